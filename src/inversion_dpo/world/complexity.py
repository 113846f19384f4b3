"""Scene graphs of the embedded world by how much they ask for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.world.captions import with_entailed
from inversion_dpo.world.drawing import sample_scene
from inversion_dpo.world.scene_prompts import SPLITS, split_of


def parse_kind(kind: str) -> tuple[int, int]:
    """``3/2``: three objects, at least two relations; ValueError if no chain of the world is that.

    A chain of n objects states n - 1 relations, and at most entails one for every two objects.
    """
    objects, _, relations = kind.partition("/")
    if objects in ("1", "2", "3", "4") and relations.isdecimal() and len(relations) < 3:
        n, least = int(objects), int(relations)
        if least <= n * (n - 1) // 2:
            return n, least
    raise ValueError(
        f"{kind!r} is not OBJECTS/RELATIONS, e.g. 3/2: 1 to 4 objects with at least so many "
        "relations, of which there is at most one for every two objects"
    )


def graphs_of(split: str, kind: str, seed: int) -> Iterator[SceneGraph]:
    """An endless, seeded stream of graphs of a split and a kind, entailed relations included.

    A graph may come again, which among single objects, of which a split holds few, it often does.
    """
    objects, least = parse_kind(kind)
    rng = np.random.default_rng([seed, SPLITS.index(split), objects, least])
    while True:
        graph = sample_scene(rng, objects).graph
        full = with_entailed(graph)
        if split_of(graph.caption) == split and len(full.relations) >= least:
            yield full
