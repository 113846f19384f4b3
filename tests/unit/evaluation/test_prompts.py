"""Prompt sets from files, and the compositional set that ships."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inversion_dpo.evaluation.evaluate import check
from inversion_dpo.evaluation.prompt_sets import (
    graph_of_prompt,
    prompts_to_sample,
    read_prompt_set,
    read_prompts,
)
from inversion_dpo.models.base import ModelError
from inversion_dpo.run.config import PACKAGE, ConfigError, load_config
from inversion_dpo.world.captions import parse_caption
from inversion_dpo.world.scene_prompts import split_of
from tools.embedded.compositional import (
    CATEGORIES,
    category_of,
    compositional_prompts,
    write_all,
)


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n  two \nthree\n")
    found = read_prompt_set(str(tmp_path / "p.txt"), 2)
    assert found.prompts == ["one", "two"] and found.by_category == {}


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_file_of_prompts_may_be_as_editors_of_windows_save_it(tmp_path, coding):
    (tmp_path / "p.txt").write_bytes("a café\r\na dog\r\n".encode(coding))
    assert read_prompts(str(tmp_path / "p.txt"), None) == ["a café", "a dog"]
    (tmp_path / "p.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text .*; save it as that"):
        read_prompts(str(tmp_path / "p.txt"), None)


@pytest.mark.parametrize(
    ("first", "warns"),
    [("prompt", True), ("Caption,category", True), ("text", True), ("prompt of a fox", False)],
)
def test_a_first_line_that_names_a_column_is_pointed_at(tmp_path, caplog, first, warns):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{first}\na fox\n")
    assert read_prompts(str(file), None) == [first, "a fox"]
    assert (
        f"{file}: its first line, {first!r}, looks like the name of a column" in caplog.text
    ) is warns


def test_a_number_counts_training_captions_of_the_embedded_world():
    found = read_prompt_set("20", None, seed=3)
    assert len(set(found.prompts)) == 20 and {split_of(p) for p in found.prompts} == {"train"}
    assert read_prompts("30", 20, seed=3) == found.prompts
    assert read_prompts("20", None, seed=4) != found.prompts
    assert all(graph_of_prompt(p) == parse_caption(p) for p in found.prompts)
    assert graph_of_prompt("a dog on a sofa") is None


def test_genevals_own_file_is_understood(tmp_path):
    rows = [
        {"tag": "two_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"},
        {"tag": "colors", "prompt": "a red cup"},
        {"tag": "two_object", "prompt": "a cat"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_prompt_set(str(tmp_path / "p.jsonl"), None)
    assert found.prompts == ["a dog", "a red cup", "a cat"]
    assert found.by_category == {"two_object": [0, 2], "colors": [1]}


def test_a_category_may_be_a_number_and_an_empty_one_leaves_the_tag(tmp_path):
    rows = [
        {"prompt": "a", "category": 0},
        {"prompt": "b", "category": 1},
        {"prompt": "c", "category": None, "tag": " colors "},
        {"prompt": "d", "category": "", "tag": None},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "p.parquet")
    found = read_prompt_set(str(tmp_path / "p.jsonl"), None)
    assert found.categories == ["0", "1", "colors", ""]
    assert read_prompt_set(str(tmp_path / "p.parquet"), None).categories == ["0", "1"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\nnonsense', "line 2 is not JSON"),
        ("p.jsonl", '{"text": "a"}', 'line 1 has no text under "prompt"'),
        ("p.jsonl", "[1]", "line 1 has no text"),
        ("p.jsonl", '{"prompt": " "}', "line 1 has no text"),
        ("p.jsonl", '{"prompt": "\\u200b"}', "line 1 has no text"),
        ("p.jsonl", '{"prompt": "a \\ud83d cat"}', "line 1 has no text"),
        (
            "p.jsonl",
            '{"prompt": "a", "category": ["x"]}',
            'line 1, "category" or "tag": write one text',
        ),
        ("p.txt", "\u200b\n", "holds no prompts"),
        ("p.csv", "prompt,category\na,b", "is a table: give a text file with one prompt a line"),
        ("p.JSON", '["a"]', "is a table"),
        ("p.ndjson", 'one\n{"prompt": "a"}', "line 2 is a JSON object: give the file a name in"),
        ("p.txt", '{"prompt": "a"}', "line 1 is a JSON object"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name) as error:
        read_prompt_set(str(tmp_path / name), None)
    assert message in str(error.value)


@pytest.mark.parametrize("source", ["hf:", "hf:owner/name", "hf:a/b:c:d:e", "missing.txt"])
def test_bad_sources_say_how_to_write_them(source):
    with pytest.raises(ConfigError, match="hf:OWNER/NAME:COLUMN"):
        read_prompt_set(source, None)


def test_a_hub_set_is_streamed(monkeypatch):
    import datasets

    asked = []

    def load(name, split, streaming):
        asked.append((name, split, streaming))
        yield from ({"Prompt": p} for p in ["one", "", None, "two", "three"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_prompt_set("hf:nateraw/parti-prompts:Prompt", 2).prompts == ["one", "two"]
    assert read_prompt_set("hf:a/b:Prompt:test", None).prompts == ["one", "two", "three"]
    assert asked == [("nateraw/parti-prompts", "train", True), ("a/b", "test", True)]
    with pytest.raises(ConfigError, match="no column caption; it has Prompt"):
        read_prompt_set("hf:a/b:caption", None)


@pytest.mark.parametrize(
    "caption, category",
    [
        ("a small red star", "single_object"),
        ("a small red star above a small blue star", "color_binding"),
        ("a small red star above a small red cross", "shape_binding"),
        ("a small red star left of a large red star", "size_binding"),
        ("a small red star below a large blue star", "position"),
        ("a small red star above a small red cross which is below a large pink star", "complex"),
    ],
)
def test_categories_by_hand(caption, category):
    assert category_of(parse_caption(caption)) == category


@pytest.mark.slow
def test_the_shipped_set_is_what_the_script_writes():
    found = read_prompt_set("asset:prompts-compositional.jsonl", None)
    assert list(zip(found.categories, found.prompts, strict=True)) == compositional_prompts(50)
    assert set(found.by_category) == set(CATEGORIES) and len(set(found.prompts)) == 224
    assert {split_of(p) for p in found.prompts} == {"test"}


def test_a_scene_graph_stands_beside_its_prompt(tmp_path):
    from inversion_dpo.graphs.graph import Item, SceneGraph

    graph = {"items": [{"item_id": 0, "label": "cat"}], "relations": []}
    path = tmp_path / "graphs.jsonl"
    rows = [
        {"prompt": "a", "scene_graph": graph},
        {"prompt": "b"},
        {"prompt": "c", "scene_graph": json.dumps(graph)},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    cat = SceneGraph((Item(0, "cat"),))
    assert read_prompt_set(str(path), None).graphs == [cat, None, cat]
    for bad in ("{", 7, [], {"items": 3}):
        path.write_text(json.dumps({"prompt": "a", "scene_graph": bad}))
        with pytest.raises(ConfigError, match='line 1, "scene_graph"') as refusal:
            read_prompt_set(str(path), None)
        assert "\n" not in str(refusal.value)


@pytest.mark.slow  # it makes all scenes of the embedded world; the test above has one file of three
def test_the_shipped_prompt_sets_are_what_the_workshop_writes(tmp_path):
    write_all(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (PACKAGE / "assets" / file.name).read_bytes(), file.name
    assert len(list(tmp_path.iterdir())) == 3


def test_prompts_may_have_the_size_of_their_images(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": "a", "size": "832x1216"}, {"prompt": "b"}, {"prompt": "a"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_prompt_set(str(path), None)
    assert found.sizes == [(1216, 832), None, None] and found.size_of == {"a": (1216, 832)}
    path.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "a", "size": "64x64"}])))
    with pytest.raises(ConfigError, match="'a' occurs with two sizes"):
        _ = read_prompt_set(str(path), None).size_of
    for size in ("64", "0x64", 64, "64x64px"):
        path.write_text(json.dumps({"prompt": "a", "size": size}))
        with pytest.raises(ConfigError, match='line 1, "size": write it as "832x1216"'):
            read_prompt_set(str(path), None)


def test_a_file_is_not_sampled_as_a_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat")
    assert prompts_to_sample(["a cat", "a {brace", "猫" * 200, "\0"], None)
    with pytest.raises(
        ConfigError, match=r"the prompt 'a \\udcff cat' has bytes that are not UTF-8"
    ):
        prompts_to_sample(["a star", "a \udcff cat"], None)
    with pytest.raises(ConfigError, match=r"prompts.txt is a file: give the prompts themselves"):
        prompts_to_sample(["a cat", str(file)], None)


def test_what_would_stop_or_mislead_an_evaluation_is_said_first(tmp_path, caplog):
    file = tmp_path / "p.jsonl"
    config = load_config("taste", [f"evaluation.prompts={file}", "evaluation.limit=null"])
    rows = [{"prompt": "a large red star"}, {"prompt": "a large red star"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    check(config, tmp_path / "run")
    assert "1 of 2 prompts repeat an earlier one" in caplog.text
    file.write_text("\n".join(map(json.dumps, [rows[0], {"prompt": "a", "size": "65x64"}])))
    config = replace(config, evaluation=replace(config.evaluation, scorer=None))
    with pytest.raises(ModelError, match="images of 65x64: both sides must be multiples of 16"):
        check(config, tmp_path / "run")
