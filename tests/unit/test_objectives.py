"""Objectives against numbers worked out by hand, and their symmetries."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from inversion_dpo.inversion import invert
from inversion_dpo.models.schedules import discrete_schedule
from inversion_dpo.objectives import (
    OBJECTIVES,
    TARGETS,
    as_pair_errors,
    dpo,
    implicit_accuracy,
    released_sign,
    sft,
    squared_error,
    target_prediction,
)
from inversion_dpo.types import PairErrors


def errors(w, l, w_ref, l_ref):
    return PairErrors(*(torch.tensor(v, dtype=torch.float64) for v in (w, l, w_ref, l_ref)))


def test_dpo_by_hand():
    # s_w = 0.10 - 0.12 = -0.02, s_l = 0.30 - 0.25 = +0.05; logit = -(100/2)(-0.07) = 3.5
    out = dpo(errors([0.10], [0.30], [0.12], [0.25]), beta=100.0)
    assert out.margin.item() == pytest.approx(3.5)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-3.5)))


def test_dpo_weight_scales_the_logit_by_hand():
    out = dpo(errors([0.10], [0.30], [0.12], [0.25]), 100.0, torch.tensor([0.2]))
    assert out.margin.item() == pytest.approx(0.7)


def test_released_sign_by_hand():
    out = released_sign(errors([0.10], [0.30], [0.12], [0.25]), beta=100.0)
    assert out.margin.item() == pytest.approx(-3.5)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(3.5)))


def test_sft_by_hand():
    out = sft(errors([0.10, 0.2], [0.30, 9.0], [0.12, 0.0], [0.25, 0.0]))
    assert out.loss.tolist() == pytest.approx([0.10, 0.2])


def test_squared_error_is_a_mean_over_elements():
    target = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert squared_error(target, torch.zeros(2, 2)).tolist() == [2.5, 0.0]


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if o.preference])
def test_loss_is_log_two_where_policy_is_reference(name):
    same = errors([0.3, 0.1], [0.2, 0.5], [0.3, 0.1], [0.2, 0.5])
    assert OBJECTIVES[name].loss(same, 2000.0, 1.0).loss.tolist() == [math.log(2)] * 2


def test_swapping_winner_and_loser_negates_the_margin():
    e = errors([0.10, 0.4], [0.30, 0.2], [0.12, 0.1], [0.25, 0.3])
    swapped = PairErrors(e.loser, e.winner, e.loser_ref, e.winner_ref)
    torch.testing.assert_close(dpo(e, 50.0).margin, -dpo(swapped, 50.0).margin)


def test_losses_are_per_pair_never_averaged_inside_the_sigmoid():
    both = dpo(errors([0.1, 0.5], [0.3, 0.2], [0.2, 0.2], [0.2, 0.2]), 50.0).loss
    first = dpo(errors([0.1], [0.3], [0.2], [0.2]), 50.0).loss
    second = dpo(errors([0.5], [0.2], [0.2], [0.2]), 50.0).loss
    torch.testing.assert_close(both, torch.cat([first, second]))
    averaged = dpo(errors([0.3], [0.25], [0.2], [0.2]), 50.0).loss
    assert abs(both.mean() - averaged) > 0.1


def test_accuracy_counts_ties_half():
    assert implicit_accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])).item() == pytest.approx(0.625)


def test_pair_errors_split_winners_first():
    e = as_pair_errors(torch.tensor([1.0, 2, 3, 4]), torch.tensor([5.0, 6, 7, 8]))
    assert e.winner.tolist() == [1, 2] and e.loser.tolist() == [3, 4]
    assert e.winner_ref.tolist() == [5, 6] and e.loser_ref.tolist() == [7, 8]
    with pytest.raises(ValueError, match="2P"):
        as_pair_errors(torch.zeros(3), torch.zeros(3))


# ---- the three targets on one trajectory, with a network in float64


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = torch.nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.float64) / 3)
        self.b = torch.nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64) / 3)

    def forward(self, x, t):
        return torch.tanh(x @ self.a + self.b) * (1 + t.double().reshape(-1, 1) / 1000)


def gradient(target, steps, beta=100.0):
    """Norm of the gradient at policy = reference, mean over all steps of the trajectory."""
    net = Net()
    schedule = discrete_schedule(DDIMScheduler(beta_schedule="scaled_linear"))
    x_0 = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).double()
    grid = schedule.grid(steps)
    tr = invert(x_0, grid, lambda x, t: net(x, t).detach(), "epsilon")
    total = 0.0
    for i in range(1, steps + 1):
        states = (x_0, tr.states[i - 1], tr.states[i])
        index = torch.full((8,), i)
        star = target_prediction(target, index, states, tr.reference[i], grid.levels, "epsilon")
        policy = net(tr.states[i], grid.timesteps[i].expand(8))
        mse = [(star - p).square().mean(1) for p in (policy, tr.reference[i])]
        out = dpo(as_pair_errors(*mse), beta)
        torch.testing.assert_close(out.loss, torch.full((4,), math.log(2)).double())
        total = total + out.loss.mean() / steps
    total.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()


def test_gradient_at_the_reference():
    assert gradient("reference", 20) == 0.0
    assert gradient("x0", 20) > 1e-3
    assert gradient("transition", 20) > 1e-3


def test_transition_gradient_falls_like_one_over_n():
    norms = [gradient("transition", n) for n in (20, 40, 80, 160)]
    ratios = [a / b for a, b in zip(norms, norms[1:], strict=False)]
    assert all(1.7 < r < 2.3 for r in ratios), norms


def test_x0_gradient_does_not_shrink_with_n():
    assert gradient("x0", 160) > 0.5 * gradient("x0", 20)


def test_unknown_target_names_the_choices():
    x, levels = torch.zeros(1, 1), discrete_schedule(DDIMScheduler()).levels
    with pytest.raises(ValueError, match=", ".join(TARGETS)):
        target_prediction("noise", torch.ones(1).long(), (x, x, x), x, levels, "epsilon")
