"""`pairs sample`, `web` and `pairs export` as a user types them, good input and bad."""

import json
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from inversion_dpo.cli.label import subject_of
from inversion_dpo.cli.main import main
from inversion_dpo.data.source import open_pairs
from inversion_dpo.labels.questions import questions
from inversion_dpo.labels.store import LabelStore
from inversion_dpo.run.config import load_config, to_yaml
from inversion_dpo.run.fields import DataConfig
from inversion_dpo.training.recipe import train


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_sampled_pairs_wait_for_labels(capsys, tiny_config, tmp_path):
    settings, out = tmp_path / "tiny.yaml", tmp_path / "pairs.parquet"
    settings.write_text(to_yaml(tiny_config()))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red star\n\na large blue circle\na small red cross\n")
    arguments = ["pairs", "sample", "-o", out, "-c", settings, "--count", "2"]
    code, text, _ = run(capsys, *arguments, "--prompts", prompts)
    assert code == 0 and f"2 pairs in {out}\nnext: inversion-dpo web {out} -c {settings}" in text
    rows = pq.read_table(out).to_pylist()
    assert [row["caption"] for row in rows] == ["a small red star", "a large blue circle"]
    assert all(row["label_0"] is None and row["jpg_0"] != row["jpg_1"] for row in rows)
    code, text, _ = run(capsys, "pairs", "check", out)
    assert code == 1 and "label_0 is null" in text
    code, _, err = run(capsys, *arguments, "model.path=nowhere/merged")
    assert code == 2 and "nowhere/merged" in err  # of another model: the policy of a round before
    code, _, err = run(capsys, *arguments)  # captions of the embedded world are not for any model
    assert code == 2 and "needs prompts: --prompts FILE" in err
    whole = out.read_bytes()
    assert run(capsys, *arguments, "--prompts", prompts)[0] == 0  # there already
    code, _, err = run(capsys, *arguments, "--prompts", "scenes")
    assert code == 2 and f"{out} is there, and was not made with these" in err
    assert out.read_bytes() == whole
    out.unlink()
    assert run(capsys, *arguments, "--prompts", "scenes")[0] == 0
    assert pq.read_table(out)["caption"].to_pylist() != ["a small red star", "a large blue circle"]


@pytest.mark.slow  # seeds on their way have fast tests in tests/unit/labels
def test_labelled_samples_train_with_their_known_noise(capsys, tmp_path):
    """From `pairs sample` over choices to `objective.path=known`, on the embedded model."""
    samples, labels, pairs = (tmp_path / f for f in ("s.parquet", "l.sqlite", "p.parquet"))
    drawn = ["--count", "6", "--seed", "40", "evaluation.sample_steps=4"]
    assert run(capsys, "pairs", "sample", "-o", samples, *drawn)[0] == 0
    store = LabelStore(labels)
    store.add(questions(DataConfig(pairs=str(samples)), None, Counter()))
    for pair in store.pairs():
        store.label(pair.pair, "me", pair.pair, "left")
    store.close()
    assert run(capsys, "pairs", "export", labels, "-o", pairs)[0] == 0
    short = ["training.steps=2", "training.batch_size=2", "training.tracker=none"]
    known = ["objective.name=diffusion_dpo", "objective.path=known", f"data.pairs={pairs}"]
    train(load_config("taste", [*known, *short, "inversion.fixed_point_iterations=0"]), tmp_path)
    (cache,) = (f.parent for f in (tmp_path / "cache").glob("*/manifest.json"))
    first = next(iter(open_pairs(DataConfig(pairs=str(pairs)))))
    seeded = torch.Generator().manual_seed(first.seeds[0])
    shard = load_file(cache / "shard-00000.safetensors")
    own = shard["endpoint"][0].float()
    torch.testing.assert_close(own, torch.randn(own.shape, generator=seeded), rtol=0, atol=2e-3)
    assert sorted(first.seeds) == [40, 41]


@pytest.mark.parametrize("content", [None, "", "\n \n", b"\xff\xfe"])
def test_bad_prompts_are_named(capsys, tmp_path, content):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = run(capsys, "pairs", "sample", "-o", tmp_path / "x.parquet", "--prompts", path)
    assert code == 2 and "prompts.txt" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["web", "nowhere.parquet"], "nowhere.parquet does not exist"),
        (["web", "{pairs}", "--host", "0.0.0.0"], "--allow-remote"),
        (["web", "{pairs}", "--host", "no.such.host", "--allow-remote"], "--port"),
        (["web", "{pairs}", "--labels", "{pairs}"], "--labels"),
        (["web", "{pairs}", "--labels", "no/such/folder.sqlite"], "--labels"),
        (["web", "{pairs}", "data.column=x"], "did you mean 'data.columns'"),
        (["web", "{pairs}", "-c", "tast"], "no configuration 'tast'"),
        (["pairs", "export", "nowhere.sqlite", "-o", "x.parquet"], "nowhere.sqlite"),
        (["pairs", "export", "{pairs}", "-o", "x.parquet"], "cannot be used for labels"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, pair_file, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = Path(pair_file).read_bytes()
    where = [a.format(pairs=pair_file) for a in arguments]
    code, _, err = run(capsys, *where, *(["--port", "0"] if where[0] == "web" else []))
    assert code == 2 and message in err and "Traceback" not in err
    assert Path(pair_file).read_bytes() == before and not [*tmp_path.iterdir()]


def test_without_the_extra_it_says_what_to_install(capsys, tmp_path, monkeypatch, pair_file):
    monkeypatch.chdir(tmp_path)
    for name in [n for n in sys.modules if n.startswith("inversion_dpo.web.")]:
        if name != "inversion_dpo.cli.label":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    code, _, err = run(capsys, "web", pair_file, "--port", "0")
    assert code == 2 and "inversion-dpo[web]" in err


def test_a_run_or_data(tiny_config, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(tiny_config("training.steps=3")))
    about = subject_of(str(tmp_path), "taste", ["data.limit=2"], None)
    assert about.run == tmp_path and about.labels == tmp_path / "labels.sqlite"
    assert about.config.training.steps == 3 and about.config.data.limit == 2
    data = subject_of("asset:taste.parquet", "taste", [], None)
    assert data.run is None and data.labels == Path("taste.labels.sqlite")
    assert data.config.data.pairs == "asset:taste.parquet"
    assert subject_of("hf:someone/pairs", "taste", [], None).labels == Path("pairs.labels.sqlite")


def test_the_whole_loop_in_json_is_what_the_documentation_says():
    """docs/how-to/label.md quotes figures of examples/warm_labels.py; they must be its output's."""
    root = Path(__file__).parents[2]
    kept = json.loads((root / "docs" / "results" / "labelling.json").read_text())
    page = (root / "docs" / "how-to" / "label.md").read_text()
    for seed in kept["runs"]:
        share = kept["runs"][seed]["share of warm grounds"]
        low, high = share["interval"]
        assert low > 0
        assert f"+{share['gain']:.3f} [+{low:.3f}, +{high:.3f}]" in page
