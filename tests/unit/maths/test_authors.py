"""Every objective against its authors' code, whose formula is put down anew in float64 numpy.

Repository, commit and file stand in each test; docs/explanation/objectives.md lists where this
project departs. Theirs are means over a batch. Slopes are compared as well: they would show a
stray detach().
"""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from inversion_dpo.maths.losses import (
    LOSSES,
    as_pair_errors,
    residual_overlap,
    safeguarded,
    with_terms,
)
from inversion_dpo.maths.methods import METHODS
from inversion_dpo.maths.records import Grid, Levels, LossSettings, NoisyStates
from inversion_dpo.maths.schedule import posterior_std
from inversion_dpo.maths.targets import target_prediction
from inversion_dpo.models.schedules import discrete_schedule
from inversion_dpo.training import states as points
from inversion_dpo.training.step import pair_errors
from tests.sessions import loss_of

PAIRS, SHAPE = 3, (4, 2, 2)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALPHA_BAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def cases(*betas):
    """Three seeds at every beta."""
    return pytest.mark.parametrize(("seed", "beta"), [(s, b) for s in range(3) for b in betas])


# ---- what the formulas share


def drawn(seed, drift=0.0):
    """Predictions of policy and reference, and the noise, which winner and loser share; (2P, *).

    drift: how much of the reference's error the policy is rid of.
    """
    normal = np.random.default_rng(seed).normal
    star = np.concatenate([normal(size=(PAIRS, *SHAPE))] * 2)
    ref = star + 0.3 * normal(size=star.shape)
    return ref + drift * (star - ref) + 0.02 * normal(size=star.shape), ref, star


def mse(a, b):
    """Means over an image's elements."""
    return ((a - b) ** 2).mean(axis=(1, 2, 3))


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def inside(theta, ref, star, beta):
    """-beta / 2 ((m_w - m_l) - (r_w - r_l)), m and r the errors of policy and reference; [P]."""
    (m_w, m_l), (r_w, r_l) = (np.split(mse(x, star), 2) for x in (theta, ref))
    return -beta / 2 * ((m_w - m_l) - (r_w - r_l))


def minus_log_sigmoid(x):
    return np.logaddexp(0, -x)


def check(name, authors, theta, ref, star, beta, p=None):
    """Loss and slope in float64; the loss once more by way of a training step, in float32.

    authors: the loss of a batch, of the policy's predictions. p: soft labels.
    """
    objective, settings = loss_of(name), LossSettings(beta)
    policy, reference, target = (
        torch.tensor(theta, requires_grad=True),
        *map(torch.tensor, (ref, star)),
    )
    of_policy, of_reference, moved = (
        (a - b).square().mean((1, 2, 3))
        for a, b in ((target, policy), (target, reference), (reference, policy))
    )
    more = {} if p is None else {"preference": torch.tensor(p)}
    baseline = (of_reference - of_policy).mean().detach()
    errors = as_pair_errors(of_policy, of_reference, moved=moved, baseline=baseline, **more)
    loss = objective(errors, settings).loss.mean()
    assert loss.item() == pytest.approx(authors(theta), rel=1e-10)

    loss.backward()
    way, h = np.random.default_rng(99).normal(size=theta.shape), 1e-6
    slope = (authors(theta + h * way) - authors(theta - h * way)) / (2 * h)
    assert (policy.grad.numpy() * way).sum() == pytest.approx(slope, rel=1e-5)

    session = SimpleNamespace(
        plan=SimpleNamespace(
            weights=lambda size: torch.ones(1),
            soft_labels=p is not None,
            safeguard=False,
            loss=LOSSES[METHODS[name].loss],
        ),
        accelerator=SimpleNamespace(num_processes=1),
        cache=SimpleNamespace(
            preference=lambda pairs: torch.tensor(p),
            region=lambda pairs: None,
            single=False,
            size=lambda pair: (8, 8),
        ),
    )
    i = torch.zeros(len(theta), dtype=torch.int64)
    at = NoisyStates(i, target, i, torch.ones(len(theta)), target, reference)
    errors = pair_errors(session, at, policy.detach(), list(range(PAIRS)))
    assert objective(errors, settings).loss.mean().item() == pytest.approx(loss.item(), rel=1e-3)


# ---- objectives


@cases(500.0, 5000.0)
def test_diffusion_dpo(seed, beta):
    """SalesforceAIResearch/DiffusionDPO@8d3ee5c, train.py.

    Both take means over elements, so that beta is the same number (theirs: 5000).
    """
    theta, ref, star = drawn(seed)

    def authors(theta):
        return minus_log_sigmoid(inside(theta, ref, star, beta)).mean()

    check("diffusion_dpo", authors, theta, ref, star, beta)


@cases(2000.0, 6000.0)
def test_flow_dpo_with_its_terms(seed, beta):
    """bghira/SimpleTuner@bc8e6ab, helpers/distillation/flow_dpo/distiller.py, norm_type mean."""
    theta, ref, star = drawn(seed)
    (win, lose), (ref_win, ref_lose) = np.split(theta, 2), np.split(ref, 2)
    apart = ((win - ref_win) ** 2).mean() + ((lose - ref_lose) ** 2).mean()
    preference = minus_log_sigmoid(inside(theta, ref, star, beta)).mean()
    authors = preference + 0.5 * apart * 3.0 + 0.25 * ((win - star[:PAIRS]) ** 2).mean()
    policy, reference = torch.tensor(mse(theta, star)), torch.tensor(mse(ref, star))
    errors = as_pair_errors(policy, reference, moved=torch.tensor(mse(theta, ref)))
    s = LossSettings(beta, anchor=3.0, sft_weight=0.25)
    found = with_terms(LOSSES["dpo"].function(errors, s), errors, s)
    assert found.loss.mean().item() == pytest.approx(authors, rel=1e-10)


@cases(1.0, 100.0)
def test_dmpo(seed, beta):
    """AIDC-AI/Diffusion-SDPO@1c83c65, train.py, dmpo_alpha 0.01."""
    theta, ref, star = drawn(seed)

    def authors(theta):
        u, q = inside(theta, ref, star, beta), 1 - 0.01
        p = sigmoid(u)
        log_p, log_not = -minus_log_sigmoid(u), -minus_log_sigmoid(-u)
        return (p * (log_p - np.log(q)) + (1 - p) * (log_not - np.log(1 - q))).mean()

    check("dmpo", authors, theta, ref, star, beta)


@cases(0.001, 5.0, 5000.0)
def test_dspo(seed, beta):
    """huaishengzhu/DSPO@20867cf, train.py, of SD 1.5 (its script: beta 0.001)."""
    theta, ref, star = drawn(seed)

    def authors(theta):
        factor = beta * sigmoid(-inside(theta, ref, star, beta)).reshape(-1, 1, 1, 1)
        residual = (theta - star)[:PAIRS] - factor * (theta - ref)[:PAIRS]
        return (residual**2).mean()

    check("dspo", authors, theta, ref, star, beta)


@cases(0.1, 10.0)
def test_mapo(seed, beta):
    """mapo-t2i/mapo@b1c1088, train.py and args.py: c = 0.5, beta 0.1; T that of the schedule."""
    theta, ref, star = drawn(seed)

    def authors(theta):
        m_w, m_l = np.split(mse(theta, star), 2)
        phi_w, phi_l = (m / 2 / (np.exp(m / 2) - 1) for m in (m_w, m_l))
        return m_w.mean() + beta * minus_log_sigmoid(1000 * (phi_w - phi_l)).mean()

    check("mapo", authors, theta, ref, star, beta)


@pytest.mark.parametrize("drift", [-0.1, 0.1])
@cases(1000.0, 5000.0)
def test_kto(seed, beta, drift):
    """jacklishufan/diffusion-kto@01c2fc3, train_kto_sd_v1.5.py, --halo sigmoid, both lambdas 1.

    The baseline is without gradient; the drifts are one that is clamped and one that is not.
    """
    theta, ref, star = drawn(seed, drift)
    sign = np.repeat([1, -1], PAIRS)  # of an image's label
    baseline = max(0.0, (mse(ref, star) - mse(theta, star)).mean())
    assert (baseline > 0) == (drift > 0)

    def authors(theta):
        gain = mse(ref, star) - mse(theta, star)
        return (1 - sigmoid(sign * beta * (gain - baseline))).mean()

    check("kto", authors, theta, ref, star, beta)


def inverted(seed):
    """Predictions as of :func:`drawn`, the authors' targets, and ours; each pair at its own level.

    The target is the noise that leads straight from the clean image to where inversion came.
    """
    rng = np.random.default_rng([seed, 1])
    x_0, x_t = rng.normal(size=(2, 2 * PAIRS, *SHAPE))
    bar = np.tile(ALPHA_BAR[rng.integers(50, 1000, PAIRS)], 2)
    a, s = (part.reshape(-1, 1, 1, 1) for part in (bar**0.5, (1 - bar) ** 0.5))
    theirs = (x_t - a * x_0) / s

    x_0, x_t, grid = map(torch.tensor, (x_0, x_t, np.r_[1.0, bar]))  # a grid of just these levels
    levels, i = Levels(grid.sqrt(), (1 - grid).sqrt()), torch.arange(1, len(grid))
    ours = target_prediction("x0", i, (x_0, x_0, x_t), x_t, levels, "epsilon").numpy()
    theta, ref, star = drawn(seed)
    return theirs + theta - star, theirs + ref - star, theirs, ours


@cases(2000.0, 5000.0)
def test_inpo(seed, beta):
    """JaydenLyh/InPO@a9cfc4d, train.py."""
    theta, ref, theirs, ours = inverted(seed)

    def authors(theta):
        return minus_log_sigmoid(inside(theta, ref, theirs, beta)).mean()

    np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    check("inpo", authors, theta, ref, ours, beta)


@cases(200.0, 2000.0)
def test_smpo(seed, beta):
    """JaydenLyh/SmPO@61105a1, train.py, its batches being of one pair.

    p is the softmax of two scores between 0 and 1.
    """
    theta, ref, theirs, ours = inverted(seed)
    scores = np.sort(np.random.default_rng([seed, 2]).uniform(size=(2, PAIRS)), axis=0)
    p = np.exp(scores[1]) / np.exp(scores).sum(0)

    def authors(theta):
        of_pairs = [
            minus_log_sigmoid(
                10 * (2 * p[k] - 1) * inside(*(x[k::PAIRS] for x in (theta, ref, theirs)), beta)
            )
            for k in range(PAIRS)
        ]
        return np.mean(of_pairs)

    check("smpo", authors, theta, ref, ours, beta, p)


@pytest.mark.parametrize("mu", [0.0, 0.5])
@cases(5.0, 50.0)
def test_sdpo(seed, beta, mu):
    """AIDC-AI/Diffusion-SDPO@1c83c65, train.py, its batches being of one pair.

    The gradient of the loser's error is scaled by lambda, and nothing else.
    """
    theta, ref, star = drawn(seed)
    share = np.array([-0.5, 0.8, 3.0]).reshape(-1, 1, 1, 1)  # of the winner's residual, in pair k
    theta[PAIRS:] = star[PAIRS:] + share * (theta - star)[:PAIRS] + (theta - ref)[PAIRS:]
    slope_w, slope_l = np.split(2 * (theta - star) / np.prod(SHAPE), 2)  # of the two errors
    scale = np.ones(PAIRS)
    for k in range(PAIRS):
        product = (slope_w[k] * slope_l[k]).sum()
        if product > 0:
            scale[k] = min(1, (1 - mu) * (slope_w[k] ** 2).sum() / product)
    assert scale[0] == 1 and scale[2] < 0.5
    logit = inside(theta, ref, star, beta)
    outer, scale = (x.reshape(-1, 1, 1, 1) for x in (beta / 2 * sigmoid(-logit) / PAIRS, scale))
    authors = np.concatenate([outer * slope_w, -outer * scale * slope_l])

    policy, target = torch.tensor(theta, requires_grad=True), torch.tensor(star)
    of_policy = (target - policy).square().mean((1, 2, 3))
    overlap = residual_overlap(target, policy.detach())
    errors = as_pair_errors(of_policy, torch.tensor(mse(ref, star)), overlap=overlap)
    loss = loss_of("diffusion_dpo")(safeguarded(errors, mu), LossSettings(beta)).loss.mean()
    loss.backward()
    assert loss.item() == pytest.approx(minus_log_sigmoid(logit).mean(), rel=1e-10)
    np.testing.assert_allclose(policy.grad.numpy(), authors, rtol=1e-5)  # overlaps are float32


# ---- inversion under the policy


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (499, 500), (998, 999), (1, 101), (301, 401), (200, 999)]
)
def test_posterior_std(low, high):
    """diffusers' variance, whose root is what the noise of DDIM-InPO's script is scaled by."""
    ours = posterior_std(*(discrete_schedule(DDIMScheduler(**SD)).levels[t] for t in (low, high)))
    ddim, ddpm = DDIMScheduler(**SD), DDPMScheduler(**SD)
    for scheduler in (ddim, ddpm):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    assert ours.item() == pytest.approx(ddim._get_variance(high, low).item() ** 0.5, rel=1e-9)
    if low == high - 1:
        assert ours.item() == pytest.approx(ddpm._get_variance(high).item() ** 0.5, rel=1e-9)


@pytest.mark.parametrize("clean", [1.0, ALPHA_BAR[0]])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["inpo", "smpo"])
def test_states_of_an_inversion_under_the_policy(name, seed, clean, monkeypatch):
    """JaydenLyh/InPO@a9cfc4d and JaydenLyh/SmPO@61105a1, train.py, at a timestep of their path.

    Both require diffusers 0.20.0, whose inverse DDIM leads from t to t + T/N. The path is that of
    their ten steps, from ``clean`` (theirs: the schedule's first level) over 1, 101, ... to 901.
    """
    times = np.r_[0, np.arange(1, 1000, 100)]
    bar = np.r_[clean, ALPHA_BAR[times[1:]]]
    normal, noises = np.random.default_rng(seed).normal, []
    x_0, slopes = normal(size=(2 * PAIRS, *SHAPE)), normal(size=SHAPE)

    def network(x, t):
        return np.tanh(slopes * x) * (1 + t / 1000)

    def predict(_, x, t, condition):
        return torch.tensor(network(x.numpy(), t.numpy().reshape(-1, 1, 1, 1)))

    def recorded(shape, generators):
        noises.append(normal(size=(len(generators), *shape)))  # for winner and loser their own
        return torch.tensor(noises[-1])

    monkeypatch.setattr(points, "normal", recorded)
    levels = Levels(torch.tensor(bar**0.5), torch.tensor((1 - bar) ** 0.5))
    session = SimpleNamespace(
        cache=SimpleNamespace(
            grid_at=lambda size: Grid(torch.tensor(times), levels),
            size=lambda pair: (8, 8),
            kind="epsilon",
            empty={},
            of_images=lambda what, pairs: torch.tensor(x_0),
        ),
        plan=SimpleNamespace(path=METHODS[name].path, low=2, high=10, guidance_scale=1),
        accelerator=SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext),
        model=SimpleNamespace(predict=predict, combine=None),
        network=None,
    )
    generators = [torch.Generator().manual_seed(100 * seed + k) for k in range(PAIRS)]
    found = points.policy_states(session, list(range(PAIRS)), {}, generators)

    def ddim(x, eps, j):
        here, there = bar[j], bar[j + 1]
        clean = (x - (1 - here) ** 0.5 * eps) / here**0.5
        return there**0.5 * clean + (1 - there) ** 0.5 * eps

    for b, i in enumerate(found.level.tolist()):
        x = x_0[b]
        for j in range(i):
            eps = network(x, times[j])
            if name == "smpo":
                x = ddim(x, (eps + network(ddim(x, eps, j), times[j])) / 2, j)
            else:
                variance = (1 - bar[j]) / (1 - bar[j + 1]) * (1 - bar[j + 1] / bar[j])
                x = ddim(x, eps, j) + 0.1 * variance**0.5 * noises[j][b]
        np.testing.assert_allclose(found.x_t[b], x, rtol=1e-9)
        # from which one step leads to x_0 at the path's first level: theirs, where that is clean
        kept = (bar[i] / clean) ** 0.5
        star = (x - kept * x_0[b]) / ((1 - bar[i]) ** 0.5 - kept * (1 - clean) ** 0.5)
        np.testing.assert_allclose(found.target[b], star, rtol=1e-9)
        assert found.timesteps[b] == times[i] and found.level[b] == found.level[b % PAIRS]
