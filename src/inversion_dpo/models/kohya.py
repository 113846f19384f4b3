"""A trained LoRA under kohya's key names, which ComfyUI and AUTOMATIC1111 read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors import safe_open
from torch import Tensor

from inversion_dpo.models.base import ModelError
from inversion_dpo.models.kohya_flux import flux_to_kohya
from inversion_dpo.run.disk import atomic_save

WEIGHTS = "pytorch_lora_weights.safetensors"


def to_kohya(adapter: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and file metadata in kohya's form of a LoRA, from the adapter's folder.

    Stable Diffusion 1, 2 and XL: diffusers' own names with ``.`` as ``_``
    (``lora_unet_down_blocks_0_...``), which ComfyUI and AUTOMATIC1111 know. FLUX.1: see
    :func:`kohya_flux.flux_to_kohya`. Every pair of matrices has its ``alpha`` beside it; diffusers'
    converter writes the rank there, which is put right here.

    Raises:
        ModelError: no LoRA, one of Stable Diffusion 3, or a DoRA.
    """
    weights, settings = read_lora(adapter)
    part = min(weights).split(".")[0]
    alpha, rank = settings[f"{part}.lora_alpha"], settings[f"{part}.r"]
    if any("lora_magnitude_vector" in key for key in weights):
        raise ModelError(
            f"{adapter} is a DoRA, whose scale programs read differently: train with "
            "policy.merge=true and use the merged pipeline"
        )
    if part == "unet":
        renamed = convert_state_dict_to_kohya(weights)
        for key in [k for k in renamed if k.endswith(".alpha")]:
            renamed[key] = torch.tensor(float(alpha))
    elif any("single_transformer_blocks" in key for key in weights):
        renamed = flux_to_kohya(weights, float(alpha))
    else:
        raise ModelError(
            f"{adapter}: kohya's names are written for Stable Diffusion 1, 2, XL and FLUX.1. Of "
            f"Stable Diffusion 3 ComfyUI reads {WEIGHTS} itself, at a scale of 1 (alpha = rank)"
        )
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
    }
    return {k: v.contiguous() for k, v in renamed.items()}, about


def read_lora(adapter: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an adapter's folder and its settings; ModelError if it is none of ours."""
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
    return weights, settings


def write_kohya(adapter: Path, file: Path) -> Path:
    """Write :func:`to_kohya`'s file, whole or not at all."""
    weights, about = to_kohya(adapter)
    atomic_save(weights, file, about)
    return file
