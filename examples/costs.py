"""What the papers' settings cost, before anything is run: ``python examples/costs.py`` prints it.

Counted are forward passes of the network, by image: four for a trained one (forward, its repetition
under gradient checkpointing, and a backward that costs two), and those that the method adds. They
become hours by the one rate that this project measured: docs/results/costs.md, SDXL at 1024 pixels,
all weights, one H200. For Stable Diffusion 1.5 the authors' own statement is used: 2000 steps of
2048 pairs in about 24 hours on 16 GPUs. Bytes are the cache's, as `inversion-dpo invert` counts
them, and the checkpoints'.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

from inversion_dpo.run.config import load_config
from inversion_dpo.run.fields import Config

HERE = Path(__file__).parent
PAPERS = ("diffusion-dpo", "inpo", "inversion-dpo", "kto")
PAIRS = 851_293  # of Pick-a-Pic v2 without ties, arXiv 2311.12908
TRAINED = 4  # forward passes that a trained image costs
SDXL_PAIRS = 4.86  # a second, one H200
SD15_PAIRS = 2000 * 2048 / (24 * 3600 * 16) * 5 / 4  # with Diffusion-DPO's fifth pass left out
MOMENTS = {"adamw": 2.0, "adamw8bit": 0.5, "adafactor": 0.0}
WEIGHTS = {512: 0.86e9, 1024: 2.57e9}
TEXT = {512: 77 * 768, 1024: 77 * 2048 + 1280}  # numbers of an encoded prompt


def added(config: Config) -> float:
    """Count forward passes of an image beside the trained one."""
    name = config.objective.name
    if name == "inpo":  # it inverts up to the drawn level, on average half of the grid
        return 1 + config.inversion.steps / 2
    return 1.0  # the reference


def used(config: Config) -> int:
    """Count pairs that the training sees at least once."""
    return min(PAIRS, config.training.steps * config.training.batch_size)


def hours(config: Config) -> float:
    """Compute GPU hours of the training, and of the inversion where the method needs one."""
    t, large = config.training, config.model.resolution == 1024
    passes = t.steps * t.batch_size * (TRAINED + added(config))
    if config.objective.name.startswith("inversion_dpo"):
        passes += used(config) * config.inversion.steps
    return passes / TRAINED / (SDXL_PAIRS if large else SD15_PAIRS) / 3600


def gigabytes(config: Config) -> tuple[float, float]:
    """Compute the size of the cache and of the kept checkpoints, 10^9 bytes."""
    t, side = config.training, config.model.resolution
    inverted = config.objective.name.startswith("inversion_dpo")
    states = config.inversion.steps if inverted else 0
    latents = 4 * 4 * (side // 8) ** 2  # float32
    cache = used(config) * (2 * latents * (1 + 2 * states) + 4 * TEXT[side])
    kept = 4 * WEIGHTS[side] * (1 + MOMENTS[t.optimizer]) * (t.keep_checkpoints + 2)
    return cache / 1e9, kept / 1e9


def table(paper: str) -> list[str]:
    """Write the rows of a paper's README."""
    lines = [
        "| settings | pairs seen | GPU hours | cache, GB | checkpoints, GB |",
        "|---|---|---|---|---|",
    ]
    for file in sorted((HERE / paper).glob("*.yaml")):
        config = load_config(str(file), [])
        cache, kept = gigabytes(config)
        seen = config.training.steps * config.training.batch_size
        cells = (f"`{file.name}`", f"{seen:,}", f"{hours(config):,.0f}")
        lines.append(f"| {' | '.join([*cells, f'{cache:,.0f}', f'{kept:,.0f}'])} |")
    return lines


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    with suppress(BrokenPipeError):  # `| head`
        for name in PAPERS:
            print(f"\n{name}\n", *table(name), sep="\n", flush=True)
