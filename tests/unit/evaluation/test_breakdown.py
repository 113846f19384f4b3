"""The breakdown by objects, relations and kinds of error, with numbers worked out by hand."""

import numpy as np
import pytest

from inversion_dpo.evaluation.breakdown import breakdown, table_rows
from inversion_dpo.evaluation.metrics import paired_bootstrap
from inversion_dpo.graphs.graph import Item, Relation, SceneGraph

CAT, DOG, COW = Item(0, "cat", ("red",)), Item(1, "dog"), Item(2, "cow")
ONE = SceneGraph((CAT,))
TWO = SceneGraph((CAT, DOG), (Relation(0, "above", 1),))
SWAPPED = SceneGraph((CAT, DOG), (Relation(1, "above", 0),))
GREEN = SceneGraph((Item(0, "cat", ("green",)), DOG), (Relation(0, "above", 1),))
NOTHING = SceneGraph(())
ASKED = [ONE, TWO, TWO, ONE]
REFERENCE = [NOTHING, SWAPPED, GREEN, ONE]
POLICY = [ONE, TWO, TWO, ONE]


def test_by_hand():
    found = breakdown(ASKED, REFERENCE, POLICY)
    assert found["left_out"] == 0 and found["all"]["n_prompts"] == 4
    # reference: sg_iou 0, 0, 0 (the green cat's triple is another one), 1
    assert found["all"]["sg_iou"]["reference"] == 0.25 and found["all"]["sg_iou"]["gain"] == 0.75
    kinds = ("entity_errors", "attribute_errors", "relation_errors")
    assert [found["all"][k]["reference"] for k in kinds] == [0.25, 0.25, 0.25]
    assert found["all"]["relation_errors"]["gain"] == -0.25
    assert list(found["objects"]) == ["1", "2"]
    assert found["objects"]["1"]["exact"]["reference"] == 0.5
    assert found["objects"]["2"]["exact"]["reference"] == 0
    assert found["objects"]["2"]["entity_errors"]["reference"] == 0
    assert list(found["relations"]) == ["above"]
    held = found["relations"]["above"]
    assert held["n_prompts"] == 2 and held["held"]["reference"] == 0 and held["held"]["policy"] == 1
    interval = paired_bootstrap([0, 0, 0, 1], [1, 1, 1, 1])
    row = found["all"]["sg_iou"]
    assert (row["gain_low"], row["gain_high"]) == (interval.low, interval.high)


def test_unknown_and_unread_are_left_out_and_counted():
    found = breakdown([ONE, None, TWO, TWO], [ONE, ONE, None, TWO], [ONE, ONE, TWO, TWO])
    assert found["left_out"] == 2 and found["all"]["n_prompts"] == 2
    assert breakdown([None], [ONE], [ONE]) == {}
    # several images: a prompt counts if all of its images could be read
    found = breakdown([ONE, TWO], [ONE, ONE, TWO, None], [ONE, NOTHING, TWO, TWO], seeds=2)
    assert found["left_out"] == 1 and found["all"]["n_prompts"] == 1
    assert found["all"]["exact"]["gain"] == -0.5
    with pytest.raises(ValueError, match="2 images each"):
        breakdown([ONE], [ONE], [ONE], seeds=2)


def test_many_objects_are_one_group_and_the_table_has_every_part():
    many = [SceneGraph(tuple(Item(k, "cat") for k in range(n))) for n in (5, 9, 2)]
    found = breakdown(many, many, many)
    assert {k: v["n_prompts"] for k, v in found["objects"].items()} == {"2": 1, "5 or more": 2}
    rows = table_rows(breakdown(ASKED, REFERENCE, POLICY))
    assert [(name, n, measure) for name, n, measure, _ in rows] == [
        ("1 object", 2, "sg_iou"),
        ("2 objects", 2, "sg_iou"),
        ("above", 2, "relation holds"),
        ("objects missing or extra", 4, "errors an image"),
        ("objects of wrong attributes", 4, "errors an image"),
        ("wrong relations", 4, "errors an image"),
    ]
    assert all(np.isfinite(row["gain"]) for *_, row in rows)
    assert table_rows({}) == []
