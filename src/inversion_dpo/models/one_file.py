"""Models in one file, as ComfyUI and the original programs write them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Set
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import (
    LDM_UNET_KEY,
    convert_ldm_clip_checkpoint,
    convert_open_clip_checkpoint,
    fetch_diffusers_config,
    infer_diffusers_model_type,
)
from safetensors import safe_open
from torch import Tensor, nn

from inversion_dpo.models.base import ModelError
from inversion_dpo.models.intact import SCALES, WHOLE, WRAPPERS, check_loaded

logger = logging.getLogger(__name__)
CLIPS = ("cond_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
ENCODERS = {"text_encoder": CLIPS[:2], "text_encoder_2": CLIPS[2:]}
UNREAD = re.compile(r"position_ids$|^text_projection|^logit_scale")  # of text encoders, by some
NAMED_BY_COMFYUI = ("model.diffusion_model.", "diffusion_model.")  # before a network's names
VAES = ("first_stage_model.", "vae.")  # before an autoencoder's
IDLE = re.compile(r"[^.]*$|model_ema\.|denoiser\.|loss\.")  # of training, and of the schedule
BESIDE = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")  # of inputs, or marks
TOLD = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}


def configuration_of(file: str, config: str | None) -> str:
    """Find the folder or hub id that says how a single file's networks are built."""
    if config:
        return os.path.expanduser(config)
    return str(fetch_diffusers_config(_empty(file))["pretrained_model_name_or_path"])


def _empty(file: str) -> dict[str, Tensor]:
    with safe_open(file, "pt") as opened:
        shapes = {k: opened.get_slice(k).get_shape() for k in opened.keys()}
    return {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}


def network_in(
    file: str,
    part: str,
    kind: Any,
    config: Mapping[str, Any],
    precision: torch.dtype,
    read: bool = True,
) -> nn.Module:
    """Load a network, under its original or diffusers' names, from a file that may hold more.

    ``from_single_file`` would stumble over ComfyUI's prefix, pass over tensors that have no place,
    and lower the precision of layers that stay in float32.

    Args:
        file: safetensors.
        part: the network's name in the pipeline.
        kind: its class.
        config: how it is built.
        precision: of its weights.
        read: whether to read the weights; names and shapes alone are compared without.
    """
    if kind.__name__ not in SINGLE_FILE_LOADABLE_CLASSES:
        raise ModelError(f"{kind.__name__} is not read from one file: give its folder")
    with safe_open(file, "pt") as opened:
        names = _names(part, opened.keys())
        own = [key for key in names.values() if not key.endswith(BESIDE)]
        kinds = {key: opened.get_slice(key).get_dtype() for key in own}
        if few := next((k for k, kind in kinds.items() if kind in WHOLE), None):
            raise ModelError(f"{few} is held in few bits of an unknown kind: give it in bf16")
        tensor = opened.get_tensor if read else _empty(file).__getitem__
        tensors = _unscaled({name: tensor(key) for name, key in names.items()})
    with init_empty_weights():
        network: nn.Module = kind.from_config(config)
    try:
        tensors, lost = _renamed(kind, config, tensors, network.state_dict().keys())
        missing, strange = network.load_state_dict(tensors, strict=False, assign=True)
        check_loaded(network, missing, lost + strange)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        found = infer_diffusers_model_type(_empty(file))  # v1 if it is none that diffusers knows
        raise ValueError(
            f"it is not whole, or no {kind.__name__}{f', but {found}' * (found != 'v1')} ({error})"
        ) from error
    full = set(kind._keep_in_fp32_modules or ())
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            stays = full & set(name.split("."))
            tensor.data = tensor.data.to(torch.float32 if stays else precision)
    return network.eval()


def _names(part: str, keys: Iterable[str]) -> dict[str, str]:
    """Map names without wrappers and starts, such as ``transformer.``, to a network's keys.

    Args:
        part: the network's name in the pipeline.
        keys: of a file that may hold more.
    """
    bare = {key: WRAPPERS.sub("", key) for key in keys if key not in TOLD}
    prefixes = VAES if part == "vae" else NAMED_BY_COMFYUI
    start = next((p for p in prefixes if any(n.startswith(p) for n in bare.values())), "")
    if part == "vae" and not start and any(n.startswith(CLIPS) for n in bare.values()):
        raise ModelError("the file holds no autoencoder: set model.vae to one")
    own = [key for key, name in bare.items() if name.startswith(start)]
    names = {bare[key].removeprefix(start): key for key in own}
    if len(names) < len(own):
        twice = next(key for key in own if key not in names.values())
        raise ModelError(f"{twice!r} is there twice, once inside a wrapper: save it anew")
    while len({name.partition(".")[0] for name in names}) == 1 < len(names):
        names = {name.partition(".")[2]: key for name, key in names.items()}
    return names


def unread_text(file: str, whole: bool) -> str | None:
    """Say which tensors of a file are not read, though they are no tables of a schedule.

    Args:
        file: safetensors.
        whole: whether the file is read as a pipeline, or its network alone.
    """
    with safe_open(file, "pt") as opened:
        bare = {WRAPPERS.sub("", key): key for key in opened.keys()}
    known = NAMED_BY_COMFYUI + (CLIPS + VAES) * whole
    if not any(name.startswith(known) for name in bare):
        return None
    beside = [k for name, k in bare.items() if not (name.startswith(known) or IDLE.match(name))]
    if not beside:
        return None
    why = "no part of the pipeline has such names"
    if not whole:
        why = "only the network is; the other parts come from model.config or model.path"
    return f"{file}: {len(beside)} tensors are not read, for example {min(beside)!r}: {why}"


def check_marks(file: str, scheduler: Mapping[str, Any]) -> None:
    """Compare what a file says of its schedule with a scheduler's configuration.

    Raises:
        ModelError: the file has a mark of another schedule.
    """
    with safe_open(file, "pt") as opened:
        marks = TOLD.keys() & set(opened.keys())
    for mark in sorted(marks):
        key, value = TOLD[mark]
        if scheduler.get(key) != value:
            raise ModelError(
                f"its mark {mark!r} asks for a scheduler of {key}={str(value).lower()}, and the "
                "pipeline has another: set model.config to a folder with such a scheduler (for a "
                "file in model.network: model.path)"
            )


def _unscaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply weights in fp8 by their scales, as ComfyUI does: one for a weight or for a row."""
    for key in [key for key in tensors if key.endswith(SCALES)]:
        name, scale = f"{key.rpartition('.')[0]}.weight", tensors.pop(key)
        weight = tensors.get(name, scale)
        eight = weight.itemsize == 1 and weight.is_floating_point() and scale.itemsize > 1
        if not (eight or weight.is_meta) or scale.numel() not in (1, len(weight)):
            raise ModelError(f"{name} is held in few bits of an unknown kind: give it in bf16")
        rows = scale.float().reshape(-1, *[1] * (weight.ndim - 1))
        tensors[name] = weight.float() * rows
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(BESIDE)}


def _renamed(
    kind: Any, config: Mapping[str, Any], tensors: dict[str, Tensor], names: Set[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Give tensors diffusers' names, and the names without a place; if they have those, as is."""
    if names <= tensors.keys():
        return tensors, []
    try:
        found, lost = _converted(kind, config, tensors)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        if 2 * len(names & tensors.keys()) < len(names):
            raise ValueError(
                f"its names, for example {min(tensors, default='none')!r}, are not all diffusers' "
                f"or not all the original ones: {type(error).__name__} {error}"
            ) from error
        return tensors, []
    fewer = len(names & found.keys()) < len(names & tensors.keys())
    return (tensors, []) if fewer else (found, lost)


def _converted(
    kind: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename original tensors by diffusers' converter; with them the names that it passed over."""
    start = LDM_UNET_KEY if kind.__name__.startswith("UNet") else ""
    given = {start + key: tensor for key, tensor in tensors.items()}
    convert = SINGLE_FILE_LOADABLE_CLASSES[kind.__name__]["checkpoint_mapping_fn"]
    found = convert(config=config, checkpoint=given)
    used = {_memory(tensor) for tensor in found.values()}
    given = {} if found is given else given  # most converters take out what they use
    return found, [k.removeprefix(start) for k, v in given.items() if _memory(v) not in used]


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Say where a tensor lies; without weights, all lie at 0 of a storage of their own."""
    return tensor.untyped_storage()._cdata, tensor.data_ptr()


def encoders_in(
    file: str, source: str, index: Mapping[str, Any], precision: torch.dtype, read: bool = True
) -> dict[str, nn.Module]:
    """Load the text encoders of a whole file, told apart by name; diffusers does it by width.

    Args:
        file: a checkpoint under the original names.
        source: the folder or hub id that says how they are built.
        index: model_index.json of it.
        precision: of their weights.
        read: whether to read the weights; names and shapes alone are compared without.

    Raises:
        ModelError: one is not whole; diffusers would draw the rest at random.
    """
    made = {}
    for part in ENCODERS.keys() & index.keys():
        kind = getattr(transformers, index[part][1])
        with init_empty_weights():
            encoder: nn.Module = kind(kind.config_class.from_pretrained(source, subfolder=part))
        with safe_open(file, "pt") as opened:
            bare = {WRAPPERS.sub("", key): key for key in opened.keys()}
            own = [name for name in bare if name.startswith(ENCODERS[part])]
            tensor = opened.get_tensor if read else _empty(file).__getitem__
            tensors = {name: tensor(bare[name]) for name in own}
        openclip = [f"{start}model." for start in ENCODERS[part]]
        start = next((s for s in openclip if any(key.startswith(s) for key in own)), None)
        convert = convert_ldm_clip_checkpoint
        if start:
            convert = partial(convert_open_clip_checkpoint, encoder, prefix=start)
        lost = "" if hasattr(encoder, "text_model") else "text_model."
        try:
            found = {k.removeprefix(lost): v for k, v in convert(tensors).items()}
            missing, strange = encoder.load_state_dict(found, strict=False, assign=True)
            check_loaded(encoder, missing, [name for name in strange if not UNREAD.search(name)])
        except (KeyError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"its {part} is not whole ({error}): fetch it again, or set model.config to a "
                "pipeline of its family"
            ) from error
        made[part] = encoder.to(precision).eval() if read else encoder
    return made


def load_single_file(
    file: str, source: str, index: Mapping[str, Any], how: Mapping[str, Any]
) -> Any:
    """Load a pipeline from one file, by diffusers' own conversion.

    Args:
        file: a checkpoint under the original names.
        source: the folder or hub id that says how its networks are built.
        index: model_index.json of it.
        how: precision, and parts that are given.
    """
    kind = getattr(diffusers, index["_class_name"])
    if not hasattr(kind, "from_single_file"):
        raise ModelError(
            f"{kind.__name__} is not read from one file: set model.path to a folder or hub id, and "
            "model.network to the file"
        )
    given = {k: v for k, v in how.items() if k != "use_safetensors"}
    for part in {"unet", "vae"} & index.keys() - given.keys():
        made = getattr(diffusers, index[part][1])
        about = made.load_config(source, subfolder=part)
        given[part] = network_in(file, part, made, about, how["torch_dtype"])
    given |= encoders_in(file, source, index, how["torch_dtype"])
    if text := unread_text(file, whole=True):
        logger.warning(text)
    pipeline = kind.from_single_file(file, config=source, **given)
    check_marks(file, pipeline.scheduler.config)
    return pipeline
