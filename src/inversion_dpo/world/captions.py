"""The vocabulary and the caption grammar of the embedded world.

An item's ``label`` is its shape and its ``attributes`` are (size, colour).
"""

from __future__ import annotations

import re
from dataclasses import replace

from inversion_dpo.graphs.graph import Item, Relation, SceneGraph

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")


def caption_of(items: tuple[Item, ...], relations: tuple[Relation, ...]) -> str:
    """Say a chain of objects in English.

    >>> a, b = Item(0, "star", ("small", "red")), Item(1, "cross", ("large", "blue"))
    >>> caption_of((a, b), (Relation(0, "above", 1),))
    'a small red star above a large blue cross'
    """
    words = f"a {items[0].name}"
    for k, (relation, item) in enumerate(zip(relations, items[1:], strict=True)):
        words += f"{' which is' if k else ''} {relation.relation} a {item.name}"
    return words


_RELATION = re.compile(rf" (?:which is )?({'|'.join(RELATIONS)}) a ")


def parse_caption(caption: str) -> SceneGraph:
    """Inverse of :func:`caption_of`; ValueError if the caption is not of the grammar."""
    text = " ".join(caption.lower().split())
    if not text.startswith("a "):
        raise ValueError(f"caption is not of the scenes grammar: {caption!r}")
    parts = _RELATION.split(text[2:])
    items = tuple(_parse_item(k, part, caption) for k, part in enumerate(parts[0::2]))
    relations = tuple(Relation(k, r, k + 1) for k, r in enumerate(parts[1::2]))
    return SceneGraph(items, relations, caption)


def _parse_item(item_id: int, text: str, caption: str) -> Item:
    words = tuple(text.split())
    if not (len(words) == 3 and words[0] in SIZES and words[1] in COLOURS and words[2] in SHAPES):
        raise ValueError(f"{text!r} is not '<size> <colour> <shape>' in caption {caption!r}")
    return Item(item_id, words[2], words[:2])


def with_entailed(graph: SceneGraph) -> SceneGraph:
    """Build a chain with the relations that it entails: a left of b left of c puts a left of c.

    A relation is the axis on which two objects differ most. Where both steps are along the same
    axis and way, so is their sum; of any other two steps nothing follows.
    """
    added = [
        Relation(j, graph.relations[j].relation, k + 1)
        for j in range(len(graph.relations))
        for k in range(j + 1, len(graph.relations))
        if len({r.relation for r in graph.relations[j : k + 1]}) == 1
    ]
    return replace(graph, relations=(*graph.relations, *added))
