"""Decide by T2I-CompBench's rule how well two boxes stand as a prompt asks.

Source: Huang et al., T2I-CompBench, 2023, https://arxiv.org/abs/2307.06350; code (MIT):
https://github.com/Karine-Huang/T2I-CompBench, UniDet_eval/2D_spatial_eval.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from inversion_dpo.evaluation.scorers.geneval_rule import Detection

BESIDE = ("on side of", "next to", "near")
LEFT, RIGHT, BOTTOM, TOP = (f"on the {side} of" for side in ("left", "right", "bottom", "top"))
FORM = re.compile(rf"an? (.+?) ({'|'.join((*BESIDE, LEFT, RIGHT, BOTTOM, TOP))}) an? (.+?)\.?")
PEOPLE = ("girl", "boy", "man", "woman")  # each is looked for as a person
OVERLAP = 0.1  # intersection over union: below it two boxes stand apart
NEAR = 150  # pixels between the centres, in an image of the size that the authors resize to
LEAST = 0.5  # a lower score is 0


class Asked(NamedTuple):
    """What a prompt asks for: the first object stands in the relation to the second."""

    first: str
    relation: str
    second: str


def read_relation(prompt: str) -> Asked | None:
    """Read "a dog on the left of a car", the form of T2I-CompBench's set; None for another one."""
    if (found := FORM.fullmatch(prompt.strip().lower())) is None:
        return None
    first, relation, second = found.groups()
    return Asked(*("person" if n in PEOPLE else n for n in (first, relation, second)))


def size_of(height: int, width: int) -> float:
    """Return the longer side that the authors resize to: the shorter has 479, no side above 480."""
    short, long = sorted((height, width))
    return min(480.0, 479.0 * long / short)


def score_of(asked: Asked, best: Mapping[str, Detection]) -> float:
    """Score half for the place and a quarter for each object's detection, in [0, 1].

    A score below one half is 0, and so is every image without one of the objects.

    Args:
        asked: of the prompt.
        best: name -> its surest detection, if there is one, in an image of the authors' size.
    """
    if asked.first not in best or asked.second not in best:
        return 0.0
    one, other = best[asked.first], best[asked.second]
    score = 0.25 * (one.score + other.score) + placed(asked.relation, one.box, other.box) / 2
    return score if score >= LEAST else 0.0


def placed(
    relation: str,
    first: tuple[float, float, float, float],
    second: tuple[float, float, float, float],
) -> float:
    """Tell how well the first box stands to the second, in [0, 1]: left, top, right, bottom.

    A direction holds if it is the greater part of the offset; overlapping boxes count less.
    """
    x, y = ((second[k] + second[k + 2]) / 2 - (first[k] + first[k + 2]) / 2 for k in (0, 1))
    if relation in BESIDE:
        return 1.0 if min(abs(x), abs(y)) < NEAR else NEAR / max(abs(x), abs(y))
    far, aside = {LEFT: (x, y), RIGHT: (-x, y), TOP: (y, x), BOTTOM: (-y, x)}[relation]
    if far <= abs(aside):
        return 0.0
    share = overlap(first, second)
    return 1.0 if share < OVERLAP else OVERLAP / share


def overlap(
    first: tuple[float, float, float, float], second: tuple[float, float, float, float]
) -> float:
    """Compute intersection over union of two boxes that are not empty."""
    sides = [min(first[k + 2], second[k + 2]) - max(first[k], second[k]) for k in (0, 1)]
    common = max(0.0, sides[0]) * max(0.0, sides[1])
    one, other = ((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return common / (one + other - common)
