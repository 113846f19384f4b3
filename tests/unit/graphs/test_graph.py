from __future__ import annotations

import json

import numpy as np
import pytest

from inversion_dpo.graphs.graph import INVERSE, Item, Relation, SceneGraph
from inversion_dpo.world.captions import RELATIONS, caption_of, parse_caption
from inversion_dpo.world.drawing import sample_scene

STAR, CROSS = Item(0, "star", ("small", "red")), Item(1, "cross", ("large", "blue"))
GRAPH = SceneGraph((STAR, CROSS), (Relation(0, "above", 1),), "what was asked: “a star”")


def sampled(count: int) -> list[SceneGraph]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng).graph for _ in range(count)]


def test_json_has_the_fields_of_laion_sg() -> None:
    assert json.loads(GRAPH.to_json()) == {
        "caption_ori": "what was asked: “a star”",
        "items": [
            {"item_id": 0, "label": "star", "attributes": ["small", "red"]},
            {"item_id": 1, "label": "cross", "attributes": ["large", "blue"]},
        ],
        "relations": [{"triple_id": 0, "item1": 0, "relation": "above", "item2": 1}],
    }


def test_json_round_trip() -> None:
    for graph in [GRAPH, SceneGraph(()), *sampled(100)]:
        assert SceneGraph.from_json(graph.to_json()) == graph
        assert "\n" not in graph.to_json()


def test_fields_that_may_be_missing() -> None:
    graph = SceneGraph.from_dict({"items": [{"item_id": "7", "label": "cat"}]})
    assert graph == SceneGraph((Item(7, "cat"),))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON \\(Expecting property name"),
        ("[" * 100_000, "not JSON \\("),
        ("[]", "graph is \\[\\], not an object {...}"),
        ("{}", "items is missing"),
        ('{"items": null}', "items is missing, not a list"),
        ('{"items": {"0": "cat"}}', "items is {'0': 'cat'}, not a list"),
        ('{"items": ["cat"]}', "items\\[0\\] is 'cat', not an object"),
        ('{"items": [{"item_id": 0}]}', "items\\[0\\].label is missing"),
        ('{"items": [{"item_id": 0, "label": " "}]}', "items\\[0\\].label is empty"),
        ('{"items": [{"item_id": 0, "label": 7}]}', "items\\[0\\].label is 7, not a text"),
        (
            '{"items": [{"item_id": 0, "label": "\\ud800"}]}',
            "'.ud800', not a text that U",
        ),
        ('{"items": [{"label": "cat"}]}', "items\\[0\\].item_id is missing"),
        ('{"items": [{"item_id": "x", "label": "cat"}]}', "item_id is 'x', not an integer"),
        ('{"items": [{"item_id": "--1", "label": "cat"}]}', "item_id is '--1', not an integer"),
        ('{"items": [{"item_id": 1.5, "label": "cat"}]}', "item_id is 1.5, not an integer"),
        ('{"items": [{"item_id": true, "label": "cat"}]}', "item_id is True, not an integer"),
        ('{"items": [{"item_id": "²", "label": "cat"}]}', "item_id is '²', not an integer"),
        (
            '{"items": [{"item_id": 0, "label": "cat", "attributes": null}]}',
            "is missing, not a list",
        ),
        ('{"items": [{"item_id": 0, "label": "cat", "attributes": [3]}]}', "\\[0\\] is 3, not a"),
        ('{"items": [{"item_id": 0, "label": "c", "global_item_id": "x"}]}', "global_item_id is"),
        ('{"items": [], "relations": {}}', "relations is {}, not a list"),
        ('{"items": [], "relations": [7]}', "relations\\[0\\] is 7, not an object"),
        ('{"items": [], "caption_ori": ["a"]}', "caption_ori is \\['a'\\], not a text"),
        ('{"items": [], "name": 5}', "name is 5, not a text"),
        (
            '{"items": [{"item_id": 3, "label": "a"}, {"item_id": 3, "label": "b"}]}',
            "item_ids are not unique: \\[3, 3\\]",
        ),
        (
            '{"items": [{"item_id": 0, "label": "cat"}],'
            ' "relations": [{"item1": 0, "relation": "above", "item2": 1}]}',
            "relations\\[0\\] names item_id 1, which is not among \\[0\\]",
        ),
        (
            '{"items": [{"item_id": 0, "label": "cat"}],'
            ' "relations": [{"item1": 0, "relation": "above", "item2": 0}]}',
            "relations\\[0\\] relates item_id 0 to itself",
        ),
        (
            '{"items": [{"item_id": 0, "label": "cat"}, {"item_id": 1, "label": "dog"}],'
            ' "relations": [{"item1": 0, "relation": "", "item2": 1}]}',
            "relations\\[0\\].relation is empty",
        ),
    ],
)
def test_malformed_json_is_a_value_error(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SceneGraph.from_json(text)


def test_items_are_found_by_id() -> None:
    assert GRAPH.item(1) is CROSS
    with pytest.raises(KeyError, match="no item 2"):
        GRAPH.item(2)


def test_caption_of_a_chain() -> None:
    circle = Item(2, "circle", ("small", "black"))
    relations = (Relation(0, "above", 1), Relation(1, "left of", 2))
    expected = "a small red star above a large blue cross which is left of a small black circle"
    assert caption_of((STAR, CROSS, circle), relations) == expected
    assert caption_of((STAR,), ()) == "a small red star"


def test_parsing_inverts_captions() -> None:
    graphs = sampled(300)
    assert {len(g.items) for g in graphs} == {1, 2, 3, 4}
    for graph in graphs:
        assert parse_caption(graph.caption) == graph


def test_parsing_overlooks_case_and_spaces() -> None:
    parsed = parse_caption("  A small RED star   above a large blue cross\n")
    assert parsed.items == (STAR, CROSS)
    assert parsed.relations == (Relation(0, "above", 1),)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "small red star",
        "a photo of a cat",
        "a red small star",
        "a small red star and a large blue cross",
        "a small red star near a large blue cross",
        "a small red star above",
        "a small red star above a cross",
    ],
)
def test_captions_outside_the_grammar_are_value_errors(caption: str) -> None:
    with pytest.raises(ValueError, match="caption"):
        parse_caption(caption)


def test_every_relation_has_its_inverse() -> None:
    assert set(INVERSE) == set(RELATIONS)
    assert all(INVERSE[INVERSE[r]] == r != INVERSE[r] for r in RELATIONS)
