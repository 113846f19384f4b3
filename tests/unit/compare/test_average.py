"""benchmarks/average.py: the mean of policies, each on a base of its own."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inversion_dpo.cli import train_run
from inversion_dpo.compare.rounds import merge
from inversion_dpo.evaluation.evaluate import load_policy_pipeline
from inversion_dpo.models.loading import load_pipeline

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks/average.py"))


def test_the_mean_of_a_policy_and_of_one_that_stands_on_it(tiny_config, tmp_path, monkeypatch):
    first, second, mean = (tmp_path / name for name in ("first", "second", "mean"))
    config = tiny_config("training.steps=2", "training.learning_rate=0.05")
    bases = [config, replace(config, model=replace(config.model, path=str(first / "merged")))]
    policies = []
    for run, settings in zip((first, second), bases, strict=True):
        train_run(settings, run)
        merge(settings, run / "adapter", run / "merged")
        policies.append(load_pipeline(str(run / "merged")).unet.state_dict())

    monkeypatch.setattr(sys, "argv", ["average.py", str(mean), str(first), str(second)])
    SCRIPT["main"]()
    moved = 0.0
    for name, value in load_policy_pipeline(config, mean).unet.state_dict().items():
        a, b = (p[name] for p in policies)
        torch.testing.assert_close(value, (a + b) / 2)
        moved = max(moved, float((a - b).abs().max()))
    assert moved > 1e-3
    with pytest.raises(SystemExit, match="exists: choose another"):
        SCRIPT["main"]()


def test_another_network_is_refused(tiny_config, tmp_path, monkeypatch):
    run, other = tmp_path / "run", tmp_path / "other"
    train_run(tiny_config("training.steps=1"), run)
    found = {run: SCRIPT["policy"](run), other: SCRIPT["policy"](run)}
    found[other][1].conv_out = torch.nn.Conv2d(8, 5, 3)
    average = SCRIPT["average"]
    monkeypatch.setitem(average.__globals__, "policy", found.__getitem__)
    with pytest.raises(SystemExit, match="other trains another network than"):
        average([run, other])
