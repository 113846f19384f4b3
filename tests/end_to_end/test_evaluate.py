"""Evaluation as a user types it: several images a prompt, any two models, kills, categories."""

import csv
import itertools
import json
import re
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from inversion_dpo.cli.main import main
from inversion_dpo.evaluation.evaluate import pairs_agree
from inversion_dpo.evaluation.samples import commit_of, model_digest, scoring_digest
from inversion_dpo.evaluation.sides import load_policy_pipeline
from inversion_dpo.evaluation.wording import agreement_text
from inversion_dpo.models.sampler import Sampler
from inversion_dpo.run.config import load_config, to_yaml
from inversion_dpo.run.folder import claim
from inversion_dpo.training.recipe import train
from tests.sessions import sampled
from tools.tiny.scorers import write_tiny_scorer

CAPTIONS = [
    ("color_binding", "a small red star above a small blue star"),
    ("color_binding", "a small red star left of a small pink star"),
    ("position", "a large red star below a small blue cross"),
    ("position", "a small red star right of a large blue cross"),
]


def command(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"category": c, "prompt": p}) for c, p in CAPTIONS))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_pipeline, pair_file, prompts):
    """A trained run of seconds; copy it before writing to it."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    config = load_config(
        None,
        [
            f"model.path={tiny_pipeline}",
            "evaluation.preference=warmth",
            f"data.pairs={pair_file}",
            "data.holdout=0.25",
            "inversion.steps=4",
            "inversion.batch_size=8",
            "policy.rank=4",
            "policy.alpha=4",
            "training.steps=3",
            "training.batch_size=4",
            "training.learning_rate=1e-2",
            "evaluation.sample_steps=2",
            f"evaluation.prompts={prompts}",
            "evaluation.batch_size=3",
        ],
    )
    claim(folder, config)
    train(config, folder)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory):
    """The run evaluated and reported, and what the evaluation printed; copy it, too."""
    folder, said = shutil.copytree(trained, tmp_path_factory.mktemp("reported") / "run"), StringIO()
    for name in ("evaluate", "report"):
        with redirect_stdout(said if name == "evaluate" else StringIO()):
            with pytest.raises(SystemExit) as stop:
                main([name, str(folder)])
        assert not stop.value.code
    return folder, said.getvalue()


def test_a_policy_on_other_weights_than_it_was_trained_on_is_told(
    trained, tiny_pipeline, tmp_path, caplog
):
    """A base that was replaced in its place, or another revision: the LoRA fits it all the same."""
    run, base = (
        shutil.copytree(place, tmp_path / place.name) for place in (trained, Path(tiny_pipeline))
    )
    config = load_config(str(run / "config.yaml"), [f"model.path={base}"])
    (run / "config.yaml").write_text(to_yaml(config))
    load_policy_pipeline(config, run / "adapter")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({k: v * 1.01 for k, v in weights.items()}, file, {"format": "pt"})
    other = replace(config, model=replace(config.model, dtype="bfloat16"))  # meant to differ
    load_policy_pipeline(other, run / "adapter")
    assert "trained on other weights" not in caplog.text
    snapshot = shutil.copytree(run / "adapter", run / "snapshots" / "step-000001")
    for policy in (run / "adapter", next((run / "adapter").glob("*.safetensors")), snapshot):
        load_policy_pipeline(config, policy)
        assert f"{policy} was trained on other weights than {base} has now" in caplog.text


def test_the_report_shows_what_was_measured_whatever_changed_since(capsys, reported, tmp_path):
    run = shutil.copytree(reported[0], tmp_path / "run")
    shown = (run / "grid.json").read_text()
    (tmp_path / "other.txt").write_text("a small red star\n")
    text = (run / "evaluated.yaml").read_text()
    text = re.sub("prompts: .*", f"prompts: {tmp_path}/other.txt", text, count=1)
    (run / "evaluated.yaml").write_text(text)
    code, _, err = command(capsys, "report", run)
    assert code == 0 and (run / "grid.json").read_text() == shown, err
    shutil.rmtree(run / "samples")
    code, _, err = command(capsys, "report", run)
    assert code == 2 and "was evaluated on 4 prompts" in err and "holds 1 now: run" in err


def test_several_seeds_scorers_categories_and_the_table(capsys, run, tmp_path):
    place = write_tiny_scorer("pickscore", tmp_path / "pickscore")
    words = ("evaluation.scorer=scenes,pickscore", f"evaluation.checkpoints.pickscore={place}")
    code, text, _ = command(capsys, "evaluate", run, *words, "evaluation.seeds=2")
    assert "pickscore" in text and (run / "samples" / "scores.sqlite").exists()
    sides, lines = ("policy", "reference"), (run / "images/prompts.txt").read_text().splitlines()
    assert sorted(p.name for p in (run / "images").glob("*.png")) == [
        f"{k:03d}-{side}.png" for k in range(len(lines)) for side in sides
    ]
    for side in sides:
        files = (run / "samples").glob(f"{side}-*.parquet")  # at the guidance of training too
        fourth = [row for file in files for row in pq.read_table(file).to_pylist()[3:4]]
        assert lines[3] == f"003 {fourth[0]['prompt']}"
        assert (run / f"images/003-{side}.png").read_bytes() in [row["image"] for row in fourth]
    assert code == 0 and "color_binding" in text and "of 2 images" in text
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["n_prompts"] == 4 and metrics["seeds"] == 2
    assert {k: v["n_prompts"] for k, v in metrics["categories"].items()} == {
        "color_binding": 2,
        "position": 2,
    }
    table = pq.read_table(run / "per_prompt.parquet").to_pydict()
    assert table["prompt"] == [p for _, p in CAPTIONS for _ in range(2)]
    assert table["category"] == [c for c, _ in CAPTIONS for _ in range(2)]
    assert table["seed"] == [1000 + k + 1_000_000 * j for k in range(4) for j in range(2)]
    gain = np.mean(table["policy.warmth"]) - np.mean(table["reference.warmth"])
    assert metrics["warmth"]["gain"] == pytest.approx(gain)
    assert metrics["win_rate"] == pytest.approx(np.mean(table["win"]))
    part = metrics["categories"]["position"]["warmth"]["policy"]
    assert part == pytest.approx(np.mean(table["policy.warmth"][4:]))


def test_the_report_has_its_figures_data(reported):
    run, _ = reported
    metrics = json.loads((run / "metrics.json").read_text())
    gains = {r["metric"]: r for r in csv.DictReader((run / "gains.csv").open())}
    assert float(gains["warmth"]["gain"]) == metrics["warmth"]["gain"]
    curves = list(csv.DictReader((run / "curves.csv").open()))
    assert [float(r["loss"]) for r in curves if r["loss"]]
    grid = json.loads((run / "grid.json").read_text())
    assert [row["caption"] for row in grid] == [p for _, p in CAPTIONS]
    categories = list(csv.DictReader((run / "categories.csv").open()))
    assert {r["category"] for r in categories} == {"color_binding", "position"}
    page = (run / "report.html").read_text()
    assert "By category of prompt" in page and "color_binding" in page
    agree = metrics["pairs_agree"]
    assert agree["low"] <= agree["share"] <= agree["high"]
    assert f"Measured on {agree['n']} pairs" in page and "ach pair prefers" not in page


def scorer(monkeypatch, function):
    """Make a scorer of a function importable, and name it."""
    module = ModuleType("own_for_pairs")
    module.score = function
    monkeypatch.setitem(sys.modules, "own_for_pairs", module)
    return ["evaluation.scorer=own_for_pairs:score", "evaluation.preference=score"]


def test_what_the_pairs_prefer_is_claimed_only_where_it_was_measured(run, monkeypatch, tmp_path):
    own, place = str(run / "config.yaml"), itertools.count()
    metrics = {}
    for name, function in {
        "even": lambda images, prompts: np.zeros(len(images)),
        "winners": lambda images, prompts: [-next(place) for _ in images],  # winner, loser, ...
        "broken": lambda images, prompts: [float("nan")] * len(images),
    }.items():
        config = load_config(own, scorer(monkeypatch, function))
        metrics[name] = {"pairs_agree": pairs_agree(config, tmp_path)}
    told = {name: agreement_text(found, "score") for name, found in metrics.items()}
    assert metrics["even"]["pairs_agree"]["share"] == 0.5
    assert "does not measure what these pairs prefer" in told["even"]
    assert "the winner has the higher `score` in 100% [" in told["winners"]
    assert "does not" not in told["winners"] and told["broken"] == ""


def test_black_samples_are_named_where_they_are_sampled(run, monkeypatch, caplog):
    config, prompts = load_config(str(run / "config.yaml"), []), [p for _, p in CAPTIONS]
    black = [np.zeros((64, 64, 3), np.uint8)]
    monkeypatch.setattr(Sampler, "draw", lambda self, asked, seeds, **more: black * len(asked))
    sampled(config, None, run / "black", prompts, "reference", 1)
    told = "reference: 4 of 4 samples are of one colour ('a small red star above a small blue star"
    assert told in caplog.text and "and 1 more" in caplog.text and "safety checker" in caplog.text


@pytest.mark.parametrize("setting", ["model.lora", "model.vae", "model.scene_graph", "adapter"])
def test_a_file_written_over_makes_new_samples(tmp_path, setting):
    """A LoRA saved again under its name is another model, and so is a changed configuration."""
    part, file = tmp_path / "part", tmp_path / "part" / "pytorch_lora_weights.safetensors"
    part.mkdir()
    found = set()
    for text in ("first", "second"):
        file.write_text(text)
        for settings in ("{}", '{"scaling_factor": 1}'):
            (part / "config.json").write_text(settings)
            for place in (part, file):
                given = [] if setting == "adapter" else [f"{setting}={place}"]
                config = load_config(None, given)
                found.add((place, model_digest(config, place if not given else None)))
    assert len({digest for place, digest in found if place == part}) == 4
    assert len({digest for place, digest in found if place == file}) == 2


def test_a_branch_of_the_hub_that_moves_makes_new_samples(hub_cache, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    (part / "config.json").write_text("{}")
    found = []
    for commit in ("a" * 40, "b" * 40):
        hub_cache("models", "owner/name", part, commit=commit)
        commit_of.cache_clear()
        for setting in ("path", "lora"):
            config = load_config(None, [f"model.{setting}=owner/name"])
            found.append(model_digest(config, None))
    assert len(set(found)) == 4
    commit_of.cache_clear()
    load = load_config(None, ["model.path=nobody/nothing"])
    assert model_digest(load, None) == model_digest(load, None)


def test_both_guidances_are_reported(capsys, reported, tmp_path):
    """Then another evaluation and its report, which is about its settings, not the run's own."""
    run, text = shutil.copytree(reported[0], tmp_path / "run"), reported[1]
    own = load_config(str(run / "config.yaml"), [])
    assert (own.objective.guidance_scale, own.evaluation.guidance_scale) == (1, 4)
    assert "at the guidance of training, 1, not 4" in text
    found = json.loads((run / "metrics.json").read_text())
    other = found["at_training_guidance"]
    assert (other["guidance_scale"], other["instead_of"]) == (1, 4)
    assert other["warmth"] != found["warmth"]
    page = (run / "report.html").read_text()
    assert "At both guidances" in page and "1, as trained" in page
    assert command(capsys, "export", run)[0] == 0
    card = (run / "export" / "README.md").read_text()
    assert "At guidance 1, as it was trained, it wins " in card and "guidance 4 and 1 with" in card

    files = {p.name: p.stat().st_mtime_ns for p in (run / "samples").glob("*.parquet")}
    assert len(files) == 4  # two models at two guidances
    code, text, _ = command(capsys, "evaluate", run, "evaluation.guidance_scale=1")
    assert code == 0 and "as it was trained" not in text
    alone = json.loads((run / "metrics.json").read_text())
    assert "at_training_guidance" not in alone
    assert {k: v for k, v in other.items() if k not in ("guidance_scale", "instead_of")} == {
        k: v for k, v in alone.items() if k in other
    }
    assert command(capsys, "report", run)[0] == 0
    again = {p.name: p.stat().st_mtime_ns for p in (run / "samples").glob("*.parquet")}
    assert again == files  # nothing was sampled twice
    grid = json.loads((run / "grid.json").read_text())
    assert np.mean([r["policy"] for r in grid]) == pytest.approx(alone["warmth"]["policy"])
    assert alone["warmth"]["policy"] != pytest.approx(found["warmth"]["policy"])


def test_a_killed_evaluation_loses_one_batch(run, monkeypatch):
    config = load_config(str(run / "config.yaml"), ["evaluation.seeds=2"])
    prompts = [p for _, p in CAPTIONS]
    whole, _ = sampled(config, None, run / "other", prompts, "reference", 2)
    drawn, real = [], Sampler.draw

    def dying(sampler, asked, *rest, **more):
        drawn.append(len(asked))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return real(sampler, asked, *rest, **more)

    monkeypatch.setattr(Sampler, "draw", dying)
    with pytest.raises(KeyboardInterrupt):
        sampled(config, None, run / "samples", prompts, "reference", 2)
    images, scores = sampled(config, None, run / "samples", prompts, "reference", 2)
    assert drawn == [3, 3, 2, 2]
    assert all(np.array_equal(a, b) for a, b in zip(images, whole, strict=True))
    assert len(scores["warmth"]) == 8
    (file,) = (run / "samples").glob("*.parquet")
    file.with_suffix("").mkdir()  # as a kill leaves it between the whole file and its parts' end
    sampled(config, None, run / "samples", prompts, "reference", 2)
    assert drawn == [3, 3, 2, 2]
    assert not [p for p in (run / "samples").iterdir() if p.is_dir()]


def test_more_seeds_keep_the_first_ones(run):
    config, prompts = load_config(str(run / "config.yaml"), []), [p for _, p in CAPTIONS]
    one, _ = sampled(config, None, run / "samples", prompts, "reference", 1)
    two, _ = sampled(config, None, run / "samples", prompts, "reference", 2)
    differences = np.abs(np.array(one, int) - np.array(two[::2], int))
    assert differences.max() <= 1  # other batches round otherwise in the last bit
    assert not np.array_equal(two[0], two[1])


@pytest.mark.slow
def test_any_two_models(capsys, run, tmp_path, tiny_pipeline):
    settings = tmp_path / "settings.yaml"
    settings.write_text(to_yaml(load_config(str(run / "config.yaml"), [])))
    assert command(capsys, "evaluate", run)[0] == 0
    own = json.loads((run / "metrics.json").read_text())
    lora = run / "adapter" / "pytorch_lora_weights.safetensors"
    for k, model in enumerate((run, run / "adapter", lora)):
        out = tmp_path / f"two-{k}"
        code, _, err = command(capsys, "evaluate", out, "-c", settings, "--policy", model)
        assert code == 0, err
        assert json.loads((out / "metrics.json").read_text())["warmth"] == own["warmth"]
    assert command(capsys, "report", out)[0] == 0
    page = (out / "report.html").read_text()
    assert f"{lora} against the base model" in page and "What the pairs prefer" not in page
    same = tmp_path / "same"
    code, _, _ = command(
        capsys, "evaluate", same, "-c", settings, "--policy", run / "adapter", "--reference", run
    )
    found = json.loads((same / "metrics.json").read_text())
    assert code == 0 and found["warmth"]["gain"] == 0 and found["win_rate"] == 0.5
    from inversion_dpo import api

    assert api.evaluate(same, reference=str(run), policy=str(lora))["warmth"]["gain"] == 0
    back = tmp_path / "back"
    code, _, _ = command(
        capsys, "evaluate", back, "-c", settings, "--policy", tiny_pipeline, "--reference", run
    )
    found = json.loads((back / "metrics.json").read_text())
    assert code == 0 and found["warmth"]["gain"] == pytest.approx(-own["warmth"]["gain"])


@pytest.mark.parametrize("model", ["no/such/thing/here", "./nothing", "words"])
def test_what_is_no_model_is_one_line(capsys, run, tmp_path, model):
    code, _, err = command(
        capsys, "evaluate", tmp_path / "new", "-c", run / "config.yaml", "--policy", model
    )
    assert code == 2 and "is no model" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.scorer=pikscore", "did you mean 'pickscore'"),
        ("evaluation.scorer=7", "evaluation.scorer"),
        ("evaluation.scorer=[]", "evaluation.scorer"),
        ("evaluation.seeds=0", "evaluation.seeds=0: give a whole number of at least 1"),
        ("evaluation.preference=beauty", "evaluation.preference='beauty'"),
        ("evaluation.checkpoints.clip=/no/where", "evaluation.checkpoints.clip"),
        ("evaluation.prompts=hf:x", "hf:OWNER/NAME:COLUMN"),
    ],
)
def test_bad_settings_are_one_line(capsys, run, override, message):
    extra = ["evaluation.scorer=clip"] if "checkpoints" in override else []
    code, _, err = command(capsys, "evaluate", run, override, *extra)
    assert code == 2 and message in err and "Traceback" not in err


def test_a_scorer_written_over_scores_anew(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "weights").mkdir()
    found = set()
    for text in ("1", "22"):
        (tmp_path / "scorer_of_mine.py").write_text(f"def score(images, prompts): return {text}")
        (tmp_path / "weights" / "model.safetensors").write_text(text)
        for given in (
            ["evaluation.scorer=scorer_of_mine:score"],
            ["evaluation.scorer=clip", f"evaluation.checkpoints.clip={tmp_path / 'weights'}"],
        ):
            found.add(scoring_digest(load_config(None, given)))
    assert len(found) == 4


def test_scorers_label_pairs_that_train_reads(capsys, run, tmp_path, prompts):
    settings = run / "config.yaml"
    arguments = ["pairs", "build", "-c", settings, "-o", tmp_path / "ai", "--prompts", prompts]
    code, _, err = command(
        capsys, *arguments, "--scorer", "scenes", "--samples", "3", "--by", "warmth,shape_quality"
    )
    assert code == 0, err
    rows = pq.read_table(tmp_path / "ai" / "pairs.parquet").to_pylist()
    assert rows and {r["preference_0"] for r in rows} <= {0.0, 0.25, 0.75, 1.0}
    code, text, _ = command(capsys, "pairs", "check", tmp_path / "ai" / "pairs.parquet")
    assert code == 0 and str(len(rows)) in text
    code, _, err = command(capsys, *arguments, "--scorer", "scenes", "--samples", "4")
    assert code == 2 and "another --output" in err
    code, _, err = command(
        capsys,
        "pairs",
        "build",
        "-c",
        settings,
        "-o",
        tmp_path / "none",
        "--prompts",
        prompts,
        "evaluation.scorer=null",
    )
    assert code == 2 and "--scorer" in err


def test_export_writes_what_diffusers_and_kohyas_readers_take(capsys, reported, tmp_path):
    run = shutil.copytree(reported[0], tmp_path / "run")
    words = ("export", run, "--format", "kohya")
    code, text, err = command(capsys, *words, "--push-to-hub", "me/mine", "--dry-run")
    assert code == 0 and "nothing was written or uploaded; without --dry-run" in text, err
    assert "run-kohya.safetensors" in text and not (run / "export").exists()
    assert command(capsys, *words)[1].splitlines() == text.splitlines()[:-1]
    assert "`warmth`" in (run / "export" / "README.md").read_text()
    code, _, err = command(capsys, "export", run, "--format", "ckpt")
    assert code == 2 and "diffusers, kohya, comfyui" in err
