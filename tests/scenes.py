"""The exact checker's scores of one image, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.world.checker import NAMES, judge


def judge_scenes(
    images: list[np.ndarray[Any, Any]], graphs: list[SceneGraph]
) -> tuple[dict[str, np.ndarray[Any, Any]], list[SceneGraph]]:
    """Scores [B] by name and the graphs found, of images [64, 64, 3] against what is asked for."""
    found = judge(images, [graph.caption for graph in graphs], graphs)
    return {name: found[name] for name in NAMES}, found["graph"]


def score_image(graph: SceneGraph, image: np.ndarray[Any, Any]) -> dict[str, float]:
    """Every score of one image [64, 64, 3] of a prompt."""
    return {name: float(v[0]) for name, v in judge_scenes([image], [graph])[0].items()}
