"""Fill the cache: encode every pair, invert it under the frozen reference, write shards.

Methods without trajectories only need encoded pairs. An interrupted inversion continues with the
missing shards, on any number of processes.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from inversion_dpo.data.buckets import left_out_text, square
from inversion_dpo.data.images import DataError, stack_pixels
from inversion_dpo.data.source import graph_of
from inversion_dpo.maths.inversion import (
    Compare,
    Predict,
    compared,
    invert,
    recovered_noise,
)
from inversion_dpo.models.base import (
    Condition,
    DiffusionModel,
    Guidance,
    ModelError,
    guided,
    joined,
    network_of,
    without_prompt,
)
from inversion_dpo.models.prompts import overlong
from inversion_dpo.models.schedules import grid_for
from inversion_dpo.run.disk import atomic_json, atomic_save
from inversion_dpo.run.folder import alone_at
from inversion_dpo.run.processes import Team
from inversion_dpo.trajectories.cache import TrajectoryCache
from inversion_dpo.trajectories.cost import announce, evaluations_again, missing
from inversion_dpo.trajectories.jobs import (
    Images,
    Inverter,
    Job,
    Lot,
    Pictures,
    lots,
    one_ahead,
    pictures,
    regions,
    sources,
    text_of,
)
from inversion_dpo.trajectories.key import CacheKey
from inversion_dpo.trajectories.known import known_noise
from inversion_dpo.trajectories.reading import SHARD
from inversion_dpo.trajectories.storing import check_finite, kept_steps, packed
from inversion_dpo.trajectories.writing import (
    EMPTY,
    KEY,
    is_intact,
    is_whole,
    neighbours,
    take_over,
    write_manifest,
    write_shard,
)

if TYPE_CHECKING:
    from inversion_dpo.data.source import PairSource

THREADS = 8  # decode pictures, at most
logger = logging.getLogger(__name__)


def fill(
    root: Path,
    model: DiffusionModel,
    pairs: PairSource,
    key: CacheKey,
    *,
    team: Team | None = None,
    reuse: bool = False,
) -> TrajectoryCache:
    """Invert all pairs that are missing or damaged, and open the cache; idempotent.

    The source is read once, a shard at a time: a stream need not fit in memory or on disk.

    Args:
        root: the folder that holds caches, one for each key.
        model: the frozen reference.
        pairs: read only if the cache is not whole.
        key: everything that the trajectories depend on.
        team: the processes that share the shards among them; all must call this.
        reuse: whether shards that another cache in ``root`` has are taken from there.

    Returns:
        The cache, whose checksums hold.

    Raises:
        ConfigError: the schedule has not so many steps.
        DataError: no pair fits a size.
        ModelError: a value is not finite; it names the image.
        BusyError: another run fills this cache.
    """
    team, folder = team or Team(), root / key.name()
    schedule = model.schedule_at(square(key.resolution))
    grid = grid_for(schedule, "inversion.steps", key.steps, key.spacing)
    how = Inverter(model, key, grid, team.device)
    if not is_whole(folder, team):
        folder.mkdir(parents=True, exist_ok=True)
        with alone_at(folder) if team.main else nullcontext():
            _finish(folder, how, pairs, team, neighbours(key, folder) if reuse else [])
    return TrajectoryCache(folder, how.grid_at, model.schedule.kind)


def _finish(
    folder: Path, how: Inverter, pairs: PairSource, team: Team, caches: Sequence[Path]
) -> None:
    """Write what is missing of a cache, the manifest last."""
    if team.main:
        announce(how, pairs, folder, team.size, missing(how, pairs, folder, caches))
        atomic_json(asdict(how.key), folder / KEY)
        atomic_save({k: v.cpu() for k, v in how.model.empty().items()}, folder / EMPTY)
    team.wait()
    shards, left_out = _write_missing(folder, how, pairs, team, caches)
    if not shards:
        raise DataError(f"{pairs.config.pairs}: {left_out_text(len(left_out), len(left_out))}")
    team.wait()
    if team.main:
        counts = pairs.counts + Counter(left_out.values())
        about = {"key": asdict(how.key), "counts": dict(counts), "left_out": list(left_out)}
        write_manifest(folder, about, [SHARD.format(k) for k in range(shards)])
    team.wait()


def _write_missing(
    folder: Path, how: Inverter, pairs: PairSource, team: Team, caches: Sequence[Path]
) -> tuple[int, dict[int, str]]:
    """Write this process's share of the missing shards.

    Returns:
        The number of all shards; and of each pair that is left out its place, and why.
    """
    number, left_out, count = -1, dict[int, str](), pairs.expected() if team.main else None
    doing = "invert" if how.key.extent.last else "encode"
    threads = max(1, min(THREADS, (os.cpu_count() or 1) // team.size))
    with (
        tqdm(total=count, desc=doing, unit="pair", mininterval=1.0, disable=not team.main) as bar,
        ThreadPoolExecutor(threads, "pictures") as pool,
    ):
        stream = lots(pairs.read(), how, left_out)
        try:
            for task in one_ahead(_tasks(folder, how, stream, team, pool, caches)):
                number = task.lot.number
                if task.pictures:
                    _write(folder, how, task)
                bar.update(len(task.lot.jobs))
        finally:
            pool.shutdown(cancel_futures=True)
    return number + 1, left_out


@dataclass(frozen=True)
class Task:
    """A shard on its way.

    pictures: of each pair, decoded in other threads; none if another process writes this shard, or
    it is there.
    """

    lot: Lot
    pictures: list[Future[Pictures]]


def _tasks(
    folder: Path,
    how: Inverter,
    stream: Iterable[Lot],
    team: Team,
    pool: Executor,
    caches: Sequence[Path],
) -> Iterator[Task]:
    """Give the shards in turn, and have the pictures of those to be written here decoded."""
    told = set[Path]()
    for lot in stream:
        path, what = folder / SHARD.format(lot.number), (lot.digests, lot.made_of)
        images = list[Future[Pictures]]()
        if lot.number % team.size == team.rank and not is_intact(path, *what):
            if not (cache := take_over(path, *what, caches)):
                images = [pool.submit(pictures, how.model, job, how.key) for job in lot.jobs]
            elif cache not in told:
                logger.info("what %s has of these pairs is taken over, not made again", cache)
                told.add(cache)
        yield Task(lot, images)


def _write(folder: Path, how: Inverter, task: Task) -> None:
    """Invert the pairs of a shard and write it."""
    lot, jobs = task.lot, task.lot.jobs
    size, images = jobs[0].place.size, [decoded.result() for decoded in task.pictures]
    shard = invert_pairs(how.at(size), jobs, lot.new, images)
    check_finite(shard, [job.pair for job in jobs])
    entry = {
        "pairs": [job.number for job in jobs],
        "size": size,
        "digests": lot.digests,
        "made_of": lot.made_of,
        "images": [job.pair.marks for job in jobs],
        "overlong": overlong(how.model, [job.pair.caption for job in jobs]),
        "errors": [],
        "texts": lot.places,
    }
    write_shard(folder / SHARD.format(lot.number), shard, entry)


# ---------------------------------------------------------------- one shard


def invert_pairs(
    how: Inverter,
    jobs: list[Job],
    new: Sequence[int] | None = None,
    images: Sequence[Pictures] = (),
) -> dict[str, Tensor]:
    """Make one shard, see :class:`TrajectoryCache`.

    Args:
        how: model, key and device.
        jobs: P pairs of one size; the noise depends on their numbers.
        new: the pairs whose conditions are stored here, all by default.
        images: of the pairs, decoded here by default.
    """
    model, key, pairs = how.model, how.key, [job.pair for job in jobs]
    images = images or [pictures(model, job, key) for job in jobs]
    fitted, edited = [f for made in images for f in made.fitted], [made.edited for made in images]

    def encode(s: slice) -> Tensor:
        return model.encode(stack_pixels([f.image for f in fitted[images_of(s, key.sides)]]))

    x_0 = torch.cat(how.encoded.of(len(jobs), encode))
    condition, shared = conditions(how, jobs, edited), Condition()
    if pairs[0].source:  # as all of them have, or none
        parts = how.encoded.of(len(jobs), lambda s: sources(model, edited[s]))
        shared = {"source": torch.cat(parts)}
    framing = model.framing([f.framing for f in fitted])
    shard = {"clean": x_0.cpu(), "preference": torch.tensor([p.preference for p in pairs])}
    if key.mask == "differ" or pairs[0].mask:
        shard |= regions(jobs, fitted, key, x_0.shape[2:])
    if key.extent.last or key.endpoint:
        per_pair = condition | shared
        per_image = {k: v.repeat_interleave(key.sides, 0) for k, v in per_pair.items()} | framing
        per_image = {k: v.to(how.device) for k, v in per_image.items()}
        x_0, make = x_0.to(how.device), known_noise if key.endpoint == "known" else paths

        def made(s: slice) -> dict[str, Tensor]:
            rows = images_of(s, key.sides)
            return make(how, x_0[rows], {k: v[rows] for k, v in per_image.items()}, jobs[s])

        made_parts = how.inverted.of(len(jobs), made)
        shard |= {k: torch.cat([part[k] for part in made_parts]) for k in made_parts[0]}
    if key.endpoint:  # states and targets are made of these: rounding makes no error of training
        shard |= {name: shard[name].half() for name in ("clean", "endpoint")}
    rows = list(range(len(jobs)) if new is None else new)
    if rows:
        shard |= {f"condition.{k}": v[rows].cpu() for k, v in condition.items()}
    shard |= {f"pair.{k}": v.cpu() for k, v in shared.items()}
    shard |= {f"framing.{k}": v.cpu() for k, v in framing.items()}
    return shard


def images_of(pairs: slice, sides: int) -> slice:
    """Take the images of pairs that lie winner, loser, winner, loser; one each if alone."""
    return slice(sides * pairs.start, sides * pairs.stop)


def conditions(how: Inverter, jobs: Sequence[Job], edited: Sequence[Images]) -> Condition:
    """Encode the prompts of pairs, [P, ...] each, and the sources where the encoder reads them.

    Each is encoded alone, and so has the same bits wherever it recurs.

    Args:
        how: model and key.
        jobs: P pairs.
        edited: the image that each pair edits, at its size, or nothing.
    """
    made: dict[bytes, Condition] = {}
    keys = [text_of(job, how) for job in jobs]
    for key, job, source in zip(keys, jobs, edited, strict=True):
        if key not in made:
            more: dict[str, Any] = {"sources": source} if how.model.edits == "reads" else {}
            more |= {"graphs": [graph_of(job.pair)]} if how.key.scene_graph else {}
            made[key] = how.model.condition([job.pair.caption], **more)
            if not all(part.isfinite().all() for part in made[key].values()):
                raise ModelError(
                    f"{job.pair.where}: its encoded caption has values that are not finite. Set "
                    "model.dtype=float32 or bfloat16"
                )
    return {name: joined([made[key][name] for key in keys]) for name in made[keys[0]]}


def paths(
    how: Inverter, x_0: Tensor, condition: Condition, jobs: Sequence[Job]
) -> dict[str, Tensor]:
    """Compute trajectories, or where they end, from latents x_0 [2P, *].

    Args:
        how: model, key and grid.
        x_0: latents [2P, *], winner and loser in turn; [P, *] of single images.
        condition: of every image, [2P, ...] each.
        jobs: the P pairs; noise and kept states are drawn from their numbers.
    """
    model, key, extent = how.model, how.key, how.key.extent
    numbers = [job.number for job in jobs]
    predict, reference = predictions(model, condition, key.guidance_scale, key.reference_guidance)
    noise = pair_noise(numbers, x_0.shape).to(x_0) if extent.start else None
    path = invert(x_0, how.grid, predict, model.schedule.kind, noise=noise, extent=extent)
    if reference is not None:
        path = compared(path, reference, extent.first)
    found, form = recovered_noise(path), key.form
    variance = found.flatten(1).double().square().mean(1)
    if key.endpoint:
        stored = {"endpoint": found}
    else:
        steps = kept_steps(numbers, form) if key.keep else None
        stored = packed(path, form, noise, steps, sides=key.sides)
    return {k: v.cpu() for k, v in (stored | {"x_T_variance": variance}).items()}


def predictions(
    model: DiffusionModel, condition: Condition, along: float, stored: float
) -> tuple[Predict, Compare | None]:
    """Return the prediction that a path follows, and the one to store if it differs.

    Args:
        model: its network predicts.
        condition: of every image, [B, ...].
        along: guidance of the path.
        stored: guidance of the stored predictions. They take one evaluation, not two:
            p_s = p_u + s (p_c - p_u), so p_w = p_u + w / s (p_s - p_u). Where a family rescales
            the guided prediction, that only holds for s = 1, and else there are two.
    """
    denoiser = partial(model.predict, network_of(model))
    empty = model.empty() if (along, stored) != (1.0, 1.0) else {}
    guidance = Guidance(along, empty, model.combine)
    predict = partial(guided, denoiser, condition=condition, guidance=guidance)

    def compare(x: Tensor, t: Tensor, followed: Tensor) -> Tensor:
        if stored == 1 or evaluations_again(model, along, stored) == 2:
            return guided(denoiser, x, t, condition, Guidance(stored, empty, model.combine))
        p_u = denoiser(x, t, without_prompt(condition, empty))
        return model.combine(p_u, followed, stored / along)

    return predict, None if along == stored else compare


def pair_noise(numbers: Sequence[int], shape: torch.Size) -> Tensor:
    """Draw standard normal (B, *) from the numbers of pairs; both images share it."""
    seeds = (numbers[k * len(numbers) // shape[0]] for k in range(shape[0]))
    return torch.stack(
        [torch.randn(shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


def noise_variance(cache: TrajectoryCache) -> float:
    """Compute the variance of the recovered x_T in the first shard; sampling starts from 1."""
    return float(cache.shard(0).get_tensor("x_T_variance").mean())
