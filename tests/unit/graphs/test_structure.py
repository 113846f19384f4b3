"""Errors of objects, attributes and relations, worked out by hand; IoUs where words repeat."""

import pytest

from inversion_dpo.graphs.graph import Item, Relation, SceneGraph, agreement
from inversion_dpo.graphs.matching import (
    CONVERSE,
    Departures,
    departures,
    matched,
    plain,
    relations_held,
    with_converses,
)


def graph(objects, *relations):
    """ "red circle, blue star", (0, "left of", 1): the last word is the label."""
    parts = [o.split() for o in objects.split(", ")] if objects else []
    items = tuple(Item(k, words[-1], tuple(words[:-1])) for k, words in enumerate(parts))
    return SceneGraph(items, tuple(Relation(*r) for r in relations))


ASKED = graph("red circle, blue star, red square", (0, "left of", 1), (1, "above", 2))
SAME = graph("red square, blue star, red circle", (2, "left of", 1), (1, "above", 0))


@pytest.mark.parametrize(
    ("intended", "found", "missing", "extra", "attributes", "relations"),
    [
        (ASKED, SAME, 0, 0, 0, 0),
        (ASKED, graph(""), 3, 0, 0, 0),
        (graph(""), ASKED, 0, 3, 0, 0),
        # a wrong colour is an error of attributes, and its relation holds
        (
            graph("red circle, blue star", (0, "left of", 1)),
            graph("green circle, blue star", (0, "left of", 1)),
            0,
            0,
            1,
            0,
        ),
        # another shape: one object missing, one too many, its relation not counted
        (
            graph("red circle, blue star", (0, "left of", 1)),
            graph("red cross, blue star", (0, "left of", 1)),
            1,
            1,
            0,
            0,
        ),
        # both there, the other way round
        (
            graph("red circle, blue star", (0, "left of", 1)),
            graph("red circle, blue star", (1, "left of", 0)),
            0,
            0,
            0,
            1,
        ),
        # colours exchanged, places kept: the red one is not where it should be
        (
            graph("red circle, blue circle", (0, "left of", 1)),
            graph("red circle, blue circle", (1, "left of", 0)),
            0,
            0,
            0,
            1,
        ),
        # two red circles asked, one there
        (graph("red circle, red circle", (0, "left of", 1)), graph("red circle"), 1, 0, 0, 0),
        (
            graph("red circle, red circle", (0, "left of", 1)),
            graph("red circle, red circle", (1, "left of", 0)),
            0,
            0,
            0,
            0,
        ),
        (
            graph("red circle, red circle", (0, "left of", 1)),
            graph("red circle, red circle", (1, "above", 0)),
            0,
            0,
            0,
            1,
        ),
        # the blue circle is matched with the blue one, not in the order of the graphs
        (graph("red circle, blue circle"), graph("blue circle, green circle"), 0, 0, 1, 0),
        (graph("red circle"), graph("blue circle, red circle"), 0, 1, 0, 0),
        # equal ones first: all four pairs share "red" alone
        (graph("red circle, big red circle"), graph("old red circle, red circle"), 0, 0, 1, 0),
        # order of attributes says nothing
        (graph("small red circle"), graph("red small circle"), 0, 0, 0, 0),
    ],
)
def test_departures(intended, found, missing, extra, attributes, relations):
    assert departures(intended, found) == Departures(missing, extra, attributes, relations)
    assert departures(intended, found).entities == missing + extra


def test_most_attributes_decide_who_is_meant():
    asked = graph("small red circle, large blue circle")
    assert matched(asked, graph("large red star, large green circle, small green circle")) == {
        0: 2,
        1: 1,
    }


def test_two_red_circles():
    """Asked: two red circles side by side above a star. Found: one of them, and the star."""
    asked = graph("red circle, red circle, blue star", (0, "left of", 1), (1, "above", 2))
    found = graph("red circle, blue star", (0, "above", 1))
    fit = agreement(asked, found)
    assert fit.entity_iou == pytest.approx(2 / 3)  # {circle, star} of {circle, circle, star}
    assert fit.sg_iou == fit.relation_iou == pytest.approx(1 / 2)
    assert relations_held(asked, found) == {"left of": 0.0, "above": 1.0}
    three = graph(
        "red circle, red circle, red circle, blue star",
        (0, "left of", 1),
        (1, "left of", 2),
        (0, "left of", 2),
        (1, "above", 3),
    )
    assert agreement(asked, three).entity_iou == pytest.approx(3 / 4)
    assert agreement(asked, three).sg_iou == 1 and not agreement(asked, three).exact


def test_relations_in_both_directions():
    """One arrow asked; of an answer that says both only what is asked counts."""
    asked = graph("cat, dog", (0, "chases", 1))
    both = graph("cat, dog", (0, "chases", 1), (1, "chases", 0))
    assert agreement(asked, both).exact == 1 and departures(asked, both).relations == 0
    other = graph("cat, dog", (1, "chases", 0))
    assert agreement(asked, other).sg_iou == 0 and departures(asked, other).relations == 1
    fit = agreement(both, other)  # both asked, one found
    assert fit.sg_iou == fit.relation_iou == 0.5 and not fit.exact
    assert relations_held(both, other) == {"chases": 0.5}


def test_relations_in_a_ring():
    ring = [(0, "behind", 1), (1, "behind", 2), (2, "behind", 0)]
    asked = graph("cat, dog, cow", *ring)
    assert (
        agreement(
            asked, graph("cow, cat, dog", (1, "behind", 2), (2, "behind", 0), (0, "behind", 1))
        ).exact
        == 1
    )
    back = graph("cat, dog, cow", *[(b, r, a) for a, r, b in ring])
    assert agreement(asked, back).sg_iou == 0 and departures(asked, back).relations == 3
    # with converses an answer states both orders of a pair: of each only the asked one is compared,
    # and "cat in front of dog" stands where "cat behind dog" was asked: 0 of 6
    assert agreement(asked, with_converses(back)).sg_iou == 0
    two = graph("cat, dog, cow", *ring[:2])
    assert agreement(asked, two).sg_iou == pytest.approx(2 / 3)
    assert relations_held(asked, two) == {"behind": pytest.approx(2 / 3)}


def test_converses():
    assert all(CONVERSE[CONVERSE[word]] == word for word in CONVERSE)
    asked, said = graph("cat, dog", (0, "left of", 1)), graph("cat, dog", (1, "right of", 0))
    assert agreement(asked, said).sg_iou == 0
    assert agreement(asked, with_converses(said)).exact == 1
    near = with_converses(graph("cat, dog", (0, "near", 1), (0, "eats", 1)))
    assert [(r.item1, r.relation, r.item2) for r in near.relations] == [
        (0, "near", 1),
        (1, "near", 0),
        (0, "eats", 1),
    ]
    assert with_converses(near) == near


def test_words_are_levelled_and_nothing_more():
    told = SceneGraph(
        (Item(0, " Big  CAT", ("Red", "old", "red ")), Item(1, "cats")),
        (Relation(0, "Left  Of", 1),),
    )
    assert plain(told, {"big cat": "cat"}) == SceneGraph(
        (Item(0, "cat", ("old", "red")), Item(1, "cats")), (Relation(0, "left of", 1),)
    )
    assert plain(plain(told)) == plain(told)


def test_exact_means_no_departures_in_rendered_scenes():
    import numpy as np

    from inversion_dpo.world.checker import detect
    from inversion_dpo.world.drawing import sample_scene
    from tools.embedded.painting import render

    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = sample_scene(rng)
        found = detect(render(scene)).graph()
        assert departures(scene.graph, found) == Departures(0, 0, 0, 0)
        assert set(relations_held(scene.graph, found).values()) <= {1.0}
