"""Prompt sets by name, from a hub's cache and from GitHub's files."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inversion_dpo.cli.main import main
from inversion_dpo.evaluation import named_sets as sets
from inversion_dpo.evaluation.prompt_sets import read_prompt_set
from inversion_dpo.run.config import ConfigError

GENEVAL = [{"tag": "counting", "include": [], "prompt": "three oranges"}, {"prompt": "a cow"}]
FILES = {  # in the list's order: what each file's form looks like, and what has to be read of it
    "pickapic-test": ({"caption": ["a", "b "]}, ["a", "b"], ["", ""]),
    "hpdv2": ('["x", "y"]', ["x", "y"] * 4, ["anime"] * 2 + ["concept-art"] * 2),
    "partiprompts": ("Prompt\tCategory\nbond\tAbstract\n", ["bond"], ["Abstract"]),
    "drawbench": ('["x", "", "y"]', ["x", "y"], ["", ""]),
    "geneval": ("\n".join(map(json.dumps, GENEVAL)), ["three oranges", "a cow"], ["counting", ""]),
    "t2i-compbench": ("a red car\n\na cup.\n", ["a red car", "a cup."] * 6, ["color"] * 2),
    "t2i-compbench-spatial": ("a cat near a cup\n", ["a cat near a cup"], ["spatial"]),
    "dpg": (
        'item_id,text,q\n0,"one, long",x\n0,"one, long",y\n1,two,z\n',
        ["one, long", "two"],
        [],
    ),
}
NAMES = list(FILES)


@pytest.fixture
def placed(tmp_path, monkeypatch, hub_cache):
    """Call with a set's name: its files then lie where they would be after a download."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))

    def place(name):
        s, root = sets.named_sets()[name], tmp_path / "made"
        github = s.repository.removeprefix("github:")
        if github != s.repository:
            root = tmp_path / "home" / "inversion-dpo" / github / s.revision
            monkeypatch.setattr(sets, "sha256_of", lambda file: s.sha256.get(path_of(file), ""))
        path_of = lambda file: file.relative_to(root).as_posix()  # noqa: E731
        for path in s.files:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            content = FILES[name][0]
            if isinstance(content, dict):
                pq.write_table(pa.table(content), root / path)
            else:
                (root / path).write_text(content)
        if github == s.repository:
            commit = s.revision if len(s.revision) == 40 else "a" * 40
            hub_cache("datasets", s.repository, root, s.revision, commit)
        return root

    return place


def test_every_set_states_where_it_comes_from():
    assert list(sets.named_sets()) == NAMES
    for name, s in sets.named_sets().items():
        pinned = len(s.revision) == 40
        assert pinned or name == "pickapic-test"  # whose commit no page in reach states in full
        assert s.licence and "arxiv.org" in s.source
        on_github = s.repository.startswith("github:")
        assert name == "dpg" or set(s.sha256) == (set(s.files) if on_github else set())
    text = "\n".join(sets.lines())
    assert "geneval: 553 prompts, licence: MIT" in text and "djghosh13/geneval@af4902f" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_named_set_is_read_with_its_categories(placed, caplog, name):
    placed(name)
    found = read_prompt_set(name, None)
    _, prompts, categories = FILES[name]
    assert found.prompts == prompts and found.categories[: len(categories)] == categories
    assert f"has {len(prompts)} prompts, not {sets.named_sets()[name].prompts}" in caplog.text
    assert read_prompt_set(name, 1).prompts == prompts[:1]


@pytest.mark.parametrize("name", NAMES)
def test_an_unreachable_set_is_one_line_with_its_remedy(tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=f"evaluation.prompts: {name}: .* cannot be had") as error:
        read_prompt_set(name, None)
    assert "\n" not in str(error.value) and "HF_TOKEN" in str(error.value)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_file_that_was_changed_is_refused(placed, monkeypatch):
    placed("geneval")
    monkeypatch.setattr(sets, "sha256_of", lambda file: "0" * 64)
    with pytest.raises(ConfigError, match="not the published file: delete it"):
        read_prompt_set("geneval", None)


@pytest.mark.parametrize("content", ["not json", "[1", '{"a": 1}\nx'])
def test_a_damaged_file_is_one_line(placed, content):
    root = placed("geneval")
    (root / "prompts/evaluation_metadata.jsonl").write_text(content)
    with pytest.raises(ConfigError, match="evaluation.prompts: geneval: .* cannot be read"):
        read_prompt_set("geneval", None)


def test_the_command_states_and_reads(placed, capsys):
    placed("t2i-compbench")
    with pytest.raises(SystemExit):
        main(["prompts", "t2i-compbench"])
    out = capsys.readouterr().out
    assert "1800 prompts, licence: MIT" in out and "read: 12 prompts (color 2, shape 2" in out
    with pytest.raises(SystemExit) as stop:
        main(["prompts", "nonsense"])
    assert stop.value.code == 2 and "one of pickapic-test, hpdv2" in capsys.readouterr().err
