"""Which pairs a ranking of k images gives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

SCHEMES = ("best_worst", "adjacent", "all")


def order(ranks: Sequence[float], scheme: str) -> list[tuple[int, int]]:
    """Places (better, worse) of the pairs; 1 is better than 2.

    ``best_worst``: one pair. ``adjacent``: k - 1, each image with the next one down. ``all``:
    k (k - 1) / 2. Images of equal rank are paired like others, in their order in the data: the
    caller counts those pairs as ties.

    Raises:
        ValueError: an unknown scheme.
    """
    places = sorted(range(len(ranks)), key=lambda k: ranks[k])
    if scheme == "best_worst":
        return [(places[0], places[-1])] if len(places) > 1 else []
    if scheme == "adjacent":
        return list(pairwise(places))
    if scheme == "all":
        return list(combinations(places, 2))
    raise ValueError(f"ranking {scheme!r} is not one of {', '.join(SCHEMES)}")
