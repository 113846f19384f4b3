"""What ``import inversion_dpo`` offers, and what it costs."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import inversion_dpo
from inversion_dpo import api
from inversion_dpo.cli.main import main
from inversion_dpo.run.config import ConfigError, load_config, to_yaml


@pytest.mark.parametrize("name", inversion_dpo.__all__)
def test_the_package_offers_the_public_functions(name):
    assert getattr(inversion_dpo, name) is getattr(api, name)


def test_nothing_else_is_an_attribute():
    with pytest.raises(AttributeError, match="no attribute 'aligned'"):
        inversion_dpo.aligned  # noqa: B018


def test_importing_the_package_imports_no_torch():
    code = "import sys, inversion_dpo; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("given", [["training.steps=3"], {"training.steps": 3}, 3])
def test_settings_that_are_no_texts_are_named(given, tmp_path):
    for call in (api.align, api.evaluate):
        with pytest.raises(ConfigError, match=r"steps.*|3 is no setting: .* a list of them as \*"):
            call("taste", tmp_path / "new", given)
    assert not (tmp_path / "new").exists()


def test_paths_are_taken_for_texts(tmp_path, monkeypatch):
    """A policy's path was refused once all was sampled, as metrics.json has it as a text."""
    preset, asked = tmp_path / "mine.yaml", []
    preset.write_text("training: {steps: 3}")
    monkeypatch.setattr(
        "inversion_dpo.evaluation.evaluate.evaluate",
        lambda folder, config, models: asked.append((config.training.steps, models)),
    )
    policy, reference = tmp_path / "a", tmp_path / "b"
    api.evaluate(tmp_path / "new", policy=policy, reference=reference, preset=preset)
    assert asked == [(3, (str(reference), str(policy)))]
    monkeypatch.setattr(
        "inversion_dpo.evaluation.protocols.judge_by", lambda *given: asked.append(given[3:])
    )
    for against in (policy, str(policy), [policy]):
        api.evaluate(tmp_path / "new", protocol="sd15-dpo", policy=policy, against=against)
        assert asked.pop() == (str(policy), [str(policy)], None)


def test_the_home_folder_is_found(tmp_path, monkeypatch, capsys):
    """Python expands no ~, and a shell none in --output=~/run; a folder called ~ was made."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        "inversion_dpo.training.recipe.train", lambda c, folder: seen.append(folder)
    )
    monkeypatch.setattr(api, "check_run", lambda config, folder: seen.append(folder))
    Path("home").mkdir()
    Path("home/mine.yaml").write_text("training: {steps: 3}")
    assert api.align("~/mine.yaml", "~/run") == tmp_path / "home/run"
    monkeypatch.setattr(
        "inversion_dpo.evaluation.evaluate.evaluate",
        lambda folder, config, models: seen.append(folder) or seen.append(Path(models[1])),
    )
    api.evaluate("~/run", policy="~/run")
    for word in ("report", "sample"):
        with pytest.raises(ConfigError, match=f"{tmp_path}/home/run "):
            getattr(api, word)("~/run", *["a star"] * (word == "sample"))
    assert {*seen} == {tmp_path / "home/run"}
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config=~/mine.yaml", "--output=~/mine.yaml"])
    assert f"--output {tmp_path}/home/mine.yaml is a file" in capsys.readouterr().err
    assert not Path("~").exists()


def test_a_text_alone_is_one_prompt(tmp_path, monkeypatch):
    drawn = []
    sampler = SimpleNamespace(
        warn_of_cut=lambda prompts: None, draw=lambda *a, **k: drawn.append(a)
    )
    monkeypatch.setattr("inversion_dpo.evaluation.sides.sampler_of", lambda *_: sampler)
    Path(tmp_path / "config.yaml").write_text(to_yaml(load_config(None, [])))
    for prompts in ("a red star", ["a red star"], ("a red star",)):
        api.sample(tmp_path, prompts, seed=4, policy=False)
        assert drawn.pop() == (["a red star"], [4])
