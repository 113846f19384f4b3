"""What a run needs is looked for before any work, and a dry run looks for the same."""

import json
import shutil
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from inversion_dpo.api import check_run, evaluate
from inversion_dpo.cli.main import main
from inversion_dpo.data.images import DataError
from inversion_dpo.evaluation import defaults
from inversion_dpo.evaluation.defaults import heldout_prompts, settled, with_prompts_of
from inversion_dpo.evaluation.report import training_pairs
from inversion_dpo.evaluation.scorers.checkpoint import ScorerError
from inversion_dpo.labels.store import LabelStore
from inversion_dpo.run.config import ConfigError, load_config, preset_names, to_yaml
from inversion_dpo.run.disk import DiskError
from inversion_dpo.run.folder import claim, occupied, read_config, sole_writer
from inversion_dpo.run.processes import Team
from inversion_dpo.training.beforehand import late_texts, rate_text, unvisited_text
from inversion_dpo.training.split import split_pairs
from tests.slow import slow_but

REAL = [n for n in preset_names() if not load_config(n, []).model.path.startswith("asset:")]


@pytest.fixture
def ended(tiny_config, tmp_path, monkeypatch, capsys):
    """Call with words: how a command of the tiny run ended, (code, output, error)."""
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_config()))
    monkeypatch.chdir(tmp_path)

    def run(*words):
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("command", "dry"),
    slow_but(
        [("train", ["--dry-run"])],
        [(c, dry) for c in ("train", "invert", "demo") for dry in (["--dry-run"], [])],
    ),
)
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.pairs=none.parquet", "none.parquet does not exist"),
        ("data.pairs=tiny.yaml", "tiny.yaml"),
        ("data.split=test", "data.split=test has no effect"),
        ("data.columns.caption=text", "text"),
        ("model.path=./none", "model.path=./none: nothing is there"),
        ("model.path=.", "cannot load model.path=.: "),
        ("model.path=someone/model", "the hub is not reached"),
        ("model.vae=none", "model.vae=none: nothing is there"),
        ("model.network=.", "model.network=.: the folder has no config.json"),
        ("model.lora=/none.safetensors", "model.lora=/none.safetensors: nothing is there"),
        ("model.scene_graph=~/none", "model.scene_graph=~/none: nothing is there"),
        ("training.tracker=wandb", "pip install wandb"),
        ("model.revision=main", "model.revision=main has no effect"),
    ],
)
def test_what_is_missing_is_said_before_the_folder_is_made(ended, command, dry, setting, message):
    first = [] if command == "demo" else ["-c", "tiny.yaml"]
    code, printed, error = ended(command, *first, "-o", "run", setting, *dry)
    assert (code, printed, error.count("\n")) == (2, "", 1) and message in error
    assert not Path("run").exists()


@pytest.mark.parametrize("command", ["train", "invert"])
def test_a_dry_run_looks_at_the_folder_and_leaves_it_alone(
    ended, tiny_config, monkeypatch, command
):
    monkeypatch.setattr("inversion_dpo.training.cost.estimate", lambda *_: [])  # test_cost.py
    words = (command, "-c", "tiny.yaml", "--dry-run", "-o")
    code, printed, _ = ended(*words, "new")
    assert code == 0 and yaml.safe_load(printed)["training"]["steps"] == 8
    assert not Path("new").exists()
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("precious")
    claim(Path("run"), tiny_config("objective.beta=7"))
    Path("run/checkpoints").mkdir()
    for folder, message in {
        "mine": "not empty",
        "mine/thesis.txt": "is a file",
        "mine/thesis.txt/run": "is a file",
        "run": "holds another run: objective.beta",
    }.items():
        code, printed, error = ended(*words, folder)
        assert (code, printed) == (2, "") and message in error
    claim(Path("long"), tiny_config("training.steps=12"))
    Path("long/checkpoints/step-000012").mkdir(parents=True)
    code, printed, error = ended(*words, "long")
    assert (code, printed) == (2, "") and "training.steps=8, but long is trained for 12" in error


def test_a_kill_in_the_first_moment_leaves_the_folder_to_the_run(tiny_config, tmp_path):
    (tmp_path / "config.yaml.partial").write_text("model:")
    claim(tmp_path, tiny_config())
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_only_the_first_process_reads_what_it_has_just_written(ended, monkeypatch):
    """The others may be done before the times are written."""
    second = Team(rank=1, size=2)
    monkeypatch.setattr("inversion_dpo.api.check_run", lambda *_: None)
    monkeypatch.setattr("inversion_dpo.training.recipe.train", lambda *_: None)
    for place in ("folder", "processes"):
        monkeypatch.setattr(f"inversion_dpo.run.{place}.current_team", lambda: second)
    assert ended("train", "-c", "tiny.yaml", "-o", "run") == (0, "", "")


def test_another_model_is_refused_in_an_evaluated_run_and_waiting_weights_are_not(
    ended, tiny_config, tiny_run, tmp_path
):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "config.yaml").write_text(to_yaml(tiny_config("training.snapshot_every=4")))
    few = ("evaluation.limit=1", "evaluation.scorer=null", "evaluation.preference=auto")
    code, _, error = ended("evaluate", "run", "model.dtype=bfloat16", *few)
    assert code == 2 and "model.dtype is 'float32' there" in error
    assert f"--policy {Path('run/adapter')} --config {Path('run/config.yaml')}" in error
    assert ended("evaluate", "run", "model.offload=true", *few)[0] == 0
    assert read_config(run).model.offload


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("evaluation.scorer=pickscor", "did you mean 'pickscore'"),
        ("evaluation.scorer=no_such:taste", "evaluation.scorer=no_such:taste: there is no such mo"),
        ("evaluation.preference=beauty", "evaluation.preference='beauty' is not a score of scenes"),
        ("evaluation.scorer=null evaluation.preference=warmth", "preference=warmth has no effect"),
        ("evaluation.checkpoints.clip=x", "evaluation.checkpoints.clip has no effect"),
        (
            "policy.target_modules=[to_q,to_w]",
            "policy.target_modules: no layer's name ends in 'to_w'",
        ),
        ("policy.target_modules=[^no]", "policy.target_modules=['^no']"),
        ("training.optimizer=adamw8bit", "pip install bitsandbytes"),
        ("objective.soft_labels=true", "no pair has a preference_0"),
        ("inversion.steps=1000", "inversion.steps=1000: the model's schedule takes 1 to 999"),
        ("model.resolution=60", "model.resolution=60 must be a multiple of"),
        ("model.prompt_chunks=9 model.t5=false", "model.t5=False has no effect"),
        ("data.limit=3", "only 3 usable pairs; give at least 4"),
        (
            "inversion.reconstruct=true objective.name=inversion_dpo_released",
            "inversion.reconstruct=true does not fit objective.path=released",
        ),
    ],
)
def test_what_would_stop_a_training_is_said_before_any_weight(
    ended, monkeypatch, settings, message
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("inversion_dpo.training.recipe.load_model", None)
    code, printed, error = ended("train", "-c", "tiny.yaml", "-o", "run", *settings.split())
    assert (code, printed, error.count("\n")) == (2, "", 1) and message in error
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("kind", "rate", "said"),
    [
        ("full", 1e-4, "about 1e-05, or expect broken pictures"),
        ("full", 2e-5, None),
        ("lora", 1e-4, None),
        ("lora", 1e-8, "about 0.0001, or expect nothing to change"),
        ("lora", 1e-2, "about 0.0001, or expect broken pictures"),
    ],
)
def test_a_learning_rate_of_another_policy_is_warned_of(kind, rate, said):
    assert (rate_text(kind, rate) or "").endswith(said or "")
    assert (rate_text(kind, rate) is None) is (said is None)


def full(monkeypatch):
    """Leave ten bytes on the disk."""
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10))


def test_checkpoints_that_do_not_fit_are_refused(ended, monkeypatch):
    full(monkeypatch)
    for more, size in (
        ((), "0 MB more"),
        (("policy.kind=full", "training.optimizer=adafactor"), ""),
    ):
        code, _, error = ended("train", "-c", "tiny.yaml", "-o", "run", *more)
        assert code == 2 and "checkpoints need about" in error and size in error


SAMPLING = {
    "sample": ("a star", "-o"),
    "pairs sample": ("--prompts", "prompts.txt", "-o"),
    "pairs build": ("--prompts", "prompts.txt", "evaluation.scorer=mine:taste", "-o"),
}


def test_what_a_training_ends_before_is_said():
    late = load_config(None, ["training.steps=5", "training.snapshot_every=6"]).training
    assert late_texts(late) == [
        "training.warmup=10 exceeds training.steps=5: training.learning_rate is never reached",
        "training.snapshot_every=6 exceeds training.steps=5: no copy of the policy is made",
    ]
    assert not late_texts(load_config(None, ["training.steps=10"]).training)


def test_pairs_that_no_step_sees_are_said_before_they_are_inverted(caplog, tmp_path):
    """Of Pick-a-Pic's pairs the preset for SDXL sees one in fifty."""
    settings = "training.steps=3", "training.batch_size=6", "data.holdout=0.1"
    config = load_config(None, settings)
    assert not unvisited_text(20, config) and not unvisited_text(None, config)
    assert unvisited_text(21, config) == (
        "3 steps of 6 pairs see 18 pairs, and all 21 would be inverted or encoded for them. "
        "Set data.limit=20, which takes the first ones, or raise training.steps"
    )
    check_run(config, tmp_path / "run")
    assert "see 18 pairs, and all 2,000 would be" in caplog.text


def test_a_wrong_setting_of_an_evaluation_is_not_kept(tiny_config, tmp_path):
    claim(tmp_path, tiny_config())
    with pytest.raises(ScorerError, match="did you mean 'scenes'"):
        evaluate(tmp_path, "evaluation.scorer=scens")
    assert read_config(tmp_path).evaluation.scorer == "scenes"


def test_a_comparison_checks_each_of_its_runs_before_the_first(ended):
    words = ("--methods", "x0", "--seeds", "2", "--vary", "inversion.steps=3,2000")
    code, _, error = ended("compare", "-c", "tiny.yaml", "-o", "new", "--curve-prompts=0", *words)
    assert code == 2 and "error: inversion.steps=2000: the model's schedule takes" in error
    assert not Path("new").exists()


@pytest.mark.parametrize(
    "words",
    [
        "train -o new",
        "invert -o new",
        "compare -o new --methods x0 --seeds 1",
        "evaluate new --policy someone/lora evaluation.prompts=heldout",
    ],
)
def test_pairs_are_looked_at_before_a_hub_is_asked(ended, monkeypatch, words):
    """A hub that is not reached is asked again and again, for minutes."""

    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    for place in ("api", "compare.experiment", "evaluation.readiness", "models.loading"):
        monkeypatch.setattr(f"inversion_dpo.{place}.check_model", asked, raising=False)
    monkeypatch.setattr("inversion_dpo.evaluation.sides.kind_of", asked)
    Path("bad.csv").write_text("winner,loser,prompt\nnone.png,none.png,a\n")
    code, _, error = ended(*words.split(), "-c", "tiny.yaml", "data.pairs=bad.csv")
    assert code == 2 and "bad.csv, row 0, winner: there is no file 'none.png'" in error
    assert not Path("new").exists() or words.startswith("evaluate")


@pytest.mark.parametrize(
    "words",
    [["sample", "--prompts", "prompts.txt"], ["import", "votes.csv"], ["export", "x.sqlite"]],
)
def test_a_file_has_one_writer_and_a_name_that_is_read_again(ended, words):
    Path("prompts.txt").write_text("a star")
    Path("votes.csv").write_text("image_0,image_1,prompt,choice\na.png,b.png,a,left\n")
    LabelStore(Path("x.sqlite")).close()
    with sole_writer(Path("busy.parquet")):
        code, _, error = ended("pairs", *words, "-o", "busy.parquet")
        assert code == 2 and "busy.parquet is being written already: wait for it" in error
    Path("folder.parquet").mkdir()
    for name in ("votes.csv", "pairs", "folder.parquet"):
        code, _, error = ended("pairs", *words, "-o", name)
        assert code == 2 and f"--output {name}: give a file whose name ends in .parq" in error
    assert Path("votes.csv").read_text().startswith("image_0")
    pq.write_table(pa.table({"mine": [1]}), "table.parquet")
    Path("text.parquet").write_bytes(b"mine")
    for name in ("table.parquet", "text.parquet"):
        whole = Path(name).read_bytes()
        code, _, error = ended("pairs", *words, "-o", name)
        assert code == 2 and f"{name} is there, and " in error and "choose another" in error
        assert Path(name).read_bytes() == whole


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_a_run_has_one_command_that_writes_its_samples(ended, tiny_config, command):
    claim(Path("run"), tiny_config())
    Path("run/metrics.json").write_text("{}")
    with occupied(Path("run")):
        code, _, error = ended(command, "run")
    assert code == 2 and error.startswith("error: run is in use by another run: wait for it")
    assert error.count("\n") == 1
    assert "no-run is not a run" in ended(command, "no-run")[2] and not Path("no-run").exists()


@pytest.mark.parametrize("words", ["build.quality=9", "--rounds 2 build.samples=3"])
def test_a_comparison_refuses_settings_of_a_build_that_it_does_not_read(ended, words):
    code, _, error = ended("compare", "-c", "tiny.yaml", "-o", "new", *words.split())
    assert code == 2 and "has no effect in `compare`: later rounds (--rounds) read" in error


WRONG = {
    "evaluation.sample_steps=1000": ("new", "evaluation.sample_steps=1000: the model's"),
    "evaluation.guidance_scale=0": ("new", "evaluation.guidance_scale=0 is below 1, and"),
    "model.resolution=60": ("new", "model.resolution=60 must be a multiple"),
    "model.resolution=1600": ("new", "samples need about"),
    "model.lora=/none.safetensors": ("new", "model.lora=/none.safetensors: nothing is there"),
    "model.t5=true": ("tiny.yaml/new", "nothing can be written to"),
}


def test_a_guidance_in_turn_has_an_effect_or_is_refused(ended):
    Path("prompts.txt").write_text("a star")
    Path("mine.py").write_text("def taste(images, prompts):\n    return [1.0] * len(images)\n")
    words = ("pairs", "build", "-c", "tiny.yaml", *SAMPLING["pairs build"], "new")
    code, _, error = ended(*words, "build.guidance_scales=[1,0.5]")
    assert code == 2 and "build.guidance_scales=0.5 is below 1, and StableDiff" in error


# In `make test`: each fault by one command, and by each command one.
@pytest.mark.parametrize(
    ("command", "more"),
    slow_but(
        [*product(["pairs build"], WRONG), *product(SAMPLING, ["model.resolution=1600"])],
        product(SAMPLING, WRONG),
    ),
)
def test_what_would_stop_the_sampling_is_said_before_it(ended, monkeypatch, command, more):
    output, message = WRONG[more]
    Path("prompts.txt").write_text("a star")
    Path("mine.py").write_text("def taste(images, prompts):\n    return [1.0] * len(images)\n")
    monkeypatch.setattr("inversion_dpo.evaluation.sides.load_pipeline", None)
    if "need" in message:
        full(monkeypatch)
    output += ".parquet" * (command == "pairs sample")
    words = (*command.split(), "-c", "tiny.yaml", *SAMPLING[command])
    code, printed, error = ended(*words, output, more)
    assert (code, printed, error.count("\n")) == (2, "", 1) and message in error
    assert not Path(output).exists()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("pairs", "sample", "-o", "new.parquet", "--prompts"), "--prompts: "),
        (("pairs", "build", "-o", "new", "--prompts"), "--prompts (build.prompts): "),
        (
            ("compare", "-o", "new", "evaluation.scorer=clip", "--rounds", "2", "--round-prompts"),
            "--round-prompts: ",
        ),
    ],
)
def test_missing_prompts_are_named_by_their_option(ended, words, option):
    code, _, error = ended(*words, "none.txt")
    assert code == 2 and f"error: {option}no file none.txt" in error and not Path("new").exists()


def test_a_build_names_a_score_that_there_is_not(ended):
    Path("prompts.txt").write_text("a small red star")
    words = (
        "pairs",
        "build",
        "--dry-run",
        "-o",
        "new",
        "--prompts",
        "prompts.txt",
        "--by",
        "beauty",
    )
    code, _, error = ended(*words)
    assert code == 2 and "build.by: 'beauty' is no score; choose from sg_iou" in error


def test_a_folder_that_may_not_be_written_to_is_named(tiny_config, tmp_path, monkeypatch):
    def refused(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("inversion_dpo.run.disk.TemporaryFile", refused)
    with pytest.raises(DiskError, match=f"written to {tmp_path} .Permission denied"):
        check_run(tiny_config(), tmp_path / "a" / "b")


def test_missing_prompts_are_warned_of_before_the_training(tiny_config, tmp_path, caplog):
    check_run(tiny_config("evaluation.prompts=none.txt"), tmp_path / "run")
    assert "none.txt" in caplog.text and "before `inversion-dpo evaluate`" in caplog.text


def test_building_pairs_looks_too(ended):
    words = ("pairs", "build", "-c", "tiny.yaml", "-o", "built", "--dry-run")
    Path("prompts.txt").write_text("a small red star")
    for more, message in {
        ("--prompts", "none.txt"): "none.txt",
        ("model.path=./none", "--prompts", "prompts.txt"): "model.path=./none",
        (): "needs prompts",
    }.items():
        code, printed, error = ended(*words, *more)
        assert (code, printed) == (2, "") and message in error
    code, printed, _ = ended(*words, "--prompts", "prompts.txt")
    assert code == 0 and yaml.safe_load(printed)["build"]["prompts"] == "prompts.txt"
    assert not Path("built").exists()


@pytest.mark.parametrize("setting", ["model.t5=false", "model.guidance_embed=3.0"])
def test_a_setting_of_another_family_is_refused(tiny_config, setting):
    import torch

    from inversion_dpo.models.base import ModelError
    from inversion_dpo.models.loading import load_model

    with pytest.raises(ModelError, match=f"(?i){setting} has no effect with StableDiffusionPipe"):
        load_model(tiny_config(setting), torch.device("cpu"))


# ---- presets on one's own pairs


@pytest.mark.parametrize("name", slow_but(["sd15", "flux", "qwen-image"], REAL))
def test_a_preset_of_a_real_model_needs_only_pairs(name, tiny_pipeline, pair_file, tmp_path):
    given = [f"data.pairs={pair_file}", f"model.path={tiny_pipeline}", "model.vae=null"]
    config = load_config(name, [*given, "policy.target_modules=null"])
    check_run(config, tmp_path / "run")
    assert config.policy.kind == "lora" and config.training.learning_rate == 1e-4
    e = settled(config, tmp_path / "run").evaluation
    prompts = [json.loads(line)["prompt"] for line in Path(e.prompts).read_text().splitlines()]
    assert prompts == list(heldout_prompts(config)) and 0 < len(prompts) <= 2
    assert (e.scorer, e.preference) == (None, "auto")


def test_held_out_prompts_are_those_of_no_trained_pair(pair_file, tmp_path, tiny_config):
    rows = pq.read_table(pair_file).to_pylist()
    _, held = split_pairs(list(range(16)), 0.25)
    for number, row in enumerate(rows):
        row["caption"] = "shared" if number in (held[0], 1 - (held[0] == 0)) else f"{number}"
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    found = heldout_prompts(tiny_config(f"data.pairs={file}"))
    assert set(found) <= {f"{number}" for number in held} and "shared" not in found
    for row in rows:
        row["caption"] = "shared"
    pq.write_table(pa.Table.from_pylist(rows), file)
    with pytest.raises(ConfigError, match="every caption of the 4 held-out pairs is trained on"):
        heldout_prompts(tiny_config(f"data.pairs={file}"))


@pytest.mark.parametrize("name", ["sft", "kto"])
def test_prompts_are_held_out_of_the_images_that_are_trained_on(monkeypatch, name):
    """``sft`` trains on liked images alone, and splits these."""
    pairs = [
        SimpleNamespace(caption=f"{k}", source=None, single=True, marks=[f"{k}"], preference=k % 2)
        for k in range(40)
    ]
    monkeypatch.setattr(defaults, "_fitting", lambda config: ((p, (64, 64)) for p in pairs))
    usable = [k for k in range(40) if name == "kto" or k % 2]
    found = heldout_prompts(load_config(None, ["data.holdout=0.25", f"objective.name={name}"]))
    assert sorted(found) == sorted(f"{k}" for k in split_pairs(usable, 0.25)[1])


def test_a_second_source_of_a_held_out_instruction_is_counted(monkeypatch, caplog):
    about = {"caption": "warmer", "single": False}
    pairs = [SimpleNamespace(source=bytes([k]), marks=[f"{k}"], **about) for k in range(8)]
    monkeypatch.setattr(defaults, "_fitting", lambda config: ((p, (64, 64)) for p in pairs))
    assert len(heldout_prompts(load_config(None, ["data.holdout=0.5"]))) == 1
    assert "leaves out 3 held-out edits, whose prompt occurs with another source" in caplog.text


def test_pairs_that_have_moved_stop_nothing_that_needs_none(tiny_config, tmp_path, caplog):
    config = tiny_config("data.pairs=gone.parquet", "evaluation.prompts=heldout")
    with pytest.raises(DataError, match="gone.parquet does not exist"):
        settled(config, tmp_path)
    file = tmp_path / "heldout-prompts.jsonl"
    file.write_text('{"prompt": "a"}\n')
    assert settled(config, tmp_path).evaluation.prompts == str(file)
    claim(tmp_path / "run", config)
    assert training_pairs(tmp_path / "run") == []
    assert f"held-out prompts of {file} are" in caplog.text and "no training pairs" in caplog.text


@pytest.mark.parametrize("inside", ["", "runs/x0-0"], ids=["run", "of a comparison"])
def test_held_out_prompts_move_with_their_folder(tiny_config, tmp_path, inside):
    (tmp_path / "heldout-prompts.jsonl").write_text('{"prompt": "a"}\n')
    config = tiny_config("evaluation.prompts=/gone/heldout-prompts.jsonl")
    found = with_prompts_of(config, tmp_path / inside).evaluation.prompts
    assert found == str(tmp_path / "heldout-prompts.jsonl")
    mine = tiny_config("evaluation.prompts=/gone/prompts.txt")
    assert with_prompts_of(mine, tmp_path / inside) == mine


@pytest.mark.parametrize(
    ("scorer", "name"),
    [("pickscore", "pickscore"), ("[clip]", "clip"), ("mine:taste", "taste"), ("null", "auto")],
)
def test_the_only_score_is_the_preference(tiny_config, tmp_path, scorer, name):
    config = tiny_config("evaluation.preference=auto", f"evaluation.scorer={scorer}")
    assert settled(config, tmp_path).evaluation.preference == name


def test_of_several_scores_the_preference_is_named(tiny_config, tmp_path):
    config = tiny_config("evaluation.preference=auto", "evaluation.scorer=[clip, pickscore]")
    with pytest.raises(ConfigError, match="evaluation.preference=clip"):
        settled(config, tmp_path)


@pytest.mark.parametrize(
    ("setting", "fits", "message"),
    [
        ("policy.merge=true", 2, "merged weights need about .*set policy.merge=false"),
        ("training.snapshot_every=2", 1, "copies of the policy need .*raise training.snapshot_"),
    ],
)
def test_a_disk_for_a_part_alone_is_refused(setting, fits, message, tiny_config, monkeypatch):
    """With room for the checkpoints, or for them and the copies of the policy, and no more."""
    free = iter([10**12] * fits)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=next(free, 10)))
    with pytest.raises(DiskError, match=message):
        check_run(tiny_config(setting), Path("new"))


def test_a_short_file_of_settings_trains(tiny_config, tmp_path, caplog):
    """It says nothing of scores: that stops the evaluation, not the training."""
    config = tiny_config("evaluation.preference=auto")
    check_run(config, tmp_path / "new")
    assert "'auto' is not a score of scenes" in caplog.text and "Name them before" in caplog.text
