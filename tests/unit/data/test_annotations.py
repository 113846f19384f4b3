"""Scene-graph annotations: what is read, what is refused row by row, and where images lie."""

import json
from pathlib import Path

import pytest
from PIL import Image

from inversion_dpo.data.annotations import (
    is_annotated,
    read_annotated,
    read_annotations,
)
from inversion_dpo.data.images import DataError
from inversion_dpo.graphs.graph import Item, Relation, SceneGraph, triples
from tests.pair_files import write_annotations

SAMPLE = Path(__file__).with_name("laion_sg.jsonl")  # twelve rows; those of odd number are spoiled


def test_of_twelve_rows_six_are_read_and_six_are_named():
    graphs, problems = read_annotations(SAMPLE)
    assert len(graphs) == len(problems) == 6 and not any("\n" in p for p in problems)
    expected = {
        1: "not JSON",
        3: "items is missing",
        5: "items[0].label is missing",
        7: "item_ids are not unique: [0, 0]",
        9: "relations[0] names item_id 2, which is not among [0, 1]",
        11: "relations[0] relates item_id 1 to itself",
    }
    for problem, (row, reason) in zip(problems, expected.items(), strict=True):
        assert problem.startswith(f"laion_sg.jsonl, row {row}: ") and reason in problem


def test_every_field_is_read():
    first, second, third, *_ = read_annotations(SAMPLE)[0]
    river = Item(1, "river", ("calm", "wide"), 3201430)
    assert first == SceneGraph(
        (Item(0, "waterfall", ("tall",), 3201429), river),
        (Relation(0, "above", 1, 2118510),),
        "waterfall above a river",
        "8040361340228797010.jpg",
        "482027",
    )
    assert second.img_id == "2"  # written as a number
    assert third.items == (Item(5, "dog", ("brown", "small")), Item(7, "ball"))


@pytest.mark.parametrize("name", ["annotations.json", "annotations.jsonl"])
def test_what_is_written_is_read_the_same(tmp_path, name):
    graphs, _ = read_annotations(SAMPLE)
    write_annotations(graphs, tmp_path / name)
    assert read_annotations(tmp_path) == (graphs, []) == read_annotations(tmp_path / name)


def test_lists_objects_by_id_and_single_annotations(tmp_path):
    rows = [graph.to_dict() for graph in read_annotations(SAMPLE)[0]][:2]
    file = tmp_path / "graphs.json"
    file.write_text(json.dumps({"77": {**rows[0], "img_id": "a"}, "78": rows[1] | {}}))
    by_id, problems = read_annotations(file)
    assert [g.img_id for g in by_id] == ["a", "2"] and not problems
    del rows[1]["img_id"]
    file.write_text(json.dumps({"77": 5, "78": rows[1]}))
    by_id, problems = read_annotations(file)
    assert [g.img_id for g in by_id] == ["78"]
    assert problems == ["graphs.json, row 0: a scene graph is 5, not an object {...}"]
    file.write_text(json.dumps(rows[0]))
    assert len(read_annotations(file)[0]) == 1
    file.write_text("\n".join(map(json.dumps, rows)))  # lines, whatever the suffix says
    assert len(read_annotations(file)[0]) == 2


def test_a_line_may_hold_any_character(tmp_path):
    row = {"items": [{"item_id": 0, "label": "sign\u2028post"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    graphs, problems = read_annotations(tmp_path / "a.jsonl")
    assert graphs[0].items[0].label == "sign\u2028post" and not problems


@pytest.mark.parametrize("text", ['[{"items": [', "5", '"items"', "null", ""])
def test_files_that_are_no_annotations_are_refused_whole(tmp_path, text):
    (tmp_path / "annotations.json").write_text(text)
    with pytest.raises(DataError, match="annotations.json is n"):
        read_annotations(tmp_path)


def test_the_file_must_be_there_and_be_one(tmp_path):
    with pytest.raises(DataError, match="holds no annotations.json or annotations.jsonl"):
        read_annotations(tmp_path)
    for name in ("annotations.json", "annotations.jsonl"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(DataError, match="holds both"):
        read_annotations(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(DataError, match="UTF-8"):
        read_annotations(tmp_path / "latin.json")


def folder_of(tmp_path, *rows):
    """Annotated images: one item each, under the given names and numbers."""
    inside = tmp_path / "set"
    (inside / "sub").mkdir(parents=True)
    for name in ("set/a.png", "set/sub/b.png", "set/9.webp", "outside.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    item = [{"item_id": 0, "label": "cat"}]
    made = [{**row, "items": item, "caption_ori": f"caption {k}"} for k, row in enumerate(rows)]
    (inside / "annotations.json").write_text(json.dumps(made))
    return inside


def test_images_are_found_by_name_or_number(tmp_path):
    folder = folder_of(tmp_path, {"name": "a.png"}, {"name": "sub/b.png"}, {"img_id": 9})
    images, problems = read_annotated(folder)
    assert problems == []
    assert [i.path.relative_to(folder).as_posix() for i in images] == [
        "a.png",
        "sub/b.png",
        "9.webp",
    ]
    assert [(i.caption, i.graph.caption) for i in images][1] == ("caption 1", "caption 1")
    assert read_annotated(folder / "annotations.json") == (images, [])


def test_paths_stay_inside_the_folder(tmp_path):
    out = str(tmp_path / "outside.png")
    names = ["../outside.png", out, "link.png", "sub\\b.png", "a\0.png", "x" * 5000, "none.png"]
    rows = [{"name": name} for name in names] + [{"img_id": "../outside"}, {}]
    images, problems = read_annotated(folder_of(tmp_path, *rows))
    assert [image.path.name for image in images] == ["b.png"]  # as Windows writes its path
    places = [k for k in range(9) if k != 3]
    assert [p.partition(": ")[0] for p in problems] == [
        f"annotations.json, row {k}" for k in places
    ]
    assert "leads out" in problems[0] and "leads out" in problems[1] and "link out" in problems[2]
    assert "no file 'none.png'" in problems[5] and "neither name nor img_id" in problems[7]


def test_annotations_are_told_from_tables_of_pairs(tmp_path):
    assert is_annotated(SAMPLE)
    (tmp_path / "pairs.json").write_text(json.dumps([{"jpg_0": "a", "jpg_1": "b", "prompt": "c"}]))
    assert not is_annotated(tmp_path / "pairs.json") and not is_annotated(tmp_path)
    (tmp_path / "own.json").write_text('[{"winner": "a.png", "loser": "b.png", "items": 3}]')
    assert not is_annotated(tmp_path / "own.json")
    (tmp_path / "annotations.json").write_text("[]")
    assert is_annotated(tmp_path)


VISUAL_GENOME = {
    "image_id": 9,
    "objects": [
        {"object_id": 5, "names": ["cat"], "attributes": ["black"]},
        {"object_id": 7, "names": ["mat"]},
    ],
    "relationships": [{"predicate": "ON", "subject_id": 5, "object_id": 7, "synsets": []}],
}
RELATIONSHIPS = {
    "image_id": 9,
    "relationships": [
        {
            "predicate": "ON",
            "subject": {"object_id": 5, "name": "black cat"},
            "object": {"object_id": 7, "names": ["mat"]},
        }
    ],
}
PSG = {
    "thing_classes": ["cat"],
    "stuff_classes": ["mat"],
    "predicate_classes": ["over", "on"],
    "data": [
        {
            "file_name": "a.png",
            "image_id": "9",
            "segments_info": [{"category_id": 0}, {"category_id": 1}],
            "relations": [[0, 1, 1]],
        },
        {"file_name": "b.png", "segments_info": [{"category_id": 4}], "relations": []},
    ],
}


@pytest.mark.parametrize(
    ("data", "subject", "relation"),
    [
        ([VISUAL_GENOME], "black cat", "ON"),
        ({"data": [VISUAL_GENOME]}, "black cat", "ON"),
        ([RELATIONSHIPS], "black cat", "ON"),
        (PSG, "cat", "on"),
    ],
)
def test_layouts_of_visual_genome_and_psg(tmp_path, data, subject, relation):
    file = tmp_path / "graphs.json"
    file.write_text(json.dumps(data))
    assert is_annotated(file)
    graphs, problems = read_annotations(file)
    assert triples(graphs[0]) == [(subject, relation, "mat")] and graphs[0].img_id == "9"
    if data is PSG:
        assert problems == [
            "graphs.json, row 1: PSG's layout is broken (IndexError('list index out of range'))"
        ]


def test_a_broken_row_of_visual_genome_is_named(tmp_path):
    broken = {"image_id": 1, "relationships": [{"predicate": "on", "subject_id": 5}]}
    (tmp_path / "a.json").write_text(json.dumps([broken, {"relationships": 3}]))
    _, problems = read_annotations(tmp_path / "a.json")
    assert problems[0] == "a.json, row 0: Visual Genome's layout is broken (KeyError('object_id'))"
    assert problems[1].startswith("a.json, row 1: Visual Genome's layout is broken")
