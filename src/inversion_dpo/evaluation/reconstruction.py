"""Measure what the reference cannot reproduce: invert, sample back, compare."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from inversion_dpo.data.images import png
from inversion_dpo.models.base import DiffusionModel
from inversion_dpo.run.disk import atomic_bytes, atomic_json
from inversion_dpo.trajectories.cache import TrajectoryCache

if TYPE_CHECKING:
    from inversion_dpo.data.source import Pair

SHOWN = 8  # of the worst images


def psnr(images: Tensor, again: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio in dB [B] between images (B, *) in [-1, 1]."""
    error = (images - again).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-12))


def quantiles(values: list[float]) -> dict[str, float]:
    """Compute minimum, quartiles and maximum."""
    names = ("least", "quarter", "median", "three_quarters", "most")
    points = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    return {n: round(float(v), 4) for n, v in zip(names, points, strict=True)}


def captioned(rows: list[tuple[str, Tensor]]) -> Image.Image:
    """Draw rows of (text, image beside its reconstruction [3, H, 2W]) below one another."""
    height, width = rows[0][1].shape[1:]
    times, line = max(1, 512 // width), 22  # small images are enlarged, pixel by pixel
    step = height * times + line
    sheet = Image.new("RGB", (width * times, line + step * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((4, 2), "left the image, right what sampling back makes of it", "black", font)
    for k, (text, both) in enumerate(rows):
        pixels = ((both + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        large = pixels.repeat(times, 0).repeat(times, 1)
        sheet.paste(Image.fromarray(large), (0, line + k * step))
        draw.text((4, (k + 1) * step + 2), text, "black", font)
    return sheet


def write_reconstruction(
    folder: Path,
    model: DiffusionModel,
    cache: TrajectoryCache,
    back: TrajectoryCache,
    given: Iterable[Pair],
) -> str:
    """Write ``reconstruction.json`` and pictures of the worst images; return a summary.

    Both the stored latents and those sampled back are decoded, so that the autoencoder's own loss
    does not count.

    Args:
        folder: of the run.
        model: decodes the latents.
        cache: of the pairs as encoded.
        back: of the same pairs, sampled back.
        given: the pairs of the data, read until the worst ones are found, to name their rows.
    """
    decibels: list[float] = []
    worst: list[tuple[float, int, str, Tensor]] = []
    for pairs in (some[k : k + 8] for some in cache.of_shard for k in range(0, len(some), 8)):
        before = model.decode(cache.of_images("clean", pairs))
        after = model.decode(back.of_images("reconstructed", pairs))
        values = psnr(before, after)[: cache.sides * len(pairs)]  # a single image is there twice
        for row, value in enumerate(values.tolist()):
            decibels.append(value)
            side = ("winner", "loser")[row // len(pairs)]
            both = torch.cat([before[row], after[row]], dim=2)
            worst.append((value, pairs[row % len(pairs)], side, both))
        worst = sorted(worst, key=lambda w: w[:3])[:SHOWN]
    found = rows_of(given, {cache.digests[p] for _, p, _, _ in worst})
    of = [found.get(cache.digests[p]) for _, p, _, _ in worst]
    named = [
        f"{pair.where if pair else f'pair {p}'}{'' if cache.single else f', {side}'}"
        for pair, (_, p, side, _) in zip(of, worst, strict=True)
    ]
    report = {
        "psnr_db": quantiles(decibels),
        "relative_latent_error_of_pairs": quantiles(back.errors),
        "worst": [
            {"image": name, "prompt": pair and pair.caption, "psnr_db": round(value, 2)}
            for name, pair, (value, *_) in zip(named, of, worst, strict=True)
        ],
    }
    atomic_json(report, folder / "reconstruction.json")
    rows = [(f"{v:.1f} dB: {name}", w) for name, (v, *_, w) in zip(named, worst, strict=True)]
    atomic_bytes(png(np.asarray(captioned(rows))), folder / "reconstruction-worst.png")
    middle, least = report["psnr_db"]["median"], report["psnr_db"]["least"]  # type: ignore[index]
    return (
        f"sampled back: median {middle:.1f} dB, worst {least:.1f} dB; see "
        f"{folder / 'reconstruction.json'} and reconstruction-worst.png"
    )


def rows_of(given: Iterable[Pair], digests: set[str]) -> dict[str, Pair]:
    """Find pairs by their digests; reads no further than it must."""
    found: dict[str, Pair] = {}
    for pair in given:
        if pair.digest in digests:
            found[pair.digest] = pair
            if len(found) == len(digests):
                break
    return found
