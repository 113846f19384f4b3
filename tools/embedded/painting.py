"""Pictures of the embedded world's scenes, for the shipped pairs, the pretraining and the tests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.world.drawing import (
    CLEAR,
    CROP,
    IMAGE_SIZE,
    PALETTE,
    RADIUS,
    Scene,
    coverage,
    dominant_relation,
    ground_colour,
    quantise,
    try_layout,
)


def place(cover: NDArray[np.float64], col: int, row: int) -> NDArray[np.float64]:
    """Put a crop with its middle pixel at (col, row) on an empty image; cut at the borders."""
    half = CROP // 2
    padded = np.zeros((IMAGE_SIZE + 2 * CROP, IMAGE_SIZE + 2 * CROP))
    top, left = row - half + CROP, col - half + CROP
    if 0 <= top <= IMAGE_SIZE + CROP and 0 <= left <= IMAGE_SIZE + CROP:
        padded[top : top + CROP, left : left + CROP] = cover
    return padded[CROP:-CROP, CROP:-CROP]


def draw(shape: str, size: str, x: float, y: float) -> NDArray[np.float64]:
    """Coverage [64, 64] of one object, its centre rounded to a quarter pixel."""
    (col, phase_x), (row, phase_y) = quantise(x), quantise(y)
    return place(coverage(shape, size, phase_x, phase_y), col, row)


def render(scene: Scene) -> NDArray[np.uint8]:
    """Paint a scene: uint8 [64, 64, 3]."""
    image = np.broadcast_to(ground_colour(scene.warmth), (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    for item, (x, y) in zip(scene.graph.items, scene.positions, strict=True):
        size, colour = item.attributes
        alpha = draw(item.label, size, x, y)[..., None]
        image = image * (1 - alpha) + np.array(PALETTE[colour], float) * alpha
    return np.round(image).astype(np.uint8)


def lay_out(rng: np.random.Generator, graph: SceneGraph) -> tuple[tuple[float, float], ...]:
    """Draw positions under which every relation of a graph is clear, by trying; see ``CLEAR``."""
    place = {item.item_id: k for k, item in enumerate(graph.items)}
    while True:
        found = try_layout(rng, [RADIUS[i.attributes[0]] for i in graph.items])
        if found and all(
            dominant_relation(found[place[r.item1]], found[place[r.item2]], CLEAR) == r.relation
            for r in graph.relations
        ):
            return found
