"""Sampling of scenes: 64x64 RGB, one to four flat shapes on a plain ground.

A scene is a :class:`~inversion_dpo.world.captions.SceneGraph` plus positions and a ground colour.
The caption states objects and relations; it never states the ground's ``warmth``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.graphs.graph import Item, Relation, SceneGraph
from inversion_dpo.world.captions import COLOURS, SHAPES, SIZES, caption_of

IMAGE_SIZE = 64
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 215, 40),
    "green": (40, 150, 60),
    "blue": (35, 80, 215),
    "purple": (125, 50, 170),
    "pink": (245, 110, 180),
    "black": (25, 25, 30),
}
RADIUS = {"small": 7.0, "large": 11.0}  # pixels
COOL_GROUND, WARM_GROUND = (200, 216, 242), (246, 226, 188)
CROP = 27  # pixels; holds any shape at any sub-pixel phase
_SUPERSAMPLE = 4
_OBJECT_COUNTS = (1, 2, 3, 4)
_OBJECT_PROBABILITIES = (0.15, 0.60, 0.18, 0.07)
_GAP = 2.0  # least distance between the circles around two objects, pixels
CLEAR = 4.0  # a stated relation's axis exceeds the other by at least this, pixels


@dataclass(frozen=True)
class Scene:
    """A scene graph with what its caption leaves open.

    positions: (x, y) centre of each item in pixels, x to the right, y down.
    warmth: 0 (cool, bluish ground) to 1 (warm, cream ground).
    """

    graph: SceneGraph
    positions: tuple[tuple[float, float], ...]
    warmth: float


def inside(shape: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points (u right, v down, in units of the radius) lie in the shape."""
    if shape == "circle":
        return np.asarray(u**2 + v**2 <= 0.92**2)
    if shape == "square":
        return np.asarray(np.maximum(abs(u), abs(v)) <= 0.82)
    if shape == "triangle":
        return np.asarray((v <= 0.8) & (abs(u) <= 0.56 * (v + 1.0)))
    if shape == "diamond":
        return np.asarray(abs(u) + abs(v) <= 1.0)
    if shape == "star":
        return _inside_star(u, v)
    if shape == "cross":
        arms = (abs(u) <= 0.32) & (abs(v) <= 0.95), (abs(v) <= 0.32) & (abs(u) <= 0.95)
        return np.asarray(arms[0] | arms[1])
    raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")


def _inside_star(
    u: NDArray[np.float64], v: NDArray[np.float64], outer: float = 1.08, inner: float = 0.46
) -> NDArray[np.bool_]:
    """Five-pointed star: fold the angle onto one half-point and test its straight edge."""
    half = np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + half) % (2 * half) - half)
    r = np.hypot(u, v)
    x, y = r * np.cos(angle), r * np.sin(angle)
    ix, iy = inner * np.cos(half), inner * np.sin(half)
    return np.asarray((x - outer) * iy - (ix - outer) * y <= 0)


@lru_cache(maxsize=4096)
def coverage(shape: str, size: str, phase_x: float, phase_y: float) -> NDArray[np.float64]:
    """Antialiased coverage [CROP, CROP] in [0, 1], centre at the middle pixel plus the phase."""
    n = CROP * _SUPERSAMPLE
    grid = (np.arange(n) + 0.5) / _SUPERSAMPLE - 0.5 - CROP // 2
    u = (grid[None, :] - phase_x) / RADIUS[size]
    v = (grid[:, None] - phase_y) / RADIUS[size]
    mask = inside(shape, *np.broadcast_arrays(u, v)).astype(np.float64)
    cover = mask.reshape(CROP, _SUPERSAMPLE, CROP, _SUPERSAMPLE).mean(axis=(1, 3))
    cover.setflags(write=False)
    return cover


def quantise(position: float) -> tuple[int, float]:
    """Split a coordinate into a pixel and a phase in quarter pixels."""
    quarter = round(position * 4) / 4
    pixel = int(np.floor(quarter + 0.5))
    return pixel, quarter - pixel


def ground_colour(warmth: float) -> NDArray[np.float64]:
    """RGB in 0..255 on the line from the cool to the warm ground."""
    cool, warm = np.array(COOL_GROUND, float), np.array(WARM_GROUND, float)
    return cool + (warm - cool) * warmth


def dominant_relation(
    a: tuple[float, float], b: tuple[float, float], clear: float = 0.0
) -> str | None:
    """How a lies to b along the axis on which they differ most; None if neither axis is clear."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    if abs(abs(dx) - abs(dy)) < clear:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def sample_scene(rng: np.random.Generator, n_objects: int | None = None) -> Scene:
    """Draw a scene: distinct objects, no overlap, every stated relation clear."""
    n = n_objects or int(rng.choice(_OBJECT_COUNTS, p=_OBJECT_PROBABILITIES))
    kinds = rng.choice(len(SIZES) * len(COLOURS) * len(SHAPES), size=n, replace=False)
    items = tuple(_item(k, int(kind)) for k, kind in enumerate(kinds))
    while True:
        positions = try_layout(rng, [RADIUS[i.attributes[0]] for i in items])
        if positions is None:
            continue
        stated = [dominant_relation(positions[k], positions[k + 1], CLEAR) for k in range(n - 1)]
        if None not in stated:
            break
    relations = tuple(Relation(k, str(r), k + 1) for k, r in enumerate(stated))
    graph = SceneGraph(items, relations, caption_of(items, relations))
    return Scene(graph, positions, float(rng.uniform()))


def _item(item_id: int, kind: int) -> Item:
    size, rest = divmod(kind, len(COLOURS) * len(SHAPES))
    colour, shape = divmod(rest, len(SHAPES))
    return Item(item_id, SHAPES[shape], (SIZES[size], COLOURS[colour]))


def try_layout(
    rng: np.random.Generator, radii: list[float]
) -> tuple[tuple[float, float], ...] | None:
    """Draw centres under which no two objects touch; None where there is no room."""
    placed: list[tuple[float, float]] = []
    for k, radius in enumerate(radii):
        for _ in range(20):
            low, high = radius + 1, IMAGE_SIZE - radius - 2
            x, y = rng.uniform(low, high, size=2)
            if all(
                np.hypot(x - px, y - py) >= radius + radii[j] + _GAP
                for j, (px, py) in enumerate(placed)
            ):
                placed.append((float(x), float(y)))
                break
        if len(placed) <= k:
            return None
    return tuple(placed)
