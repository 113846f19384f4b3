"""A trained LoRA under the key names that ComfyUI and AUTOMATIC1111 read.

Kohya's names of a transformer are the original network's, which fuses query, key and value in
FLUX.1, FLUX.2, Chroma and Lumina 2: see :mod:`.originals`. ComfyUI
(https://github.com/Comfy-Org/ComfyUI, comfy/lora.py) reads them for every network that it has, and
diffusers' own names of most.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors import safe_open
from torch import Tensor

from inversion_dpo.models.base import ModelError
from inversion_dpo.models.lora import WEIGHTS
from inversion_dpo.models.originals import (
    FLUX,
    FLUX_2,
    KREA_2,
    KREA_2_TOP,
    LUMINA,
    LUMINA_2,
    SD3,
    WAN,
    Names,
    Table,
)
from inversion_dpo.run.disk import atomic_save

BLOCKS = FLUX | WAN | LUMINA_2
OF_FLUX_2 = (
    r"transformer\.(single_transformer_blocks\.\d+\.attn\.to_(qkv_mlp_proj|out\.lora)"
    r"|transformer_blocks\.\d+\.ff(_context)?\.linear_)"
)
FLAT = r"transformer\.(layers|noise_refiner|context_refiner)\.\d+\.attention\."  # Z-Image
SANA = r"transformer\.transformer_blocks\.\d+\.attn1\."
QWEN = "QwenImage"  # in the pipeline's class: its modules are called as those of others
SD_3, KREA = "StableDiffusion3", "Krea2"  # the same
SD_3_BLOCKS: Table = {  # without the norms' layers, of which one has shift and scale exchanged
    "transformer_blocks": ("joint_blocks_", {k: v for k, v in SD3.items() if "adaLN" not in k})
}
FUSED = r"transformer\.single_transformer_blocks\.\d+\.(attn\.to_[qkv]\.|proj|norm)"  # FLUX.1
RENAMED = (  # of Wan and of Lumina 2: ComfyUI has no table of diffusers' names
    r"transformer\.(blocks\.\d+\.(attn[12]|ffn)"
    r"|(layers|noise_refiner|context_refiner)\.\d+\.(attn\.|norm1\.|feed_forward\.linear))"
)
MLP = 4  # the width of proj_mlp over that of the others


def to_kohya(adapter: Path, kind: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename an adapter's tensors as kohya's programs do; with them the file's metadata.

    Stable Diffusion 1, 2 and XL, Z-Image and Qwen-Image: diffusers' own names with ``.`` as ``_``
    (``lora_unet_down_blocks_0_...``). FLUX.1, FLUX.2, Chroma, Wan, Lumina 2, Stable Diffusion 3 and
    Krea 2: see :func:`blocks_to_kohya`. Every pair of matrices has its ``alpha`` beside it;
    diffusers' converter writes the rank there, which is put right here.

    Args:
        adapter: its folder.
        kind: the class of the pipeline, if it is known: by it Qwen-Image, Stable Diffusion 3 and
            Krea 2 are told apart.

    Raises:
        ModelError: no LoRA, one of another family, or a DoRA.
    """
    weights, settings = _named_by_others(adapter)
    part = min(weights).split(".")[0]
    alpha, rank = settings[f"{part}.lora_alpha"], settings[f"{part}.r"]
    if part == "unet":
        renamed = convert_state_dict_to_kohya(weights)
        for key in [k for k in renamed if k.endswith(".alpha")]:
            renamed[key] = torch.tensor(float(alpha))
    elif kind.startswith(QWEN) or any(re.match(FLAT, key) for key in weights):
        renamed = _flat(weights, float(alpha))
    elif kind.startswith(SD_3):
        renamed = blocks_to_kohya(weights, float(alpha), SD_3_BLOCKS)
    elif kind.startswith(KREA):
        renamed = blocks_to_kohya(weights, float(alpha), KREA_2, KREA_2_TOP)
    elif any(re.match(f"{FUSED}|{OF_FLUX_2}|{RENAMED}", key) for key in weights):
        renamed = blocks_to_kohya(weights, float(alpha))
    else:
        raise ModelError(
            f"{adapter}: kohya's names are written for Stable Diffusion 1, 2, XL, FLUX.1, FLUX.2, "
            "Chroma, Z-Image, Wan and Lumina 2; for Stable Diffusion 3, Qwen-Image and Krea 2 "
            "too, where the base in model.path is within reach. For ComfyUI use --format comfyui"
        )
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
    }
    return {k: v.contiguous() for k, v in renamed.items()}, about


def _flat(weights: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Write ``_`` for every ``.`` of a module's name, and alpha beside its matrices."""
    made = dict[str, Tensor]()
    for key, tensor in weights.items():
        module, _, half = key.removesuffix(".weight").rpartition(".lora_")
        name = f"lora_unet_{module.partition('.')[2].replace('.', '_')}"
        made[f"{name}.lora_{'down' if half == 'A' else 'up'}.weight"] = tensor
        made[f"{name}.alpha"] = torch.tensor(alpha)
    return made


def to_comfyui(adapter: Path, kind: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name an adapter's tensors so that ComfyUI finds its layers; with them the file's metadata.

    Of UNets, Wan and Lumina 2 as :func:`to_kohya` does. Of the others it has a table of diffusers'
    names. It reads no metadata, so alpha over rank is multiplied into B there.

    Raises:
        ModelError: no LoRA, a DoRA, or one of SANA, which ComfyUI does not have.
    """
    weights, settings = _named_by_others(adapter)
    part = min(weights).split(".")[0]
    if part == "unet" or any(re.match(RENAMED, key) for key in weights):
        return to_kohya(adapter)
    scale = float(settings[f"{part}.lora_alpha"]) / settings[f"{part}.r"]
    return {k: v * scale if ".lora_B." in k else v for k, v in weights.items()}, {}


NAMERS = {"kohya": to_kohya, "comfyui": to_comfyui}


def _named_by_others(adapter: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a LoRA as :func:`read_lora` does; ModelError for one of SANA."""
    weights, settings = read_lora(adapter)
    if any(re.match(SANA, key) for key in weights):
        raise ModelError(
            f"{adapter}: a LoRA of SANA has diffusers' names only, and ComfyUI itself does not "
            "load SANA; use the diffusers file"
        )
    return weights, settings


def read_lora(adapter: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adapter's tensors and settings from its folder; ModelError if it is none of ours."""
    file = adapter / WEIGHTS
    if not file.is_file():
        raise ModelError(f"{adapter} holds no LoRA ({WEIGHTS}): train one first")
    with safe_open(file, "pt") as opened:
        weights = {key: opened.get_tensor(key) for key in opened.keys()}
        settings = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    if not any(key.endswith(".lora_alpha") for key in settings) or not weights:
        raise ModelError(f"{file} says nothing of its alpha; save it with this project's train")
    for pattern in ("alpha_pattern", "rank_pattern"):
        if any(value for key, value in settings.items() if key.endswith(f".{pattern}")):
            raise ModelError(f"{file} has a {pattern}; only one rank and alpha can be exported")
    if any("lora_magnitude_vector" in key for key in weights):
        raise ModelError(
            f"{adapter} is a DoRA, whose scale programs read differently: train with "
            "policy.merge=true and use the merged pipeline"
        )
    return weights, settings


def write_lora(adapter: Path, file: Path, form: str, kind: str = "") -> Path:
    """Write an adapter under other names, whole or not at all.

    Args:
        adapter: its folder.
        file: where the weights go.
        form: whose names, kohya or comfyui.
        kind: as :func:`to_kohya` takes it.
    """
    weights, about = NAMERS[form](adapter, kind)
    atomic_save(weights, file, about)
    return file


def blocks_to_kohya(
    weights: Mapping[str, Tensor],
    alpha: float,
    more: Table | None = None,
    top: Names | None = None,
) -> dict[str, Tensor]:
    """Rename a transformer's LoRA; of fused modules the matrices are stacked, and so is alpha.

    Fused, the down matrices [r, in] lie below one another and the up matrices [out, r] on the
    diagonal: the same product, at n times the rank. A module without a LoRA takes part with zeros.

    Args:
        weights: under diffusers' names.
        alpha: of every pair of matrices.
        more: names of a family that cannot be told by its modules.
        top: the same of its modules outside the blocks.

    Raises:
        ModelError: a module that kohya's names do not have, or one of Lumina 2's attention without
            the others, whose widths differ.
    """
    left, made = dict(weights), dict[str, Tensor]()
    tables = BLOCKS | (FLUX_2 if any(re.match(OF_FLUX_2, key) for key in weights) else {})
    tables |= more or {}
    places = {m.group(1, 2) for key in weights if (m := re.match(r"(\D+)\.(\d+)\.", key))}
    for blocks, number in sorted(places):
        prefix, fused = tables.get(blocks.removeprefix("transformer."), ("", {}))
        for name, modules in fused.items():
            parts = {}
            for module in modules:
                keys = [f"{blocks}.{number}.{module}.lora_{part}.weight" for part in "AB"]
                if left.keys() >= set(keys):
                    parts[module] = [left.pop(key) for key in keys]
            if fused is LUMINA and 0 < len(parts) < len(modules):
                raise ModelError(
                    f"kohya's format has one matrix for {', '.join(modules)}: name all of them in "
                    "policy.target_modules and train again"
                )
            if parts:
                made |= _fused(f"lora_unet_{prefix}{number}_{name}", modules, parts, alpha)
    for name, (module,) in (top or {}).items():
        keys = [f"transformer.{module}.lora_{part}.weight" for part in "AB"]
        if left.keys() >= set(keys):
            parts = {module: [left.pop(key) for key in keys]}
            made |= _fused(f"lora_unet_{name}", (module,), parts, alpha)
    if left:
        raise ModelError(
            f"kohya's names have nothing for {min(left)}: train other policy.target_modules, or "
            "give away the adapter as it is, for diffusers"
        )
    return made


def _fused(
    name: str, modules: Sequence[str], parts: Mapping[str, Sequence[Tensor]], alpha: float
) -> dict[str, Tensor]:
    """Fuse the LoRAs (A, B) of some modules into one of kohya's."""
    times = {module: MLP if module == "proj_mlp" else 1 for module in modules}
    module, (down, up) = next(iter(parts.items()))
    width, rank = len(up) // times[module], up.shape[1]
    empty = {m: (torch.zeros_like(down), up.new_zeros(width * times[m], rank)) for m in modules}
    whole = [parts.get(m, empty[m]) for m in modules]
    return {
        f"{name}.lora_down.weight": torch.cat([a for a, _ in whole]),
        f"{name}.lora_up.weight": torch.block_diag(*[b for _, b in whole]),
        f"{name}.alpha": torch.tensor(alpha * len(whole)),
    }
