"""Objectives against numbers worked out by hand, and their symmetries."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from diffusers import DDIMScheduler

from inversion_dpo.maths.beta import adapted_beta, gap_weighted
from inversion_dpo.maths.inversion import invert
from inversion_dpo.maths.losses import (
    LOSSES,
    as_pair_errors,
    balance,
    dpo,
    dpo_bounded,
    dspo,
    kto,
    link_loss,
    mapo,
    released_sign,
    residual_overlap,
    safeguarded,
    sft,
    smpo,
    squared_error,
    with_terms,
)
from inversion_dpo.maths.methods import METHODS
from inversion_dpo.maths.records import Levels, LossOutput, LossSettings
from inversion_dpo.maths.targets import TARGETS, step_weights, target_prediction
from inversion_dpo.models.schedules import discrete_schedule
from tests.sessions import loss_of


def errors(w, l, w_ref, l_ref, **more):
    """Errors [P] by hand; ``more`` are the other fields of PairErrors."""
    both = [torch.tensor([*a, *b], dtype=torch.float64) for a, b in ((w, l), (w_ref, l_ref))]
    fields = {k: torch.tensor(v, dtype=torch.float64) for k, v in more.items()}
    return replace(as_pair_errors(*both), **fields)


def beta(value, **more):
    return LossSettings(value, **more)


# s_w = 0.10 - 0.12 = -0.02, s_l = 0.30 - 0.25 = +0.05; logit = -(100/2)(-0.07) = 3.5
BY_HAND = ([0.10], [0.30], [0.12], [0.25])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_dpo_by_hand():
    out = dpo(errors(*BY_HAND), beta(100.0))
    assert out.margin.item() == pytest.approx(3.5)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-3.5)))


def test_dpo_weight_scales_the_logit_by_hand():
    out = dpo(errors(*BY_HAND, weight=[0.2]), beta(100.0))
    assert out.margin.item() == pytest.approx(0.7)


def test_dpo_bounded_by_hand():
    # r_w = 50 * 0.02 = 1, r_l = -50 * 0.05 = -2.5; tanh 1 + tanh 2.5 = 0.761594 + 0.986614
    out = dpo_bounded(errors(*BY_HAND), beta(100.0))
    assert out.margin.item() == pytest.approx(1.748208, abs=1e-6)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-1.748208)), abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "dpo_bounded", "smpo", "dmpo", "kto"])
def test_a_weight_multiplies_beta(name):
    more, loss = {"baseline": [0.01], "preference": [0.8]}, LOSSES[name].function
    given, plain = errors(*BY_HAND, weight=[0.2], **more), errors(*BY_HAND, **more)
    assert loss(given, beta(100.0)).loss.item() == pytest.approx(
        loss(plain, beta(20.0)).loss.item()
    )
    assert loss(given, beta(100.0)).margin.item() == loss(plain, beta(20.0)).margin.item()


@pytest.mark.parametrize("name", ["nft", "sft", "denoising"])
def test_a_weight_multiplies_the_loss(name):
    loss = LOSSES[name].function
    given, plain = errors(*BY_HAND, weight=[0.2]), errors(*BY_HAND)
    found = loss(given, beta(0.5)).loss.item()
    assert found == pytest.approx(0.2 * loss(plain, beta(0.5)).loss.item())


@pytest.mark.parametrize("name", ["nft", "kto", "denoising", "terms"])
def test_each_image_counts_by_its_share(name):
    def loss(loser, *shares):
        more = {"winner_share": [shares[0]], "loser_share": [shares[1]], "winner_moved": [0.04]}
        e = errors([0.10], [loser], [0.12], [0.25], loser_moved=[loser / 5], **more)
        if name == "terms":
            plain = LossOutput(torch.zeros(1), torch.zeros(1))
            return with_terms(plain, e, beta(1.0, anchor=3.0, sft_weight=7.0)).loss.item()
        return LOSSES[name].function(e, beta(0.5)).loss.item()

    assert loss(0.3, 1.0, 0.0) == loss(0.9, 1.0, 0.0) > 0  # the loser has no share
    mixed = 0.25 * loss(0.3, 1.0, 0.0) + 0.75 * loss(0.3, 0.0, 1.0)
    assert loss(0.3, 0.25, 0.75) == pytest.approx(mixed)


def test_dpo_bounded_holds_a_lost_loser_and_is_ktos_logit():
    w, l = torch.tensor([0.10], requires_grad=True), torch.tensor([0.90], requires_grad=True)
    e = replace(errors(*BY_HAND), winner=w, loser=l)
    dpo_bounded(e, beta(100.0)).loss.backward()
    assert w.grad.item() > 1 and abs(l.grad.item()) < 1e-8  # r_l = -32.5: tanh is flat
    margin = dpo_bounded(errors(*BY_HAND), beta(100.0)).margin
    torch.testing.assert_close(margin, 2 - 4 * kto(errors(*BY_HAND), beta(100.0)).loss)


def test_terms_by_hand():
    e = errors(*BY_HAND, winner_moved=[0.04], loser_moved=[0.02], weight=[0.5])
    out = dpo(e, beta(100.0))
    found = with_terms(out, e, beta(100.0, anchor=3.0, sft_weight=7.0))
    # 0.5 (3 (0.04 + 0.02) / 2 + 7 * 0.10) = 0.5 (0.09 + 0.7)
    assert (found.loss - out.loss).item() == pytest.approx(0.395)
    assert torch.equal(found.margin, out.margin)
    assert torch.equal(with_terms(out, e, beta(100.0)).loss, out.loss)


@pytest.mark.parametrize(
    ("logit", "wanted"),
    [
        (0.0, 200.0),  # at the reference
        (-3.0, 200.0),  # pairs are ranked wrongly
        (math.log(4), 200.0),
        (2 * math.log(4), 100.0),
        (99.0, 20.0),  # a tenth of the first at least
    ],
)
def test_adapted_beta_by_hand(logit, wanted):
    found = adapted_beta(logit, 0.2, 200.0)
    assert found == pytest.approx(wanted)
    if wanted == 100.0:  # a fifth of the gradient is left
        assert sigmoid(-logit * found / 200.0) == pytest.approx(0.2)


@pytest.mark.parametrize("b", [1.0, 10.0, 100.0])
def test_at_its_optimum_the_mean_gradient_factor_is_the_same_under_every_beta(b):
    """2p (1 - p), so that no gradient factor tells which beta is right; p = sigmoid(1.5)."""
    p, gap = sigmoid(1.5), torch.tensor([2 * 1.5 / b], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1).double()
    right = dpo(replace(errors(*BY_HAND), winner=-gap, winner_ref=zero, loser=zero, loser_ref=zero),
                beta(b))  # fmt: skip
    wrong = dpo(replace(errors(*BY_HAND), winner=zero, winner_ref=zero, loser=-gap, loser_ref=zero),
                beta(b))  # fmt: skip
    (p * right.loss + (1 - p) * wrong.loss).sum().backward()
    assert gap.grad.item() == pytest.approx(0)
    factor = p * torch.sigmoid(-right.margin) + (1 - p) * torch.sigmoid(-wrong.margin)
    assert factor.item() == pytest.approx(2 * p * (1 - p))


def test_gap_weighted_beta_by_hand():
    """Gaps .8 and -.5 of a mean of .4: twice the logit of 3.5, and -1.25 times."""
    e = errors(*(2 * side for side in BY_HAND), preference=[0.9, 0.25])
    weighed = gap_weighted(e, 0.4)
    out = dpo(weighed, beta(100.0))
    assert out.margin.tolist() == pytest.approx([7.0, -4.375])
    wanted = [math.log(1 + math.exp(-7.0)), math.log(1 + math.exp(4.375))]
    assert out.loss.tolist() == pytest.approx(wanted)
    as_smpo = dpo(gap_weighted(e, 0.1), beta(100.0)).loss  # SmPO has 10 for 1 / mean
    torch.testing.assert_close(as_smpo, smpo(e, beta(100.0)).loss)
    # turned round: the loss of the pair whose winner and loser have changed places
    w, l, w_ref, l_ref = BY_HAND
    other = errors(l, w, l_ref, w_ref, preference=[0.75])
    for loss in (dpo, dpo_bounded, kto):
        both = loss(weighed, beta(100.0)).loss[1:], loss(gap_weighted(other, 0.4), beta(100.0)).loss
        torch.testing.assert_close(*both)


def test_any_two_images_of_a_plackett_luce_list_follow_bradley_terry():
    """So pairs of a list estimate the same rewards; here of three images, over all six orders."""
    r = [0.3, -1.1, 0.8]

    def chance(order):
        return math.prod(
            math.exp(r[i]) / sum(math.exp(r[j]) for j in order[k:]) for k, i in enumerate(order)
        )

    found = sum(chance(o) for o in permutations(range(3)) if o.index(0) < o.index(1))
    assert found == pytest.approx(sigmoid(r[0] - r[1]))


def test_released_sign_by_hand():
    out = released_sign(errors(*BY_HAND), beta(100.0))
    assert out.margin.item() == pytest.approx(-3.5)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(3.5)))


def test_sft_by_hand():
    out = sft(errors([0.10, 0.2], [0.30, 9.0], [0.12, 0.0], [0.25, 0.0]), beta(1.0))
    assert out.loss.tolist() == pytest.approx([0.10, 0.2])


def test_links_by_hand():
    # hinge: max(0, 1 - 3.5) = 0, and 4.5 for the other sign; ipo: (3.5 - 0.5)^2 = 9, (4)^2 = 16
    for link, right, wrong in (("hinge", 0.0, 4.5), ("ipo", 9.0, 16.0)):
        assert dpo(errors(*BY_HAND), beta(100.0, link=link)).loss.item() == pytest.approx(right)
        smooth = dpo(errors(*BY_HAND), beta(100.0, link=link, label_smoothing=0.1))
        assert smooth.loss.item() == pytest.approx(0.9 * right + 0.1 * wrong)
    with pytest.raises(ValueError, match="sigmoid, hinge, ipo"):
        link_loss(torch.zeros(1), torch.ones(1), "tanh")


def test_ipo_is_beta_squared_times_the_published_loss():
    # Azar et al.: (h - 1/(2 beta))^2 with h = -(s_w - s_l)/2 = 0.035
    published = (0.035 - 1 / 200) ** 2
    ours = dpo(errors(*BY_HAND), beta(100.0, link="ipo")).loss.item()
    assert ours == pytest.approx(100.0**2 * published)


def test_label_smoothing_and_soft_labels_by_hand():
    # p = 0.1 + 0.8 * 0.75 = 0.7
    out = dpo(errors(*BY_HAND, preference=[0.75]), beta(100.0, label_smoothing=0.1))
    wanted = -0.7 * math.log(sigmoid(3.5)) - 0.3 * math.log(sigmoid(-3.5))
    assert out.loss.item() == pytest.approx(wanted)


def test_a_soft_label_has_its_minimum_at_its_own_logit():
    # of -p log s(z) - (1-p) log s(-z): z = log(p / (1-p))
    z = torch.tensor([math.log(0.7 / 0.3)], dtype=torch.float64, requires_grad=True)
    link_loss(z, torch.tensor([0.7], dtype=torch.float64), "sigmoid").sum().backward()
    assert abs(z.grad.item()) < 1e-12


def test_smpo_by_hand():
    # 10 (2 * 0.6 - 1) = 2 times the logit of 3.5
    out = smpo(errors(*BY_HAND, preference=[0.6]), beta(100.0))
    assert out.margin.item() == pytest.approx(7.0)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-7.0)))


def test_kto_by_hand():
    # g_w = 0.12 - 0.10 = 0.02, g_l = 0.25 - 0.30 = -0.05; baseline 0.01: 0.01 and -0.06; beta 100
    out = kto(errors(*BY_HAND, baseline=[0.01]), beta(100.0))
    assert out.loss.item() == pytest.approx(((1 - sigmoid(1.0)) + (1 - sigmoid(6.0))) / 2)
    below = kto(errors(*BY_HAND, baseline=[-0.3]), beta(100.0))  # clamped to 0
    assert below.loss.item() == pytest.approx(((1 - sigmoid(2.0)) + (1 - sigmoid(5.0))) / 2)
    same = kto(errors([0.1], [0.2], [0.1], [0.2]), beta(100.0))
    assert same.loss.item() == pytest.approx(0.5)
    weighed = kto(errors(*BY_HAND, baseline=[0.01]), LossSettings(100.0, liked=2.0, disliked=0.5))
    assert weighed.loss.item() == pytest.approx((1 - sigmoid(1.0)) + (1 - sigmoid(6.0)) / 4)


def test_unequal_thumbs_are_balanced_by_hand():
    """Of 2 liked and 6 others: half of the mean over 8 is 2 a liked image and 2/3 another."""
    assert balance(0.5, 2, 6) == (2.0, pytest.approx(2 / 3))
    assert balance(0.5, 9, 9) == (1.0, 1.0)  # as in pairs: nothing changes
    w, l = balance(0.8, 5, 15)  # Diffusion-KTO's positive_ratio
    assert 5 * w / 20 == pytest.approx(0.8) and 15 * l / 20 == pytest.approx(0.2)


def test_mapo_by_hand():
    def phi(u):
        return u / (math.exp(u) - 1)

    logit = 1000 * (phi(0.5 * 0.10) - phi(0.5 * 0.30))  # about 50: winners fit better
    out = mapo(errors([0.10], [0.30], [0.0], [0.0]), beta(0.1))
    assert out.margin.item() == pytest.approx(logit)
    assert out.loss.item() == pytest.approx(0.10 + 0.1 * math.log(1 + math.exp(-logit)))
    assert torch.isfinite(mapo(errors([0.0], [0.0], [0.0], [0.0]), beta(0.1)).loss).all()


def test_dspo_equals_the_formula_on_vectors():
    # ||(e_theta - e*) - beta (1 - s(logit)) (e_theta - e_ref)||^2 on winners, mean over elements
    torch.manual_seed(0)
    star, theta, ref = torch.randn(3, 6, 5, dtype=torch.float64)  # three winners, three losers
    policy, reference = (star - theta).square().mean(1), (star - ref).square().mean(1)
    moved = (theta - ref).square().mean(1)
    logit = -(2.0 / 2) * ((policy - reference)[:3] - (policy - reference)[3:])
    c = 2.0 * (1 - torch.sigmoid(logit))[:, None]
    wanted = ((theta - star)[:3] - c * (theta - ref)[:3]).square().mean(1)
    out = dspo(as_pair_errors(policy, reference, moved=moved), beta(2.0))
    torch.testing.assert_close(out.loss, wanted)


def test_dspo_gradient_equals_the_formula_on_vectors():
    torch.manual_seed(1)
    star, ref = torch.randn(2, 6, 5, dtype=torch.float64)
    start = torch.randn(6, 5, dtype=torch.float64)

    def expanded(theta):
        errors_of = [(star - x).square().mean(1) for x in (theta, ref)]
        return dspo(
            as_pair_errors(*errors_of, moved=(theta - ref).square().mean(1)), beta(2.0)
        ).loss

    def direct(theta):
        s = (star - theta).square().mean(1) - (star - ref).square().mean(1)
        c = 2.0 * (1 - torch.sigmoid(-(s[:3] - s[3:])))[:, None]
        return ((theta - star)[:3] - c * (theta - ref)[:3]).square().mean(1)

    found = []
    for loss in (expanded, direct):
        theta = start.clone().requires_grad_(True)
        loss(theta).sum().backward()
        found.append(theta.grad)
    torch.testing.assert_close(*found)


def test_safeguard_by_hand():
    # winner's residual (1, 0), loser's (3, 4): |r_w|^2 = 1, <r_w, r_l> = 3, so lambda = 1/3
    target, prediction = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.zeros(2, 2)
    overlap = residual_overlap(target, prediction)
    assert overlap.tolist() == [1.5]  # a mean over two elements
    loser = torch.tensor([12.5], requires_grad=True)
    e = replace(as_pair_errors(torch.tensor([0.5, 12.5]), torch.zeros(2)), overlap=overlap)
    held = safeguarded(replace(e, loser=loser))
    assert held.loser.item() == 12.5
    held.loser.sum().backward()
    assert loser.grad.item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("overlap", [-1.0, 0.0, 0.1])
def test_safeguard_leaves_other_losers_alone(overlap):
    loser = torch.tensor([2.0], requires_grad=True)
    e = as_pair_errors(torch.tensor([0.5, 2.0]), torch.zeros(2), overlap=torch.tensor([overlap]))
    safeguarded(replace(e, loser=loser)).loser.sum().backward()
    assert loser.grad.item() == 1.0


def test_safeguarded_step_does_not_raise_the_winners_error():
    """With one Jacobian for both, moving both predictions along the scaled gradients."""
    torch.manual_seed(0)
    r_w, r_l = torch.randn(2, 8, 16, dtype=torch.float64)
    r_l = r_l + 3 * r_w  # many overlap
    target = torch.cat([r_w, r_l])
    shift = torch.zeros(8, 16, dtype=torch.float64, requires_grad=True)  # of both predictions
    moved = (target - torch.cat([shift, shift])).square().mean(1)
    overlap = residual_overlap(target, torch.zeros_like(target)).double()
    e = as_pair_errors(moved, torch.zeros(16).double(), overlap=overlap)

    def rise(e):  # first-order change of |r_w - shift|^2 after a step against the gradient
        (grad,) = torch.autograd.grad((e.winner - e.loser).sum(), shift, retain_graph=True)
        return (2 * r_w * grad).sum(1)

    assert (rise(e) > 1).all()
    assert (rise(safeguarded(e)) < 1e-6).all()  # overlaps are float32


def test_squared_error_is_a_mean_over_elements():
    target = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert squared_error(target, torch.zeros(2, 2)).tolist() == [2.5, 0.0]


@pytest.mark.parametrize(
    "name", [n for n, m in METHODS.items() if m.loss.startswith(("dpo", "smpo"))]
)
def test_loss_is_log_two_where_policy_is_reference(name):
    same = errors([0.3, 0.1], [0.2, 0.5], [0.3, 0.1], [0.2, 0.5])
    assert loss_of(name)(same, beta(2000.0)).loss.tolist() == [math.log(2)] * 2


def test_swapping_winner_and_loser_negates_the_margin():
    e = errors([0.10, 0.4], [0.30, 0.2], [0.12, 0.1], [0.25, 0.3])
    swapped = errors([0.30, 0.2], [0.10, 0.4], [0.25, 0.3], [0.12, 0.1])
    for name in ("inversion_dpo", "smpo", "kto", "dspo", "mapo"):
        loss = loss_of(name)
        torch.testing.assert_close(loss(e, beta(50.0)).margin, -loss(swapped, beta(50.0)).margin)


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_per_pair_never_averaged_inside(name):
    loss = loss_of(name)
    both = loss(errors([0.1, 0.5], [0.3, 0.2], [0.2, 0.2], [0.2, 0.2]), beta(0.7)).loss
    first = loss(errors([0.1], [0.3], [0.2], [0.2]), beta(0.7)).loss
    second = loss(errors([0.5], [0.2], [0.2], [0.2]), beta(0.7)).loss
    torch.testing.assert_close(both, torch.cat([first, second]))


def test_pair_errors_split_winners_first():
    e = as_pair_errors(
        torch.tensor([1.0, 2, 3, 4]),
        torch.tensor([5.0, 6, 7, 8]),
        moved=torch.tensor([9.0, 10, 11, 12]),
    )
    assert e.winner.tolist() == [1, 2] and e.loser.tolist() == [3, 4]
    assert e.winner_ref.tolist() == [5, 6] and e.loser_ref.tolist() == [7, 8]
    assert e.winner_moved.tolist() == [9, 10] and e.loser_moved.tolist() == [11, 12]
    with pytest.raises(ValueError, match="2P"):
        as_pair_errors(torch.zeros(3), torch.zeros(3))


# ---- weights of noise levels


def test_weights_by_hand():
    # alpha^2 = 1, .9, .5 -> SNR = inf, 9, 1; min_snr on errors of eps: 5/9 and 1
    alpha = torch.tensor([1.0, 0.9, 0.5], dtype=torch.float64).sqrt()
    levels = Levels(alpha, (1 - alpha**2).sqrt())
    assert step_weights(levels, "epsilon", "uniform").tolist() == [1, 1]
    assert step_weights(levels, "v_prediction", "min_snr").tolist() == pytest.approx([5 / 9, 1])
    # a transition moves by c_p = s_low - (a_low / a_high) s_high per unit of eps
    first = 0.0 - (1 / math.sqrt(0.9)) * math.sqrt(0.1)
    second = math.sqrt(0.1) - math.sqrt(0.9 / 0.5) * math.sqrt(0.5)
    wanted = [first**2, second**2]
    assert step_weights(levels, "epsilon", "transition").tolist() == pytest.approx(wanted)
    flow = Levels(torch.tensor([1.0, 0.75, 0.5]), torch.tensor([0.0, 0.25, 0.5]))
    assert step_weights(flow, "flow_prediction", "transition").tolist() == [0.0625, 0.0625]
    # SNR 9 and 1; errors of x_0 are s^2 times those of the velocity
    wanted = [5 * 0.0625, 1 * 0.25]
    assert step_weights(flow, "flow_prediction", "min_snr").tolist() == pytest.approx(wanted)
    ended = Levels(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 0.75**0.5, 1.0]))  # no signal
    assert step_weights(ended, "v_prediction", "min_snr")[1] == 1
    assert step_weights(ended, "v_prediction", "transition").isfinite().all()
    with pytest.raises(ValueError, match="uniform, min_snr, transition"):
        step_weights(levels, "epsilon", "none")


# ---- the three targets on one trajectory, with a network in float64


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = torch.nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.float64) / 3)
        self.b = torch.nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64) / 3)

    def forward(self, x, t):
        return torch.tanh(x @ self.a + self.b) * (1 + t.double().reshape(-1, 1) / 1000)


def gradient(target, steps):
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
        out = dpo(as_pair_errors(*mse), LossSettings(100.0))
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
