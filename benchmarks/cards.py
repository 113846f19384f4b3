"""Which model on which card? ``python benchmarks/cards.py`` prints the arithmetic as Markdown.

Every network is built on torch's meta device, which holds shapes and no numbers, with the
configuration of the published weights: diffusers' defaults are theirs, where nothing stands beside
the name. Counted are the network's weights, also with ``model.quantize`` and ``model.offload``, and
a LoRA on the family's own layers with gradient and AdamW's two moments. Not counted are
activations, which depend on resolution and batch: the last columns say in how many bits the weights
fit, and what the card then has left. A second table has the error of a layer in fewer bits, a third
that of an inversion, on random weights. Text encoders and autoencoder leave the card before
training.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import diffusers
import torch
from model_cost import SDXL
from peft import LoraConfig
from torch import nn
from workshop import write_tiny

from inversion_dpo.maths.inversion import invert
from inversion_dpo.models.base import Framing
from inversion_dpo.models.loading import FAMILIES, adapt, load_pipeline
from inversion_dpo.models.quantized import BLOCK, IN_BLOCK, QuantizedLinear
from inversion_dpo.run.fields import ModelConfig
from inversion_dpo.trajectories.fill import predictions

TINY = ("sdxl", "sd3", "flux", "z-image", "qwen-image")
CARDS = (12, 24, 48, 80)  # GB
LEAST = 2.0  # GB that have to be left for activations
ADAPTER = 16  # bytes of a float32 weight with its gradient and AdamW's two moments
FULL = ADAPTER  # the frozen reference waits in main memory, where its predictions are cached
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
# https://huggingface.co/stabilityai/stable-diffusion-3.5-medium and -large: transformer/config.json
SD35: dict[str, Any] = {"sample_size": 128, "in_channels": 16, "out_channels": 16}
SD35 |= {"joint_attention_dim": 4096}
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


def saved(model: nn.Module) -> dict[str, float]:
    """Bytes that a card has less than in bfloat16, by ``model.quantize`` or ``model.offload``."""
    layers = [m for n, m in model.named_modules() if type(m) is nn.Linear and IN_BLOCK.search(n)]
    eight = sum(m.weight.numel() - 2 * m.out_features for m in layers)
    four = sum(m.weight.numel() * (2 - 0.5 - 2 / BLOCK) for m in layers)
    return {"int8": eight, "nf4": four, "offload": sum(2 * m.weight.numel() for m in layers)}


def counted(name: str, rank: int) -> tuple[int, int, dict[str, float]]:
    """Weights of the network and of a LoRA on its family's default layers; and :func:`saved`."""
    pipeline, network, config = NETWORKS[name]
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, network)(**config)
        weights = sum(p.numel() for p in model.parameters())
        less = saved(model)
        file, family = FAMILIES[pipeline]
        targets = list(getattr(import_module(f"inversion_dpo.models.{file}"), family).targets)
        where = targets[0] if targets[0].startswith("^") else targets
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=rank, target_modules=where))  # type: ignore[operator]
    return weights, sum(p.numel() for p in model.parameters() if p.requires_grad), less


def lines(rank: int) -> Iterator[str]:
    """Write the table, in gigabytes of 10^9 bytes."""
    cards = " | ".join(f"left on {card}" for card in CARDS)
    head = "| network | weights, 10^9 | bfloat16 | int8 | nf4 | offload | LoRA of rank "
    head += f"{rank} | all weights"
    yield f"{head} | {cards} |"
    yield "|---" * (8 + len(CARDS)) + "|"
    for name in NETWORKS:
        weights, adapter, less = counted(name, rank)
        frozen = {"bfloat16": 2 * weights} | {k: 2 * weights - v for k, v in less.items()}
        trained, whole = ADAPTER * adapter / 1e9, FULL * weights / 1e9
        cells = [f"{weights / 1e9:.2f}", *(f"{n / 1e9:.1f}" for n in frozen.values())]
        cells += [f"{trained:.2f}", f"{whole:.0f}"]
        for card in CARDS:
            left = {k: card - n / 1e9 - trained for k, n in frozen.items()}
            cells.append(next((f"{n:.1f} ({k})" for k, n in left.items() if n > LEAST), "–"))
        yield f"| {name} | {' | '.join(cells)} |"


def errors() -> Iterator[str]:
    """Write the relative error of a layer's output in fewer bits, on normal weights, seed 0."""
    torch.manual_seed(0)
    layer, x = nn.Linear(1024, 1024, bias=False), torch.randn(64, 1024)
    nn.init.normal_(layer.weight, std=0.02)
    yield "| model.quantize | relative error of a layer's output |"
    yield "|---|---|"
    with torch.no_grad():
        whole = layer(x)
        for kind in ("int8", "fp8", "nf4"):
            error = (QuantizedLinear(layer, kind)(x) - whole).norm() / whole.norm()
            yield f"| `{kind}` | {100 * float(error):.1f}% |"


def paths(families: Iterable[str], steps: int = 10) -> Iterator[str]:
    """Write how far an inversion in fewer bits ends from the whole network's, and its time.

    On tiny random weights of the genuine classes, from normal latents, seed 0.
    """
    kinds: tuple[Literal["int8", "fp8", "nf4"], ...] = ("int8", "fp8", "nf4")
    head = " | ".join(f"{k}: error of the end | {k}: time" for k in kinds)
    yield f"| tiny pipeline | {head} |"
    yield "|---" * (1 + 2 * len(kinds)) + "|"
    for family in families:
        with TemporaryDirectory() as place:
            folder, ends = str(write_tiny(family, Path(place) / family)), []
            for kind in (None, *kinds):
                model = adapt(load_pipeline(ModelConfig(folder, quantize=kind)), 64)
                torch.manual_seed(0)
                x_0 = torch.randn_like(model.encode(torch.zeros(2, 3, 64, 64)))
                framing = model.framing([Framing((64, 64), (0, 0), (64, 64))] * 2)
                condition = model.condition(["a red square", "a blue circle"]) | framing
                predict, _ = predictions(model, condition, 1.0, 1.0)
                begun = time.perf_counter()
                path = invert(x_0, model.schedule.grid(steps), predict, model.schedule.kind)
                ends.append((path.states[-1], time.perf_counter() - begun))
        (whole, seconds), *others = ends
        cells = (
            f"{100 * float((x - whole).norm() / whole.norm()):.1f}% | x {t / seconds:.1f}"
            for x, t in others
        )
        yield f"| `{family}` | {' | '.join(cells)} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    print("\n".join([*lines(parser.parse_args().rank), "", *errors(), "", *paths(TINY)]))


if __name__ == "__main__":
    main()
