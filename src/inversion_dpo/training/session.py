"""What is alive during a training, and the order in which it visits the pairs."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from inversion_dpo.data.transforms import Size
from inversion_dpo.models.base import DiffusionModel
from inversion_dpo.run.processes import Team
from inversion_dpo.training.plan import Plan
from inversion_dpo.training.policy import Policy
from inversion_dpo.trajectories.cache import TrajectoryCache

T = TypeVar("T")


@dataclass
class Session:
    """Everything that is alive during training.

    network: the prepared policy network, which every forward goes through. coefficients: whatever
    adapts, kept in checkpoints. skipped: steps whose loss or gradient was not finite; updates: the
    others. initial: the trainable tensors before step 0, until they are seen to move. moved: those
    of a reference that moves; empty if it does not. settings: that checkpoints are of.
    """

    accelerator: Accelerator
    model: DiffusionModel
    policy: Policy
    network: nn.Module
    optimizer: Any
    cache: TrajectoryCache
    train_pairs: list[int]
    buckets: list[list[int]]  # the same, by the size of their pictures
    heldout_pairs: list[int]
    plan: Plan
    clip: float
    max_skipped: int
    keep_checkpoints: int
    team: Team = field(default_factory=Team)
    coefficients: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    updates: int = 0
    initial: dict[str, Tensor] = field(default_factory=dict)
    moved: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def split_by(items: Iterable[T], size_of: Callable[[T], Size]) -> list[list[T]]:
    """Split items by size, smallest first; within a size their order stays."""
    return [list(group) for _, group in groupby(sorted(items, key=size_of), size_of)]


def batch_of_step(
    buckets: Sequence[list[int]], batch: int, seed: int, number: int
) -> list[tuple[int, int]]:
    """List the global batch of a step as (pair, epoch), all of one bucket.

    By the end of epoch e a bucket of n pairs gave floor(n e / B) batches, so that every pair is
    seen equally often. The batches of an epoch are shuffled over the buckets; each takes the
    bucket's next pairs. All follows from seed and step, and a single bucket is
    :func:`pairs_of_step`.

    Args:
        buckets: numbers of pairs, by the size of their pictures.
        batch: pairs of a step, B.
        seed: of the run.
        number: of the step, from 0.
    """
    counts = tuple(map(len, buckets))
    epoch = epoch_of_step(counts, batch, number)
    done = sum(n * (epoch - 1) // batch for n in counts)
    bucket, place = epoch_batches(counts, batch, seed, epoch)[number - done]
    return pairs_of_step(buckets[bucket], batch, seed, place)


def epoch_of_step(counts: Sequence[int], batch: int, number: int) -> int:
    """Find the epoch, from 1, in which buckets of so many pairs give the batch of a step.

    Args:
        counts: pairs of each bucket.
        batch: pairs of a step.
        number: of the step, from 0.
    """
    most = (number + 1 + len(counts)) * batch // sum(counts) + 1
    return bisect_right(
        range(most + 1), number, key=lambda epoch: sum(n * epoch // batch for n in counts)
    )


@lru_cache(maxsize=2)
def epoch_batches(
    counts: tuple[int, ...], batch: int, seed: int, epoch: int
) -> list[tuple[int, int]]:
    """List an epoch's batches in their order, each as (bucket, number among the bucket's own)."""
    first = [n * (epoch - 1) // batch for n in counts]
    names = [k for k, n in enumerate(counts) for _ in range(first[k], n * epoch // batch)]
    following = [itertools.count(start) for start in first]
    order = epoch_order(len(names), seed, -epoch).tolist()
    return [(names[i], next(following[names[i]])) for i in order]


def pairs_of_step(pairs: list[int], batch: int, seed: int, number: int) -> list[tuple[int, int]]:
    """List the global batch of a step as (pair, epoch): permutations laid end to end."""
    chosen: list[tuple[int, int]] = []
    while len(chosen) < batch:
        epoch, offset = divmod(number * batch + len(chosen), len(pairs))
        order = epoch_order(len(pairs), seed, epoch)[offset : offset + batch - len(chosen)]
        chosen += [(pairs[i], epoch) for i in order.tolist()]
    return chosen


@lru_cache(maxsize=64)  # two for each bucket
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Shuffle an epoch; kept, for a million pairs take longer to shuffle than a step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)
