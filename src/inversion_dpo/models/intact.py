"""Whether a model's weights are all there, and are numbers: libraries pass over what is not."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, VQModel
from safetensors import safe_open
from torch import nn
from transformers import CLIPPreTrainedModel, CLIPTokenizer, PreTrainedTokenizerBase

from inversion_dpo.models.base import ModelError, frozen_parts
from inversion_dpo.run.words import counted

UNUSED = re.compile(  # tensors of published files that networks have no place for
    r"norm_final\.weight|pos_embed|y_embedder\.y_embedding|(loss|model_ema)\..*"
)
WRAPPERS = re.compile(  # in names: torch.compile's, FSDP's, checkpointing's and DDP's
    r"(?:(?<=[._])|^)(?:_orig_mod[._]|(?:_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)"
    r"|(?:(?<=\.)|^)module\."
)
SCALES = (".scale_weight", ".weight_scale")  # of weights in fp8, as ComfyUI has them
WHOLE = ("I8", "U8")  # types of whole numbers, in which weights of few bits are packed
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
CLIP_LAYER = re.compile(r"(?:^|text_model\.)encoder\.layers\.(\d+)\.")
PATCH = 4  # pixels of latents in a token, whose channels some networks count
LONGEST = 10_000  # tokens that CLIP may read: more is the library's word for none
TELLING: tuple[tuple[str, ...], ...] = (  # what weights do not show: of each row one, if taken
    ("num_train_timesteps",),
    ("beta_schedule", "trained_betas"),
    ("beta_start", "trained_betas"),
    ("beta_end", "trained_betas"),
    ("shift",),
    ("attention_head_dim", "num_attention_heads"),
    ("n_heads",),
    ("num_heads",),
    ("norm_num_groups",),
    ("flip_sin_to_cos",),
    ("freq_shift",),
    ("hidden_act",),
    ("feed_forward_proj", "dense_act_fn"),
    ("rope_parameters", "rope_theta", "rope_scaling"),
)
OLDEST = re.compile(r"0\.[123]\.")  # of diffusers: its autoencoder had 32 groups, and no such key
DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


def check_settings(part: str, kind: type, about: Mapping[str, Any]) -> None:
    """Refuse a configuration without what the library would fill in by another model's value.

    Args:
        part: its name in the pipeline.
        kind: its class, or the class of its configuration.
        about: what the file says.

    Raises:
        ModelError: names what is missing.
    """
    if "quantization_config" in about:
        raise ModelError(
            f"{part} is held in few bits (quantization_config of its config.json): give it in "
            "bf16, and set model.quantize or quantize_text, which make few bits of it here"
        )
    said = {k for k, v in about.items() if v is not None}
    if lost := [row[0] for row in _asked(kind, about, said) if said.isdisjoint(row)]:
        raise ModelError(
            f"the configuration of {part} does not say {', '.join(lost)}, and the library would "
            "fill in another model's: fetch it again"
        )


def _asked(kind: type, about: Mapping[str, Any], said: set[str]) -> list[tuple[str, ...]]:
    """List what a configuration has to say: of each row one setting."""
    takes = inspect.signature(kind).parameters
    rows = [row for row in TELLING if not takes.keys().isdisjoint(row)]
    if "latent_channels" in takes and OLDEST.match(str(about.get("_diffusers_version"))):
        rows = [row for row in rows if row != ("norm_num_groups",)]
    if {"latent_channels", "scaling_factor"} <= takes.keys():
        four = about.get("latent_channels") == 4
        unsaid = four and not about.get("force_upcast") and "scaling_factor" not in about
        if not unsaid:  # as that of Stable Diffusion 1, which does not say it
            rows.append(("scaling_factor",))
        if about.get("latent_channels") == 16 and "shift_factor" in takes:  # as SD3's and FLUX's
            rows += [("shift_factor",)] * ("shift_factor" not in about)  # null: it has none
    if about.get("use_flow_sigmas"):  # of samplers that were made for eps
        rows += [("flow_shift",), ("prediction_type",)]
    if not said.isdisjoint(DYNAMIC):  # they are of no use without one another
        rows += [(key,) for key in ("use_dynamic_shifting", *DYNAMIC)]
    return rows


def check_whole(network: nn.Module) -> nn.Module:
    """Refuse a network whose weights the file held in part only."""
    missing = [n for n, p in network.named_parameters() if p.is_meta]
    if missing:
        raise ModelError(
            f"{counted(len(missing), 'weight is', 'weights are')} missing, for example "
            f"{missing[0]!r}"
        )
    return network


def check_loaded(network: nn.Module, missing: Collection[str], strange: Collection[str]) -> None:
    """Refuse a network that a file fills in part only, or that is not all of the file.

    Args:
        network: of diffusers.
        missing: names of its weights that the file lacks.
        strange: names in the file that it has no place for.

    Raises:
        ValueError: counts, and an example of each.
    """
    strange = [name for name in strange if not UNUSED.fullmatch(name)]
    found = (("lacks", missing), ("has too many:", strange))
    said = [f"{what} {len(n)} tensors, for example {min(n)!r}" for what, n in found if n]
    if said:
        raise ValueError(f"for {type(network).__name__} it {' and '.join(said)}")


def check_vocabularies(pipeline: Any, folder: Path) -> None:
    """Refuse a tokenizer whose folder has no vocabulary, or does not say how it is used.

    It would know no word, or fill prompts up with other tokens, and never cut them.

    Args:
        pipeline: with its tokenizers, some of them inside a processor.
        folder: of the pipeline, or the one that says how a single file is built.
    """
    for part, component in pipeline.components.items():
        tokenizer = getattr(component, "tokenizer", component)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            continue
        if not any((folder / part / name).is_file() for name in VOCABULARIES):
            raise ModelError(
                f"{folder / part} has no vocabulary ({', '.join(VOCABULARIES)}): fetch it again"
            )
        encoder = part.replace("tokenizer", "text_encoder").replace("processor", "text_encoder")
        network: Any = getattr(pipeline, encoder, None)
        rows = network.get_input_embeddings().num_embeddings if network else math.inf
        word, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if number >= rows:
            raise ModelError(
                f"{folder / part} gives {word!r} the number {number}, and {encoder} has embeddings "
                f"of numbers below {rows}: fetch the two from one model"
            )
        about = folder / part / "tokenizer_config.json"
        if not about.is_file():
            raise ModelError(f"{about} is lost: fetch it again")
        if isinstance(tokenizer, CLIPTokenizer):
            files = [f for f in (about, about.with_name("special_tokens_map.json")) if f.is_file()]
            said = set().union(*(json.loads(file.read_text(encoding="utf-8")) for file in files))
            if tokenizer.model_max_length > LONGEST or "pad_token" not in said:
                raise ModelError(f"{about} lacks model_max_length or pad_token: fetch it again")


def check_names(pipeline: Any, folder: Path, given: Collection[str]) -> list[str]:
    """Compare a folder's files, by their headers, with a pipeline's networks.

    Args:
        pipeline: from the folder's configurations, with or without weights.
        folder: of the pipeline.
        given: parts that come from elsewhere.

    Returns:
        What to warn of: weights that have no place.

    Raises:
        ModelError: the files have fewer weights than a network; the library would draw the rest.
    """
    warnings = []
    for part, network in frozen_parts(pipeline).items():
        files = list((folder / part).glob("*.safetensors"))
        if part in given or not files:
            continue
        held = shapes_of(files)
        names = network.state_dict().keys()
        tied = getattr(network, "_tied_weights_keys", None) or ()
        count = len(list(network.parameters())) - len(tied)
        if len(held) < count:
            example = next(name for name in names if name not in held)
            raise ModelError(
                f"{folder / part} holds {len(held)} of at least {count} weights that its "
                f"config.json asks for, not {example!r} for example: fetch it again"
            )
        check_shapes(network, held, f"{folder / part}")
        layers = [int(m[1]) + 1 for name in held if (m := CLIP_LAYER.search(name))]
        if isinstance(network, CLIPPreTrainedModel) and layers:
            asked = network.config.num_hidden_layers
            if max(layers) > asked:
                warnings.append(
                    f"{folder / part}: the file has {max(layers)} layers, and config.json asks for "
                    f"{asked}: the last are not used"
                )
        if part not in ("unet", "transformer"):
            continue
        check_loaded(network, names - held.keys(), ())
        if strange := sorted(name for name in held.keys() - names if not UNUSED.fullmatch(name)):
            warnings.append(
                f"{folder / part}: {len(strange)} tensors have no place in the network that "
                f"config.json describes, for example {strange[0]!r}: one of the two may be of "
                "another variant"
            )
    return warnings


def shapes_of(files: Iterable[Path]) -> dict[str, list[int]]:
    """Read the shapes of the weights in files, by name; headers alone are read.

    Raises:
        ModelError: a wrapper around the network has given names, or weights are of few bits.
    """
    held: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
        held |= {name: weight.get_shape() for name, weight in slices.items()}
        if few := next((n for n, w in slices.items() if packed(n, w.get_dtype())), None):
            raise ModelError(
                f"{file}: {few!r} is of weights in few bits, which are not read from a folder: "
                "give them in bf16. Give a network in scaled fp8 as this file (model.network)"
            )
        if wrapped := next((m for name in held if (m := WRAPPERS.search(name))), None):
            raise ModelError(
                f"{file} has {wrapped[0]!r} in its names, of a wrapper such as DDP's or "
                "torch.compile's: save the network inside it (accelerator.unwrap_model), or give "
                "this file itself as model.network or model.vae, where that is left out"
            )
    return held


def packed(name: str, dtype: str) -> bool:
    """Say whether a tensor is of weights in few bits: packed, or a scale of them."""
    return dtype in WHOLE or name.endswith(SCALES)


def check_shapes(network: nn.Module, held: Mapping[str, Sequence[int]], where: str) -> None:
    """Refuse weights of other shapes than a network's, by the name that both have.

    Args:
        network: from a configuration, with or without weights.
        held: shapes of a file's weights, by name.
        where: the file or folder, for the error.
    """
    for name, weight in network.state_dict().items():
        if name in held and [*weight.shape] != [*held[name]]:
            raise ModelError(
                f"{where}: {name!r} has the shape {[*held[name]]}, and {[*weight.shape]} by "
                "config.json: one of the two is of another model"
            )


def check_channels(network: Any, vae: Any) -> None:
    """Refuse a network that takes more than latents, as those for inpainting do, or makes more.

    Refuse also one that is told a class, and autoencoders that only preview.

    Args:
        network: of diffusers.
        vae: its autoencoder.

    Raises:
        ModelError: names the channels of both.
    """
    if isinstance(vae, AutoencoderTiny | VQModel):
        raise ModelError(
            f"its {type(vae).__name__} is no autoencoder to train with. Set model.vae to the "
            "autoencoder of the published model; leave model.vae out if it names this one"
        )
    for key in ("num_class_embeds", "class_embed_type"):
        if told := network.config.get(key):
            raise ModelError(
                f"its {type(network).__name__} has {key}={told!r}: it is told a class of images, "
                "which no pair has, and is not supported"
            )
    latents = next(c for n in ("latent_channels", "z_dim") if (c := vae.config.get(n)))
    for key in ("in_channels", "out_channels"):
        channels = network.config.get(key)
        if channels not in (None, latents, PATCH * latents):
            raise ModelError(
                f"its {type(network).__name__} has {key}={channels}, and latents have {latents} "
                f"({PATCH * latents} in patches): models for inpainting, for control images, or of "
                "a learned variance are not supported"
            )


def check_values(pipeline: Any) -> None:
    """Refuse networks with weights that are not finite; ModelError names one of them."""
    for part, network in frozen_parts(pipeline).items():
        for name, weight in network.named_parameters():
            if weight.is_meta or weight.itemsize == 1:
                continue
            if not weight.isfinite().all():
                wider = "" if weight.dtype == torch.float32 else "set model.dtype=float32, or "
                raise ModelError(
                    f"{part} has weights that are not finite in {weight.dtype}, for example "
                    f"{name!r}: {wider}fetch the file again"
                )
