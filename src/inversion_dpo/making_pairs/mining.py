"""Which of a prompt's images become pairs: small pure functions of their scores.

A group is a prompt's images, each as its scores by name, higher is better. What is found are places
in the group. Images of equal score are told apart by their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from inversion_dpo.data.images import DataError

Scores = Mapping[str, float]

# Scores that were trained as log-odds: sigmoid(slope x difference) is the scorer's own probability.
# PickScore: softmax of its scores. ImageReward: Bradley-Terry on the reward before it is divided by
# 1.0333. HPSv2: softmax of 100 x cosine. Others only say which is higher.
SLOPES = {"pickscore": 1.0, "imagereward": 1.0333394966054072, "hpsv2": 100.0, "hpsv21": 100.0}


@dataclass(frozen=True)
class Mined:
    """Places of winner and loser, and the probability, above one half, that it is so."""

    winner: int
    loser: int
    preference: float


Miner = Callable[[Sequence[Scores], Sequence[str], float], list[Mined]]


def best_worst(group: Sequence[Scores], by: Sequence[str], least: float) -> list[Mined]:
    """Pair the image of the highest mean score with the one of the lowest.

    Choose it where every prompt shall count once and contrasts shall be clear.
    """
    value = means(group, by)
    order = sorted(range(len(group)), key=lambda k: value[k])
    return _apart(value, [(max(order, key=lambda k: value[k]), order[0])], least) if group else []


def margin(group: Sequence[Scores], by: Sequence[str], least: float) -> list[Mined]:
    """Pair every two images whose mean scores differ by at least ``least``, the widest first.

    Choose it where sampling is dear: a prompt gives several pairs, none of them a close call.
    """
    return _apart(means(group, by), permutations(range(len(group)), 2), least)


def every(group: Sequence[Scores], by: Sequence[str], least: float) -> list[Mined]:
    """Pair every two images of different mean scores, whatever ``least`` is, the widest first.

    Choose it to train with soft labels, which weigh the close calls down.
    """
    return margin(group, by, 0.0)


def pareto(group: Sequence[Scores], by: Sequence[str], least: float) -> list[Mined]:
    """Pair every two images of which one is ``least`` better in the mean and worse in no score.

    The widest come first. Choose it where no score may be bought with another one.
    """
    names = _named(group, by)
    return [
        replace(p, preference=preference(group[p.winner], group[p.loser], by))
        for p in margin(group, by, least)
        if all(group[p.winner][name] >= group[p.loser][name] for name in names)
    ]


def majority(group: Sequence[Scores], by: Sequence[str], least: float) -> list[Mined]:
    """Pair the image that most scores prefer with the one that fewest prefer.

    ``least``: the least share of votes for the winner, above one half. Choose it where scores have
    no common scale, such as those of several learned judges.
    """
    strength = [
        sum(preference(a, b, by) for k, b in enumerate(group) if k != j)
        for j, a in enumerate(group)
    ]
    order = sorted(range(len(group)), key=lambda k: (-strength[k], k))
    if len(order) < 2:
        return []
    share = preference(group[order[0]], group[order[-1]], by)
    sure = share > 0.5 and share >= least - 1e-12
    return [Mined(order[0], order[-1], share)] if sure else []


MINERS: dict[str, Miner] = {
    "best_worst": best_worst,
    "margin": margin,
    "pareto": pareto,
    "majority": majority,
    "all": every,
}


def disjoint(pairs: Sequence[Mined]) -> list[Mined]:
    """Give the first pairs that share no image: each image stands in one pair at most."""
    kept: list[Mined] = []
    for pair in pairs:
        if not {pair.winner, pair.loser} & {k for p in kept for k in (p.winner, p.loser)}:
            kept.append(pair)
    return kept


def means(group: Sequence[Scores], by: Sequence[str]) -> list[float]:
    """Take the mean of the named scores of each image; DataError if one is not there."""
    names = _named(group, by)
    return [sum(scores[name] for name in names) / len(names) for scores in group]


def preference(first: Scores, second: Scores, by: Sequence[str]) -> float:
    """Take the mean over the named scores of the probability that the first is preferred.

    Without a slope in SLOPES a score says 1, 0, or one half where both are equal: then it is the
    share of votes. DataError if a score is not there.
    """
    votes = []
    for name in _named([first, second], by):
        gap, slope = first[name] - second[name], SLOPES.get(name)
        votes.append(float(np.sign(gap) + 1) / 2 if slope is None else sigmoid(slope * gap))
    return sum(votes) / len(votes)


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), without overflow."""
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def _named(group: Sequence[Scores], by: Sequence[str]) -> Sequence[str]:
    """Give the names to go by: all, if none is given."""
    there = list(group[0]) if group else []
    for name in by:
        if group and name not in there:
            raise DataError(f"no score {name!r} to go by; there are {', '.join(there)}")
    return by or there


def _apart(value: Sequence[float], pairs: Iterable[tuple[int, ...]], least: float) -> list[Mined]:
    """Those whose winner's value is higher, by ``least``; the widest first.

    Their probability is the sigmoid of the gap, as SmPO has it (2025,
    https://arxiv.org/abs/2506.02698).
    """
    gaps = {(w, l): value[w] - value[l] for w, l in pairs}
    wide = sorted((-gap, pair) for pair, gap in gaps.items() if gap > 0 and gap >= least)
    return [Mined(w, l, sigmoid(-gap)) for gap, (w, l) in wide]
