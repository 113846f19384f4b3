"""Targets and weights of noise levels, with numbers worked out by hand."""

import pytest
import torch

from inversion_dpo.maths.records import Levels
from inversion_dpo.maths.targets import TARGETS, level_weights, step_weights, target_prediction


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


# alpha^2 = 1, 0.64, 0.36: velocity weighs 1 / 0.64 and 1 / 0.36
DIFFUSION = Levels(numbers(1.0, 0.8, 0.6), numbers(0.0, 0.6, 0.8))
FLOW = Levels(numbers(1.0, 0.75, 0.5), numbers(0.0, 0.25, 0.5))


def test_velocity_weighs_by_one_over_alpha_squared():
    weights = step_weights(DIFFUSION, "epsilon", "velocity")
    assert weights.tolist() == pytest.approx([1.5625, 1 / 0.36])
    assert torch.equal(step_weights(DIFFUSION, "v_prediction", "velocity"), weights)
    assert step_weights(FLOW, "flow_prediction", "velocity").tolist() == [1, 1]


def test_velocity_gives_errors_of_eps_the_size_of_errors_of_v():
    """At one x_t, two guesses of eps and the guesses of v that they amount to."""
    torch.manual_seed(0)
    x_t, eps, other = torch.randn(3, 5, dtype=torch.float64)
    a, s = DIFFUSION.alpha[2], DIFFUSION.sigma[2]
    v, other_v = (a * e - s * (x_t - s * e) / a for e in (eps, other))
    weight = step_weights(DIFFUSION, "epsilon", "velocity")[1]
    torch.testing.assert_close(weight * (eps - other).square(), (v - other_v).square())


@pytest.mark.parametrize("name", ["velocity", "transition"])
def test_a_level_without_signal_counts_nothing_where_errors_of_eps_would_be_infinite(name):
    ended = Levels(numbers(1.0, 0.6, 0.0), numbers(0.0, 0.8, 1.0))
    assert step_weights(ended, "v_prediction", name)[1] == 0
    assert step_weights(ended, "v_prediction", name)[0] > 0.1


def test_transition_of_a_v_network_is_that_of_its_errors_of_eps():
    # c_p = s_low - a_low / a_high s_high: from the first level 0 - 0.6 / 0.8, from the second
    # 0.6 - 0.8 * 0.8 / 0.6
    wanted = [0.5625, (0.6 - 0.64 / 0.6) ** 2]
    for kind in ("epsilon", "v_prediction"):
        assert step_weights(DIFFUSION, kind, "transition").tolist() == pytest.approx(wanted)


def test_min_snr_caps_at_five():
    # flow: SNR 9 -> 5 and 1; on errors of the velocity times sigma^2 = 0.0625 and 0.25
    weights = step_weights(FLOW, "flow_prediction", "min_snr")
    assert weights.tolist() == pytest.approx([0.3125, 0.25])
    # diffusion: 5 / SNR = 5 * 0.36 / 0.64, more than 1, and so is the second
    assert step_weights(DIFFUSION, "epsilon", "min_snr").tolist() == [1, 1]
    quiet = Levels(numbers(1.0, 0.96), numbers(0.0, 0.28))
    wanted = [5 * 0.0784 / 0.9216]
    assert step_weights(quiet, "epsilon", "min_snr").tolist() == pytest.approx(wanted)


def test_weights_have_mean_one_over_the_levels_that_are_trained_on():
    levels = Levels(numbers(1.0, 0.5, 0.25, 0.2), numbers(0.0, 0.8, 0.9, 0.95))
    # 1 / alpha^2 = 4, 16, 25; the clean end counts as its neighbour
    whole = level_weights(levels, "epsilon", "velocity", 1, 3)
    assert whole.tolist() == pytest.approx([4 / 15, 4 / 15, 16 / 15, 25 / 15])
    upper = level_weights(levels, "epsilon", "velocity", 2, 3)
    assert upper.tolist() == pytest.approx([8 / 41, 8 / 41, 32 / 41, 50 / 41])
    one = level_weights(levels, "epsilon", "velocity", 2, 2)
    assert one.tolist() == pytest.approx([0.25, 0.25, 1.0, 25 / 16])
    assert whole.dtype == torch.float32
    assert level_weights(levels, "epsilon", "uniform", 1, 3).tolist() == [1] * 4


def test_targets_by_hand():
    # flow: one step of velocity p from x_t lands on x_t + (s_to - s) p
    x_0, before, x_t = (numbers(v).reshape(1, 1) for v in (1.0, 3.0, 7.0))
    index, reference, states = torch.tensor([2]), numbers(42.0).reshape(1, 1), (x_0, before, x_t)
    found = {
        t: target_prediction(t, index, states, reference, FLOW, "flow_prediction").item()
        for t in TARGETS
    }
    assert found == {"x0": (7 - 1) / 0.5, "transition": (7 - 3) / 0.25, "reference": 42.0}


def test_each_image_has_its_own_level():
    x_0, x_t = numbers(1.0, 1.0).reshape(2, 1), numbers(2.0, 2.0).reshape(2, 1)
    states = (x_0, x_0, x_t)
    found = target_prediction("x0", torch.tensor([1, 2]), states, x_t, FLOW, "flow_prediction")
    assert found.flatten().tolist() == [4.0, 2.0]
