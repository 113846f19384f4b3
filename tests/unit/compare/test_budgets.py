"""benchmarks/budgets.py: its arms and what they cost, without training."""

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks/budgets.py"))
HELDOUT = 0.1  # the presets' data.holdout


@pytest.mark.parametrize("budget", [0, 1, 2])
def test_both_methods_have_the_same_budget(budget):
    """3 + 1 evaluations of each of a step's 32 images, or 3 and the inversion before."""
    pairs, steps = SCRIPT["ARMS"]["diffusion_dpo"][1][budget]
    fresh = steps * 32 * 4
    pairs, steps = SCRIPT["ARMS"]["x0"][1][budget]
    trained = pairs - round(pairs * HELDOUT)
    per_image = (9 - 1 + 1) + (9 - 1)  # the states 1..9, and once more each above the first
    spent = steps * 32 * 3 + 2 * trained * per_image
    assert 0.99 * fresh < spent <= fresh


def test_settings_are_the_methods_own():
    x0 = SCRIPT["settings"]("x0", 389, 116, 3)
    dpo = SCRIPT["settings"]("diffusion_dpo", 2000, 180, 3)
    assert (x0.inversion.fixed_point_iterations, x0.objective.t_min) == (1, 0.4)
    assert (dpo.inversion.steps, dpo.objective.t_min) == (1, 0.1)
    for config in (x0, dpo):
        assert config.training.seed == 3 and config.objective.beta == 1000
        assert (config.training.batch_size, config.training.learning_rate) == (16, 3e-4)
        assert config.data.holdout == HELDOUT
