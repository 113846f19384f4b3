"""Decide by GenEval's rule whether an image shows what its prompt asks for.

Source: Ghosh et al., GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment,
2023, https://arxiv.org/abs/2310.11513; rule and thresholds as in
https://github.com/djghosh13/geneval, evaluation/evaluate_images.py (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a detection's score must be above
MOST = 16  # detections of a class that are looked at
MARGIN = 0.1  # of both objects' sizes: an offset within it has no direction
COUNTING = "counting"  # the task with the higher threshold
RELATIONS = ("left of", "right of", "above", "below")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# The 80 classes of COCO in their usual order, three of them renamed by the authors.
CLASSES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,"
    "banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush".split(",")
)


@dataclass(frozen=True)
class Detection:
    """An object that a detector found.

    name: its class. score: in [0, 1]. box: left, top, right, bottom in pixels. mask: bool [H, W].
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: NDArray[np.bool_] | None = field(default=None, compare=False)


Found = Mapping[str, Sequence[Detection]]  # class -> what is looked at, best first


def fault_of(asked: Mapping[str, Any]) -> str:
    """Say what is wrong with a row of GenEval's metadata; "" if the rule can read it."""
    clauses = [asked.get("include") or [], asked.get("exclude") or []]
    if not clauses[0] and not clauses[1]:
        return 'neither "include" nor "exclude" names an object'
    for clause in (c for part in clauses for c in part):
        if not isinstance(clause, Mapping) or clause.get("class") not in CLASSES:
            return f"{clause!r} names no class of COCO as GenEval writes it"
        count = clause.get("count")
        if type(count) is not int or count < 1:
            return f'"count" of {clause["class"]!r} is no whole number of at least 1'
        if clause.get("color", COLOURS[0]) not in COLOURS:
            return f"{clause['color']!r} is none of the colours {', '.join(COLOURS)}"
    for place, clause in enumerate(clauses[0]):
        relation, target = (*(clause.get("position") or (RELATIONS[0], -1)), None)[:2]
        known = relation in RELATIONS and type(target) is int and target < place
        if not known or ("position" in clause and target < 0):
            return f'"position" of {clause["class"]!r} is no relation to an object named before it'
    return ""


def kept(detections: Sequence[Detection], task: str) -> dict[str, list[Detection]]:
    """Keep the detections above the task's threshold, at most 16 of a class, best first.

    Overlapping boxes all count: the authors' limit of overlap is 1.
    """
    least = COUNTING_THRESHOLD if task == COUNTING else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda d: -d.score):
        if one.score > least and len(found.setdefault(one.name, [])) < MOST:
            found[one.name].append(one)
    return found


def coloured(asked: Mapping[str, Any], found: Found) -> dict[str, Sequence[Detection]]:
    """List the detections whose colour the rule asks for, by class."""
    clauses = [c for c in asked.get("include") or [] if "color" in c]
    clauses = [c for c in clauses if len(found.get(c["class"], ())) >= c["count"]]
    most = {
        c["class"]: max(d["count"] for d in clauses if d["class"] == c["class"]) for c in clauses
    }
    return {name: found[name][:count] for name, count in most.items()}


def verdict(
    asked: Mapping[str, Any], found: Found, colours: Mapping[str, Sequence[str]]
) -> tuple[bool, str]:
    """Return whether an image is as asked, and every reason why it is not.

    Args:
        asked: a row of GenEval's metadata: all of ``include`` must hold, none of ``exclude``.
        found: what :func:`kept` returns.
        colours: names of the colours of :func:`coloured`'s detections.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection]] = []  # of each clause; empty if it does not hold
    for clause in asked.get("include") or []:
        group = found.get(clause["class"], ())[: clause["count"]]
        reason = _lacking(clause, group, colours) or _misplaced(clause, group, groups)
        reasons += [reason] if reason else []
        groups.append(() if reason else group)
    for clause in asked.get("exclude") or []:
        name, count, seen = clause["class"], clause["count"], len(found.get(clause["class"], ()))
        if seen >= count:
            reasons.append(f"fewer than {count} {name} asked, {seen} found")
    return not reasons, "; ".join(reasons)


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Say where box a lies seen from box b: an offset of centres beyond MARGIN of both sizes.

    A direction holds if it makes up more than half of the offset's length.
    """
    one, other = np.asarray(a, float).reshape(2, 2), np.asarray(b, float).reshape(2, 2)
    offset = one.mean(axis=0) - other.mean(axis=0)
    sizes = abs(one[1] - one[0]) + abs(other[1] - other[0])
    beyond = np.maximum(abs(offset) - MARGIN * sizes, 0) * np.sign(offset)
    if (abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    return {name for name, far in zip(RELATIONS, (-x, x, -y, y), strict=True) if far > 0.5}


def _lacking(
    clause: Mapping[str, Any], group: Sequence[Detection], colours: Mapping[str, Sequence[str]]
) -> str:
    name, count = clause["class"], clause["count"]
    if len(group) < count:
        return f"{count} {name} asked, {len(group)} found"
    if (colour := clause.get("color")) is None:
        return ""
    seen = list(colours[name][:count])
    return "" if seen.count(colour) == count else f"{colour} {name} asked, {', '.join(seen)} found"


def _misplaced(
    clause: Mapping[str, Any], group: Sequence[Detection], groups: Sequence[Sequence[Detection]]
) -> str:
    if "position" not in clause:
        return ""
    relation, target = clause["position"]
    if not groups[target]:
        return f"nothing found for {clause['class']} to be {relation}"
    for one, other in ((a, b) for a in group for b in groups[target]):
        seen = relations(one.box, other.box)
        if relation not in seen:
            where = " and ".join(sorted(seen)) or "at its side in no clear direction"
            return f"{clause['class']} {relation} {other.name} asked, {where} found"
    return ""
