"""Exact checker of the embedded world: image -> detected scene graph, and scores against a graph.

Pixels are labelled with the nearest palette colour or the ground; connected components are
matched to rendered templates by soft IoU. Metrics are the set IoUs of exact triples that
LAION-SG defines (Li et al., 2024, https://arxiv.org/abs/2412.08580).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from inversion_dpo.graphs.graph import Agreement, Item, Relation, SceneGraph, agreement
from inversion_dpo.run.config import ConfigError
from inversion_dpo.world.captions import SHAPES, SIZES, parse_caption
from inversion_dpo.world.drawing import (
    CROP,
    IMAGE_SIZE,
    PALETTE,
    coverage,
    dominant_relation,
    ground_colour,
    quantise,
)

NAMES = ("sg_iou", "entity_iou", "relation_iou", "exact", "composition", "warmth", "shape_quality")
MIN_CONFIDENCE = 0.7  # a component matching no template this well is a "blob"
_MIN_AREA = 20  # pixels; smaller components are antialiasing or specks
_MIN_CORE = 3  # pixels left after a 3x3 erosion; thin fringes have none
_COLOURS = tuple(PALETTE)
_PALETTE = np.array([PALETTE[c] for c in _COLOURS], float)
_WARMTH_AXIS = ground_colour(1.0) - ground_colour(0.0)


@dataclass(frozen=True)
class Detection:
    """One object found: centre (x, y) in pixels; confidence is the soft IoU, 0 to 1."""

    label: str
    size: str
    colour: str
    x: float
    y: float
    confidence: float


@dataclass(frozen=True)
class Detected:
    """Everything found in one image; ``warmth`` is the ground's, 0 cool to 1 warm (unclipped)."""

    objects: tuple[Detection, ...]
    warmth: float

    def graph(self) -> SceneGraph:
        """All objects and, for each ordered pair, the relation along its dominant axis."""
        items = tuple(Item(k, o.label, (o.size, o.colour)) for k, o in enumerate(self.objects))
        relations = []
        for j, a in enumerate(self.objects):
            for k, b in enumerate(self.objects):
                if j != k and (r := dominant_relation((a.x, a.y), (b.x, b.y))):
                    relations.append(Relation(j, r, k))
        return SceneGraph(items, tuple(relations))


@dataclass(frozen=True)
class SceneScores(Agreement):
    """Scores of one image against the graph its caption states; all but warmth in [0, 1]."""

    shape_quality: float
    warmth: float

    @property
    def composition(self) -> float:
        """What the caption asks for: mean of entity and scene-graph IoU."""
        return 0.5 * (self.entity_iou + self.sg_iou)


def detect(image: NDArray[np.uint8]) -> Detected:
    """Find the objects in a uint8 image [64, 64, 3]; ConfigError on any other shape."""
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ConfigError(
            f"evaluation.scorer=scenes reads pictures of {IMAGE_SIZE}x{IMAGE_SIZE} pixels of the "
            f"embedded world alone, not {list(image.shape)}: give another scorer, or null"
        )
    pixels = image.astype(float)
    ground = _ground(pixels)
    nearest = _nearest(pixels, ground)
    found = [(c, m) for c in range(len(_COLOURS)) for m in _components(nearest == c)]
    taken = np.sum([m for _, m in found], axis=0) if found else np.zeros(nearest.shape, int)
    objects = [_recognise(pixels, ground, _COLOURS[c], m, (taken - m) > 0) for c, m in found]
    objects.sort(key=lambda o: (o.y, o.x))
    warmth = (ground - ground_colour(0.0)) @ _WARMTH_AXIS / (_WARMTH_AXIS @ _WARMTH_AXIS)
    return Detected(tuple(objects), float(warmth))


def _nearest(pixels: NDArray[np.float64], ground: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index [64, 64] of each pixel's nearest palette colour; -1 for the ground, also on a tie."""
    colours = np.concatenate([ground[None], _PALETTE])
    # |p - c|^2 without |p|^2, which is the same for every colour
    return np.asarray(((colours**2).sum(-1) - 2 * pixels @ colours.T).argmin(-1) - 1)


def _ground(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """RGB of the ground: the median pixel, then the median over what is nearest to it.

    The first alone is pulled towards the objects' colours as soon as there is noise.
    """
    rough = np.median(pixels.reshape(-1, 3), axis=0)
    ground = pixels[_nearest(pixels, rough) < 0]
    return np.asarray(np.median(ground, axis=0) if len(ground) else rough)


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    if mask.sum() < _MIN_AREA:  # most colours are not there at all
        return []
    labels, count = ndimage.label(mask)
    core = ndimage.binary_erosion(mask, np.ones((3, 3)))
    parts = (labels == k for k in range(1, count + 1))
    return [p for p in parts if p.sum() >= _MIN_AREA and (p & core).sum() >= _MIN_CORE]


def _recognise(
    pixels: NDArray[np.float64],
    ground: NDArray[np.float64],
    colour: str,
    component: NDArray[np.bool_],
    others: NDArray[np.bool_],
) -> Detection:
    """Match one component to every (shape, size) template laid on its centroid."""
    axis = np.array(PALETTE[colour], float) - ground
    alpha = np.clip((pixels - ground) @ axis / max(float(axis @ axis), 1.0), 0, 1)
    near = ndimage.binary_dilation(component, iterations=2) & ~others
    alpha = np.where(near, alpha, 0.0)
    area, along = alpha.sum(), np.arange(IMAGE_SIZE)
    cx, cy = alpha.sum(0) @ along / area, alpha.sum(1) @ along / area
    best = ("blob", "small", cx, cy, 0.0)
    for shape in SHAPES:
        for size in SIZES:
            ox, oy = _centroid(shape, size)
            iou = _soft_iou(alpha, area, shape, size, cx - ox, cy - oy)
            if iou > best[4]:
                best = (shape, size, cx - ox, cy - oy, iou)
    label = best[0] if best[4] >= MIN_CONFIDENCE else "blob"
    return Detection(label, best[1], colour, float(best[2]), float(best[3]), best[4])


def _soft_iou(
    alpha: NDArray[np.float64], area: float, shape: str, size: str, x: float, y: float
) -> float:
    """Sum of minima over sum of maxima of alpha, whose sum is ``area``, and the drawn template.

    Only where the template is: the maxima's sum is both areas less the minima's.
    """
    (col, phase_x), (row, phase_y) = quantise(x), quantise(y)
    top, left = row - CROP // 2, col - CROP // 2
    seen = alpha[max(0, top) : top + CROP, max(0, left) : left + CROP]
    cover = coverage(shape, size, phase_x, phase_y)[max(0, -top) :, max(0, -left) :]
    cover = cover[: seen.shape[0], : seen.shape[1]]
    shared = np.minimum(seen, cover).sum()
    return float(shared / (area + cover.sum() - shared))


@lru_cache(maxsize=64)
def _centroid(shape: str, size: str) -> tuple[float, float]:
    cover = coverage(shape, size, 0.0, 0.0)
    rows, cols = np.indices(cover.shape) - cover.shape[0] // 2
    return float((cols * cover).sum() / cover.sum()), float((rows * cover).sum() / cover.sum())


def score(intended: SceneGraph, detected: Detected) -> SceneScores:
    """Compare a detected scene with the graph its caption states."""
    quality = float(np.mean([o.confidence for o in detected.objects] or [0.0]))
    found = agreement(intended, detected.graph())
    return SceneScores(**asdict(found), shape_quality=quality, warmth=detected.warmth)


def judge(
    images: Sequence[NDArray[np.uint8]],
    prompts: Sequence[str],
    graphs: Sequence[SceneGraph | None] | None = None,
) -> dict[str, Any]:
    """Score images [B] by name, and give under ``graph`` the scene graph found in each image.

    Args:
        images: uint8 [64, 64, 3].
        prompts: captions of the embedded world, one for each image.
        graphs: what each prompt asks for; None: what its caption says.

    Raises:
        ValueError: a prompt without a graph is not of the caption grammar.
    """
    given = graphs or [None] * len(prompts)
    asked = [g if g and g.items else parse_caption(p) for g, p in zip(given, prompts, strict=True)]
    seen = [detect(image) for image in images]
    found = [score(graph, d) for graph, d in zip(asked, seen, strict=True)]
    scores = {n: np.array([getattr(s, n) for s in found], dtype=np.float64) for n in NAMES}
    return scores | {"graph": [d.graph() for d in seen]}
