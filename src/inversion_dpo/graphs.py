"""Scene graphs in the field's schema, and how far one agrees with another.

The JSON layout is that of LAION-SG (Li et al., 2024, https://arxiv.org/abs/2412.08580):
``items[{item_id, label, attributes}]`` and ``relations[{triple_id, item1, relation, item2}]``
with the caption in ``caption_ori``. The metrics are its set IoUs of exact triples.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any


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


@dataclass(frozen=True)
class Agreement:
    """How far a found graph agrees with the intended one; every value in [0, 1].

    entity_iou: multisets of full object names. sg_iou: exact triples, attributes included, and
    the bare names of isolated objects. relation_iou: triples by label alone. exact: entity_iou
    and sg_iou are both 1.
    """

    entity_iou: float
    relation_iou: float
    sg_iou: float

    @property
    def exact(self) -> float:
        """1 if all objects and all stated triples are there and no other object, else 0."""
        return float(self.entity_iou == 1.0 and self.sg_iou == 1.0)


def agreement(intended: SceneGraph, found: SceneGraph) -> Agreement:
    """Compare a found graph with the intended one.

    A found graph may hold a relation for every pair of objects; only as many of each pair as the
    intended graph speaks of are compared.
    """
    entity = set_iou((i.name for i in intended.items), (i.name for i in found.items))
    linked = {i for r in intended.relations for i in (r.item1, r.item2)}
    isolated = [i.name for i in intended.items if i.item_id not in linked]
    seen = Counter(i.name for i in found.items)
    alone = list((Counter(isolated) & seen).elements())
    want, got = triples(intended), triples(found)
    sg = set_iou([*want, *isolated], [*_stated(want, got), *alone])
    want, got = triples(intended, False), triples(found, False)
    return Agreement(entity, set_iou(want, _stated(want, got)), sg)


def set_iou(a: Iterable[Hashable], b: Iterable[Hashable]) -> float:
    """Intersection over union of two multisets; two empty ones agree fully."""
    left, right = Counter(a), Counter(b)
    union = sum((left | right).values())
    return sum((left & right).values()) / union if union else 1.0


def triples(graph: SceneGraph, attributes: bool = True) -> list[tuple[str, str, str]]:
    """(subject, relation, object) in words; with ``attributes=False`` by label alone."""
    name = {i.item_id: i.name if attributes else i.label for i in graph.items}
    return [(name[r.item1], r.relation, name[r.item2]) for r in graph.relations]


def _stated(
    intended: list[tuple[str, str, str]], found: list[tuple[str, str, str]]
) -> list[tuple[str, str, str]]:
    """Of the complete found graph, only what the intended graph speaks of.

    For each ordered pair of names as many triples as are intended, agreeing ones first: two
    circles side by side are both "circle left of circle" and its inverse, and only one is asked.
    """
    agreeing = Counter(intended) & Counter(found)
    room = Counter((a, b) for a, _, b in (Counter(intended) - agreeing).elements())
    stated = list(agreeing.elements())
    for a, relation, b in (Counter(found) - agreeing).elements():
        if room[a, b] > 0:
            room[a, b] -= 1
            stated.append((a, relation, b))
    return stated
