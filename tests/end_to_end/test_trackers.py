"""Trackers get what the log has, and nothing secret; a missing one is said before the work."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate.tracking
import pytest
from accelerate import Accelerator

from inversion_dpo.cli import main as cli
from inversion_dpo.run.config import ConfigError, to_yaml
from inversion_dpo.training.recipe import train
from inversion_dpo.training.run_files import read_rows
from inversion_dpo.training.trackers import begin_tracker, tracker_of
from tests.slow import slow_but

SECRETS = {"HF_TOKEN": "hf_SECRETSECRETSECRET", "WANDB_API_KEY": "wandb5ecret5ecret5ecret"}

TRACKERS = "inversion_dpo.training.trackers"


class Recorder(SimpleNamespace):
    """Stands for wandb or trackio: notes what it is called with."""

    def __init__(self):
        super().__init__(calls=[])

    def init(self, **settings):
        self.calls.append(["init", settings])
        return self

    def log(self, values, step=None, **more):
        self.calls.append(["log", values | {"step": step} | more])

    def finish(self):
        self.calls.append(["finish", {}])


def test_a_tracker_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr(f"{TRACKERS}.get_available_trackers", lambda: ["tensorboard"])
    assert tracker_of("auto") == "tensorboard" and tracker_of("none") is None
    with pytest.raises(ConfigError, match="pip install wandb"):
        tracker_of("wandb")
    monkeypatch.setattr(f"{TRACKERS}.get_available_trackers", lambda: [])
    assert tracker_of("auto") is None


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_that_it_is_missing_is_said_before_the_inversion(
    tiny_config, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(f"{TRACKERS}.get_available_trackers", lambda: [])
    preset = tmp_path / "run.yaml"
    preset.write_text(to_yaml(tiny_config(f"training.tracker={name}")))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "-c", str(preset), "-o", str(tmp_path / "run")])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"error: training.tracker={name} needs `pip install" in lines[0]
    assert len(lines) == 1 and not list((tmp_path / "run").rglob("*.safetensors"))


def test_that_wandb_cannot_log_in_is_said_before_the_inversion(
    tiny_config, tmp_path, monkeypatch, capsys
):
    def login():
        raise RuntimeError("No API key configured.\nmore")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=login))
    monkeypatch.setattr(f"{TRACKERS}.get_available_trackers", lambda: ["wandb"])
    preset = tmp_path / "run.yaml"
    preset.write_text(to_yaml(tiny_config("training.tracker=wandb")))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "-c", str(preset), "-o", str(tmp_path / "run")])
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err == (
        "error: training.tracker=wandb does not start (No API key configured.): log in by `wandb "
        "login`, or set WANDB_MODE=offline, or set training.tracker=none\n"
    )


def test_a_tracker_that_does_not_start_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{TRACKERS}.get_available_trackers", lambda: ["trackio"])
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=int.__name__))
    with pytest.raises(ConfigError, match="training.tracker=trackio does not start .*=none$"):
        begin_tracker(Accelerator(), "trackio", tmp_path, 0)


def test_the_run_has_the_name_of_the_folder_in_which_it_was_typed(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{TRACKERS}.get_available_trackers", lambda: ["trackio"])
    stub = Recorder()
    monkeypatch.setitem(sys.modules, "trackio", stub)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    begin_tracker(Accelerator(), "trackio", Path("."), 0)
    assert stub.calls == [["init", {"project": "inversion-dpo", "name": "mine"}]]


def test_a_folder_tensorboard_is_not_the_package(tmp_path, monkeypatch):
    """As ``cd RUN; accelerate launch -m inversion_dpo train -o .`` has it, which resumes."""
    pytest.importorskip("tensorboardX")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "tensorboard")
    (tmp_path / "tensorboard").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    accelerator = Accelerator()
    begin_tracker(accelerator, "tensorboard", tmp_path, 0)
    accelerator.log({"loss": 1.0}, step=0)
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("name", slow_but(["wandb"], ["wandb", "trackio"]))
def test_what_it_gets_is_the_log_and_no_secret(
    tiny_config, tiny_caches, tmp_path, monkeypatch, name
):
    """As accelerate calls it; the module itself is a stand-in."""
    for key, value in SECRETS.items():
        monkeypatch.setenv(key, value)
    stub = Recorder()
    monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [name])
    few = ("training.steps=3", "training.eval_every=2")
    train(tiny_config(f"training.tracker={name}", *few), tmp_path / "mine", tiny_caches)
    assert stub.calls[0] == ["init", {"project": "inversion-dpo", "name": "mine"}]
    assert stub.calls[-1] == ["finish", {}]
    logged = [values for what, values in stub.calls if what == "log"]
    rows = read_rows(tmp_path / "mine/metrics.jsonl")
    apart = ("seconds", "peak_memory_mb", "pairs")
    assert logged == [{k: v for k, v in row.items() if k not in apart} for row in rows]
    assert "heldout_accuracy" in logged[-1] and logged[-1]["step"] == 3
    assert not any(value in json.dumps(stub.calls) for value in SECRETS.values())


def test_tensorboard_gets_what_the_log_has(tiny_config, tiny_caches, tmp_path):
    pytest.importorskip("tensorboardX")
    few = ("training.steps=3", "training.eval_every=2")
    train(tiny_config("training.tracker=tensorboard", *few), tmp_path, tiny_caches)
    files = list((tmp_path / "tensorboard").rglob("events.*"))
    assert files and b"heldout_accuracy" in files[0].read_bytes()
