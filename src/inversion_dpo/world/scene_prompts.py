"""Prompt sets of the embedded world, split by a hash of the caption.

The base model and the preference pairs use ``train`` captions only; settings are chosen on
``validation``; ``test`` is what is reported. The split of a caption never changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.world.captions import with_entailed
from inversion_dpo.world.drawing import Scene, sample_scene

SPLITS = ("train", "validation", "test")


def split_of(caption: str) -> str:
    """train (90%), validation (5%) or test (5%), from the caption's SHA-256."""
    bucket = hashlib.sha256(caption.encode()).digest()[0] % 20
    return {18: "validation", 19: "test"}.get(bucket, "train")


def scenes(split: str, seed: int) -> Iterator[Scene]:
    """Yield an endless, seeded stream of scenes whose captions belong to ``split``."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    while True:
        scene = sample_scene(rng)
        if split_of(scene.graph.caption) == split:
            yield scene


def prompts(split: str, count: int, seed: int = 0) -> list[SceneGraph]:
    """``count`` distinct scene graphs of a split, in a fixed order."""
    seen: dict[str, SceneGraph] = {}
    for scene in scenes(split, seed):
        if len(seen) == count:
            break
        seen.setdefault(scene.graph.caption, scene.graph)
    return list(seen.values())


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
    """Yield an endless, seeded stream of graphs of a split and a kind, entailed relations included.

    A graph may come again, which among single objects, of which a split holds few, it often does.
    """
    objects, least = parse_kind(kind)
    rng = np.random.default_rng([seed, SPLITS.index(split), objects, least])
    while True:
        graph = sample_scene(rng, objects).graph
        full = with_entailed(graph)
        if split_of(graph.caption) == split and len(full.relations) >= least:
            yield full
