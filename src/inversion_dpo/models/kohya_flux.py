"""FLUX.1's LoRA under kohya's names, which fuse query, key and value as the original network does.

Source of the names: https://github.com/kohya-ss/sd-scripts, networks/convert_flux_lora.py, whose
way back diffusers has as ``_convert_kohya_flux_lora_to_diffusers``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inversion_dpo.models.base import ModelError

# kohya's name in a block -> diffusers' modules that it holds, below one another
DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
BLOCKS = {
    "transformer.transformer_blocks": ("lora_unet_double_blocks", DOUBLE),
    "transformer.single_transformer_blocks": ("lora_unet_single_blocks", SINGLE),
}
MLP = 4  # the width of proj_mlp over that of the others


def flux_to_kohya(weights: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Rename a FLUX.1 LoRA; of fused modules the matrices are stacked, and so is alpha.

    Fused, the down matrices [r, in] lie below one another and the up matrices [out, r] on the
    diagonal: the same product, at n times the rank. A module without a LoRA takes part with zeros.

    Raises:
        ModelError: a module that kohya's names do not have.
    """
    left, made = dict(weights), dict[str, Tensor]()
    places = {m.group(1, 2) for key in weights if (m := re.match(r"(.*?_blocks)\.(\d+)\.", key))}
    for blocks, number in sorted(places):
        prefix, fused = BLOCKS.get(blocks, ("", {}))
        for name, modules in fused.items():
            keys = [f"{blocks}.{number}.{module}" for module in modules]
            parts = [_pop(left, key) for key in keys]
            if any(parts):
                made |= _fused(f"{prefix}_{number}_{name}", modules, parts, alpha)
    if left:
        raise ModelError(f"kohya's names have nothing for {min(left)}: train other target_modules")
    return made


def _pop(left: dict[str, Tensor], key: str) -> tuple[Tensor, Tensor] | None:
    down = left.pop(f"{key}.lora_A.weight", None)
    up = left.pop(f"{key}.lora_B.weight", None)
    return None if down is None or up is None else (down, up)


def _fused(
    name: str, modules: Sequence[str], parts: Sequence[tuple[Tensor, Tensor] | None], alpha: float
) -> dict[str, Tensor]:
    """The tensors of one of kohya's modules."""
    here = {module: part for module, part in zip(modules, parts, strict=True) if part}
    module, (down, up) = next(iter(here.items()))
    width = len(up) // (MLP if module == "proj_mlp" else 1)
    whole = []
    for module in modules:
        rows = width * (MLP if module == "proj_mlp" else 1)
        zeros = torch.zeros_like(down), up.new_zeros(rows, up.shape[1])
        whole.append(here.get(module, zeros))
    return {
        f"{name}.lora_down.weight": torch.cat([a for a, _ in whole]),
        f"{name}.lora_up.weight": torch.block_diag(*[b for _, b in whole]),
        f"{name}.alpha": torch.tensor(alpha * len(whole)),
    }
