"""Measure what the reference cannot reproduce: invert, sample back, compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from inversion_dpo.data.images import png
from inversion_dpo.models.base import DiffusionModel
from inversion_dpo.run.disk import atomic_bytes, atomic_json
from inversion_dpo.trajectories.cache import TrajectoryCache


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
    folder: Path, model: DiffusionModel, cache: TrajectoryCache, back: TrajectoryCache
) -> str:
    """Write ``reconstruction.json`` and pictures of the worst images; return a summary.

    Both the stored latents and those sampled back are decoded, so that the autoencoder's own loss
    does not count.

    Args:
        folder: of the run.
        model: decodes the latents.
        cache: of the pairs as encoded.
        back: of the same pairs, sampled back.
    """
    decibels: list[float] = []
    worst: list[tuple[float, int, str, Tensor]] = []
    for pairs in (some[k : k + 8] for some in cache.of_shard for k in range(0, len(some), 8)):
        before = model.decode(cache.of_images("clean", pairs))
        after = model.decode(back.of_images("reconstructed", pairs))
        for row, value in enumerate(psnr(before, after).tolist()):
            decibels.append(value)
            side = "winner" if row < len(pairs) else "loser"
            both = torch.cat([before[row], after[row]], dim=2)
            worst.append((value, pairs[row % len(pairs)], side, both))
        worst = sorted(worst, key=lambda w: w[:3])[:8]
    report = {
        "psnr_db": quantiles(decibels),
        "relative_latent_error_of_pairs": quantiles(back.errors),
        "worst": [{"pair": p, "side": s, "psnr_db": round(v, 2)} for v, p, s, _ in worst],
    }
    atomic_json(report, folder / "reconstruction.json")
    rows = [(f"pair {p}, {s}: {v:.1f} dB", both) for v, p, s, both in worst]
    atomic_bytes(png(np.asarray(captioned(rows))), folder / "reconstruction-worst.png")
    middle, least = report["psnr_db"]["median"], report["psnr_db"]["least"]  # type: ignore[index]
    return (
        f"sampled back: median {middle:.1f} dB, worst {least:.1f} dB; see "
        f"{folder / 'reconstruction.json'} and reconstruction-worst.png"
    )
