"""The exact checker as a scorer: ``evaluation.scorer=scenes``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.world.captions import parse_caption
from inversion_dpo.world.checker import detect, score

NAMES = (
    "sg_iou",
    "entity_iou",
    "relation_iou",
    "exact",
    "composition",
    "warmth",
    "shape_quality",
)


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
