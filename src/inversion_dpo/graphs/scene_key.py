"""What a scene is known by: to find the same scene again in another split."""

from __future__ import annotations

import json
from functools import cached_property

import networkx as nx
from networkx.algorithms.isomorphism import categorical_edge_match, categorical_node_match

from inversion_dpo.graphs.graph import INVERSE, SceneGraph


class SceneKey:
    """Equal for two scene graphs if and only if they say the same; a key of dictionaries.

    Order, ids, caption and image do not matter, nor the order of attributes, capitals, a relation
    stated twice, or "a left of b" against "b right of a" (:data:`INVERSE`). Objects of one name
    are told apart by their relations alone. Without objects, the caption's words decide.

    Attributes:
        text: what each object and each relation says, sorted. Scenes that are the same share it;
            others may, as three men in a ring and in a row do. It depends on no library's version,
            so a split that it decides stays.
    """

    def __init__(self, graph: SceneGraph) -> None:
        names = {
            i.item_id: json.dumps([i.label.lower(), *sorted(a.lower() for a in i.attributes)])
            for i in graph.items
        }
        edges = {_directed(r.item1, r.relation.lower(), r.item2) for r in graph.relations}
        said = sorted([names[a], relation, names[b]] for a, relation, b in edges)
        words = " ".join(graph.caption.lower().split())
        self.text = json.dumps([sorted(names.values()), said]) if names else words
        self._network = nx.Graph()
        for item, name in names.items():
            self._network.add_node(item, name=name)
        for edge in edges:  # a relation is a node between its objects
            self._network.add_node(edge, name=edge[1])
            self._network.add_edge(edge[0], edge, end="from")
            self._network.add_edge(edge, edge[2], end="to")

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SceneKey) or self.text != other.text:
            return False
        if sorted(self._colours.values()) != sorted(other._colours.values()):
            return False
        return nx.is_isomorphic(
            self._coloured,
            other._coloured,
            categorical_node_match("colour", None),
            categorical_edge_match("end", None),
        )

    @cached_property
    def _colours(self) -> dict[object, str]:
        """Weisfeiler and Leman's colour of each node: only nodes of one can be exchanged."""
        rounds = max(1, len(self._network))
        found = nx.weisfeiler_lehman_subgraph_hashes(self._network, "end", "name", rounds)
        return {node: colours[-1] for node, colours in found.items()}

    @cached_property
    def _coloured(self) -> nx.Graph:
        network = self._network.copy()
        nx.set_node_attributes(network, self._colours, "colour")
        return network


def _directed(a: int, relation: str, b: int) -> tuple[int, str, int]:
    """Of a relation and its inverse, give the one that comes first in the alphabet."""
    other = INVERSE.get(relation, relation)
    return (b, other, a) if other < relation else (a, relation, b)
