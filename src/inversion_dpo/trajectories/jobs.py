"""Pairs on their way into a shard: numbered, each with its bucket and any source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from inversion_dpo.data.buckets import Place, buckets, place
from inversion_dpo.data.images import stack_pixels
from inversion_dpo.data.transforms import Size, fit, flip, flips
from inversion_dpo.models.base import Condition, DiffusionModel
from inversion_dpo.trajectories.key import CacheKey

if TYPE_CHECKING:
    from inversion_dpo.data.source import Pair


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


def turned(job: Job, key: CacheKey) -> tuple[Image.Image, ...]:
    """Give winner, loser and any source, all mirrored if the pair is to be."""
    pair, source = job.pair, job.pair.source_image
    images = pair.images if source is None else (*pair.images, source)
    mirrored = key.flip_seed is not None and flips(pair.caption, key.flip_seed, pair.digest, 0)
    return flip(*images) if mirrored else images


def sources(
    model: DiffusionModel, jobs: Sequence[Job], images: Sequence[Sequence[Image.Image]]
) -> Condition:
    """Encode the images that pairs edit, [P, ...]; empty if there are none.

    Args:
        model: of a family that edits.
        jobs: P pairs of one size.
        images: the source of each, or nothing.
    """
    fitted = [
        fit(source, model.source_size(job.place.size), job.place.fit).image
        for job, given in zip(jobs, images, strict=True)
        for source in given
    ]
    return {"source": model.encode(stack_pixels(fitted))} if fitted else {}
