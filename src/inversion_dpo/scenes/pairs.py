"""Preference pairs from samples of the embedded world: best against worst of one prompt.

The files have Pick-a-Pic's columns (Kirstain et al., 2023, https://arxiv.org/abs/2305.01569) and
are read by :mod:`inversion_dpo.data.pairs` like anybody else's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.data.candidates import Candidate as Candidate
from inversion_dpo.data.candidates import encode_image as encode_image
from inversion_dpo.data.candidates import write_pairs as write_pairs
from inversion_dpo.data.images import decode_image
from inversion_dpo.graphs import SceneGraph
from inversion_dpo.scenes.checker import detect, score

LABELLINGS: dict[str, Callable[[Mapping[str, float]], float]] = {
    "taste": lambda scores: scores["warmth"],  # a warm ground, which no caption asks for
    "composition": lambda scores: scores["composition"],  # what the caption asks for
}
def score_image(graph: SceneGraph, image: NDArray[np.uint8]) -> dict[str, float]:
    """Every score of the checker, and ``composition``, for one image [64, 64, 3] of a prompt."""
    scores = score(graph, detect(image))
    return {**asdict(scores), "composition": scores.composition}


def candidate(graph: SceneGraph, seed: int, image: NDArray[np.uint8]) -> Candidate:
    """Encode a sample [64, 64, 3], then score what is left: the label fits what training sees."""
    jpg = encode_image(image)
    stored = np.asarray(decode_image(jpg, f"seed {seed}"))
    return Candidate(graph.caption, graph.to_json(), seed, jpg, score_image(graph, stored))


def best_against_worst(
    candidates: Sequence[Candidate], key: str, margin: float
) -> tuple[Candidate, Candidate] | None:
    """(winner, loser) of one prompt's candidates; None if their scores differ by less than margin.

    Equal scores are decided by the lowest seed. Candidates that all score the same are no pair,
    whatever the margin.

    Raises:
        ValueError: ``key`` is not in LABELLINGS, or the candidates are of several captions.
    """
    if key not in LABELLINGS:
        raise ValueError(f"unknown labelling {key!r}; one of {', '.join(LABELLINGS)}")
    if len({c.caption for c in candidates}) > 1:
        raise ValueError("candidates of one pair must share their caption")
    if not candidates:
        return None
    value = LABELLINGS[key]
    winner = min(candidates, key=lambda c: (-value(c.scores), c.seed))
    loser = min(candidates, key=lambda c: (value(c.scores), c.seed))
    gap = value(winner.scores) - value(loser.scores)
    return (winner, loser) if gap > 0 and gap >= margin else None


def soft_label(winner: Candidate, loser: Candidate, key: str) -> float:
    """Probability that the winner is the better one, sigmoid of the gap; scores are in [0, 1].

    As SmPO has it (2025, https://arxiv.org/abs/2506.02698).
    """
    value = LABELLINGS[key]
    return 1 / (1 + math.exp(value(loser.scores) - value(winner.scores)))
