"""The key of a scene: equal for graphs that say the same, different for all others."""

import itertools
import random
import time

import pytest

from inversion_dpo.graphs.graph import Item, Relation, SceneGraph, agreement
from inversion_dpo.graphs.scene_key import SceneKey

RED = ("red",)


def graph(names, *relations):
    """Items of the given names, ``(a, relation, b)`` by place."""
    items = tuple(Item(k, n.split()[-1], tuple(n.split()[:-1])) for k, n in enumerate(names))
    return SceneGraph(items, tuple(Relation(*r) for r in relations))


def shuffled(g, seed):
    """The same in another order, with other ids and another caption."""
    order = random.Random(seed).sample(range(len(g.items)), len(g.items))
    ids = {i.item_id: 10 + 7 * k for i, k in zip(g.items, order, strict=True)}
    items = [Item(ids[i.item_id], i.label, i.attributes[::-1], 99) for i in g.items]
    relations = [Relation(ids[r.item1], r.relation, ids[r.item2], 5) for r in g.relations]
    random.Random(seed).shuffle(items)
    random.Random(seed).shuffle(relations)
    return SceneGraph(tuple(items), tuple(relations), f"caption {seed}", f"{seed}.png")


def isomorphic(a, b):
    """By trying all orders."""

    def facts(g, order):
        place = {i.item_id: k for i, k in zip(g.items, order, strict=True)}
        names = {(place[i.item_id], i.label, tuple(sorted(i.attributes))) for i in g.items}
        return names, {(place[r.item1], r.relation, place[r.item2]) for r in g.relations}

    if len(a.items) != len(b.items):
        return False
    want = facts(a, range(len(a.items)))
    return any(facts(b, p) == want for p in itertools.permutations(range(len(b.items))))


def test_against_all_orders():
    """Random small graphs of few names: equal keys if and only if some order makes them equal."""
    draw = random.Random(0)
    graphs = []
    for _ in range(120):
        n = draw.choice([2, 3, 3, 4])
        names = [draw.choice(["a", "red a"]) for _ in range(n)]
        pairs = draw.sample(list(itertools.permutations(range(n), 2)), draw.choice([1, 2, 3][:n]))
        graphs.append(graph(names, *((a, draw.choice(["on", "by"]), b) for a, b in pairs)))
    keys = [SceneKey(g) for g in graphs]
    for (a, s), (b, t) in itertools.combinations(zip(graphs, keys, strict=True), 2):
        assert (s == t) == isomorphic(a, b), (a, b)


CHAIN = graph(["small star", "cross", "cross"], (0, "above", 1), (1, "left of", 2))
RING = graph(["man"] * 3, (0, "sees", 1), (1, "sees", 2), (2, "sees", 0))


@pytest.mark.parametrize("g", [CHAIN, RING, graph(["red circle", "red circle"])])
def test_order_ids_and_captions_do_not_matter(g):
    for seed in range(10):
        assert SceneKey(shuffled(g, seed)) == SceneKey(g)


def test_the_same_said_the_other_way_round():
    back = graph(["small star", "cross", "cross"], (1, "below", 0), (2, "right of", 1))
    assert SceneKey(back) == SceneKey(CHAIN)
    assert SceneKey(graph(["a", "b"], (0, "on", 1))) != SceneKey(graph(["a", "b"], (1, "on", 0)))


def test_saying_it_twice_changes_nothing_and_capitals_neither():
    once = graph(["a", "b"], (0, "left of", 1))
    assert SceneKey(graph(["A", "b"], (0, "Left of", 1), (1, "right of", 0))) == SceneKey(once)


def test_repeated_objects_are_counted():
    two, three = graph(["red circle"] * 2), graph(["red circle"] * 3)
    assert SceneKey(two) != SceneKey(three)
    apart = graph(["red circle"] * 2, (0, "left of", 1))
    assert SceneKey(apart) != SceneKey(two)
    assert SceneKey(graph(["red circle"] * 2, (1, "left of", 0))) == SceneKey(apart)
    one_way = graph(["red circle"] * 2, (0, "by", 1))
    both_ways = graph(["red circle"] * 2, (0, "by", 1), (1, "by", 0))
    assert SceneKey(one_way) != SceneKey(both_ways)


def test_rings_are_not_chains_nor_other_rings():
    chain = graph(["man"] * 3, (0, "sees", 1), (1, "sees", 2), (0, "sees", 2))
    assert SceneKey(RING) != SceneKey(chain)
    six = graph(["man"] * 6, *((k, "sees", (k + 1) % 6) for k in range(6)))
    threes = graph(["man"] * 6, *((k, "sees", k // 3 * 3 + (k + 1) % 3) for k in range(6)))
    assert SceneKey(six) != SceneKey(threes)  # to neighbours alone they look the same
    assert SceneKey(shuffled(six, 1)) == SceneKey(six)


def test_many_equal_objects_take_no_time():
    begun = time.monotonic()
    crowd = graph(["tree"] * 40, *((k, "by", 0) for k in range(1, 20)))
    pairs = graph(["man"] * 30, *((2 * k, "beside", 2 * k + 1) for k in range(15)))
    for g in (crowd, pairs):
        assert SceneKey(shuffled(g, 0)) == SceneKey(g)
    assert time.monotonic() - begun < 5


def test_agreement_of_repeated_objects():
    intended = graph(["red circle", "red circle"], (0, "left of", 1))
    assert agreement(intended, graph(["red circle"] * 2, (1, "left of", 0))).exact == 1
    one = agreement(intended, graph(["red circle"]))
    assert (one.entity_iou, one.sg_iou) == (0.5, 0.0)
    three = agreement(intended, graph(["red circle"] * 3, (0, "left of", 1)))
    assert three.entity_iou == pytest.approx(2 / 3) and three.exact == 0


def test_agreement_of_relations_both_ways_and_in_a_ring():
    both = graph(["a", "b"], (0, "faces", 1), (1, "faces", 0))
    assert agreement(both, both).exact == 1
    half = agreement(both, graph(["a", "b"], (0, "faces", 1)))
    assert (half.entity_iou, half.sg_iou) == (1.0, 0.5)
    turned = graph(["man"] * 3, (1, "sees", 0), (2, "sees", 1), (0, "sees", 2))
    assert agreement(RING, turned).exact == 1 and agreement(RING, RING).exact == 1
    names = graph(["a", "b", "c"], (0, "sees", 1), (1, "sees", 2), (2, "sees", 0))
    other = graph(["a", "b", "c"], (1, "sees", 0), (2, "sees", 1), (0, "sees", 2))
    assert agreement(names, other).sg_iou == 0


def test_the_text_that_decides_a_split_never_changes():
    assert SceneKey(CHAIN).text == (
        '[["[\\"cross\\"]", "[\\"cross\\"]", "[\\"star\\", \\"small\\"]"], '
        '[["[\\"cross\\"]", "left of", "[\\"cross\\"]"], '
        '["[\\"star\\", \\"small\\"]", "above", "[\\"cross\\"]"]]]'
    )
    assert SceneKey(SceneGraph((), (), "A  small cat")).text == "a small cat"
