"""The setting in closed form: its mathematics, and that methods approach the known optimum."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from mixture_model import (
    METHODS,
    REFERENCE,
    SCHEDULE,
    Budget,
    least_divergence,
    outcome,
    preference_pairs,
    reference_eps,
    train_mixture,
)
from scipy import integrate

from inversion_dpo.maths.records import Levels
from tests.slow import slow_but


def density(mixture):
    return lambda x: float(np.exp(mixture.log_density(np.array([x])))[0])


def test_tilted_mixture_is_the_tilted_density():
    z, _ = integrate.quad(lambda x: density(REFERENCE)(x) * np.exp(0.7 * x), -9, 9)
    tilted = REFERENCE.tilted(0.7)
    for x in (-2.0, 0.1, 1.9):
        assert density(tilted)(x) == pytest.approx(density(REFERENCE)(x) * np.exp(0.7 * x) / z)
    mean, _ = integrate.quad(lambda x: x * density(tilted)(x), -9, 9)
    assert tilted.mean() == pytest.approx(mean)


def test_least_divergence_is_that_of_the_tilted_mixture():
    tilted = REFERENCE.tilted(0.7)
    kl, _ = integrate.quad(
        lambda x: density(tilted)(x) * np.log(density(tilted)(x) / density(REFERENCE)(x)), -6, 8
    )
    assert least_divergence(tilted.mean()) == pytest.approx(kl, rel=1e-6)


def test_noise_is_minus_sigma_times_the_score():
    level = Levels(torch.tensor([0.8]).double(), torch.tensor([0.6]).double())
    x = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    spread = (0.8 * REFERENCE.std) ** 2 + 0.6**2
    parts = [
        w * torch.exp(-((x - 0.8 * m) ** 2) / (2 * spread))
        for w, m in zip(REFERENCE.weights, REFERENCE.means, strict=True)
    ]
    (score,) = torch.autograd.grad(torch.log(sum(parts)).sum(), x)
    assert REFERENCE.eps(x, level).item() == pytest.approx(-0.6 * score.item())


def test_the_reference_samples_itself_and_the_optimum_nearly():
    own = outcome(reference_eps)
    assert abs(own["reward"]) < 1e-9 and own["kl"] < 1e-3
    best = REFERENCE.tilted(1.0)
    assert outcome(lambda x, i: best.eps(x, SCHEDULE.levels[i]))["distance"] < 0.05


def test_labels_follow_bradley_terry():
    x, p = preference_pairs(20_000, 0)
    winner, loser = x.chunk(2)
    torch.testing.assert_close(p, torch.sigmoid(winner - loser)[:, 0])
    assert (winner > loser).double().mean() == pytest.approx(
        torch.sigmoid((winner - loser).abs()).mean().item(), abs=0.01
    )


ENDS = {  # rate and beta by docs/results/mixture.md or its seed 100, and the share of distance left
    "x0": (3e-3, 10.0, 0.3),
    "transition": (1e-3, 30.0, 0.3),
    "diffusion_dpo": (3e-4, 10.0, 0.3),
    "kto": (3e-3, 10.0, 0.3),
    "dmpo": (3e-4, 30.0, 0.5),
    "nft": (3e-4, 0.3, 0.5),
    "x0_smoothed": (3e-4, 10.0, 0.3),
    "x0_soft": (3e-4, 10.0, 0.3),
    "x0_hinge": (3e-3, 10.0, 0.3),
    "x0_safeguard": (3e-3, 10.0, 0.4),
    "x0_bounded": (3e-3, 30.0, 0.4),
    "x0_auto": (3e-3, 10.0, 0.3),
    "dpo_moving": (3e-4, 30.0, 0.3),
    "stepped": (3e-4, 10.0, 0.4),
    "line": (3e-3, 30.0, 0.5),
    "line_half": (3e-3, 30.0, 0.5),
    "known": (3e-3, 30.0, 0.5),
    "x0_ipo": (3e-3, 3.0, 0.4),
    "dspo": (3e-4, 1.0, 0.3),
    "mapo": (3e-4, 0.1, 0.5),
    "inpo": (3e-4, 10.0, 0.5),
    "sft": (1.2e-4, 1.0, 0.7),
    "smpo": (1e-3, 100.0, 0.95),
}


def test_every_method_is_tried_where_the_optimum_is_known():
    may_diverge = {"kto_inverted", "x0_gap"}
    assert set(ENDS) | {"reference", "released"} | may_diverge == set(METHODS)


# Seconds each: in `make test` one method with a cache, and one without a reference.
@pytest.mark.parametrize("name", slow_but(["x0"], ENDS))
def test_a_method_comes_nearer_to_the_optimum(name):
    rate, beta, share = ENDS[name]
    steps = 60 if name in ("inpo", "smpo") else 300  # these invert at every step
    end = outcome(train_mixture(METHODS[name], rate, beta, 0, Budget(steps=steps)))
    assert end["distance"] < share * outcome(reference_eps)["distance"]


@pytest.mark.parametrize("name", slow_but(["released"], ["reference", "released"]))
def test_the_figures_form_never_leaves_its_saddle(name):
    policy = train_mixture(METHODS[name], 1e-2, 10.0, 0, Budget(steps=20))
    assert outcome(policy) == outcome(reference_eps)


def test_what_settles_for_good_and_what_its_steps_cost():
    script = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "mixture.py"))
    settled, spent = script["settled"], script["spent"]
    rows = [{"step": s, "distance": d} for s, d in ((0, 1.6), (10, 0.2), (20, 0.4), (30, 0.3))]
    assert settled(rows, 0.3) == 30  # 0.2 at step 10 did not last
    assert settled(rows, 0.4) == 10
    assert settled(rows, 0.1) == settled([*rows, {"step": 40, "distance": np.nan}], 1) == np.inf
    # 2,048 pairs of two images, N + 1 = 21 evaluations each; 256 pairs a step
    assert spent("x0") == (2 * 2048 * 21, 2 * 256 * 3)
    assert spent("diffusion_dpo") == (0, 2 * 256 * 4)
