"""Put a LoRA, DoRA, LoHa or LoKr file on a pipeline: every tensor of it, or none.

Programs spell the same matrices differently. diffusers, peft (``base_model.model.`` before the
names), bare module names and kohya (``lora_unet_``, dots as underscores) lead to the same layers,
and so do the original networks' names (:mod:`.originals`; of a UNet by diffusers' table). A file of
which a part fits no layer is refused: diffusers would load the rest, or nothing, without an error.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from inversion_dpo.models.base import ModelError
from inversion_dpo.models.lora_matrices import (
    MAGNITUDE,
    Matrices,
    change_of,
    made_of,
    scale_of,
    unheard_text,
)
from inversion_dpo.models.lora_names import WORDS, bare_of, flat_of, part_of, spellings, split
from inversion_dpo.models.originals import Place, places
from inversion_dpo.models.quantized import QuantizedLinear
from inversion_dpo.run.fields import ModelConfig
from inversion_dpo.run.folder import read_config

logger = logging.getLogger(__name__)
WEIGHTS = "pytorch_lora_weights.safetensors"
NAMED = (WEIGHTS, "adapter_model.safetensors")  # as diffusers and peft name the file
ABOUT, PEFTS = "adapter_config.json", "base_model.model."  # peft's file, and start of its names
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
GIVEN = "given"  # the adapter's name in the pipeline
CHANGED = re.compile("pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)  # ways to begin, of peft
OF_CLIP = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # as diffusers' loader asks
Layers = dict[Place, Matrices]


def lora_file(name: str) -> Path:
    """Find the file of a LoRA that is named by file, folder or hub id.

    Raises:
        ModelError: there is none, or a folder holds several.
    """
    place = Path(name).expanduser()
    if not place.exists():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ModelError("nothing is there: give a file, folder or hub id")
        place = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*config.json"]))
    files = [place] if place.is_file() else [place / n for n in NAMED if (place / n).is_file()]
    files = files[:1] or sorted(place.glob("*.safetensors"))
    if len(files) != 1 or files[0].suffix != ".safetensors":
        held = "several files: name one" if len(files) > 1 else "no .safetensors file"
        there = [place] if place.is_file() else [*place.iterdir()]
        pickles = [f for f in there if f.suffix in PICKLED]
        inner = sorted(f for f in there if any((f / n).is_file() for n in NAMED))
        remedy = f"; {inner[0]} has one: give that folder" if inner else ""
        if len(inner) > 1:
            names = " and ".join(f.name for f in inner)
            remedy = f"; {names} have one each: write those of one model to one file (by diffusers'"
            remedy += " save_lora_weights), or give one of the folders"
        if pickles:
            remedy = f"; {pickles[0].name} can run code and is not opened: convert it"
        raise ModelError(f"{place} holds {held}{remedy}")
    return files[0]


def warn_of_start(m: ModelConfig, file: Path) -> None:
    """Warn if a run's LoRA was trained on the same base with what this model lacks.

    Args:
        m: the model that it is put on, as ``model.lora`` or later.
        file: of the LoRA, in the folder of its run or elsewhere.
    """
    near = file.absolute().parents[1:3]  # the second of a snapshot
    run = next((p for p in near if (p / "config.yaml").is_file()), None)
    if run is None:
        return
    own = read_config(run).model
    had = {key: getattr(own, key) for key in ("network", "lora") if getattr(own, key)}
    lacks = [f"model.{k}={v}" for k, v in had.items() if v != getattr(m, k)]
    if own.path == m.path and lacks:
        logger.warning(
            "%s was trained on a model with %s, which this model lacks: it makes another policy of "
            "it. Set that too; of two LoRAs merge the first into the base in model.path",
            file,
            " and ".join(lacks),
        )


def add_lora(pipeline: Any, name: str) -> None:
    """Put a LoRA on the pipeline as an adapter, for :func:`merge_lora`; LoHa and LoKr are merged.

    Args:
        pipeline: of diffusers.
        name: file, folder or hub id.

    Raises:
        ModelError: a tensor of the file fits no layer of the pipeline; counts and an example.
    """
    weights, changes = read_lora(pipeline, lora_file(name))
    for (part, layer), change in changes.items():
        module = getattr(pipeline, part).get_submodule(layer)
        if isinstance(module, QuantizedLinear):
            few = f"model.quantize{'_text' * part.startswith('text')}=null"
            raise ModelError(
                f"what it adds to {part}.{layer} (LoHa, LoKr, or a LoRA of a text encoder) cannot "
                "be added to weights in few bits or in main memory: set "
                f"{few if module.kind else 'model.offload=false'}"
            )
        module.weight.data += change.to(module.weight)
    for part in sorted({key.split(".")[0] for key in weights}):
        network = getattr(pipeline, part)
        if hasattr(network, "load_lora_adapter"):
            network.load_lora_adapter(weights, prefix=part, adapter_name=GIVEN)
        else:
            pipeline.load_lora_into_text_encoder(
                weights, None, network, prefix=part, adapter_name=GIVEN
            )
    _check(pipeline, weights, name)


def read_lora(pipeline: Any, file: Path) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tensor]]:
    """Read a file for a pipeline, whose weights may lie on the meta device.

    Returns:
        LoRA matrices under diffusers' names, their scale multiplied in, and the changes of weights
        that LoHa and LoKr make, by part and layer.

    Raises:
        ModelError: a tensor of the file fits no layer of the pipeline.
    """
    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
            settings = _settings(file, opened)
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged ({error}): fetch it again") from error
    eight = [k for k, t in tensors.items() if t.itemsize == 1 and t.is_floating_point()]
    tensors |= {k: tensors[k].float() for k in eight}
    if not settings and any(PEFTS in k for k in tensors):
        logger.warning(
            "%s has no adapter_config.json beside it: its alpha is taken to be its rank", file
        )
    weights, changes = dict[str, Tensor](), dict[tuple[str, str], Tensor]()
    layers = find_layers(pipeline, tensors)
    scales = {place: scale_of(held, settings, place) for place, held in layers.items()}
    if text := unheard_text(settings, layers):
        logger.warning("%s: %s", file, text)
    if len({"alpha" in matrices for matrices in layers.values()}) > 1 and not settings:
        lost = [place for place, matrices in layers.items() if "alpha" not in matrices]
        logger.warning(
            "%s: %d of %d layers have no alpha, for example %s: it is taken to be their rank",
            *(file, len(lost), len(layers), lost[0].modules[0]),
        )
    for place, matrices in layers.items():
        network = getattr(pipeline, place.part)
        shapes = [network.get_submodule(name).weight.shape for name in place.modules]
        whole = torch.Size((sum(shape[0] for shape in shapes), *shapes[0][1:]))
        made = made_of(place, matrices, scales[place], whole)
        loadable = place.part in pipeline._lora_loadable_modules and (
            not place.part.startswith("text")
            or (place.modules[0].endswith(OF_CLIP) and MAGNITUDE not in made)  # which it loses
        )
        start = 0
        for name, shape in zip(place.modules, shapes, strict=True):
            part = {k: v if k == "A" else v[start : start + shape[0]] for k, v in made.items()}
            start += shape[0]
            if "change" in part:
                changes[place.part, name] = part["change"]
            elif not loadable:
                changes[place.part, name] = change_of(part, network.get_submodule(name).weight)
            else:
                weights |= _named(f"{place.part}.{name}.", part, shape)
    if not any(v.is_meta or v.any() for k, v in (weights | changes).items() if "lora_A" not in k):
        logger.warning("%s changes nothing: its matrices B, or its alphas, are 0", file)
    return weights, changes


def _settings(file: Path, opened: Any) -> dict[str, Any]:
    """Read how a LoRA is scaled, from its header or from peft's file beside it.

    That file is of the LoRA that peft saved, and of no other in the folder.

    Raises:
        ModelError: it is no JSON, or made for a base that was changed when training began.
    """
    told, beside = (opened.metadata() or {}).get("lora_adapter_metadata"), file.with_name(ABOUT)
    if not told and not beside.is_file():
        return {}
    if not told and file.stem != "adapter_model" and not any(PEFTS in k for k in opened.keys()):
        logger.warning("%s is not of %s, and is not read: peft did not name it", beside, file)
        return {}
    place = f"the header of {file}" if told else str(beside)
    try:
        found = dict(json.loads(told or beside.read_text(encoding="utf-8-sig")))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{place} is no JSON of settings ({error}): fetch it again") from error
    for key, value in found.items():
        if key.endswith("init_lora_weights") and CHANGED.match(str(value)):
            raise ModelError(
                f"it began as {value} ({place}), which changes the base too: save it by peft with "
                "path_initial_model_for_weight_conversion, or merge it first"
            )
    return found


def _named(start: str, part: Matrices, shape: torch.Size) -> dict[str, Tensor]:
    """Name a module's matrices as diffusers does; of a convolution some write them as a matrix."""
    ones = (1,) * (len(shape) - 2)
    named = {
        "lora_A.weight": part["A"].reshape(len(part["A"]), *shape[1:]),
        "lora_B.weight": part["B"].reshape(*part["B"].shape, *ones),
    }
    if MAGNITUDE in part:
        named[MAGNITUDE] = part[MAGNITUDE].reshape(*(1, -1, *ones) if ones else (-1,))
    return {start + k: v for k, v in named.items()}


def merge_lora(pipeline: Any) -> None:
    """Add the LoRA that is loaded into a pipeline to its weights, and remove it."""
    held = [p for p in pipeline._lora_loadable_modules if getattr(pipeline, p, None) is not None]
    pipeline.fuse_lora(components=held)
    pipeline.unload_lora_weights()


def find_layers(pipeline: Any, tensors: Mapping[str, Tensor]) -> Layers:
    """Sort a file's tensors by the pipeline's layers; ModelError if one fits none."""
    layers, strange = _sorted(pipeline, tensors, {})
    if strange and hasattr(pipeline, "unet"):
        layers, strange = _sorted(pipeline, tensors, _of_unet(pipeline, strange))
    halves, seen = {"A", "B"}, set[tuple[str, str]]()
    for place, matrices in layers.items():
        own = {(place.part, name) for name in place.modules}
        if len(halves & matrices.keys()) == 1 or not matrices.keys() - {"alpha"}:
            strange.append(f"{place.part}.{place.modules[0]} (half a pair)")
        if len({name.partition("_")[0] for name in matrices} & {"B", "hada", "lokr"}) > 1:
            strange.append(f"{place.part}.{place.modules[0]} (of two kinds)")
        if own & seen:
            strange.append(f"{place.part}.{place.modules[0]} (a second time)")
        seen |= own
    if strange or not layers:
        example = strange[0] if strange else next(iter(tensors), "an empty file")
        count = len(strange) or len(tensors)
        remedy = _absent(pipeline, strange) or "give a LoRA of this model"
        if strange and all(_of_a_layer(pipeline, k) and k[-1] != ")" for k in strange):
            remedy = (
                "only LoRA, DoRA, LoHa and LoKr are read. Merge the file by the program that made "
                "it, and give the whole model"
            )
        raise ModelError(
            f"{count} of {len(tensors)} tensors fit no layer of {type(pipeline).__name__}, for "
            f"example {example!r}: {remedy}"
        )
    return layers


def _absent(pipeline: Any, keys: Sequence[str]) -> str | None:
    """Say what to do where all keys are for one thing that the pipeline holds none of."""
    if keys and all(key.startswith(WORDS) for key in keys):
        return (
            "embeddings of new words are not read, so that prompts with those words would mean "
            "something else. Save the LoRA without them, for prompts without those words"
        )
    parts = {part_of(pipeline, bare_of(key)[0]) for key in keys}
    part = parts.pop() if len(parts) == 1 else None
    if part is None or getattr(pipeline, part) is not None:
        return None
    return f"they are for {part}, which is not loaded: set model.t5=true if the pipeline has it"


def _of_a_layer(pipeline: Any, key: str) -> bool:
    """Say whether a key begins with a layer's name, so that its end is of an unknown kind."""
    parts, name = bare_of(key)
    held = [p for p in parts if getattr(pipeline, p, None) is not None]
    tables = [places(getattr(pipeline, part), part) for part in held]
    stems = [name.rsplit(".", count)[0] for count in (1, 2)]
    return any(n in table for table in tables for stem in stems for n in spellings(stem))


def _sorted(
    pipeline: Any, tensors: Mapping[str, Tensor], other: Mapping[str, str]
) -> tuple[Layers, list[str]]:
    """Sort tensors by place; with them the keys that name none.

    Args:
        pipeline: of diffusers.
        tensors: of the file.
        other: names of layers that diffusers calls otherwise.
    """
    layers, strange, tables = Layers(), list[str](), dict[str, dict[str, Place]]()
    for key, tensor in tensors.items():
        parts, found = split(key)
        part = part_of(pipeline, parts)
        if part is None or found is None or getattr(pipeline, part) is None:
            strange.append(key)
            continue
        if part not in tables:
            tables[part] = places(getattr(pipeline, part), part)
        names = spellings(other.get(flat_of(found[1]), found[1]))
        place = next((tables[part][n] for n in names if n in tables[part]), None)
        name = found["own"] or str(found.lastgroup)
        if place is None or name in layers.get(place, {}):
            strange.append(key + " (a second time)" * (place is not None))
        else:
            layers.setdefault(place, {})[name] = tensor
    return layers, strange


def _of_unet(pipeline: Any, keys: Sequence[str]) -> dict[str, str]:
    """Ask diffusers what it calls the original UNet's layers of these keys; nothing if it fails."""
    flat = sorted({flat_of(found[1]) for key in keys if (found := split(key)[1])})
    numbers = {
        f"lora_unet_{name}.lora_{half}.weight": torch.full((1, 1), float(k))
        for k, name in enumerate(flat)
        for half in ("down", "up")
    }
    try:
        named, _ = pipeline.lora_state_dict(numbers, unet_config=pipeline.unet.config)
    except (ValueError, KeyError, IndexError):
        return {}
    return {flat[int(v)]: found[1] for k, v in named.items() if (found := split(k)[1])}


def _check(pipeline: Any, weights: Mapping[str, Tensor], name: str) -> None:
    """Compare what the pipeline holds with what was loaded, tensor by tensor."""
    lost = []
    for key, tensor in weights.items():
        part, _, rest = key.partition(".")
        layer, _, matrix = rest.removesuffix(".weight").rpartition(".")
        module: nn.Module = getattr(pipeline, part).get_submodule(layer)
        held: Any = getattr(module, matrix, {})
        if GIVEN not in held or not torch.equal(held[GIVEN].weight, tensor.to(held[GIVEN].weight)):
            lost.append(key)
    if lost:
        raise ModelError(
            f"{len(lost)} of {len(weights)} tensors of {name} did not reach "
            f"{type(pipeline).__name__}, for example {lost[0]!r}"
        )
