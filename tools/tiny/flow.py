"""Tiny random pipelines of the flow-matching families of 2025 and later."""

from __future__ import annotations

from collections.abc import Callable

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn

from tools.tiny.parts import build_qwen3, build_qwen_tokenizer, build_vae, enliven


def build_z_image() -> ZImagePipeline:
    """Z-Image: a single stream whose padding tokens are trained; the time is that of the data."""
    tokenizer = build_qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    enliven(transformer.all_final_layer["2-1"].linear)
    for blocks in (transformer.layers, transformer.noise_refiner):
        for block in blocks:
            enliven(block.adaLN_modulation[0])
    nn.init.normal_(transformer.x_pad_token)
    nn.init.normal_(transformer.cap_pad_token)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=build_vae(16, 0.3611, shift=0.1159),
        text_encoder=build_qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )


FLOW: dict[str, Callable[[], DiffusionPipeline]] = {
    "z-image": build_z_image,
}
