"""The command as a user types it, good input and bad, on the tiny random pipeline."""

import json
import os
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from inversion_dpo import api
from inversion_dpo.cli.main import main
from inversion_dpo.evaluation import sample_files as sample_file_module
from inversion_dpo.evaluation import sides
from inversion_dpo.run.config import to_yaml
from inversion_dpo.run.fields import ConfigError
from inversion_dpo.run.folder import claim, occupied
from tools.tiny.scorers import write_tiny_scorer


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture
def settings(tiny_config, tmp_path):
    """A YAML file of the tiny run."""
    file = tmp_path / "tiny.yaml"
    given = ("evaluation.batch_size=2", "evaluation.guidance_scale=1")  # that of training
    file.write_text(to_yaml(tiny_config(*given)))
    return file


OTHERWISE = "made with another prompt, seed, model or setting"
ENDED = re.compile(
    r"held-out accuracy (0|1)\.\d\d of 4 pairs \(95% interval .* to .*\): few pairs;.*\n"
    r"drift from the reference: .*\n"
    r"time: \d+ s before and \d+ s in training; peak memory: \d+ MB\n"
    r"policy: .*adapter\n(best held-out score: at step \d, .*best`\n)?"
    r"next: inversion-dpo advise .*\n +inversion-dpo evaluate "
)


def spoil(pair_file, tmp_path, **columns):
    """A copy of the pairs in which row 3 has other values; None drops the column."""
    rows = pq.read_table(pair_file).to_pylist()
    for name, value in columns.items():
        if value is None:
            for row in rows:
                del row[name]
        else:
            rows[3][name] = value
    path = tmp_path / "spoiled.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_train_evaluate_report_and_sample(capsys, settings, tmp_path):
    """The main job, from pairs to a picture of the policy; then distances to real images."""
    out = tmp_path / "run"
    code, text, _ = run(capsys, "train", "-c", settings, "-o", out)
    assert code == 0 and ENDED.search(text), text
    code, text, _ = run(capsys, "evaluate", out)
    assert code == 0 and "sg_iou" in text and "win rate" in text
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("preference", "sg_iou", "entity_iou", "relation_iou", "exact"):
        assert {"reference", "policy", "gain", "gain_low", "gain_high"} <= set(metrics[name])
    assert {"win_rate", "n_prompts", "seconds", "pairs", "steps"} <= set(metrics)
    assert metrics["n_prompts"] == 4 and metrics["pairs"] == 16 and metrics["steps"] == 8
    assert {"invert", "train", "sample reference", "sample policy"} <= set(metrics["seconds"])
    code, text, _ = run(capsys, "advise", out)
    assert code == 0 and "held-out" in text
    assert run(capsys, "report", out)[0] == 0
    assert "<html" in (out / "report.html").read_text()
    code, text, _ = run(capsys, "sample", "a small red star", "--run", out, "-o", tmp_path / "png")
    assert code == 0 and (tmp_path / "png" / "000000.png").exists()
    clip = f"evaluation.checkpoints.clip={write_tiny_scorer('clip', tmp_path / 'clip')}"
    code, text, err = run(capsys, "fid", out, "--real", out / "images", clip)
    assert code == 0 and "reference" in text and "policy" in text, err


def test_a_policy_from_before_its_training_was_continued_is_named(
    capsys, settings, tiny_run, tmp_path, caplog
):
    """The run was killed at step 3 of a longer training; the policy of the shorter one is there."""
    out = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copy(settings, out / "config.yaml")
    rows = (out / "metrics.jsonl").read_text().splitlines()[:3]
    (out / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    said = rf"{out} is trained to step 3 of \d+, and adapter/ is from before it was continued"
    asked = ["sample", "a red star", "--run", out, "-o", tmp_path / "png"]
    for command in (["evaluate", out, "evaluation.limit=2"], asked):
        caplog.clear()
        code, _, err = run(capsys, *command)
        assert code == 0, err
        assert len(re.findall(said, caplog.text)) == 1, command
    caplog.clear()
    api.sample(out, ["a red star"])
    assert re.search(said, caplog.text)
    caplog.clear()
    api.sample(out, ["a red star"], policy=False)
    for seed in (1.5, -1):
        with pytest.raises(ConfigError, match=f"seed={seed} must be a whole number of at least 0"):
            api.sample(out, ["a red star"], seed=seed)
    assert not caplog.text


def test_two_samples_do_not_draw_into_one_folder_at_once(capsys, settings, tmp_path, monkeypatch):
    """The second is refused, or finds what the first drew while it loaded its model."""
    asked, out = ["sample", "a red star", "-c", settings, "-o", tmp_path / "png"], tmp_path / "png"
    with occupied(out, run=False):
        code, _, err = run(capsys, *asked)
    assert code == 2 and "png is in use by another run" in err and not list(out.glob("*.png"))
    load = sides.sampler_of

    def slow(config, adapter):
        (out / "000000.png").write_bytes(b"another picture")
        return load(config, adapter)

    monkeypatch.setattr(sides, "sampler_of", slow)
    code, _, err = run(capsys, *asked)
    assert code == 2 and OTHERWISE in err
    assert (out / "000000.png").read_bytes() == b"another picture"


def test_sample_keeps_its_pictures_and_replaces_no_other(capsys, settings, tmp_path, monkeypatch):
    """Killed after the first batch it goes on; another prompt is refused before any weight."""
    asked = ["sample", "a red star", "a blå circle", "-c", settings]
    more = ["evaluation.batch_size=1", "evaluation.guidance_scale=2"]
    whole, out = tmp_path / "whole", tmp_path / "png"
    assert run(capsys, *asked, "-o", whole, *more)[0] == 0
    written, atomic = [], sample_file_module.atomic_bytes

    def once(data, path, **given):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        atomic(data, path, **given)

    monkeypatch.setattr(sample_file_module, "atomic_bytes", once)
    assert run(capsys, *asked, "-o", out, *more)[0] == 130
    monkeypatch.undo()
    first = (out / "000000.png").stat().st_mtime_ns
    code, text, _ = run(capsys, *asked, "-o", out, *more)
    assert code == 0 and text.split() == [str(out / f"00000{k}.png") for k in (0, 1)]
    assert (out / "000000.png").stat().st_mtime_ns == first
    for name in ("000000.png", "000001.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    with Image.open(out / "000001.png") as image:
        assert image.text["prompt"] == "a blå circle" and image.text["seed"] == "1"
    refuse = lambda *_: pytest.fail("loaded")  # noqa: E731
    monkeypatch.setattr("inversion_dpo.evaluation.sides.sampler_of", refuse)
    assert run(capsys, *asked, "-o", out, *more)[0] == 0  # all there
    others = ([more[0], "evaluation.guidance_scale=3"], [*more, "--seed", "1"], more[:1])
    for changed in others:
        code, _, err = run(capsys, *asked, "-o", out, *changed)
        assert code == 2 and OTHERWISE in err and str(out) in err
    code, _, err = run(capsys, "sample", "a green square", "-c", settings, "-o", out, *more)
    assert code == 2 and "000000.png" in err and "'a green square'" in err
    base = shutil.copytree(yaml.safe_load(settings.read_text())["model"]["path"], tmp_path / "base")
    again = [*more, f"model.path={base}"]
    monkeypatch.undo()
    assert run(capsys, *asked, "-o", tmp_path / "of_base", *again)[0] == 0
    os.utime(base / "model_index.json", ns=(1, 1))  # as if it were trained further, in its place
    code, _, err = run(capsys, *asked, "-o", tmp_path / "of_base", *again)
    assert code == 2 and OTHERWISE in err
    (out / "000000.png").write_bytes(b"no picture")
    assert run(capsys, *asked, "-o", out, *more)[0] == 2


def test_a_finished_run_is_not_repeated(capsys, settings, tiny_run, tmp_path):
    out = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copy(settings, out / "config.yaml")
    before = (out / "metrics.jsonl").read_text()
    code, text, _ = run(capsys, "train", "-c", settings, "-o", out)
    assert code == 0 and ENDED.search(text), text
    rows = (out / "metrics.jsonl").read_text()
    assert len(rows.splitlines()) == 9 and rows.splitlines()[:8] == before.splitlines()[:8]


FEW = ("data.limit=8", "inversion.steps=2")


def test_invert_reports_the_reconstruction_error(capsys, settings, tmp_path):
    code, text, _ = run(capsys, "invert", "-c", settings, "-o", tmp_path / "run", *FEW)
    assert code == 0 and "8 pairs" in text
    assert re.search(r"guidance 1: \d+\.\d{4}: (good|fair|large)", text)
    assert "the noise recovered by inversion has variance" in text


def test_invert_says_when_nothing_is_to_be_inverted(capsys, settings, tmp_path):
    words = ("objective.name=diffusion_dpo", FEW[0])
    code, text, _ = run(capsys, "invert", "-c", settings, "-o", tmp_path / "run", *words)
    assert code == 0 and "not inverted: objective.name=diffusion_dpo" in text


def test_dry_run_prints_the_settings_and_writes_nothing(capsys, settings, tmp_path):
    words = ("-c", settings, "-o", tmp_path / "x", "--dry-run", "training.steps=7")
    code, text, _ = run(capsys, "train", *words)
    assert code == 0 and yaml.safe_load(text)["training"]["steps"] == 7
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "command",
    [
        "",
        "train",
        "demo",
        "invert",
        "sample",
        "evaluate",
        "report",
        "advise",
        "pairs build",
        "pairs check",
        "web",
        "pairs sample",
        "pairs export",
    ],
)
def test_help_explains(capsys, command):
    code, text, _ = run(capsys, *command.split(), "--help")
    assert code == 0 and "Usage" in text and len(text) > 200


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lerning_rate=1", "did you mean 'training.learning_rate'"),
        ("trainig.steps=1", "did you mean 'training'"),
        ("training.steps=many", "training.steps"),
        ("training.steps=0", "training.steps=0: give a whole number of at least 1"),
        ("training.steps", "key=value"),
        ("objective.target=x1", "did you mean 'x0'"),
        ("objective.name=dpo", "inversion_dpo"),
        ("policy.kind=qlora", "lora, full"),
        ("training.gradient_accumulation=3", "multiple"),
        ("data.holdout=0", "data.holdout"),
    ],
)
def test_bad_settings_are_named(capsys, settings, tmp_path, override, message):
    code, _, err = run(capsys, "train", "-c", settings, "-o", tmp_path / "x", override)
    assert code == 2 and message in err and "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_transition_with_exact_inversion_is_refused(capsys, settings, tmp_path):
    code, _, err = run(
        capsys,
        "train",
        "-c",
        settings,
        "-o",
        tmp_path / "x",
        "objective.target=transition",
        "inversion.fixed_point_iterations=3",
    )
    assert code == 2 and "vanishes" in err and "objective.target=x0" in err


def test_unknown_preset_lists_the_presets(capsys, tmp_path):
    code, _, err = run(capsys, "train", "-c", "tast", "-o", tmp_path / "x")
    assert code == 2 and "taste" in err and "sd15" in err


def test_unknown_key_in_the_file_names_the_file(capsys, settings, tmp_path):
    settings.write_text("training:\n  step: 3\n")
    code, _, err = run(capsys, "train", "-c", settings, "-o", tmp_path / "x")
    assert code == 2 and "tiny.yaml" in err and "training.steps" in err


def test_folder_of_another_run_is_refused_and_untouched(capsys, settings, tmp_path, tiny_config):
    claim(tmp_path / "run", tiny_config("objective.beta=7"))
    (tmp_path / "run/checkpoints").mkdir()
    before = (tmp_path / "run/config.yaml").read_text()
    code, _, err = run(capsys, "train", "-c", settings, "-o", tmp_path / "run")
    assert code == 2 and "objective.beta" in err and "another --output" in err
    assert (tmp_path / "run/config.yaml").read_text() == before


def test_folder_with_other_files_is_refused(capsys, settings, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    code, _, err = run(capsys, "train", "-c", settings, "-o", tmp_path / "mine")
    assert code == 2 and "not empty" in err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label_0": None}, "label_0"),
        ({"label_0": 0.7}, "row 3"),
        ({"jpg_0": b"\x89PNG broken"}, "row 3"),
        ({"caption": " "}, "row 3"),
    ],
)
def test_bad_pairs_name_file_row_and_remedy(
    capsys, settings, tmp_path, pair_file, columns, message
):
    path = spoil(pair_file, tmp_path, **columns)
    arguments = ["train", "-c", settings, "-o", tmp_path / "x", f"data.pairs={path}"]
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "spoiled.parquet" in err and message in err and "Traceback" not in err
    code, text, err = run(capsys, "pairs", "check", path)
    assert code in (1, 2) and message in text + err


def test_good_pairs_pass_the_check(capsys, pair_file):
    code, text, _ = run(capsys, "pairs", "check", pair_file)
    assert code == 0 and "16" in text


def test_after_bad_data_the_same_folder_can_be_used(capsys, settings, tmp_path, pair_file):
    bad, out = spoil(pair_file, tmp_path, label_0=0.7), tmp_path / "run"
    words = ("train", "-c", settings, "-o", out, *FEW, "training.steps=1")
    assert run(capsys, *words, f"data.pairs={bad}")[0] == 2
    assert run(capsys, *words)[0] == 0


def test_missing_model_folder_says_which_key(capsys, settings, tmp_path):
    code, _, err = run(
        capsys, "train", "-c", settings, "-o", tmp_path / "x", f"model.path={tmp_path / 'no'}"
    )
    assert code == 2 and "model.path" in err


def test_evaluate_without_a_run_says_so(capsys, tmp_path):
    for command in ("evaluate", "report"):
        code, _, err = run(capsys, command, tmp_path)
        assert code == 2 and f"{tmp_path} is not a run" in err
