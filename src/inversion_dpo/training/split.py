"""Which pairs are trained on, and which are held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from scipy.cluster.hierarchy import DisjointSet

T = TypeVar("T")


def split_pairs(
    numbers: Sequence[int], holdout: float, images: Sequence[Sequence[str]] = (), seed: int = 0
) -> tuple[list[int], list[int]]:
    """Shuffle pair numbers and set a share aside (at least one): training, held-out.

    Pairs that share an image, also by way of other pairs, stay together. Such groups are set aside
    in the order of the shuffle as long as they fit; if none fits, the smallest one is. Only where
    that has more than half of the pairs are they set aside one by one.

    Args:
        numbers: of the pairs, which ascend.
        holdout: ``data.holdout``, the share that is set aside.
        images: marks of each pair's images, by its number; without them no pair shares one.
        seed: of the shuffle.
    """
    count, held = len(numbers), list[int]()
    most = min(count - 1, max(1, round(count * holdout)))
    groups = _shuffled(grouped(numbers, images), seed)
    for group in groups:
        held += group if len(held) + len(group) <= most else []
    if not held:
        least = min(groups, key=len)
        held = least if 2 * len(least) <= count else _shuffled(numbers, seed)[:most]
    return sorted({*numbers} - {*held}), sorted(held)


def grouped(numbers: Sequence[int], images: Sequence[Sequence[str]]) -> list[list[int]]:
    """Put pairs together that share an image, each group in the place of its first pair.

    Args:
        numbers: of the pairs, which ascend.
        images: marks of each pair's images, by its number; none if that is not known.
    """
    groups, first = DisjointSet(numbers), dict[str, int]()
    for number in numbers:
        for mark in images[number] if images else ():
            groups.merge(first.setdefault(mark, number), number)
    return sorted(map(sorted, groups.subsets()))


def _shuffled(items: Sequence[T], seed: int) -> list[T]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[k] for k in order.tolist()]
