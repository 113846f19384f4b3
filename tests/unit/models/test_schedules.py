"""diffusers' scheduler configurations, read as schedules."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from inversion_dpo.models.base import ModelError
from inversion_dpo.models.schedules import discrete_schedule, flow_schedule
from inversion_dpo.schedule import step

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ours_and_theirs(schedule, scheduler, steps):
    """One descent of our sampler grid and of diffusers' DDIM, under the same wild predictions."""
    grid = schedule.grid(steps, "sampler")
    scheduler.set_timesteps(steps)
    assert grid.timesteps.flip(0)[:-1].tolist() == scheduler.timesteps.tolist()
    x = theirs = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for k, t in enumerate(scheduler.timesteps):
        i = grid.steps - k
        output = torch.tanh(x * 3) + 0.1 * k
        x = step(x, output, grid.levels[i], grid.levels[i - 1], schedule.kind)
        theirs = scheduler.step(torch.tanh(theirs * 3) + 0.1 * k, t, theirs).prev_sample
    return x, theirs


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
def test_sampler_grid_is_ddims(spacing, kind, set_alpha_to_one, offset):
    config = {"timestep_spacing": spacing, "prediction_type": kind, "clip_sample": False}
    scheduler = DDIMScheduler(
        **SD, **config, set_alpha_to_one=set_alpha_to_one, steps_offset=offset
    )
    x, theirs = ours_and_theirs(discrete_schedule(scheduler), scheduler, 20)
    torch.testing.assert_close(x, theirs, rtol=1e-4, atol=1e-4)


def test_zero_terminal_snr_with_v_prediction():
    scheduler = DDIMScheduler(
        **SD, rescale_betas_zero_snr=True, timestep_spacing="trailing",
        prediction_type="v_prediction", clip_sample=False,
    )  # fmt: skip
    schedule = discrete_schedule(scheduler)
    assert schedule.levels.alpha[-1] < 1e-3
    x, theirs = ours_and_theirs(schedule, scheduler, 10)
    torch.testing.assert_close(x, theirs, rtol=1e-4, atol=1e-4)


def test_zero_terminal_snr_with_eps_prediction_is_refused():
    with pytest.raises(ModelError, match="zero terminal SNR"):
        discrete_schedule(DDIMScheduler(**SD, rescale_betas_zero_snr=True))


def test_sample_prediction_is_refused():
    with pytest.raises(ModelError, match="epsilon, v_prediction"):
        discrete_schedule(DDIMScheduler(**SD, prediction_type="sample"))


def test_linspace_spacing_is_the_even_grid():
    schedule = discrete_schedule(DDIMScheduler(**SD, timestep_spacing="linspace"))
    sampler, even = schedule.grid(10, "sampler"), schedule.grid(10, "even")
    assert torch.equal(sampler.timesteps, even.timesteps)
    assert torch.equal(sampler.levels.alpha, even.levels.alpha)


@pytest.mark.parametrize("sampler", [PNDMScheduler, EulerDiscreteScheduler])
def test_any_samplers_configuration_gives_its_betas(sampler):
    theirs = sampler(**SD, steps_offset=1)
    alpha = discrete_schedule(theirs).levels.alpha
    torch.testing.assert_close(alpha.float() ** 2, theirs.alphas_cumprod, rtol=1e-6, atol=0)


def test_grid_of_sd15_by_hand():
    scheduler = PNDMScheduler(**SD, steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True)
    grid = discrete_schedule(scheduler).grid(10, "sampler")
    assert grid.timesteps.tolist() == [0, 1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    assert float(grid.levels.alpha[0] ** 2) == pytest.approx(1 - 0.00085, rel=1e-5)


def test_shifted_flow_grid_by_hand():
    grid = flow_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0)).grid(4, "sampler")
    assert grid.levels.sigma[0] == 0 and grid.levels.sigma[-1] == 1
    assert torch.equal(grid.timesteps, grid.levels.sigma * 1000)
    torch.testing.assert_close(grid.levels.alpha + grid.levels.sigma, torch.ones(5).double())
    # sigma = 3 s / (1 + 2 s); the last but one of four starts at s = (2 * sigma_min' + 1) / 3
    low = 3 * 0.001 / 1.002
    s = (low + 2 * 1.0) / 3
    assert float(grid.levels.sigma[-2]) == pytest.approx(3 * s / (1 + 2 * s), rel=1e-4)


def test_dynamic_shift_equals_the_flux_recipe():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    grid = flow_schedule(scheduler, mu=0.8, flux_sigmas=True).grid(5, "sampler")
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 5, 5), mu=0.8)
    torch.testing.assert_close(grid.levels.sigma.flip(0).float(), scheduler.sigmas)
    torch.testing.assert_close(grid.timesteps.flip(0)[:-1].float(), scheduler.timesteps)


def test_a_flow_table_is_ascending_and_shifted():
    schedule = flow_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert len(schedule) == 1000 and (schedule.levels.sigma.diff() > 0).all()
    grid = schedule.grid(10, "even")
    assert grid.levels.sigma[0] == 0 and grid.levels.sigma[-1] == 1


def test_flow_needs_its_scheduler():
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler"):
        flow_schedule(DDIMScheduler(**SD))
