"""Which model on which card? ``python benchmarks/cards.py`` prints the arithmetic as Markdown.

Every network is built on torch's meta device, which holds shapes and no numbers, with the
configuration of the published weights: diffusers' defaults are theirs, where nothing stands beside
the name. Counted are the network's weights, and a LoRA on the family's own layers with gradient and
AdamW's two moments. Not counted are activations, which depend on resolution and batch: the last
columns say what a card has left for them. Text encoders and autoencoder leave the card before
training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import diffusers
import torch
from model_cost import SDXL
from peft import LoraConfig
from torch import nn

from inversion_dpo.models.loading import FAMILIES

CARDS = (12, 24, 48, 80)  # GB
ADAPTER = 16  # bytes of a float32 weight with its gradient and AdamW's two moments
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
# https://huggingface.co/stabilityai/stable-diffusion-3.5-medium and -large: transformer/config.json
SD35 = {"sample_size": 128, "in_channels": 16, "out_channels": 16, "joint_attention_dim": 4096}
SD35 |= {"pooled_projection_dim": 2048, "qk_norm": "rms_norm", "attention_head_dim": 64}
LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
LARGE |= {"pos_embed_max_size": 192}
# name -> diffusers' pipeline (which leads to the family's layers), network, its configuration
NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Stable Diffusion 1.5": ("StableDiffusionPipeline", "UNet2DConditionModel", SD15),
    "SDXL": ("StableDiffusionXLPipeline", "UNet2DConditionModel", SDXL),
    "Stable Diffusion 3.5 large": (
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        SD35 | LARGE,
    ),
    "FLUX.1": ("FluxPipeline", "FluxTransformer2DModel", {"guidance_embeds": True}),
    "Z-Image": ("ZImagePipeline", "ZImageTransformer2DModel", {}),
    "FLUX.2 dev": ("Flux2Pipeline", "Flux2Transformer2DModel", {}),
    "Qwen-Image": ("QwenImagePipeline", "QwenImageTransformer2DModel", {}),
    "Chroma": ("ChromaPipeline", "ChromaTransformer2DModel", {}),
    "Krea 2": ("Krea2Pipeline", "Krea2Transformer2DModel", {}),
    "Wan 2.1 14B": ("WanPipeline", "WanTransformer3DModel", {}),
    "SANA 1.6B": ("SanaPipeline", "SanaTransformer2DModel", {}),
    "Lumina 2": ("Lumina2Pipeline", "Lumina2Transformer2DModel", {}),
}


def counted(name: str, rank: int) -> tuple[int, int]:
    """Weights of the network, and of a LoRA on the layers that its family trains by default."""
    pipeline, network, config = NETWORKS[name]
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, network)(**config)
        weights = sum(p.numel() for p in model.parameters())
        file, family = FAMILIES[pipeline]
        targets = list(getattr(import_module(f"inversion_dpo.models.{file}"), family).targets)
        where = targets[0] if targets[0].startswith("^") else targets
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=rank, target_modules=where))  # type: ignore[operator]
    return weights, sum(p.numel() for p in model.parameters() if p.requires_grad)


def lines(rank: int) -> Iterator[str]:
    """Write the table, in gigabytes of 10^9 bytes."""
    cards = " | ".join(f"left on {card}" for card in CARDS)
    head = f"| network | weights, 10^9 | frozen, bfloat16 | LoRA of rank {rank} | all weights"
    yield f"{head} | {cards} |"
    yield "|---" * (5 + len(CARDS)) + "|"
    for name in NETWORKS:
        weights, adapter = counted(name, rank)
        frozen, trained, whole = (n / 1e9 for n in (2 * weights, ADAPTER * adapter, 16 * weights))
        left = [card - frozen - trained for card in CARDS]
        cells = [f"{weights / 1e9:.2f}", f"{frozen:.1f}", f"{trained:.2f}", f"{whole:.0f}"]
        cells += [f"{n:.1f}" if n > 0 else "–" for n in left]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    print("\n".join(lines(parser.parse_args().rank)))


if __name__ == "__main__":
    main()
