"""Compositional prompts of the embedded world, by what has to be kept apart.

The categories follow GenEval (Ghosh et al., 2023, https://arxiv.org/abs/2310.11513) and
T2I-CompBench (Huang et al., 2023, https://arxiv.org/abs/2307.06350) as far as this world has them:
colours, shapes and sizes to be bound to objects, places of two objects, and chains of three and
four. ``python -m tools.embedded.compositional`` writes every prompt set that ships.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from inversion_dpo.graphs.graph import Item, Relation, SceneGraph
from inversion_dpo.run.config import PACKAGE
from inversion_dpo.run.disk import atomic_text
from inversion_dpo.world.captions import COLOURS, RELATIONS, SHAPES, SIZES, caption_of
from inversion_dpo.world.scene_prompts import prompts, split_of

CATEGORIES = (
    "single_object",
    "color_binding",
    "shape_binding",
    "size_binding",
    "position",
    "complex",
)


def category_of(graph: SceneGraph) -> str:
    """Which of CATEGORIES a scene graph belongs to.

    Two objects that agree in two of shape, colour and size and differ in the third test the
    binding of that one; any other two test their places; three and four are ``complex``.
    """
    if len(graph.items) == 1:
        return "single_object"
    if len(graph.items) > 2:
        return "complex"
    first, second = ((*item.attributes, item.label) for item in graph.items)
    names = ("size_binding", "color_binding", "shape_binding")
    differing = [n for n, a, b in zip(names, first, second, strict=True) if a != b]
    return differing[0] if len(differing) == 1 else "position"


def small_graphs() -> Iterator[SceneGraph]:
    """Every scene of one object, then every scene of two different ones."""
    kinds = [
        Item(0, shape, (size, colour)) for size in SIZES for colour in COLOURS for shape in SHAPES
    ]
    yield from (SceneGraph((a,), (), caption_of((a,), ())) for a in kinds)
    for a, b, relation in product(kinds, kinds, RELATIONS):
        if a != b:
            items, link = (a, replace(b, item_id=1)), (Relation(0, relation, 1),)
            yield SceneGraph(items, link, caption_of(items, link))


def compositional_prompts(most: int, split: str = "test") -> list[tuple[str, str]]:
    """(category, caption) of a split: at most ``most`` of each category, drawn with seed 0.

    Of single objects and of sizes the split holds few: this world has 96 and 384 such captions.
    """
    graphs = [g for g in small_graphs() if split_of(g.caption) == split]
    graphs += [g for g in prompts(split, 1000) if len(g.items) > 2]
    order = np.random.default_rng(0).permutation(len(graphs))
    found: dict[str, list[str]] = {name: [] for name in CATEGORIES}
    for k in order:
        captions = found[category_of(graphs[k])]
        captions += [graphs[k].caption] if len(captions) < most else []
    return [(name, caption) for name in CATEGORIES for caption in found[name]]


def write_compositional(path: Path, most: int) -> None:
    """One JSON object a line: ``category`` and ``prompt``."""
    rows = compositional_prompts(most)
    lines = [json.dumps({"category": name, "prompt": caption}) for name, caption in rows]
    atomic_text("\n".join(lines) + "\n", path)


def write_split(split: str, path: Path) -> None:
    """1000 captions of a split, one a line."""
    atomic_text("".join(f"{graph.caption}\n" for graph in prompts(split, 1000)), path)


def write_all(folder: Path) -> None:
    """Every prompt set that ships with the package."""
    write_compositional(folder / "prompts-compositional.jsonl", 50)
    for split in ("validation", "test"):
        write_split(split, folder / f"prompts-{split}.txt")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    write_all(PACKAGE / "assets")
