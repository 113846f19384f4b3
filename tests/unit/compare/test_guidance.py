"""benchmarks/guidance.py: its arms differ in the guidance of training alone, without training."""

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
