"""A trained LoRA under kohya's key names, which ComfyUI and AUTOMATIC1111 read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from inversion_dpo.models.base import ModelError

WEIGHTS = "pytorch_lora_weights.safetensors"


def to_kohya(adapter: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and file metadata in kohya's form of a UNet's LoRA, from the adapter's folder.

    The names are diffusers' own with ``.`` as ``_``: ``lora_unet_down_blocks_0_...``. Both programs
    know them for Stable Diffusion 1, 2 and XL. Every pair of matrices has its ``alpha`` beside it;
    diffusers' converter writes the rank there, which is put right here.

    Raises:
        ModelError: no LoRA, a LoRA of a transformer (ComfyUI reads those as they are), or a DoRA.
    """
    weights, settings = read_lora(adapter)
    if any(not key.startswith("unet.") for key in weights):
        raise ModelError(
            f"{adapter} is no LoRA of a UNet: kohya's names are written for Stable Diffusion 1, 2 "
            f"and XL. ComfyUI reads {WEIGHTS} of SD3 and FLUX as it is"
        )
    if any("lora_magnitude_vector" in key for key in weights):
        raise ModelError(
            f"{adapter} is a DoRA, whose scale the two programs read differently: train with "
            "policy.merge=true and use the merged pipeline"
        )
    renamed = convert_state_dict_to_kohya(weights)
    for key in [k for k in renamed if k.endswith(".alpha")]:
        renamed[key] = torch.tensor(float(settings["unet.lora_alpha"]))
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings["unet.r"]),
        "ss_network_alpha": str(settings["unet.lora_alpha"]),
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
    if weights.keys() and not settings:
        raise ModelError(f"{file} says nothing of its alpha; save it with this project's train")
    for pattern in ("alpha_pattern", "rank_pattern"):
        if settings.get(f"unet.{pattern}"):
            raise ModelError(f"{file} has a {pattern}; only one rank and alpha can be exported")
    return weights, settings


def write_kohya(adapter: Path, file: Path) -> Path:
    """Write :func:`to_kohya`'s file, whole or not at all."""
    weights, about = to_kohya(adapter)
    partial = file.with_name(file.name + ".partial")
    save_file(weights, partial, about)
    partial.replace(file)
    return file
