"""Scene graphs in the field's schema, and how far one agrees with another.

The JSON layout is that of LAION-SG (Li et al., 2024, https://arxiv.org/abs/2412.08580, data at
https://huggingface.co/datasets/mengcy/LAION-SG): ``name`` (the image's file), ``img_id``,
``caption_ori``, ``items[{item_id, label, attributes, global_item_id}]`` and
``relations[{triple_id, item1, relation, item2, global_relation_id}]``. The metrics are its set IoUs
of exact triples.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Strict, StringConstraints, TypeAdapter, ValidationError

from inversion_dpo.graphs.layouts import from_visual_genome, is_visual_genome

# Said of the same two objects the other way round.
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _digits(value: Any) -> Any:
    """Read a whole number that is written as text."""
    written = isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value)
    return int(value) if written else value


def _parts(value: Any) -> Any:
    """Attributes that are one text, with commas between them."""
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.split(",") if part.strip()]


Number = Annotated[int, Strict(), BeforeValidator(_digits)]
Text = Annotated[str, StringConstraints(pattern=r"\S")]
OptionalText = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]


@dataclass(frozen=True)
class Item:
    """One object: ``label`` is what it is, ``attributes`` say how, e.g. size and colour.

    item_id: its number in this image. global_item_id: its number in the whole data, if it has one.
    """

    item_id: Number
    label: Text
    attributes: Annotated[tuple[Text, ...], BeforeValidator(_parts)] = ()
    global_item_id: Number | None = None

    @property
    def name(self) -> str:
        """The object in words, e.g. ``large red circle``."""
        return " ".join((*self.attributes, self.label))


@dataclass(frozen=True)
class Relation:
    """``item1 relation item2``; items are named by their ``item_id``."""

    item1: Number
    relation: Text
    item2: Number
    global_relation_id: Number | None = None


@dataclass(frozen=True)
class SceneGraph:
    """What a caption asks for, or what a checker found.

    name, img_id: the image that an annotation speaks of: its file's name and its number, as text.
    """

    items: tuple[Item, ...]
    relations: tuple[Relation, ...] = ()
    caption: Annotated[OptionalText, Field(alias="caption_ori")] = ""
    name: OptionalText = ""
    img_id: Annotated[
        OptionalText, BeforeValidator(lambda value: str(value) if type(value) is int else value)
    ] = ""

    def item(self, item_id: int) -> Item:
        """Find the item with this id; KeyError if there is none."""
        for item in self.items:
            if item.item_id == item_id:
                return item
        raise KeyError(f"scene graph has no item {item_id}")

    def to_dict(self) -> dict[str, Any]:
        """Write the LAION-SG layout as plain JSON types, without what is optional and not set."""
        image = {"name": self.name, "img_id": self.img_id}
        return {
            **{key: value for key, value in image.items() if value},
            "caption_ori": self.caption,
            "items": [
                {"item_id": i.item_id, "label": i.label, "attributes": list(i.attributes)}
                | _if_set("global_item_id", i.global_item_id)
                for i in self.items
            ],
            "relations": [
                {"triple_id": k, "item1": r.item1, "relation": r.relation, "item2": r.item2}
                | _if_set("global_relation_id", r.global_relation_id)
                for k, r in enumerate(self.relations)
            ],
        }

    def to_json(self) -> str:
        """One line of JSON in the LAION-SG layout."""
        return json.dumps(self.to_dict())

    @staticmethod
    def from_dict(data: Any) -> SceneGraph:
        """Read the LAION-SG layout, or Visual Genome's.

        ValueError says in one line which field is missing, empty or of another type, which item_id
        is used twice, or which relation names an item twice or one that is not there.
        """
        data = from_visual_genome(data) if is_visual_genome(data) else data
        try:
            graph = _GRAPH.validate_python(data)
        except ValidationError as error:
            raise ValueError(_why(error)) from error
        ids = [i.item_id for i in graph.items]
        if len(set(ids)) < len(ids):
            raise ValueError(f"item_ids are not unique: {ids}")
        for k, r in enumerate(graph.relations):
            if absent := {r.item1, r.item2} - set(ids):
                raise ValueError(
                    f"relations[{k}] names item_id {min(absent)}, which is not among {sorted(ids)}"
                )
            if r.item1 == r.item2:
                raise ValueError(f"relations[{k}] relates item_id {r.item1} to itself")
        return graph

    @staticmethod
    def from_json(text: str) -> SceneGraph:
        """Inverse of :meth:`to_json`; ValueError on malformed text."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a scene graph that is not JSON ({error})") from error
        return SceneGraph.from_dict(data)


def _if_set(key: str, value: int | None) -> dict[str, int]:
    return {} if value is None else {key: value}


_GRAPH: TypeAdapter[SceneGraph] = TypeAdapter(SceneGraph)
_WANTED = {
    "dataclass_type": "an object {...}",
    "int_type": "an integer",
    "tuple_type": "a list",
    "string_type": "a text",
    "string_unicode": "a text that UTF-8 can hold",
}


def _why(error: ValidationError) -> str:
    """Write the first error in one line, with the field as one writes it: ``items[0].label``."""
    first = error.errors()[0]
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
    field = "".join(steps).removeprefix(".") or "a scene graph"
    kind, value = first["type"], first["input"]
    if kind in ("missing", "string_pattern_mismatch"):
        return f"{field} is {'missing' if kind == 'missing' else 'empty'}"
    given = "missing" if value is None else repr(value)[:60]
    return f"{field} is {given}, not {_WANTED.get(kind, first['msg'])}"


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
