"""Pairs on their way into a shard, each numbered and with its bucket; and who inverts them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from inversion_dpo.data.buckets import Place, Resolution, buckets, place
from inversion_dpo.data.images import stack_pixels
from inversion_dpo.data.masks import region
from inversion_dpo.data.transforms import Fitted, Size, fit, flip, flips
from inversion_dpo.maths.records import Grid
from inversion_dpo.models.base import DiffusionModel
from inversion_dpo.run.faults import Parts
from inversion_dpo.trajectories.key import CacheKey

if TYPE_CHECKING:
    from inversion_dpo.data.source import Pair, PairSource

T = TypeVar("T")
Images = Sequence[Image.Image]
LOOKED_AT = 256  # rows, to foretell the sizes of all


@dataclass(frozen=True)
class Inverter:
    """How pairs become trajectories: the frozen model, the key, the grid and the device.

    encoded, inverted: how many pairs are encoded and inverted at once; a shard, or what fits.
    """

    model: DiffusionModel
    key: CacheKey
    grid: Grid
    device: torch.device
    encoded: Parts = field(default_factory=Parts)
    inverted: Parts = field(default_factory=Parts)

    def at(self, size: Size) -> Inverter:
        """Take the grid that the model's own sampler has at a size, and as many pairs as fit."""
        for parts in (self.encoded, self.inverted):
            parts.limit(size, self.device)
        return replace(self, grid=self.grid_at(size))

    def grid_at(self, size: Size) -> Grid:
        """Return the grid of the inversion at a size (height, width) in pixels."""
        return self.model.schedule_at(size).grid(self.key.steps, self.key.spacing)


@dataclass(frozen=True)
class Job:
    """A pair with its number in the cache and its bucket."""

    number: int
    pair: Pair
    place: Place


def grouped(pairs: Iterable[Pair], key: CacheKey, left_out: dict[int, str]) -> Iterator[list[Job]]:
    """Collect pairs to shards of one size, in the order in which these become full.

    Few images wait at a time, encoded: less than a shard of each size.

    Args:
        pairs: in their order.
        key: resolution, fit, and pairs of a shard.
        left_out: where the place of a pair that gets no bucket is written, with the reason.
    """
    sizes, waiting, number = buckets(key.resolution), dict[Size, list[Job]](), 0
    for row, pair in enumerate(pairs):
        found = place(sizes, pair.sizes, key.fit)
        if not found.fit:
            left_out[row] = found.odd
            continue
        jobs = waiting.setdefault(found.size, [])
        jobs.append(Job(number, pair, found))
        number += 1
        if len(jobs) == key.pairs_per_shard:
            yield waiting.pop(found.size)
    yield from (jobs for _, jobs in sorted(waiting.items()))


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


def made_of(jobs: Sequence[Job], places: Sequence[tuple[int, int]]) -> str:
    """Hash what a shard depends on besides captions and images, and the cache's key.

    Args:
        jobs: its pairs; noise is drawn from their numbers.
        places: where their conditions are stored.
    """
    known = [
        (j.number, j.pair.preference, j.pair.scene_graph, j.pair.seeds, j.place.size, j.place.fit)
        + (j.pair.source is None, j.pair.mask is None)
        for j in jobs
    ]
    return hashlib.sha256(json.dumps([known, places]).encode()).hexdigest()


@dataclass(frozen=True)
class Lot:
    """The pairs of a shard, and what tells it from one of others.

    number: of the shard. made_of: see :func:`made_of`. places: (shard, row) of each pair's
    condition. new: the pairs whose conditions this shard stores.
    """

    number: int
    jobs: list[Job]
    digests: list[str]
    made_of: str
    places: list[tuple[int, int]]
    new: list[int]


def lots(pairs: Iterable[Pair], how: Inverter, left_out: dict[int, str]) -> Iterator[Lot]:
    """Give the pairs of each shard in turn, see :func:`grouped`.

    Args:
        pairs: in their order.
        how: model and key.
        left_out: where the place of a pair that gets no bucket is written, with the reason.
    """
    texts = dict[bytes, tuple[int, int]]()
    for number, jobs in enumerate(grouped(pairs, how.key, left_out)):
        places, new = text_places(texts, [text_of(job, how) for job in jobs], number)
        digests = [job.pair.digest for job in jobs]
        yield Lot(number, jobs, digests, made_of(jobs, places), places, new)


def sizes_ahead(pairs: PairSource, resolution: Resolution, fit: str) -> tuple[Counter[Size], float]:
    """Count the sizes of the first pairs, and which share of them gets one; none without pairs.

    Args:
        pairs: of which the first ``LOOKED_AT`` rows are read.
        resolution: of the training.
        fit: how images come to their size.
    """
    sizes, found, total = buckets(resolution), Counter[Size](), 0
    if len(sizes) == 1 and fit != "drop":
        return Counter(sizes), 1.0
    for shapes in pairs.shapes(LOOKED_AT):
        chosen, total = place(sizes, shapes, fit) if shapes else Place(sizes[0], fit), total + 1
        found.update([chosen.size] * bool(chosen.fit))
    return found or Counter(sizes[:1]), found.total() / total if found else 1.0


def turned(job: Job, key: CacheKey) -> tuple[Image.Image, ...]:
    """Give winner, loser and any source, all mirrored if the pair is to be."""
    pair = job.pair
    images = (*pair.images, source) if (source := pair.source_image) else pair.images
    return flip(*images) if mirrored(pair, key) else images


def mirrored(pair: Pair, key: CacheKey) -> bool:
    """Tell whether the images of a pair are to be mirrored."""
    return key.flip_seed is not None and flips(pair.caption, key.flip_seed, pair.digest)


@dataclass(frozen=True)
class Pictures:
    """The images of a pair at its size: winner and loser, or one alone; and any that it edits."""

    fitted: list[Fitted]
    edited: Images


def pictures(model: DiffusionModel, job: Job, key: CacheKey) -> Pictures:
    """Decode the images of a pair and bring them to its size.

    Args:
        model: says the size of an image to be edited.
        job: the pair.
        key: says how many sides count, and whether pairs are mirrored.

    Raises:
        DataError: an image cannot be read; it names the row.
    """
    winner, loser, *source = turned(job, key)
    size, how = job.place.size, job.place.fit
    both = (winner, loser)[: key.sides]
    edited = [fit(image, model.source_size(size), how).image for image in source]
    return Pictures([fit(image, size, how) for image in both], edited)


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Give each item once the next one is made, whose pictures are decoded meanwhile."""
    held = list[T]()
    for item in items:
        yield from held
        held = [item]
    yield from held


def sources(model: DiffusionModel, edited: Sequence[Images]) -> Tensor:
    """Encode the images that P pairs edit, [P, ...]."""
    return model.encode(stack_pixels([source for given in edited for source in given]))


def regions(
    jobs: Sequence[Job], fitted: Sequence[Fitted], key: CacheKey, size: Sequence[int]
) -> dict[str, Tensor]:
    """Weigh latent pixels by what of them counts, [P, 1, h, w] of mean 1; empty if all does.

    Args:
        jobs: P pairs of one size.
        fitted: their images, winner and loser in turn.
        key: says which region counts.
        size: (h, w) of the latents.

    Raises:
        DataError: nothing counts, or a mask does not fit its image; it names the row.
    """
    masks = []
    for k, job in enumerate(jobs):
        mask = job.pair.mask_image if key.mask == "given" else None
        if mask and mirrored(job.pair, key):
            mask = ImageOps.mirror(mask)
        if mask or key.mask == "differ":
            both = [f.image for f in fitted[2 * k : 2 * k + 2]]
            masks.append(region(both, mask, job.place.size, job.place.fit, job.pair.where))
    if not masks:
        return {}
    area = adaptive_avg_pool2d(torch.tensor(np.stack(masks)[:, None]).float(), (size[0], size[1]))
    return {"region": area / area.mean((1, 2, 3), keepdim=True)}
