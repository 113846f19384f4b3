"""benchmarks/guidance.py: its arms differ in the guidance of training alone, without training."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks/guidance.py"))


@pytest.mark.parametrize("method", ["x0", "diffusion_dpo"])
def test_only_the_guidance_of_training_differs(method):
    plain, guided = (SCRIPT["settings"](method, trained, 3) for trained in SCRIPT["TRAINED"])
    assert (plain.objective.guidance_scale, guided.objective.guidance_scale) == (1, 2)
    assert plain.evaluation.guidance_scale == guided.evaluation.guidance_scale == 2
    assert plain.training.seed == guided.training.seed == 3
    assert replace(plain, objective=guided.objective) == guided


def test_accuracies_are_averaged_over_200_steps(tmp_path):
    steps = [0, 1, 200, 201, 400]
    rows = [{"step": n, "accuracy": n / 400, "heldout_accuracy": 1 - n / 400} for n in steps]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    first, second = SCRIPT["learned"]([tmp_path]).splitlines()[2:]
    assert first == "| 0-200 | 0.251 | 0.749 |"  # of steps 1 and 200
    assert second == "| 200-400 | 0.751 | 0.249 |"
