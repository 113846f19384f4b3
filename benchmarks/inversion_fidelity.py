"""How much of the true noise does inversion recover? ``python benchmarks/inversion_fidelity.py``.

Samples latents from known noise x_T with the embedded model (DDIM, N steps, no guidance), then
inverts them: from the sampled latent itself, and from the image, as preference data come: decoded,
rounded to 8 bits and encoded again. Prints the variance of the recovered x_T and its mean squared
distance from the true one, with 95% intervals over images (seeds 0 and up).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from inversion_dpo.maths.inversion import invert, reconstruct
from inversion_dpo.maths.records import Extent
from inversion_dpo.models.base import DiffusionModel
from inversion_dpo.models.loading import load_model
from inversion_dpo.run.config import load_config
from inversion_dpo.trajectories.fill import predictions
from inversion_dpo.world.scene_prompts import prompts


def through_image(model: DiffusionModel, latents: Tensor) -> Tensor:
    """Decode to 8-bit pixels and encode again, (B, *) -> (B, *)."""
    pixels = model.decode(latents)
    return model.encode((pixels * 127.5).round() / 127.5)


def with_interval(values: Tensor) -> str:
    """Mean over images [B] and 95% interval of the mean."""
    half = 1.96 * values.std() / len(values) ** 0.5
    return f"{values.mean():.3f} ± {half:.3f}"


def main() -> None:
    """Print one row for each start and each kind of inversion."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = load_model(load_config("composition", []), torch.device("cpu"))
    grid, kind = model.schedule.grid(args.steps), model.schedule.kind
    condition = model.condition([g.caption for g in prompts("train", args.count, 7)])
    predict, _ = predictions(model, condition, 1.0, 1.0)
    x_T, noise = torch.randn(2, args.count, 8, 8, 8)
    x_0 = reconstruct(x_T, grid, predict, kind)
    encoded = through_image(model, x_0)
    print(
        f"encoded image against sampled latent: mean squared error "
        f"{(encoded - x_0).square().mean():.4f}, variance {x_0.var():.3f}\n"
    )
    print("| start | inversion | variance of x_T | squared distance from the true x_T |")
    print("|---|---|---|---|")
    for name, latents, start, iterations in (
        ("sampled latent", x_0, 0, 0),
        ("sampled latent", x_0, 0, 8),
        ("encoded image", encoded, 0, 0),
        ("encoded image", encoded, 0, 8),
        ("encoded image", encoded, max(1, args.steps // 10), 0),
    ):
        how = f"fixed point, {iterations}" if iterations else "naive"
        how += f", noise up to {start / args.steps:g} of the schedule" if start else ""
        extent = Extent(start=start, iterations=iterations)
        found = invert(latents, grid, predict, kind, noise=noise, extent=extent).states[-1]
        variance, error = (v.flatten(1).square().mean(1) for v in (found, found - x_T))
        print(f"| {name} | {how} | {with_interval(variance)} | {with_interval(error)} |")


if __name__ == "__main__":
    main()
