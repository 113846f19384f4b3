"""Fill the cache: encode every pair, invert it under the frozen reference, write shards.

Methods without trajectories only need encoded pairs. An interrupted inversion continues with the
missing shards, on any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from inversion_dpo.data.buckets import left_out_text, square
from inversion_dpo.data.images import DataError, stack_pixels
from inversion_dpo.data.source import graph_of
from inversion_dpo.data.transforms import Fitted, fit
from inversion_dpo.maths.inversion import (
    Compare,
    Predict,
    compared,
    invert,
    recovered_noise,
)
from inversion_dpo.models.base import (
    OVERFLOW,
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
from inversion_dpo.run.disk import atomic_save
from inversion_dpo.run.processes import Team
from inversion_dpo.trajectories.cache import TrajectoryCache
from inversion_dpo.trajectories.cost import announce, evaluations_again
from inversion_dpo.trajectories.jobs import (
    Images,
    Inverter,
    Job,
    edits,
    grouped,
    mirrored,
    regions,
    sources,
    turned,
)
from inversion_dpo.trajectories.key import CacheKey
from inversion_dpo.trajectories.known import known_noise
from inversion_dpo.trajectories.reading import SHARD
from inversion_dpo.trajectories.storing import PREDICTIONS, kept_steps, packed
from inversion_dpo.trajectories.writing import (
    EMPTY,
    is_intact,
    is_whole,
    write_manifest,
    write_shard,
)

if TYPE_CHECKING:
    from inversion_dpo.data.source import Pair, PairSource

logger = logging.getLogger(__name__)


def fill(
    root: Path,
    model: DiffusionModel,
    pairs: PairSource,
    key: CacheKey,
    *,
    device: torch.device,
    team: Team | None = None,
) -> TrajectoryCache:
    """Invert all pairs that are missing or damaged, and open the cache; idempotent.

    The source is read once, a shard at a time: a stream need not fit in memory or on disk.

    Args:
        root: the folder that holds caches, one for each key.
        model: the frozen reference.
        pairs: read only if the cache is not whole.
        key: everything that the trajectories depend on.
        device: where the network computes.
        team: the processes that share the shards among them; all must call this.

    Returns:
        The cache, whose checksums hold.

    Raises:
        ConfigError: the schedule has not so many steps.
        DataError: no pair fits a size.
        ModelError: a value is not finite; it names the image.
    """
    team, folder = team or Team(), root / key.name()
    schedule = model.schedule_at(square(key.resolution))
    grid = grid_for(schedule, "inversion.steps", key.steps, key.spacing)
    how = Inverter(model, key, grid, device)
    if not is_whole(folder, team):
        count = pairs.expected() if team.main else None
        if team.main:
            folder.mkdir(parents=True, exist_ok=True)
            announce(how, pairs, folder, team.size)
            atomic_save({k: v.cpu() for k, v in model.empty().items()}, folder / EMPTY)
        team.wait()
        shards, left_out = _write_missing(folder, how, pairs, count, team)
        if not shards:
            raise DataError(f"{pairs.config.pairs}: {left_out_text(len(left_out), len(left_out))}")
        team.wait()
        if team.main:
            counts = pairs.counts + Counter(left_out.values())
            about = {"key": asdict(key), "counts": dict(counts), "left_out": list(left_out)}
            write_manifest(folder, about, [SHARD.format(k) for k in range(shards)])
        team.wait()
    return TrajectoryCache(folder, how.grid_at, model.schedule.kind)


def _write_missing(
    folder: Path, how: Inverter, pairs: PairSource, count: int | None, team: Team
) -> tuple[int, dict[int, str]]:
    """Write this process's share of the missing shards.

    Returns:
        The number of all shards; and of each pair that is left out its place, and why.
    """
    number, left_out, texts = -1, dict[int, str](), dict[bytes, tuple[int, int]]()
    doing = "invert" if how.key.extent.last else "encode"
    with tqdm(total=count, desc=doing, unit="pair", mininterval=1.0, disable=not team.main) as bar:
        stream = grouped(pairs.read(), how.key, left_out)
        for number, chunk in enumerate(stream):
            path, digests = folder / SHARD.format(number), [job.pair.digest for job in chunk]
            places, new = text_places(texts, [text_of(job, how) for job in chunk], number)
            if number % team.size == team.rank and not is_intact(path, digests):
                shard = invert_pairs(how.at(chunk[0].place.size), chunk, new)
                check_finite(shard, [job.pair for job in chunk])
                entry = {
                    "pairs": [job.number for job in chunk],
                    "size": chunk[0].place.size,
                    "digests": digests,
                    "images": [job.pair.marks for job in chunk],
                    "overlong": overlong(how.model, [job.pair.caption for job in chunk]),
                    "errors": [],
                    "texts": places,
                }
                write_shard(path, shard, entry)
            bar.update(len(chunk))
    return number + 1, left_out


# ---------------------------------------------------------------- one shard


def text_of(job: Job, how: Inverter) -> bytes:
    """Identify what a pair's condition is made of: caption; and graph and source, if they count."""
    pair, read = job.pair, None
    graph = pair.scene_graph if how.key.scene_graph else None
    if how.model.edits == "reads":
        source = hashlib.sha256(pair.source or b"").hexdigest()
        read = source, job.place.size, job.place.fit, mirrored(pair, how.key)
    return hashlib.sha256(json.dumps([pair.caption, graph, read]).encode()).digest()[:16]


def text_places(
    texts: dict[bytes, tuple[int, int]], chunk: Sequence[bytes], number: int
) -> tuple[list[tuple[int, int]], list[int]]:
    """Find where the conditions of a shard's pairs are stored: in the first shard that has them.

    Args:
        texts: (shard, row) of each text so far; those of this shard are added.
        chunk: the text of each pair.
        number: of the shard.

    Returns:
        (shard, row) for each pair; and of each row that this shard stores, its pair.
    """
    new: list[int] = []
    for k, text in enumerate(chunk):
        if text not in texts:
            texts[text] = number, len(new)
            new.append(k)
    return [texts[text] for text in chunk], new


def check_finite(shard: dict[str, Tensor], pairs: list[Pair]) -> None:
    """Refuse a shard with values that are not finite; ModelError names the image and the remedy."""
    for (pair,) in not_finite(shard["pair.source"], 1) if "pair.source" in shard else ():
        raise ModelError(f"{pairs[pair].where}, source: its latent has {OVERFLOW}")
    of_images = ("clean", "endpoint")
    for name in (*of_images, "anchors", *PREDICTIONS):
        if name not in shard:
            continue
        rows = shard[name].unflatten(0, (len(pairs), -1)) if name in of_images else shard[name]
        for row, side in not_finite(rows, 2):
            where = pairs[row // (len(rows) // len(pairs))].where
            what = "latent" if name == "clean" else "inverted path"
            raise ModelError(f"{where}, {('winner', 'loser')[side]}: its {what} has {OVERFLOW}")


def not_finite(t: Tensor, axes: int) -> list[list[int]]:
    """List the places along the first axes where a tensor has values that are not finite."""
    return (~t.isfinite().flatten(axes).all(axes)).nonzero().tolist()


def invert_pairs(
    how: Inverter, jobs: list[Job], new: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Make one shard, see :class:`TrajectoryCache`.

    Args:
        how: model, key and device.
        jobs: P pairs of one size; the noise depends on their numbers.
        new: the pairs whose conditions are stored here, all by default.
    """
    model, key, pairs = how.model, how.key, [job.pair for job in jobs]
    images, fitted = [turned(job, key) for job in jobs], list[Fitted]()
    for job, (winner, loser, *_) in zip(jobs, images, strict=True):
        both = (winner, loser)[: key.sides]
        fitted += [fit(image, job.place.size, job.place.fit) for image in both]

    def encode(s: slice) -> Tensor:
        return model.encode(stack_pixels([f.image for f in fitted[images_of(s, key.sides)]]))

    x_0 = torch.cat(how.encoded.of(len(jobs), encode))
    edited = [edits(model, job, given[2:]) for job, given in zip(jobs, images, strict=True)]
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
