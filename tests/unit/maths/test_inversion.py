"""DDIM inversion against closed forms, diffusers' schedulers and itself."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from inversion_dpo.maths.inversion import (
    compared,
    evaluations_per_image,
    follow,
    invert,
    reconstruct,
    reconstruction_error,
    recovered_noise,
)
from inversion_dpo.maths.records import Extent, Grid, Levels
from inversion_dpo.maths.schedule import KINDS, add_noise, prediction_between, step
from inversion_dpo.models.schedules import discrete_schedule

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
ALPHAS = DDIMScheduler(**SD).alphas_cumprod.double()
SCHEDULE = discrete_schedule(DDIMScheduler(**SD))


def gaussian(variance=0.3, mean=0.7):
    """The exact eps of data ~ N(mean, variance): a linear, analytic model."""

    def predict(x, t):
        a = ALPHAS[t].reshape(-1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * variance + 1 - a)

    return predict


def flow_grid(steps):
    """Shifted levels of a straight path."""
    s = torch.linspace(0, 1, steps + 1).double()
    sigma = 3 * s / (1 + 2 * s)
    return Grid(sigma * 1000, Levels(1 - sigma, sigma))


def flow_gaussian(variance=0.3, mean=0.7):
    """The exact velocity of data ~ N(mean, variance) on the straight path."""

    def predict(x, t):
        sigma = (t / 1000).reshape(-1, 1)
        total = (1 - sigma) ** 2 * variance + sigma**2
        centred = x - (1 - sigma) * mean
        return (sigma - (1 - sigma) * variance) / total * centred - mean

    return predict


def inverse_grid(steps):
    """The levels at which DDIMInverseScheduler with this configuration goes up."""
    timesteps = torch.cat([torch.tensor([0]), torch.arange(steps) * (1000 // steps)])
    alpha_bar = ALPHAS[timesteps].clone()
    alpha_bar[0] = 1.0
    return Grid(timesteps, Levels(alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_whole_inversion_equals_the_diffusers_loop(kind):
    """Same timesteps, same network calls: every state agrees with diffusers' inverse scheduler."""
    scheduler = DDIMInverseScheduler(**SD, prediction_type=kind, set_alpha_to_one=True)
    scheduler.set_timesteps(25)
    grid = inverse_grid(25)
    assert scheduler.timesteps.tolist() == grid.timesteps[1:].tolist()
    x = x_0 = torch.randn(6, 3).double()
    trajectory = invert(x_0, grid, gaussian(), kind)
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(gaussian()(x, grid.timesteps[k].expand(6)), t, x).prev_sample
        torch.testing.assert_close(trajectory.states[k + 1], x, rtol=1e-5, atol=1e-6)


def test_round_trip_error_halves_when_steps_double():
    x_0 = 0.7 + 0.3**0.5 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).double()
    errors = []
    for steps in (25, 50, 100, 200):
        grid = SCHEDULE.grid(steps)
        x_T = invert(x_0, grid, gaussian(), "epsilon").states[-1]
        errors.append(
            reconstruction_error(x_0, reconstruct(x_T, grid, gaussian(), "epsilon")).mean().item()
        )
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert all(1.7 < r < 2.4 for r in ratios), (errors, ratios)


def test_fixed_point_reconstructs_where_naive_does_not():
    x_0 = torch.randn(50, 4).double()
    grid = SCHEDULE.grid(25)
    naive, exact = (
        reconstruction_error(
            x_0,
            reconstruct(
                invert(x_0, grid, gaussian(), "epsilon", extent=Extent(iterations=k)).states[-1],
                grid,
                gaussian(),
                "epsilon",
            ),
        ).mean()
        for k in (0, 50)
    )
    assert exact < 1e-6 < 1e-2 < naive


def test_flow_round_trip_error_halves_when_steps_double():
    x_0 = 0.7 + 0.3**0.5 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).double()
    errors = []
    for steps in (25, 50, 100, 200):
        grid, kind = flow_grid(steps), "flow_prediction"
        x_T = invert(x_0, grid, flow_gaussian(), kind).states[-1]
        again = reconstruct(x_T, grid, flow_gaussian(), kind)
        errors.append(reconstruction_error(x_0, again).mean().item())
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert all(1.7 < r < 2.4 for r in ratios), (errors, ratios)


def test_inverted_flow_data_is_standard_normal():
    x_0 = 0.7 + 0.3**0.5 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)).double()
    x_T = invert(x_0, flow_grid(400), flow_gaussian(), "flow_prediction").states[-1]
    assert abs(x_T.mean()) < 0.05 and abs(x_T.var() - 1) < 0.08


@pytest.mark.parametrize("kind", KINDS)
def test_trajectory_is_consistent(kind):
    """Naive: each step follows the prediction below; exact: the one above leads back down."""
    x_0 = torch.randn(5, 4).double() / 2
    flow = kind == "flow_prediction"
    grid = flow_grid(10) if flow else SCHEDULE.grid(10)
    predict = flow_gaussian() if flow else gaussian()
    for iterations in (0, 60):
        tr = invert(x_0, grid, predict, kind, extent=Extent(iterations=iterations))
        assert tr.states.shape == tr.reference.shape == (11, 5, 4)
        torch.testing.assert_close(tr.states[0], x_0)
        for i in range(10):
            low, high = grid.levels[i], grid.levels[i + 1]
            again = predict(tr.states[i], grid.timesteps[i].expand(5))
            torch.testing.assert_close(tr.reference[i], again)
            if iterations == 0:
                up = step(tr.states[i], tr.reference[i], low, high, kind)
                torch.testing.assert_close(tr.states[i + 1], up)
            elif kind != "v_prediction":  # the made-up v network is no contraction
                down = step(tr.states[i + 1], tr.reference[i + 1], high, low, kind)
                torch.testing.assert_close(down, tr.states[i], rtol=1e-5, atol=1e-6)


def transition_signal(tr, i):
    """The observed transition's prediction at its upper end, less the reference's."""
    levels, s = tr.grid.levels, tr.states
    observed = prediction_between(s[i - 1], levels[i - 1], s[i], levels[i], "epsilon")
    return (observed - tr.reference[i]).square().mean().item()


def test_transition_signal_vanishes_under_exact_inversion():
    """Why objective.target=transition refuses fixed-point inversion."""
    x_0, grid = torch.randn(20, 4).double(), SCHEDULE.grid(20)
    naive, exact = (
        invert(x_0, grid, gaussian(), "epsilon", extent=Extent(iterations=k)) for k in (0, 60)
    )
    for i in range(1, 21):
        assert transition_signal(exact, i) < 1e-9 * transition_signal(naive, i)


def test_the_observed_transition_is_the_prediction_below():
    """METHOD: under naive inversion eps* of the transition i -> i+1 is eps_ref at state i."""
    x_0, grid = torch.randn(20, 4).double(), SCHEDULE.grid(20)
    tr = invert(x_0, grid, gaussian(), "epsilon")
    for i in range(1, 21):
        observed = prediction_between(
            tr.states[i - 1], grid.levels[i - 1], tr.states[i], grid.levels[i], "epsilon"
        )
        torch.testing.assert_close(observed, tr.reference[i - 1])


def test_a_separate_reference_is_asked_at_every_state_and_knows_the_paths_prediction():
    x_0, grid, other = torch.randn(3, 4).double(), SCHEDULE.grid(5), gaussian(0.9)

    def reference(x, t, along):
        return other(x, t) + 2 * along

    plain = invert(x_0, grid, gaussian(0.2), "epsilon")
    tr = compared(plain, reference, 1)
    assert torch.equal(tr.states, plain.states)
    for i in range(1, 6):
        expected = other(tr.states[i], grid.timesteps[i].expand(3)) + 2 * plain.reference[i]
        torch.testing.assert_close(tr.reference[i], expected)


def test_inverting_and_sampling_keep_no_graph():
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x_0, grid = torch.randn(2, 3).double(), SCHEDULE.grid(3)
    tr = invert(x_0, grid, lambda x, t: weight * x, "epsilon")
    assert not tr.states.requires_grad and not tr.reference.requires_grad
    assert not compared(tr, lambda x, t, p: weight * x, 1).reference.requires_grad
    again = reconstruct(tr.states[-1], grid, lambda x, t: weight * x, "epsilon")
    assert not again.requires_grad


def test_what_is_not_evaluated_is_no_number():
    """Two noised states, of which the first is asked of nobody: its prediction is NaN."""
    x_0, noise, grid = torch.randn(1, 3).double(), torch.randn(1, 3).double(), SCHEDULE.grid(4)
    tr = invert(x_0, grid, gaussian(), "epsilon", noise=noise, extent=Extent(start=2, first=3))
    assert tr.reference.isnan().all(-1).flatten().tolist() == [True, True, False, False, False]
    plain = invert(x_0, grid, gaussian(), "epsilon")
    other = compared(plain, lambda x, t, p: p + 1, 2)
    assert other.reference.isnan().all(-1).flatten().tolist() == [True, True] + 3 * [False]
    torch.testing.assert_close(other.reference[2:], plain.reference[2:] + 1)


def test_evaluations_by_hand():
    # states 0..10; three iterations at each of the ten
    assert evaluations_per_image(Extent(0, 1, 10, 3), 1.0, 1.0) == 11 + 30
    # guided: twice that, and the reference's own at states 1 to 10
    assert evaluations_per_image(Extent(0, 1, 10, 3), 2.0, 1.0) == 2 * 41 + 10
    # noised up to 4, wanted from 6: states 4 to 10, inverted 5 to 10
    assert evaluations_per_image(Extent(4, 6, 10, 1), 1.0, 1.0) == 7 + 6
    # nothing is inverted: states 2 to 4 are noised
    assert evaluations_per_image(Extent(5, 2, 4, 3), 1.0, 1.0) == 3


def test_the_relative_error_is_of_each_image():
    x, again = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 9.0], [1.0, 2.0]])
    assert reconstruction_error(x, again).tolist() == [1.0, 0.5]


def test_batch_of_two_is_two_batches_of_one():
    x_0, grid = torch.randn(2, 4).double(), SCHEDULE.grid(8)
    together = invert(x_0, grid, gaussian(), "epsilon").states
    apart = torch.cat(
        [invert(x_0[k : k + 1], grid, gaussian(), "epsilon").states for k in (0, 1)], 1
    )
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("kind", KINDS)
def test_start_adds_the_given_noise_then_inverts(kind):
    x_0, noise, grid = torch.randn(4, 3).double(), torch.randn(4, 3).double(), SCHEDULE.grid(10)
    grid = flow_grid(10) if kind == "flow_prediction" else grid
    tr = invert(x_0, grid, gaussian_of(kind), kind, noise=noise, extent=Extent(start=2))
    for i in (0, 1, 2):
        torch.testing.assert_close(tr.states[i], add_noise(x_0, noise, grid.levels[i]))
    for i in range(2, 10):
        up = step(tr.states[i], tr.reference[i], grid.levels[i], grid.levels[i + 1], kind)
        torch.testing.assert_close(tr.states[i + 1], up)
    plain = invert(x_0, grid, gaussian_of(kind), kind, noise=noise)
    torch.testing.assert_close(plain.states, invert(x_0, grid, gaussian_of(kind), kind).states)


def gaussian_of(kind):
    return flow_gaussian() if kind == "flow_prediction" else gaussian()


@pytest.mark.parametrize("start", [-1, 10])
def test_start_outside_the_grid_is_refused(start):
    x_0 = torch.randn(2, 3).double()
    with pytest.raises(ValueError, match="start"):
        invert(x_0, SCHEDULE.grid(10), gaussian(), "epsilon", noise=x_0, extent=Extent(start=start))
    with pytest.raises(ValueError, match="noise"):
        invert(x_0, SCHEDULE.grid(10), gaussian(), "epsilon", extent=Extent(start=1))


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

    lost = invert(smooth, grid, predict, "epsilon").states[-1].var()
    noise = torch.randn(4000, 1).double()
    mended = invert(smooth, grid, predict, "epsilon", noise=noise, extent=Extent(start=20))
    assert lost < 0.3 and abs(mended.states[-1].var() - 1) < 0.1


@pytest.mark.parametrize(("first", "last"), [(1, 10), (1, 7), (2, 2), (4, 9)])
@pytest.mark.parametrize("start", [0, 3, 5])
@pytest.mark.parametrize("iterations", [0, 2])
@pytest.mark.parametrize("guidance", [1, 2])
@pytest.mark.parametrize("stored", [1, 2])
def test_nothing_is_evaluated_in_vain(first, last, start, iterations, guidance, stored):
    """Calls are those that are counted; what is wanted is what a whole inversion has there."""
    x_0, noise, grid, calls = *torch.randn(2, 4, 3).double(), SCHEDULE.grid(10), []

    def predict(x, t, cost=guidance):
        calls.extend([int(t[0])] * cost)
        return gaussian()(x, t)

    reference = None if guidance == stored else (lambda x, t, _: predict(x, t, 1))

    def inverted(extent):
        path = invert(x_0, grid, predict, "epsilon", noise=noise, extent=extent)
        return compared(path, reference, extent.first) if reference else path

    extent = Extent(start, first, last, iterations)
    lean = inverted(extent)
    assert len(calls) == evaluations_per_image(extent, guidance, stored)
    assert max(calls) == int(grid.timesteps[last])
    whole, wanted = inverted(replace(extent, first=1, last=10)), slice(first, last + 1)
    assert torch.equal(lean.states, whole.states[: last + 1])
    assert torch.equal(lean.reference[wanted], whole.reference[wanted])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("iterations", [0, 2])
@pytest.mark.parametrize("start", [0, 3])
def test_states_are_made_again_to_the_bit(kind, iterations, start):
    """From float32 latents and predictions of a network in bfloat16, kept in bfloat16."""
    grid = flow_grid(10) if kind == "flow_prediction" else SCHEDULE.grid(10)
    x_0, noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(start))

    def predict(x, t):
        return (torch.tanh(1.7 * x) + t.reshape(-1, 1) / 1500).bfloat16().float()

    extent = Extent(start, iterations=iterations)
    path = invert(x_0, grid, predict, kind, noise=noise if start else None, extent=extent)
    assert len(path.moves) == 10
    assert iterations or path.moves.data_ptr() == path.reference.data_ptr()  # no copy
    tops = torch.tensor([10, 7, 4, start])  # those with most transitions first
    moves = [path.moves[i, : int((tops > i).sum())].bfloat16() for i in range(start, 10)]
    at, refined = torch.full((4,), start), iterations > 0
    again, before = follow(path.states[start], moves, at, grid, kind, refined=refined)
    assert torch.equal(again, path.states[tops, torch.arange(4)])
    assert torch.equal(before[:3], path.states[tops - 1, torch.arange(4)][:3])
    last, at = [path.moves[9, :1]], torch.tensor([9])
    again, _ = follow(path.states[9, :1], last, at, grid, kind, refined=refined)
    assert torch.equal(again[0], path.states[10, 0])
    # one from state 3 on, and one that takes the last transition alone
    x, at = torch.stack([path.states[3, 0], path.states[9, 1]]), torch.tensor([3, 9])
    moves = [torch.stack([path.moves[3, 0], path.moves[9, 1]]), *path.moves[4:, :1]]
    again, before = follow(x.requires_grad_(), moves, at, grid, kind, refined=refined)
    assert torch.equal(again, path.states[10, :2]) and not again.requires_grad
    assert torch.equal(before, path.states[9, :2])


def test_recovered_noise_is_the_noise_that_was_added():
    x_0, noise, grid = *torch.randn(2, 4, 3).double(), SCHEDULE.grid(10)
    tr = invert(x_0, grid, gaussian(), "epsilon", noise=noise, extent=Extent(start=4, last=4))
    torch.testing.assert_close(recovered_noise(tr), noise)
    assert len(tr.states) == 5
