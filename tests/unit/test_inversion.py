"""DDIM inversion against closed forms, diffusers' schedulers and itself."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from inversion_dpo.inversion import (
    ddim_step,
    invert,
    reconstruct,
    reconstruction_error,
)
from inversion_dpo.schedule import Schedule, to_eps

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
ALPHAS = DDIMScheduler(**SD).alphas_cumprod.double()
SCHEDULE = Schedule(ALPHAS)


def gaussian(variance=0.3, mean=0.7):
    """The exact eps of data ~ N(mean, variance): a linear, analytic model."""

    def predict(x, t):
        a = SCHEDULE.alpha_bar(t).reshape(-1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * variance + 1 - a)

    return predict


def test_step_by_hand():
    # ab 1 -> 0.25 with x = 2, eps = 1: 0.5 * 2 + sqrt(0.75)
    x = ddim_step(
        torch.tensor([[2.0]]), torch.tensor(1.0), torch.tensor(0.25), torch.tensor([[1.0]])
    )
    assert x.item() == pytest.approx(1.0 + 0.75**0.5)


def test_step_is_its_own_inverse_under_the_same_noise():
    x, eps = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    a, b = torch.tensor(0.9).double(), torch.tensor(0.2).double()
    there = ddim_step(x, a, b, eps)
    torch.testing.assert_close(ddim_step(there, b, a, eps), x)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_sampling_step_equals_ddim_scheduler(prediction_type):
    scheduler = DDIMScheduler(**SD, prediction_type=prediction_type, set_alpha_to_one=True)
    scheduler.set_timesteps(25)
    x = torch.randn(2, 4, 8, 8)
    for t in scheduler.timesteps[:-1]:
        output, previous = torch.randn(2, 4, 8, 8), t - 1000 // 25
        theirs = scheduler.step(output, t, x).prev_sample
        ab = SCHEDULE.alpha_bar(t)
        eps = to_eps(output, x, ab.reshape(1), prediction_type)
        ours = ddim_step(x, ab, SCHEDULE.alpha_bar(previous), eps)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        x = theirs


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_inversion_step_equals_ddim_inverse_scheduler(prediction_type):
    scheduler = DDIMInverseScheduler(**SD, prediction_type=prediction_type, set_alpha_to_one=True)
    scheduler.set_timesteps(25)
    x = torch.randn(2, 4, 8, 8)
    for k, t in enumerate(scheduler.timesteps):
        output = torch.randn(2, 4, 8, 8)
        theirs = scheduler.step(output, t, x).prev_sample
        # diffusers converts v at the level the state is at
        source = torch.tensor(1.0).double() if k == 0 else SCHEDULE.alpha_bar(t - 40)
        eps = to_eps(output, x, source.reshape(1), prediction_type)
        ours = ddim_step(x, source, SCHEDULE.alpha_bar(t), eps)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        x = theirs


def test_whole_inversion_equals_the_diffusers_loop():
    """Same timesteps, same network calls: x after N steps agrees with diffusers."""
    scheduler = DDIMInverseScheduler(**SD, set_alpha_to_one=True)
    scheduler.set_timesteps(25)
    grid = SCHEDULE.grid(25)
    levels = torch.cat([torch.tensor([0]), scheduler.timesteps.long()])
    object.__setattr__(grid, "timesteps", levels)
    alpha_bar = ALPHAS[levels].clone()
    alpha_bar[0] = 1.0
    object.__setattr__(grid, "alpha_bar", alpha_bar)
    predict = gaussian()
    x = x_0 = torch.randn(6, 3).double()
    trajectory = invert(x_0, grid, predict)
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(predict(x, levels[k].expand(6)), t, x).prev_sample
        torch.testing.assert_close(trajectory.states[k + 1], x, rtol=1e-5, atol=1e-6)


def test_round_trip_error_halves_when_steps_double():
    x_0 = 0.7 + 0.3**0.5 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).double()
    errors = []
    for steps in (25, 50, 100, 200):
        grid = SCHEDULE.grid(steps)
        x_T = invert(x_0, grid, gaussian()).states[-1]
        errors.append(reconstruction_error(x_0, reconstruct(x_T, grid, gaussian())).mean().item())
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert all(1.7 < r < 2.4 for r in ratios), (errors, ratios)


def test_fixed_point_reconstructs_where_naive_does_not():
    x_0 = torch.randn(50, 4).double()
    grid = SCHEDULE.grid(25)
    naive, exact = (
        reconstruction_error(
            x_0, reconstruct(invert(x_0, grid, gaussian(), k).states[-1], grid, gaussian())
        ).mean()
        for k in (0, 50)
    )
    assert exact < 1e-6 < 1e-2 < naive


def test_trajectory_is_consistent():
    x_0 = torch.randn(5, 4).double()
    grid = SCHEDULE.grid(10)
    for iterations in (0, 30):
        tr = invert(x_0, grid, gaussian(), iterations)
        assert tr.states.shape == (11, 5, 4) and tr.noises.shape == (10, 5, 4)
        torch.testing.assert_close(tr.states[0], x_0)
        for i in range(10):
            step = ddim_step(tr.states[i], grid.alpha_bar[i], grid.alpha_bar[i + 1], tr.noises[i])
            torch.testing.assert_close(step, tr.states[i + 1])
            again = gaussian()(tr.states[i], grid.timesteps[i].expand(5))
            torch.testing.assert_close(tr.reference[i], again)
        same = torch.allclose(tr.noises, tr.reference[:-1])
        assert same == (iterations == 0)  # naive: the step's noise is the clean end's prediction


def test_transition_signal_vanishes_under_exact_inversion():
    """Why objective.target=transition refuses fixed-point inversion."""
    x_0, grid = torch.randn(20, 4).double(), SCHEDULE.grid(20)
    naive, exact = (invert(x_0, grid, gaussian(), k) for k in (0, 60))
    signal = [(tr.noises - tr.reference[1:]).square().mean().item() for tr in (naive, exact)]
    assert signal[1] < 1e-10 * signal[0]


def test_separate_reference_is_evaluated_at_every_state():
    x_0, grid = torch.randn(3, 4).double(), SCHEDULE.grid(5)
    tr = invert(x_0, grid, gaussian(0.2), reference=gaussian(0.9))
    torch.testing.assert_close(
        tr.reference[2], gaussian(0.9)(tr.states[2], grid.timesteps[2].expand(3))
    )
    torch.testing.assert_close(
        tr.noises[2], gaussian(0.2)(tr.states[2], grid.timesteps[2].expand(3))
    )


def test_batch_of_two_is_two_batches_of_one():
    x_0, grid = torch.randn(2, 4).double(), SCHEDULE.grid(8)
    together = invert(x_0, grid, gaussian()).states
    apart = torch.cat([invert(x_0[k : k + 1], grid, gaussian()).states for k in (0, 1)], 1)
    torch.testing.assert_close(together, apart)


def test_start_adds_the_given_noise_then_inverts():
    x_0, noise, grid = torch.randn(4, 3).double(), torch.randn(4, 3).double(), SCHEDULE.grid(10)
    tr = invert(x_0, grid, gaussian(), noise=noise, start=2)
    for i in (0, 1, 2):
        line = grid.alpha_bar[i].sqrt() * x_0 + (1 - grid.alpha_bar[i]).sqrt() * noise
        torch.testing.assert_close(tr.states[i], line)
    torch.testing.assert_close(tr.noises[:2], noise.expand(2, 4, 3))
    for i in range(2, 10):
        torch.testing.assert_close(tr.noises[i], tr.reference[i])
    plain = invert(x_0, grid, gaussian(), noise=noise, start=0)
    torch.testing.assert_close(plain.states, invert(x_0, grid, gaussian()).states)


@pytest.mark.parametrize("start", [-1, 10])
def test_start_outside_the_grid_is_refused(start):
    x_0 = torch.randn(2, 3).double()
    with pytest.raises(ValueError, match="start"):
        invert(x_0, SCHEDULE.grid(10), gaussian(), noise=x_0, start=start)
    with pytest.raises(ValueError, match="noise"):
        invert(x_0, SCHEDULE.grid(10), gaussian(), start=1)


def test_start_restores_the_variance_that_an_over_smooth_start_loses():
    """Data that lost its faintest component inverts to too small a noise; noise at t_1 mends it.

    Gaussian data of variance v has x_T of variance 1 when inverted; a tenth of the variance (what
    an autoencoder's smoothing does) gives a tenth at x_T, whatever the number of steps.
    """
    torch.manual_seed(0)
    v, grid = 1e-3, SCHEDULE.grid(200)
    smooth = (0.1 * v) ** 0.5 * torch.randn(4000, 1).double()

    def predict(x, t):
        ab = ALPHAS[t][:, None]
        return (1 - ab).sqrt() * x / (ab * v + 1 - ab)

    lost = invert(smooth, grid, predict).states[-1].var()
    mended = invert(smooth, grid, predict, noise=torch.randn(4000, 1).double(), start=20)
    assert lost < 0.3 and abs(mended.states[-1].var() - 1) < 0.1
