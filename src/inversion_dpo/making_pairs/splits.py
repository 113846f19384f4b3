"""Splits by what is asked for: the same scene never stands in two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.graphs.scene_key import SceneKey


def split_by_hash(graph: SceneGraph, shares: Mapping[str, float]) -> str:
    """One of the splits, in proportion to their shares, from the SHA-256 of the scene's text."""
    digest = hashlib.sha256(SceneKey(graph).text.encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64 * sum(shares.values())
    for name, share in shares.items():
        place -= share
        if place < 0:
            return name
    return list(shares)[-1]


def leaks(splits: Mapping[str, Iterable[SceneGraph]]) -> list[str]:
    """A line for each scene that stands in more than one split."""
    seen: dict[SceneKey, str] = {}
    found = []
    for split, graphs in splits.items():
        for graph in graphs:
            first = seen.setdefault(SceneKey(graph), split)
            if first != split:
                found.append(f"{graph.caption!r} stands in {first} and in {split}")
    return found
