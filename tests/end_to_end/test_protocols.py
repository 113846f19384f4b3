"""A paper's protocol on tiny weights: every set, every scorer, further models, kills, processes."""

import json
import shutil

import pytest

from inversion_dpo.cli.main import main
from inversion_dpo.evaluation import protocols
from inversion_dpo.run.config import to_yaml
from tests.prompt_files import place_set

PROMPTS = ["a small red star", "a large blue circle left of a small green square"]
ASSET = "evaluation.prompts=asset:prompts-test.txt"
QUICK = ["evaluation.scorer=scenes", "evaluation.preference=warmth", "evaluation.sample_steps=1"]


def command(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture
def run(tiny_run, tiny_config, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "config.yaml").write_text(to_yaml(tiny_config()))
    return folder


def test_every_protocol_names_known_sets_and_settings():
    from inversion_dpo.evaluation.named_sets import named_sets
    from inversion_dpo.run.config import load_config

    for protocol in protocols.protocols().values():
        assert set(protocol.prompts) <= set(named_sets()) and "https://" in protocol.source
        config = load_config(None, [*protocol.overrides(), f"model.path={protocol.model}"])
        resolution = f"model.resolution={config.model.resolution}"
        left = protocol.departures(config)
        assert [text for text in left if not text.startswith(resolution)] == []
        for row in protocol.published.get("rows", {}).values():
            assert len(row) == len(protocol.published["columns"])
        assert set(protocol.published.get("columns", ())) <= set(config.evaluation.scorer)


@pytest.mark.slow
def test_a_protocol_compares_checkpoints_and_stands_in_the_report(capsys, run, tmp_path, hub_cache):
    place_set(hub_cache, tmp_path / "sets", "pickapic-test", PROMPTS)
    other = shutil.copytree(run / "adapter", tmp_path / "other")
    asked = ["evaluate", run, "--protocol", "sd15-dpo", *QUICK, "evaluation.prompts=pickapic-test"]
    code, out, err = command(capsys, *asked, "--against", other)
    assert code == 0, err
    assert "Do not compare with published numbers: evaluation.sample_steps=1, not 50" in out
    found = json.loads((run / "protocols" / "sd15-dpo.json").read_text())
    models = found["sets"]["pickapic-test"]["models"]
    assert list(models) == ["this run", str(other)]  # the same LoRA by another name
    assert models["this run"] == models[str(other)]
    assert {"win_rate_low", "gain_low"} <= set(models["this run"]["warmth"])
    assert json.loads((run / "metrics.json").read_text())["warmth"] == models["this run"]["warmth"]
    assert command(capsys, "report", run)[0] == 0
    page = (run / "report.html").read_text()
    assert "Protocol sd15-dpo: pickapic-test" in page and "InPO, published" in page
    before = {f: f.stat().st_mtime_ns for f in (run / "samples").glob("*.parquet")}
    assert command(capsys, *asked, "--against", other)[0] == 0
    assert {f: f.stat().st_mtime_ns for f in (run / "samples").glob("*.parquet")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "sdxl"], "one of sd15-dpo, sdxl-dpo"),
        (["--against", "a/b"], "--against needs --protocol"),
        (["--protocol", "sd15-dpo", *QUICK, ASSET, "--against", "no/such"], "no/such"),
        (["--protocol", "sd15-dpo", *QUICK], "inversion-dpo prompts pickapic-test"),
    ],
)
def test_a_wrong_name_is_one_line_before_anything_is_sampled(capsys, run, arguments, message):
    code, _, err = command(capsys, "evaluate", run, *arguments)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not (run / "samples").exists() and not (run / "protocols").exists()


def test_published_numbers_stand_in_their_columns_alone():
    row = {"reference": 1.0, "policy": 2.0, "gain": 1.0, "gain_low": 0.5, "gain_high": 1.5}
    row |= {"win_rate": 0.6, "win_rate_low": 0.55, "win_rate_high": 0.65}
    part = {"n_prompts": 500, "models": {"a/b": {"clip": row, "mine": row}}}
    found = {"protocol": "sdxl-dpo", "departures": [], "sets": {"pickapic-test": part}}
    rows = protocols.table_of(found, "pickapic-test")
    assert [(r["model"], r[""], r["clip"], r["mine"]) for r in rows][:4] == [
        ("the reference", "mean", "1", "1"),
        ("a/b", "mean", "2", "2"),
        ("a/b", "gain", "+1.0 [+0.5, +1.5]", "+1.0 [+0.5, +1.5]"),
        ("a/b", "win rate", "60.0% [55.0, 65.0]", "60.0% [55.0, 65.0]"),
    ]
    assert [(r["model"], r["clip"], r["mine"]) for r in rows][4:] == [
        ("base, published", "28.41", "–"),
        ("Diffusion-DPO, published", "29.02", "–"),
        ("InPO, published", "28.84", "–"),
    ]
    found["sets"]["hpdv2"] = part  # of which nothing was published
    assert len(protocols.table_of(found, "hpdv2")) == 4
