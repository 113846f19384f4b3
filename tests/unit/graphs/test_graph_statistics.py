"""What is counted in scene graphs, by hand, and what `pairs check` says of them."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inversion_dpo.cli.main import main
from inversion_dpo.graphs.graph import Item, Relation, SceneGraph
from inversion_dpo.graphs.statistics import format_statistics, isolated_items, statistics_of
from inversion_dpo.making_pairs.candidates import encode_image

CIRCLES = SceneGraph(
    (Item(0, "circle", ("red",)), Item(1, "circle", ("red",))), (Relation(0, "left of", 1),)
)
BOTH_WAYS = SceneGraph(
    (Item(0, "man"), Item(1, "woman"), Item(2, "dog", ("old", "brown"))),
    (Relation(0, "faces", 1), Relation(1, "faces", 0)),
)
RING = SceneGraph(
    tuple(Item(k, "man", (str(k),)) for k in range(3)),
    tuple(Relation(k, "sees", (k + 1) % 3) for k in range(3)),
)


def test_counts_by_hand():
    found = statistics_of([CIRCLES, BOTH_WAYS, RING, SceneGraph((Item(0, "cat"),))])
    assert (found.items, found.attributes, found.relations) == (
        (2, 3, 3, 1),
        (2, 2, 3, 0),
        (1, 2, 3, 0),
    )
    assert found.labels == {"circle": 2, "man": 4, "woman": 1, "dog": 1, "cat": 1}
    assert found.words == {"left of": 1, "faces": 2, "sees": 3}
    assert (found.isolated, found.repeated, found.mutual) == (1, 1, 1)
    assert found.rare == ["cat", "dog", "woman"]


def test_isolated_items_and_rings():
    assert isolated_items(BOTH_WAYS) == [2] and isolated_items(RING) == []
    assert isolated_items(SceneGraph((Item(0, "cat"),))) == []
    assert isolated_items(SceneGraph((Item(4, "cat"), Item(5, "cat")))) == [4, 5]


def test_as_text():
    text = "\n".join(format_statistics(statistics_of([CIRCLES, BOTH_WAYS])))
    assert "scene graphs: 2; of each items 2 to 3, median 2.5" in text
    assert "most often 'circle' (2)" in text and "seen once: 3 ('dog', 'man', 'woman')" in text
    assert "isolated items: 1" in text and "both ways: 1" in text
    assert format_statistics(statistics_of([])) == []


def check(capsys, data):
    with pytest.raises(SystemExit) as stop:
        main(["pairs", "check", str(data)])
    return stop.value.code or 0, capsys.readouterr().out


def test_pairs_check_of_annotations(capsys, tmp_path):
    from pathlib import Path

    code, text = check(capsys, Path(__file__).parents[1] / "data" / "laion_sg.jsonl")
    assert code == 1 and "problems: 6" in text and "row 9: relations[0] names item_id 2" in text
    assert "laion_sg.jsonl: 6 scene graphs\n" in text and "isolated items: 2" in text
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    item = [{"item_id": 0, "label": "cat"}]
    rows = [{"name": f"{n}.png", "items": item} for n in "abc"]
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    code, text = check(capsys, tmp_path)
    assert code == 1 and "problems: 2" in text and "row 1: the image cannot be read" in text
    assert "row 2: there is no file 'c.png'" in text
    (tmp_path / "annotations.json").write_text(json.dumps(rows[:1]))
    assert check(capsys, tmp_path)[0] == 0
    (tmp_path / "annotations.json").write_text("[]")
    assert check(capsys, tmp_path)[0] == 1


def test_pairs_check_of_pairs_with_scene_graphs(capsys, tmp_path):
    light, dark = (encode_image(np.full((8, 8, 3), v, np.uint8)) for v in (200, 20))
    row = {"jpg_0": light, "jpg_1": dark, "label_0": 1.0, "caption": "two circles"}
    graphs = [CIRCLES.to_json(), '{"items": 5}', "{", None, BOTH_WAYS.to_json()]
    rows = [row | {"scene_graph": g} for g in graphs]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    code, text = check(capsys, tmp_path / "pairs.parquet")
    assert code == 1 and "5 usable pairs in 5 rows" in text and "2 scene graphs)" in text
    assert "row 1: scene_graph: items is 5, not a list" in text
    assert "row 2: scene_graph: a scene graph that is not JSON" in text
    assert "scene graphs: 2; of each items 2 to 3" in text
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "pairs.parquet")
    code, text = check(capsys, tmp_path / "pairs.parquet")
    assert code == 0 and "graphs with objects of one name: 1" in text
