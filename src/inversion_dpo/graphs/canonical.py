"""One text for every scene graph that says the same: to find a graph again in another split."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from inversion_dpo.graphs.graph import SceneGraph

# Said of the same two objects the other way round.
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Edge = tuple[int, str, int]


def canonical(graph: SceneGraph) -> str:
    """A text that two graphs share if and only if they say the same.

    Order, ids, caption and image do not matter, nor the order of attributes, capitals, a relation
    stated twice, or "a left of b" against "b right of a" (:data:`INVERSE`). Objects of one name
    are told apart by their relations alone. An object's parts that are not connected are compared
    apart, so that many equal ones cost nothing.
    """
    names = {i.item_id: _name(i.label, i.attributes) for i in graph.items}
    edges = {_directed(r.item1, r.relation.lower(), r.item2) for r in graph.relations}
    parts = (
        _least({k: names[k] for k in part}, {e for e in edges if e[0] in part})
        for part in _components(names, edges)
    )
    return json.dumps(sorted(parts))


def _name(label: str, attributes: Collection[str]) -> str:
    return json.dumps([label.lower(), *sorted(a.lower() for a in attributes)])


def _directed(a: int, relation: str, b: int) -> Edge:
    """Of a relation and its inverse the one that comes first in the alphabet."""
    other = INVERSE.get(relation, relation)
    return (b, other, a) if other < relation else (a, relation, b)


def _components(nodes: Collection[int], edges: Collection[Edge]) -> list[set[int]]:
    parts: list[set[int]] = []
    for node in nodes:
        joined = {node} | {n for a, _, b in edges if node in (a, b) for n in (a, b)}
        touched = [part for part in parts if part & joined]
        parts = [part for part in parts if not part & joined]
        parts.append(joined.union(*touched))
    return parts


def _least(colour: Mapping[int, str], edges: Collection[Edge]) -> str:
    """The least text over all orders of the nodes that their colours and edges allow.

    Colours are refined by what a node is related to (1-dimensional Weisfeiler and Leman); where
    nodes stay alike each is singled out in turn, of twins, which may be exchanged, only one.
    """
    rank = _refined(colour, edges)
    order = sorted(rank, key=lambda k: rank[k])
    alike = next(
        (
            [k for k in order if rank[k] == r]
            for r in sorted(rank.values())
            if list(rank.values()).count(r) > 1
        ),
        None,
    )
    if alike is None:
        place = {node: k for k, node in enumerate(order)}
        linked = sorted((place[a], relation, place[b]) for a, relation, b in edges)
        return json.dumps([[_plain(colour[k]) for k in order], linked])
    tried = [k for n, k in enumerate(alike) if not any(_twins(k, j, edges) for j in alike[:n])]
    depth = sum("\n" in text for text in colour.values())
    return min(_least({**colour, k: f"{colour[k]}\n{depth}"}, edges) for k in tried)


def _plain(colour: str) -> str:
    return colour.partition("\n")[0]


def _refined(colour: Mapping[int, str], edges: Collection[Edge]) -> dict[int, int]:
    """Rank of each node; equal for nodes that no round of looking at neighbours tells apart."""
    values: Mapping[int, object] = colour
    ranks = _ranks({k: json.dumps(v) for k, v in values.items()})
    while True:
        seen = {
            k: json.dumps(
                [
                    ranks[k],
                    sorted((r, ranks[b]) for a, r, b in edges if a == k),
                    sorted((r, ranks[a]) for a, r, b in edges if b == k),
                ]
            )
            for k in colour
        }
        finer = _ranks({k: f"{ranks[k]:09d}{text}" for k, text in seen.items()})
        if len(set(finer.values())) == len(set(ranks.values())):
            return ranks
        ranks = finer


def _ranks(texts: Mapping[int, str]) -> dict[int, int]:
    place = {text: k for k, text in enumerate(sorted(set(texts.values())))}
    return {node: place[text] for node, text in texts.items()}


def _twins(a: int, b: int, edges: Collection[Edge]) -> bool:
    """Whether exchanging the two changes no edge."""
    swap = {a: b, b: a}
    return {(swap.get(x, x), r, swap.get(y, y)) for x, r, y in edges} == set(edges)
