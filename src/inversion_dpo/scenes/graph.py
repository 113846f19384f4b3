"""Scene graphs in the field's schema, and the caption grammar of the embedded world.

The JSON layout is that of LAION-SG (Li et al., 2024, https://arxiv.org/abs/2412.08580):
``items[{item_id, label, attributes}]`` and ``relations[{triple_id, item1, relation, item2}]``
with the caption in ``caption_ori``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Item:
    """One object: ``label`` is its shape, ``attributes`` are (size, colour)."""

    item_id: int
    label: str
    attributes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The object in words, e.g. ``large red circle``."""
        return " ".join((*self.attributes, self.label))


@dataclass(frozen=True)
class Relation:
    """``item1 relation item2``; items are named by their ``item_id``."""

    item1: int
    relation: str
    item2: int


@dataclass(frozen=True)
class SceneGraph:
    """What a caption asks for, or what a checker found."""

    items: tuple[Item, ...]
    relations: tuple[Relation, ...] = ()
    caption: str = ""

    def item(self, item_id: int) -> Item:
        """The item with this id; KeyError if there is none."""
        for item in self.items:
            if item.item_id == item_id:
                return item
        raise KeyError(f"scene graph has no item {item_id}")

    def to_dict(self) -> dict[str, Any]:
        """The LAION-SG layout as plain JSON types."""
        return {
            "caption_ori": self.caption,
            "items": [
                {"item_id": i.item_id, "label": i.label, "attributes": list(i.attributes)}
                for i in self.items
            ],
            "relations": [
                {"triple_id": k, "item1": r.item1, "relation": r.relation, "item2": r.item2}
                for k, r in enumerate(self.relations)
            ],
        }

    def to_json(self) -> str:
        """One line of JSON in the LAION-SG layout."""
        return json.dumps(self.to_dict())

    @staticmethod
    def from_dict(data: dict[str, Any]) -> SceneGraph:
        """Read the LAION-SG layout.

        ValueError on a missing field, an item_id used twice or a dangling relation.
        """
        try:
            items = tuple(
                Item(int(i["item_id"]), str(i["label"]), tuple(map(str, i.get("attributes", ()))))
                for i in data["items"]
            )
            relations = tuple(
                Relation(int(r["item1"]), str(r["relation"]), int(r["item2"]))
                for r in data.get("relations", ())
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a scene graph in LAION-SG's layout: {error!r}") from error
        known = {i.item_id for i in items}
        if len(known) < len(items):
            raise ValueError(f"item_ids are not unique: {[i.item_id for i in items]}")
        for r in relations:
            if {r.item1, r.item2} - known:
                raise ValueError(f"relation {r} names an item_id that is not among {sorted(known)}")
        return SceneGraph(items, relations, str(data.get("caption_ori", "")))

    @staticmethod
    def from_json(text: str) -> SceneGraph:
        """Inverse of :meth:`to_json`; ValueError on malformed text."""
        return SceneGraph.from_dict(json.loads(text))


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


_RELATION = re.compile(r" (?:which is )?(left of|right of|above|below) a ")


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
