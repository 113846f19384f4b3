"""Schedules and steps against diffusers and against algebra."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from inversion_dpo.maths.records import Levels
from inversion_dpo.maths.schedule import (
    KINDS,
    Schedule,
    add_noise,
    error_scale,
    like,
    posterior_std,
    prediction_between,
    prediction_of,
    step,
    step_back,
    step_coefficients,
)
from inversion_dpo.models.schedules import discrete_schedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedule(prediction_type="epsilon"):
    return discrete_schedule(DDIMScheduler(**SD, prediction_type=prediction_type))


def level(alpha, kind):
    """A level of the path on which this kind of network lives."""
    alpha = torch.tensor(alpha, dtype=torch.float64)
    return Levels(alpha, 1 - alpha if kind == "flow_prediction" else (1 - alpha**2).sqrt())


def test_even_grid_runs_from_clean_to_the_last_timestep():
    grid = schedule().grid(20)
    assert grid.timesteps[0] == 0 and grid.timesteps[-1] == 999 and grid.steps == 20
    assert grid.levels.alpha[0] == 1.0 and grid.levels.sigma[0] == 0.0
    assert (grid.levels.alpha.diff() < 0).all() and (grid.timesteps.diff() > 0).all()
    assert grid.timesteps.dtype == torch.int64


@pytest.mark.parametrize("steps", [0, -3, 1000])
def test_grid_refuses_impossible_step_counts(steps):
    with pytest.raises(ValueError, match="takes 1 to 999 steps"):
        schedule().grid(steps)


def test_a_grid_of_a_small_schedule_by_hand():
    """Six levels: two steps at 0, 2.5 -> 2 (half to even) and 5; the first one is made clean."""
    alpha = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], dtype=torch.float64)
    levels = Levels(alpha, (1 - alpha**2).sqrt())
    own = Schedule("epsilon", 10 * torch.arange(6), levels, lambda steps: ("sampler", steps))
    grid = own.grid(2)
    assert grid.timesteps.tolist() == [0, 20, 50]
    assert grid.levels.alpha.tolist() == [1.0, 0.7, 0.4] and grid.levels.sigma[0] == 0
    assert torch.equal(grid.levels.sigma[1:], levels.sigma[torch.tensor([2, 5])])
    assert levels.alpha[0] == 0.9  # the schedule's own stays
    assert own.grid(5).timesteps.tolist() == [0, 10, 20, 30, 40, 50]
    assert own.grid(1).timesteps.tolist() == [0, 50]
    assert own.grid(3, "sampler") == ("sampler", 3)
    for steps in (0, 6):
        with pytest.raises(ValueError, match="takes 1 to 5 steps"):
            own.grid(steps)


def test_posterior_deviation_by_hand():
    """0.28 / 0.6 sqrt(0.36 - (0.8 / 0.96)^2 0.0784) between alpha 0.96 and 0.8."""
    low, high = level(0.96, "epsilon"), level(0.8, "epsilon")
    wanted = 0.28 / 0.6 * (0.36 - (0.8 / 0.96) ** 2 * 0.0784) ** 0.5
    assert posterior_std(low, high).item() == pytest.approx(wanted)
    assert posterior_std(level(1.0, "epsilon"), high) == 0
    assert posterior_std(high, high) == pytest.approx(0, abs=1e-8)  # and no root of less than 0
    assert posterior_std(high, low) == 0


def test_a_coefficient_takes_the_shape_and_type_of_what_it_multiplies():
    x = torch.zeros(2, 3, 4)
    assert like(torch.tensor([1.0, 2.0], dtype=torch.float64), x).shape == (2, 1, 1)
    scalar = like(torch.tensor(2.0, dtype=torch.float64), x)
    assert scalar.ndim == 0 and scalar.dtype == torch.float32


def test_add_noise_equals_diffusers():
    x_0, eps, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 10, 500, 999])
    ours = add_noise(x_0, eps, schedule().levels[t])
    torch.testing.assert_close(ours, DDPMScheduler(**SD).add_noise(x_0, eps, t))


def test_v_equals_diffusers_velocity():
    x_0, eps, t = torch.randn(3, 2, 3, 3), torch.randn(3, 2, 3, 3), torch.tensor([1, 500, 999])
    v = prediction_of(x_0, eps, schedule().levels[t], "v_prediction")
    torch.testing.assert_close(v, DDPMScheduler(**SD).get_velocity(x_0, eps, t))


def test_flow_velocity_is_the_derivative_of_the_path():
    x_0, eps = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    near, far = level(0.7, "flow_prediction"), level(0.7 - 1e-6, "flow_prediction")
    slope = (add_noise(x_0, eps, far) - add_noise(x_0, eps, near)) / 1e-6
    torch.testing.assert_close(prediction_of(x_0, eps, near, "flow_prediction"), slope)


def test_errors_of_v_count_as_errors_of_eps():
    x_t, at = torch.randn(2, 5).double(), level(0.6, "v_prediction")
    v, other = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    eps, other_eps = (at.sigma * x_t + at.alpha * p for p in (v, other))
    scaled = error_scale(at, "v_prediction") * (v - other).square()
    torch.testing.assert_close(scaled, (eps - other_eps).square())
    assert error_scale(at, "epsilon") == error_scale(at, "flow_prediction") == 1


def test_step_by_hand():
    # eps: alpha 1 -> 0.5 with x = 2, eps = 1: 0.5 * 2 + sqrt(0.75)
    clean, noisy = level(1.0, "epsilon"), level(0.5, "epsilon")
    x = step(torch.tensor([[2.0]]), torch.tensor([[1.0]]), clean, noisy, "epsilon")
    assert x.item() == pytest.approx(1.0 + 0.75**0.5)
    # flow: sigma 0.25 -> 0.75 with x = 2, velocity -1: 2 - 0.5
    low, high = level(0.75, "flow_prediction"), level(0.25, "flow_prediction")
    x = step(torch.tensor([[2.0]]), torch.tensor([[-1.0]]), low, high, "flow_prediction")
    assert x.item() == pytest.approx(1.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alphas", [(0.9, 0.2), (1.0, 0.4), (0.3, 0.8)])
def test_a_step_with_the_truth_stays_on_the_line(kind, alphas):
    """Whoever knows x_0 and eps walks from any level to any other without error."""
    x_0, eps = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    start, end = (level(a, kind) for a in alphas)
    x, there = add_noise(x_0, eps, start), add_noise(x_0, eps, end)
    truth = prediction_of(x_0, eps, start, kind)
    torch.testing.assert_close(step(x, truth, start, end, kind), there)
    torch.testing.assert_close(step_back(there, truth, start, end, kind), x)
    torch.testing.assert_close(prediction_between(there, end, x, start, kind), truth)


@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction"])
def test_v_and_flow_step_down_from_pure_noise(kind):
    """At zero terminal SNR x_T says nothing of the image, the prediction does."""
    x_0, eps = torch.randn(2, 4).double(), torch.randn(2, 4).double()
    top, clean = level(0.0, kind), level(1.0, kind)
    truth = prediction_of(x_0, eps, top, kind)
    torch.testing.assert_close(step(eps, truth, top, clean, kind), x_0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_sampling_step_equals_ddim_scheduler(kind):
    scheduler = DDIMScheduler(**SD, prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(25)
    levels, x = schedule().levels, torch.randn(2, 4, 8, 8)
    for t in scheduler.timesteps[:-1]:
        output = torch.randn(2, 4, 8, 8)
        theirs = scheduler.step(output, t, x).prev_sample
        ours = step(x, output, levels[t], levels[t - 40], kind)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        x = theirs


def test_sampling_step_equals_flow_match_euler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    x, sigmas = torch.randn(2, 4, 8, 8), scheduler.sigmas.double()
    for k, t in enumerate(scheduler.timesteps):
        output = torch.randn(2, 4, 8, 8)
        theirs = scheduler.step(output, t, x).prev_sample
        start, end = (level(1 - float(s), "flow_prediction") for s in sigmas[k : k + 2])
        ours = step(x, output, start, end, "flow_prediction")
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        x = theirs


def test_unknown_kind_is_refused():
    s = schedule()
    with pytest.raises(ValueError, match="velocity"):
        step_coefficients(s.levels[1], s.levels[0], "velocity")
    x, at = torch.zeros(1, 1), level(0.5, "epsilon")
    for function, arguments in ((step, (x, x, at, at)), (prediction_of, (x, x, at))):
        with pytest.raises(ValueError, match="velocity"):
            function(*arguments, "velocity")
