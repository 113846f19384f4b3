"""Sample pairs back from their recovered noise: a report that leaves the cache as it is."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from inversion_dpo.maths.inversion import Predict, invert, reconstruct, reconstruction_error
from inversion_dpo.models.base import DiffusionModel, network_of
from inversion_dpo.run.fields import InversionConfig
from inversion_dpo.run.processes import Team
from inversion_dpo.trajectories.cache import (
    MANIFEST,
    TrajectoryCache,
    is_intact,
    is_whole,
    write_manifest,
    write_shard,
)
from inversion_dpo.trajectories.fill import pair_noise, predictions
from inversion_dpo.trajectories.reading import SHARD


def sampled_back(
    model: DiffusionModel, cache: TrajectoryCache, how: InversionConfig, team: Team | None = None
) -> TrajectoryCache:
    """Reconstruct all pairs that are not reconstructed yet; idempotent.

    The noise is the cache's highest state. Where that is not stored, or not pure noise, the
    latents are inverted again.

    Args:
        model: the frozen reference.
        cache: of its pairs; all processes must call this.
        how: guidance, refinement and added noise of the inversion.
        team: the processes that share the shards among them.

    Returns:
        A cache of the same pairs, in a folder inside the other. Its shards hold ``reconstructed``
        [2P, *] and ``reconstruction`` [2P], the relative error.
    """
    team, scale = team or Team(), how.guidance_scale
    start, iterations, top = how.start, how.fixed_point_iterations, cache.grid.steps
    folder = cache.folder / f"reconstruction-{scale:g}-{iterations}-{start}"
    names = [SHARD.format(k) for k in range(len(cache.sizes))]
    if not is_whole(folder, team):
        folder.mkdir(exist_ok=True)
        mine = range(team.rank, len(names), team.size)
        for number in tqdm(mine, "sample back", unit="batch", disable=not team.main):
            pairs = cache.of_shard[number]
            digests = [cache.digests[pair] for pair in pairs]
            if is_intact(folder / names[number], digests):
                continue
            x_0, predict = batch(model, cache, number, scale)
            grid = cache.grid_at(cache.sizes[number])
            if cache.extent.last == top and not cache.form.kept:
                highest = cache.states(pairs, [top - 1] * len(pairs), "reference").x_t
                x_T = highest[in_turn(len(x_0))].to(x_0)
            else:
                noise = pair_noise(pairs, x_0.shape).to(x_0)
                extent = replace(
                    cache.extent, start=start, first=top, last=top, iterations=iterations
                )
                x_T = invert(x_0, grid, predict, cache.kind, noise=noise, extent=extent).states[-1]
            again = reconstruct(x_T, grid, predict, cache.kind)
            error = reconstruction_error(x_0, again)
            worse = [round(e, 6) for e in error.reshape(-1, 2).amax(1).tolist()]
            tensors = {"reconstructed": again.cpu(), "reconstruction": error.cpu()}
            write_shard(
                folder / names[number],
                tensors,
                {"digests": digests, "overlong": {}, "errors": worse, "pairs": pairs}
                | {"size": cache.sizes[number], "texts": [cache.texts[pair] for pair in pairs]},
            )
        team.wait()
        if team.main:
            write_manifest(folder, json.loads((cache.folder / MANIFEST).read_text()), names)
        team.wait()
    return TrajectoryCache(folder, cache.grid_at, cache.kind)


def batch(
    model: DiffusionModel, cache: TrajectoryCache, number: int, scale: float
) -> tuple[Tensor, Predict]:
    """Return a shard's latents (2P, *) on the model's device, and their prediction."""
    x_0 = cache.shard(number).get_tensor("clean").to(next(network_of(model).parameters()).device)
    condition, order = cache.condition(cache.of_shard[number]), in_turn(len(x_0))
    per_image = {k: v[order].to(x_0.device) for k, v in condition.items()}
    return x_0, predictions(model, per_image, scale, scale)[0]


def in_turn(images: int) -> Tensor:
    """Order winners, then losers, in turn, as a shard has them."""
    return torch.arange(images).reshape(2, -1).T.flatten()


def round_trip_error(model: DiffusionModel, cache: TrajectoryCache, scale: float) -> float:
    """Compute the mean relative error of inverting the first shard's latents and sampling back.

    Both ways are naive, under guidance ``scale``; compare it with scale 1 for the cost of guidance.
    """
    x_0, predict = batch(model, cache, 0, scale)
    x_T = invert(x_0, cache.grid, predict, cache.kind).states[-1]
    again = reconstruct(x_T, cache.grid, predict, cache.kind)
    return float(reconstruction_error(x_0, again).mean())
