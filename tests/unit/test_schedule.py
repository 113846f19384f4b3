"""Schedules against diffusers and against algebra."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from inversion_dpo.schedule import Schedule, add_noise, eps_towards, to_eps

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedule(prediction_type="epsilon"):
    return Schedule(DDIMScheduler(**SD).alphas_cumprod.double(), prediction_type)


def test_grid_runs_from_clean_to_the_last_timestep():
    grid = schedule().grid(20)
    assert grid.timesteps[0] == 0 and grid.timesteps[-1] == 999 and grid.steps == 20
    assert grid.alpha_bar[0] == 1.0
    assert (grid.alpha_bar.diff() < 0).all() and (grid.timesteps.diff() > 0).all()
    assert grid.timesteps.dtype == torch.int64


@pytest.mark.parametrize("steps", [0, -3, 1000])
def test_grid_refuses_impossible_step_counts(steps):
    with pytest.raises(ValueError, match="between 1 and 999"):
        schedule().grid(steps)


def test_float_timesteps_are_refused():
    with pytest.raises(TypeError, match="integers"):
        schedule().alpha_bar(torch.tensor([3.0]))


def test_add_noise_equals_diffusers():
    x_0, eps, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 10, 500, 999])
    ours = add_noise(x_0, eps, schedule().alpha_bar(t))
    torch.testing.assert_close(ours, DDPMScheduler(**SD).add_noise(x_0, eps, t))


def test_conversions_recover_eps_from_v_and_x0():
    s = schedule()
    x_0, eps = torch.randn(4, 2, 3, 3).double(), torch.randn(4, 2, 3, 3).double()
    t = torch.tensor([1, 10, 500, 999])
    alpha_bar = s.alpha_bar(t)
    x_t = add_noise(x_0, eps, alpha_bar)
    v = DDPMScheduler(**SD).get_velocity(x_0, eps, t)
    torch.testing.assert_close(to_eps(v, x_t, alpha_bar, "v_prediction"), eps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(to_eps(x_0, x_t, alpha_bar, "sample"), eps)
    torch.testing.assert_close(eps_towards(x_t, x_0, alpha_bar), eps)


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="velocity"):
        schedule("velocity")
