"""What several labellers' choices come to: an outcome for each pair, and how far they agree."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

CHOICES = ("first", "second", "tie", "bad")  # bad: both images are
UNSURE = "unsure"
# What may be said of a pair of images, and of a single one.
KINDS = {
    "pairs": CHOICES,
    "thumbs": ("up", "down", UNSURE),
    "ratings": ("1", "2", "3", "4", "5", UNSURE),
}
Votes = Mapping[str, Mapping[str, str]]  # pair -> labeller -> choice


def outcome(choices: Iterable[str]) -> str:
    """Find the choice with the most votes; "split" if there is no single one; "unlabelled" of none.

    One vote decides alone. Two labellers who differ are split, whatever they chose.
    """
    ranked = Counter(choices).most_common(2)
    if not ranked:
        return "unlabelled"
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        return "split"
    return ranked[0][0]


def share(choices: Iterable[str]) -> float | None:
    """Compute the share of choices that prefer the first image, a tie for half; None of none."""
    weight = {"first": 1.0, "tie": 0.5, "second": 0.0}
    said = [weight[choice] for choice in choices if choice in weight]
    return fmean(said) if said else None


@dataclass(frozen=True)
class Agreement:
    """How far labellers agree on the ``pairs`` that at least two of them labelled.

    same: share of equal choices among all pairs of choices on one pair of images. alpha:
    Krippendorff's; None where it is not defined: fewer than two different choices.
    """

    pairs: int
    same: float | None
    alpha: float | None


def agreement(votes: Votes, kind: str = "pairs") -> Agreement:
    """Measure the agreement of all labellers: nominal, of ratings ordinal; who is unsure is silent.

    Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011,
    https://repository.upenn.edu/handle/20.500.14332/2089: 1 is perfect, 0 what chance would give.
    """
    said = ([choice for choice in by.values() if choice != UNSURE] for by in votes.values())
    shared = [choices for choices in said if len(choices) > 1]
    if not shared:
        return Agreement(0, None, None)
    equal = [a == b for choices in shared for a, b in itertools.combinations(choices, 2)]
    return Agreement(len(shared), sum(equal) / len(equal), _alpha(shared, kind))


def _alpha(shared: list[list[str]], kind: str) -> float | None:
    if len({choice for choices in shared for choice in choices}) < 2:
        return None
    import krippendorff

    counts = [[choices.count(choice) for choice in KINDS[kind]] for choices in shared]
    level: Any = "ordinal" if kind == "ratings" else "nominal"
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement=level))
