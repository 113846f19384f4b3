"""Where a found scene graph departs from the intended one: objects, attributes, relations apart.

Pure functions on two graphs. Words are compared exactly; :func:`plain` levels them before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from inversion_dpo.graphs.graph import Item, Relation, SceneGraph, triples

# "a left of b" says "b right of a": the second is known wherever the first is.
_PAIRS = (
    ("left of", "right of"),
    ("to the left of", "to the right of"),
    ("above", "below"),
    ("over", "under"),
    ("in front of", "behind"),
    ("next to", "next to"),
    ("beside", "beside"),
    ("near", "near"),
)
CONVERSE = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}


@dataclass(frozen=True)
class Departures:
    """What is wrong in one image; all are counts.

    missing: intended objects for which no object of that label was found. extra: found objects that
    no intended one accounts for. attributes: objects of the right label whose attributes differ.
    relations: intended relations whose two objects were both found, in whatever attributes, and
    which do not hold between them.
    """

    missing: int
    extra: int
    attributes: int
    relations: int

    @property
    def entities(self) -> int:
        """Objects missing or too many."""
        return self.missing + self.extra


def departures(intended: SceneGraph, found: SceneGraph) -> Departures:
    """Count the errors of each kind; 0 of all where :func:`graphs.agreement` is exact.

    A found object stands for the intended one that it is matched with (:func:`matched`), so that a
    wrong colour is an error of attributes and none of the relations. Relations are then compared
    as triples of names, as multisets: of two equal objects either may be meant.
    """
    match = matched(intended, found)
    wrong = [i for i, f in match.items() if _kind(intended.item(i)) != _kind(found.item(f))]
    taken = {f: intended.item(i) for i, f in match.items()}
    seen = SceneGraph(
        tuple(replace(item, item_id=f) for f, item in taken.items()),
        tuple(r for r in found.relations if r.item1 in taken and r.item2 in taken),
    )
    both = [r for r in intended.relations if r.item1 in match and r.item2 in match]
    want = Counter(triples(SceneGraph(intended.items, tuple(both))))
    return Departures(
        missing=len(intended.items) - len(match),
        extra=len(found.items) - len(match),
        attributes=len(wrong),
        relations=sum((want - Counter(triples(seen))).values()),
    )


def matched(intended: SceneGraph, found: SceneGraph) -> dict[int, int]:
    """item_id of an intended object -> item_id of the found object that stands for it.

    Only objects of the same label are matched, as many as possible: first those whose attributes
    are the same, then so that they share as many attributes as possible. What is equally good is
    decided by the order of the graphs.
    """
    pairs: dict[int, int] = {}
    for label in dict.fromkeys(i.label for i in intended.items):
        want = [i for i in intended.items if i.label == label]
        have = [f for f in found.items if f.label == label]
        gain = np.array([[_likeness(i, f) for f in have] for i in want])
        rows, columns = linear_sum_assignment(gain, maximize=True)
        pairs |= {
            want[r].item_id: have[c].item_id
            for r, c in zip(rows.tolist(), columns.tolist(), strict=True)
        }
    return pairs


def relations_held(intended: SceneGraph, found: SceneGraph) -> dict[str, float]:
    """Of every relation that is asked for the share of its triples that were found, in [0, 1].

    Triples are exact, attributes included, and compared as multisets.
    """
    want, got = triples(intended), Counter(triples(found))
    shares = {}
    for word in dict.fromkeys(r for _, r, _ in want):
        asked = Counter(t for t in want if t[1] == word)
        shares[word] = sum((asked & got).values()) / sum(asked.values())
    return shares


def plain(graph: SceneGraph, synonyms: Mapping[str, str] | None = None) -> SceneGraph:
    """Give the graph with its words levelled: case, white space, given synonyms; nothing fuzzier.

    Attributes are sorted and named once, since their order says nothing.
    """
    known = synonyms or {}

    def word(text: str) -> str:
        return known.get(levelled(text), levelled(text))

    items = tuple(
        replace(i, label=word(i.label), attributes=tuple(sorted({word(a) for a in i.attributes})))
        for i in graph.items
    )
    relations = tuple(replace(r, relation=word(r.relation)) for r in graph.relations)
    return replace(graph, items=items, relations=relations)


def levelled(text: str) -> str:
    """Lower case, single spaces.

    >>> levelled("  Left   OF ")
    'left of'
    """
    return " ".join(text.lower().split())


def with_converses(graph: SceneGraph) -> SceneGraph:
    """Every relation also as its converse says it (CONVERSE), each once; nothing else follows."""
    said = [
        mine
        for r in graph.relations
        for mine in (r, Relation(r.item2, CONVERSE.get(r.relation, ""), r.item1))
        if mine.relation
    ]
    return replace(graph, relations=tuple(dict.fromkeys(said)))


def _kind(item: Item) -> tuple[str, frozenset[str]]:
    return item.label, frozenset(item.attributes)


def _likeness(a: Item, b: Item) -> float:
    """Shared attributes; of equal objects more than all others of an image can add up to."""
    return len({*a.attributes} & {*b.attributes}) + 1e6 * (_kind(a) == _kind(b))
