"""What is in many scene graphs: sizes, words, and what a reader should know before training."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from inversion_dpo.graphs.graph import SceneGraph

_NAMED = 5  # words that a line spells out


@dataclass(frozen=True)
class GraphStatistics:
    """Counts over scene graphs.

    items, attributes, relations: how many each graph has, in the graphs' order. labels, words: how
    often each label and each relation occurs. isolated: items of graphs with several that no
    relation names. repeated: graphs in which two objects have the same full name. mutual: graphs in
    which two objects are related in both directions.
    """

    items: tuple[int, ...]
    attributes: tuple[int, ...]
    relations: tuple[int, ...]
    labels: Counter[str]
    words: Counter[str]
    isolated: int
    repeated: int
    mutual: int

    @property
    def rare(self) -> list[str]:
        """Labels that occur once."""
        return sorted(label for label, times in self.labels.items() if times == 1)


def statistics_of(graphs: Sequence[SceneGraph]) -> GraphStatistics:
    """Count what is in the graphs."""
    ways = [{(r.item1, r.item2) for r in g.relations} for g in graphs]
    return GraphStatistics(
        items=tuple(len(g.items) for g in graphs),
        attributes=tuple(sum(len(i.attributes) for i in g.items) for g in graphs),
        relations=tuple(len(g.relations) for g in graphs),
        labels=Counter(i.label for g in graphs for i in g.items),
        words=Counter(r.relation for g in graphs for r in g.relations),
        isolated=sum(len(isolated_items(g)) for g in graphs),
        repeated=sum(len({i.name for i in g.items}) < len(g.items) for g in graphs),
        mutual=sum(any((b, a) in pairs for a, b in pairs) for pairs in ways),
    )


def isolated_items(graph: SceneGraph) -> list[int]:
    """Ids of the items that no relation names; none of a graph of one item."""
    linked = {k for r in graph.relations for k in (r.item1, r.item2)}
    alone = [i.item_id for i in graph.items if i.item_id not in linked]
    return alone if len(graph.items) > 1 else []


def format_statistics(found: GraphStatistics) -> list[str]:
    """Write the statistics as indented lines; none if there are no graphs."""
    if not found.items:
        return []
    per_image = ", ".join(
        f"{name} {min(n)} to {max(n)}, median {statistics.median(n):g}"
        for name, n in (
            ("items", found.items),
            ("attributes", found.attributes),
            ("relations", found.relations),
        )
    )
    rare = f"; seen once: {len(found.rare)}" + (f" ({_some(found.rare)})" if found.rare else "")
    return [
        f"  scene graphs: {len(found.items)}; of each {per_image}",
        f"    labels: {len(found.labels)}; most often {_commonest(found.labels)}{rare}",
        f"    relations: {len(found.words)}; most often {_commonest(found.words)}",
        f"    isolated items: {found.isolated}; graphs with objects of one name: {found.repeated}, "
        f"with two objects related both ways: {found.mutual}",
    ]


def _commonest(counts: Counter[str]) -> str:
    return ", ".join(f"{word!r} ({n})" for word, n in counts.most_common(_NAMED)) or "none"


def _some(words: Sequence[str]) -> str:
    return ", ".join(map(repr, words[:_NAMED])) + (", ..." if len(words) > _NAMED else "")
