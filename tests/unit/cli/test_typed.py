"""What people type: settings stay settings, each is read, and mistakes are one line."""

import logging
import os
import re
import shlex

import pytest
import typer
from tqdm import tqdm

from inversion_dpo.cli import main as cli
from inversion_dpo.cli.options import split_settings
from inversion_dpo.run.config import ConfigError, load_config, to_yaml
from inversion_dpo.run.folder import run_file
from inversion_dpo.training.effects import load_checked

APP = typer.main.get_command(cli.app)
TASTE = to_yaml(load_config("taste", []))
PAIRS = APP.commands["pairs"]
COMMANDS = {n: c for n, c in APP.commands.items() if n != "pairs"}
COMMANDS |= {f"pairs {n}": c for n, c in PAIRS.commands.items()}


def refused(capsys, *words):
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_ends_with_an_example_that_parses(name):
    command = COMMANDS[name]
    (example,) = re.findall(r"^Example: inversion-dpo (.*)$", command.help, re.M)
    words = shlex.split(example)
    assert " ".join(words[: len(name.split())]) == name
    command.make_context(name, words[len(name.split()) :])


def test_a_prompt_is_a_prompt_and_a_setting_a_setting():
    texts = ["a portrait", "E = mc2", "a sign that says a=b", " a=b"]
    settings = ["model.resolution=64", "evaluation.guidance_scale=", "modl.x=3", "seed=3"]
    assert split_settings([*settings, *texts]) == (texts, settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sample text modl.resolution=64 -o {}", "unknown key 'modl'; did you mean 'model'"),
        ("sample text training.steps=3 -o {}", "training.steps has no effect in `sample`"),
        ("sample text evaluation.seed=3 -o {}", "batch_size (--seed is the seed): leave it out"),
        ("sample text evaluation.limit=3 -o {}", "evaluation.limit has no effect in `sample`"),
        ("pairs sample evaluation.scorer=clip -o {}.parquet", "scorer has no effect in `pairs sam"),
        ("pairs build objective.beta=3 -o {}", "objective.beta has no effect in `pairs build`"),
        ("pairs build --samples 3 build.samples=4 -o {}", "build.samples is given twice"),
        ("pairs sample data.limit=3 -o {}.parquet", "data.limit has no effect in `pairs sample`"),
        ("pairs check {} model.path=x", "model.path has no effect in `pairs check`"),
        ("pairs check {} data.pairs=x", "data.pairs is given twice, as x and "),
        ("train build.samples=3 -o {}", "build.samples has no effect in `train`"),
        ("train training.steps=3 training.steps=4 -o {}", "given twice, as 3 and 4: give it once"),
        ("demo --seed 1 training.seed=2 -o {}", "training.seed is given twice"),
        ("train taste -o {}", "a preset goes with --config taste"),
        ("train -c tast -o {}", "did you mean 'taste'"),
        ("train -c {run} -o {}", "did you mean '{run}/config.yaml'"),
        ("evaluate {run} training.steps=3", "training.steps has no effect in `evaluate`"),
        ("fid {run} --real {run} data.fit=crop", "data.fit has no effect in `fid`"),
        ("evaluate evaluation.limit=3 {run}", "is a setting: name the run's folder before it"),
        ("export evaluation.limit=3", "is a setting: name the run's folder before it"),
        ("web {run} policy.rank=3", "policy.rank has no effect in `web`"),
        ("train -o model.path=x", "--output model.path=x is a setting: write --output NAME"),
        ("sample text -o model.path=x", "--output model.path=x is a setting: write --output NAME"),
        ("pairs sample -o model.path=x", "--output model.path=x is a setting: write --output NAME"),
        ("train -o /dev/null/x", "--output /dev/null is a file: give a folder"),
        ("train -o {}/" + "x" * 300, "File name too long"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_made(capsys, tmp_path, words, message):
    run, new = tmp_path / "run", tmp_path / "new"
    run.mkdir()
    (run / "config.yaml").write_text(TASTE)
    filled = [word.replace("{run}", str(run)).replace("{}", str(new)) for word in words.split()]
    assert message.replace("{run}", str(run)) in refused(capsys, *filled)
    assert not list(new.rglob("*"))


def test_a_setting_may_be_repeated_with_one_value():
    assert load_checked("taste", ["training.steps=3"] * 2).training.steps == 3
    with pytest.raises(ConfigError, match="data.columns.caption is given twice"):
        load_checked("taste", ["data.columns.caption=a", "data.columns.caption=b"])
    load_checked("taste", ["data.columns.caption=a", "data.columns.label_0=b"])


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2", "model: {path: a, path: b}", "a: [", "\x00", "a: ]"]
)
def test_yaml_that_cannot_be_read_is_one_line_with_its_place(capsys, tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert f"{file} is no YAML that can be read (" in refused(capsys, "config", file)


def test_what_the_system_refuses_is_one_line(monkeypatch, capsys, tmp_path):
    def refuse(number):
        def stopped(*_):
            raise OSError(number, os.strerror(number), str(tmp_path / "file"))

        return stopped

    for number in (13, 20, 27, 28, 36):
        monkeypatch.setattr("inversion_dpo.cli.settings.resolved", refuse(number))
        assert f"{tmp_path / 'file'}: {os.strerror(number)}" in refused(capsys, "config")


def test_what_the_hub_says_is_printed_once(monkeypatch, capsys):
    hub = logging.getLogger("huggingface_hub")  # has a handler of its own
    monkeypatch.setattr(hub, "propagate", True)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert not hub.propagate


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_):
        for _ in tqdm(range(2), "train"):
            raise KeyboardInterrupt

    monkeypatch.setattr("inversion_dpo.cli.settings.resolved", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main(["config"])
    assert stop.value.code == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("interrupted; run the same command again")  # below the bar


def test_a_run_may_have_an_equals_sign_in_its_name(tmp_path):
    """As those of `compare --vary objective.beta=1,2`."""
    folder = tmp_path / "x0 beta=1-0"
    folder.mkdir()
    (folder / "config.yaml").write_text(TASTE)
    assert run_file(folder) == str(folder / "config.yaml")


@pytest.mark.parametrize(
    "words",
    ["sample x --seed 99999999999", "pairs sample --seed -1", "compare --seeds 1000000000"],
)
def test_a_number_beyond_any_use_is_refused(capsys, tmp_path, words):
    with pytest.raises(SystemExit) as stop:
        cli.main([*words.split(), "-o", str(tmp_path / "new")])
    assert stop.value.code == 2 and "Invalid value for" in capsys.readouterr().err


def test_a_model_in_the_place_of_a_run_says_what_takes_it(tmp_path):
    run, model, file = tmp_path / "run", tmp_path / "model", tmp_path / "x.safetensors"
    notes, compared, lost = tmp_path / "notes.txt", tmp_path / "compared", tmp_path / "lost"
    for folder in (run / "adapter", model, compared / "runs/x0-0", compared / "runs/sft-0", lost):
        folder.mkdir(parents=True)
    (run / "config.yaml").touch()
    for made in (model / "model_index.json", file, notes, lost / "metrics.jsonl"):
        made.touch()
    for name in ("x0-0", "sft-0"):
        (compared / "runs" / name / "config.yaml").touch()
    for place, message in (
        (compared, f"It holds 2 runs: give one, such as {compared / 'runs/sft-0'}$"),
        (lost, "left metrics.jsonl there: put its config.yaml back from a copy$"),
        (run / "adapter", f"It lies in a run: give {run}$"),
        (model, "It is a model: `evaluate NEW_FOLDER --policy` takes it"),
        (file, "It is a model: `evaluate NEW_FOLDER --policy` takes it"),
        (notes, "It is a file: give the folder of a run"),
    ):
        with pytest.raises(ConfigError, match=f"{place} is not a run: .*{message}"):
            run_file(place)
