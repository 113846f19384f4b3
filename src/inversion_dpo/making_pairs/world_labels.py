"""What makes preference pairs of samples of the embedded world: the exact checker's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.making_pairs.labelling import Labelling
from inversion_dpo.world.checker import detect, score

# The shipped pairs: least differences of winner and loser as they were built with.
LABELLINGS = {
    "taste": Labelling(("warmth",), "best_worst", 0.25),  # a warm ground, never asked for
    "composition": Labelling(("composition",), "best_worst", 0.2),  # what the caption asks for
}


def score_image(graph: SceneGraph, image: NDArray[np.uint8]) -> dict[str, float]:
    """Every score of the checker, and ``composition``, for one image [64, 64, 3] of a prompt."""
    scores = score(graph, detect(image))
    return {**asdict(scores), "composition": scores.composition}


def judge_scenes(
    images: Sequence[NDArray[np.uint8]], graphs: Sequence[SceneGraph]
) -> tuple[dict[str, NDArray[np.float64]], list[SceneGraph]]:
    """Scores [B] by name and the graphs found, of images [64, 64, 3] against what is asked for."""
    found = [detect(image) for image in images]
    scores = [score(graph, seen) for graph, seen in zip(graphs, found, strict=True)]
    rows = [{**asdict(s), "composition": s.composition} for s in scores]
    return (
        {name: np.array([row[name] for row in rows]) for name in rows[0]},
        [seen.graph() for seen in found],
    )
