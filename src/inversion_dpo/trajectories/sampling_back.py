"""Sample pairs back from their recovered noise: a report that leaves the cache as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from inversion_dpo.maths.inversion import Predict, invert, reconstruct, reconstruction_error
from inversion_dpo.models.base import OVERFLOW, DiffusionModel, ModelError, network_of
from inversion_dpo.run.disk import check_room, read_json
from inversion_dpo.run.faults import Parts
from inversion_dpo.run.fields import InversionConfig
from inversion_dpo.run.folder import alone_at
from inversion_dpo.run.processes import Team
from inversion_dpo.trajectories.cache import TrajectoryCache
from inversion_dpo.trajectories.fill import images_of, pair_noise, predictions
from inversion_dpo.trajectories.reading import SHARD
from inversion_dpo.trajectories.storing import not_finite
from inversion_dpo.trajectories.writing import (
    MANIFEST,
    is_intact,
    is_whole,
    write_manifest,
    write_shard,
)

if TYPE_CHECKING:
    from inversion_dpo.data.source import Pair


def sampled_back(
    model: DiffusionModel,
    cache: TrajectoryCache,
    how: InversionConfig,
    team: Team | None = None,
    pairs: Iterable[Pair] = (),
) -> TrajectoryCache:
    """Reconstruct all pairs that are not reconstructed yet; idempotent.

    The noise is the cache's highest state. Where that is not stored, or not pure noise, the
    latents are inverted again.

    Args:
        model: the frozen reference.
        cache: of its pairs; all processes must call this.
        how: guidance, refinement and added noise of the inversion.
        team: the processes that share the shards among them.
        pairs: of the cache, read only to name the file and row of one that goes wrong.

    Returns:
        A cache of the same pairs, in a folder inside the other. Its shards hold ``reconstructed``
        [2P, *] and ``reconstruction`` [2P], the relative error.

    Raises:
        ModelError: a value is not finite; it names the pair.
        BusyError: another run samples these pairs back.
    """
    team = team or Team()
    name = f"reconstruction-{how.guidance_scale:g}-{how.fixed_point_iterations}-{how.start}"
    folder = cache.folder / name
    if not is_whole(folder, team):
        if team.main:
            numbers = cache.shard(0).get_tensor("clean")[0].numel()
            what, size = "reconstructions", 1.0 * cache.sides * cache.pairs * 4 * numbers
            check_room(folder, size, what, "set inversion.reconstruct=false or data.limit")
        folder.mkdir(exist_ok=True)
        with alone_at(folder) if team.main else nullcontext():
            _finish(folder, model, cache, how, team, pairs)
    return TrajectoryCache(folder, cache.grid_at, cache.kind)


def _finish(
    folder: Path,
    model: DiffusionModel,
    cache: TrajectoryCache,
    how: InversionConfig,
    team: Team,
    given: Iterable[Pair],
) -> None:
    """Write what is missing of the reconstructions, the manifest last."""
    names, parts = [SHARD.format(k) for k in range(len(cache.sizes))], Parts()
    mine = range(team.rank, len(names), team.size)
    for number in tqdm(mine, "sample back", unit="batch", disable=not team.main):
        pairs = cache.of_shard[number]
        digests = [cache.digests[pair] for pair in pairs]
        if is_intact(folder / names[number], digests):
            continue
        x_0, back = way_back(model, cache, number, how)
        parts.limit(cache.sizes[number], x_0.device)
        again = torch.cat(parts.of(len(pairs), back))
        for (row,) in not_finite(again, 1):
            pair = pairs[row // cache.sides]
            places = (p.where for p in given if p.digest == cache.digests[pair])
            side = "" if cache.single else f", {('winner', 'loser')[row % 2]}"
            where = f"{next(places, f'pair {pair}')}{side}"
            raise ModelError(f"{where}: its latent, sampled back, has {OVERFLOW}")
        error = reconstruction_error(x_0, again)
        worse = [round(e, 6) for e in error.reshape(-1, cache.sides).amax(1).tolist()]
        tensors = {"reconstructed": again.cpu(), "reconstruction": error.cpu()}
        write_shard(
            folder / names[number],
            tensors,
            {"digests": digests, "overlong": {}, "errors": worse, "pairs": pairs}
            | {"size": cache.sizes[number], "texts": [cache.texts[pair] for pair in pairs]},
        )
    team.wait()
    if team.main:
        write_manifest(folder, read_json(cache.folder / MANIFEST), names)
    team.wait()


def way_back(
    model: DiffusionModel, cache: TrajectoryCache, number: int, how: InversionConfig
) -> tuple[Tensor, Callable[[slice], Tensor]]:
    """Return a shard's latents (2P, *), and what samples those of some pairs back from noise.

    Args:
        model: the frozen reference.
        cache: of its pairs.
        number: of the shard.
        how: guidance, refinement and added noise of the inversion.
    """
    x_0, some = batch(model, cache, number, how.guidance_scale)
    grid, pairs = cache.grid_at(cache.sizes[number]), cache.of_shard[number]
    extent = replace(
        cache.extent,
        start=how.start,
        first=grid.steps,
        last=grid.steps,
        iterations=how.fixed_point_iterations,
    )

    def back(part: slice) -> Tensor:
        (x, predict), of = some(part), pairs[part]
        top = cache.extent.last == grid.steps and not (cache.form.kept or cache.endpoint)
        if top:  # whose state is stored
            highest = cache.states(of, [grid.steps - 1] * len(of), "reference").x_t
            x_T = highest[in_turn(len(of), cache.sides)].to(x)
        else:
            noise = pair_noise(of, x.shape).to(x)
            path = invert(x, grid, predict, cache.kind, noise=noise, extent=extent)
            x_T = path.states[-1]
        return reconstruct(x_T, grid, predict, cache.kind)

    return x_0, back


def batch(
    model: DiffusionModel, cache: TrajectoryCache, number: int, scale: float
) -> tuple[Tensor, Callable[[slice], tuple[Tensor, Predict]]]:
    """Return a shard's latents (2P, *) on the model's device; those of some pairs, to predict.

    Args:
        model: the frozen reference.
        cache: of its pairs.
        number: of the shard.
        scale: of classifier-free guidance.
    """
    device = next(network_of(model).parameters()).device
    x_0 = cache.shard(number).get_tensor("clean").to(device, torch.float32)
    pairs = cache.of_shard[number]
    condition, order = cache.condition(pairs), in_turn(len(pairs), cache.sides)
    per_image = {k: v[order].to(x_0.device) for k, v in condition.items()}

    def some(part: slice) -> tuple[Tensor, Predict]:
        images = images_of(part, cache.sides)
        condition = {k: v[images] for k, v in per_image.items()}
        return x_0[images], predictions(model, condition, scale, scale)[0]

    return x_0, some


def in_turn(pairs: int, sides: int) -> Tensor:
    """Order winners, then losers, in turn, as a shard has them; single images are winners alone."""
    return torch.arange(sides * pairs).reshape(sides, -1).T.flatten()


def round_trip_error(model: DiffusionModel, cache: TrajectoryCache, scale: float) -> float:
    """Compute the mean relative error of inverting the first shard's latents and sampling back.

    Both ways are naive, under guidance ``scale``; compare it with scale 1 for the cost of guidance.

    Args:
        model: the frozen reference.
        cache: of its pairs.
        scale: of classifier-free guidance, on both ways.
    """
    x_0, some = batch(model, cache, 0, scale)

    def back(part: slice) -> Tensor:
        x, predict = some(part)
        x_T = invert(x, cache.grid, predict, cache.kind).states[-1]
        return reconstruct(x_T, cache.grid, predict, cache.kind)

    parts = Parts()
    parts.limit(cache.sizes[0], x_0.device)
    again = torch.cat(parts.of(len(x_0) // cache.sides, back))
    return float(reconstruction_error(x_0, again).mean())
