"""Graphs by how much they ask for, and what a chain entails."""

from itertools import islice

import numpy as np
import pytest

from inversion_dpo.world.captions import parse_caption, with_entailed
from inversion_dpo.world.checker import detect, score
from inversion_dpo.world.drawing import sample_scene
from inversion_dpo.world.scene_prompts import graphs_of, parse_kind, split_of
from tools.embedded.painting import render


@pytest.mark.parametrize("kind", ["1/0", "2/1", "3/2", "3/3", "4/3"])
def test_a_kind_is_kept_and_the_caption_stays_the_chain(kind):
    objects, least = parse_kind(kind)
    for graph in islice(graphs_of("validation", kind, 0), 3):
        assert len(graph.items) == objects and len(graph.relations) >= least
        assert split_of(graph.caption) == "validation"
        assert with_entailed(parse_caption(graph.caption)) == graph
    again = list(islice(graphs_of("train", kind, 0), 3))
    assert list(islice(graphs_of("train", kind, 0), 3)) == again
    assert list(islice(graphs_of("train", kind, 1), 3)) != again


@pytest.mark.parametrize("kind", ["", "5/1", "0/0", "1/1", "2/2", "4/7", "3", "3/-1", "3/x", "x/1"])
def test_kinds_that_cannot_be_are_refused(kind):
    with pytest.raises(ValueError, match="OBJECTS/RELATIONS"):
        parse_kind(kind)


def test_what_follows_from_a_chain():
    def added(*steps):
        words = "".join(
            f"{' which is' if k else ''} {s} a small red star" for k, s in enumerate(steps)
        )
        graph = with_entailed(parse_caption("a small red star" + words))
        return [(r.item1, r.relation, r.item2) for r in graph.relations[len(steps) :]]

    assert added() == added("above") == added("above", "left of") == []
    assert added("above", "above") == [(0, "above", 2)]
    assert added("left of", "above", "above") == [(1, "above", 3)]
    assert added("above", "above", "above") == [(0, "above", 2), (0, "above", 3), (1, "above", 3)]
    assert added("above", "below", "above") == []


def test_what_is_entailed_is_there_whenever_the_caption_is_met():
    """Of every scene: the checker finds the entailed relations where it finds the stated ones."""
    rng, straight = np.random.default_rng(3), 0
    for _ in range(20):
        scene = sample_scene(rng, 4)
        full = with_entailed(scene.graph)
        straight += len(full.relations) > len(scene.graph.relations)
        detected = detect(render(scene))
        assert detected.graph().relations
        assert score(scene.graph, detected).exact == score(full, detected).exact == 1.0
    assert straight >= 2
