"""What a step takes out of a configuration."""

from types import SimpleNamespace

import pytest
import torch

from inversion_dpo.maths.records import Grid, Levels
from inversion_dpo.maths.schedule import Schedule
from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.training.plan import balanced, make_plan, with_gap

ALPHA = torch.linspace(1.0, 0.1, 11, dtype=torch.float64)
LEVELS = Levels(ALPHA, (1 - ALPHA**2).sqrt())
SCHEDULE = Schedule("epsilon", torch.arange(11), LEVELS, lambda steps: GRID)
GRID = Grid(torch.tensor([0, 2, 4, 6, 8]), LEVELS[torch.tensor([0, 2, 4, 6, 8])])


def plan(*overrides, grid=GRID):
    steps = f"inversion.steps={grid.steps}"
    return make_plan(
        load_config(None, [steps, *overrides]), lambda size: (SCHEDULE, grid), (64, 64)
    )


def test_a_trajectory_is_trained_on_its_grids_levels():
    p = plan("objective.t_min=0.3", "objective.t_max=0.8")
    assert (p.low, p.high, p.path, p.target) == (2, 3, "trajectory", "x0")
    assert len(p.weights((64, 64))) == 5 and p.weights((64, 64))[
        2:4
    ].mean().item() == pytest.approx(1)


def test_fresh_noise_is_trained_on_the_schedules_levels():
    p = plan("objective.name=diffusion_dpo", "objective.t_min=0.3", "objective.t_max=0.8")
    assert (p.low, p.high) == (3, 8) and len(p.weights((64, 64))) == 11
    # 1 / alpha^2 over levels 3 to 8, mean 1
    p = plan("objective.name=diffusion_dpo", "objective.weighting=velocity")
    assert p.weights((64, 64))[1:].mean().item() == pytest.approx(1, abs=0.1)
    ratio = (p.weights((64, 64))[10] / p.weights((64, 64))[5]).item()
    assert ratio == pytest.approx((0.55 / 0.1) ** 2, rel=1e-5)


def test_a_straight_line_is_trained_on_the_schedules_levels_whatever_was_inverted():
    given = ["objective.t_min=0.3", "objective.t_max=0.8", "objective.coupling=0.6"]
    for path in ("line", "known"):
        p = plan(f"objective.path={path}", *given)
        assert (p.low, p.high, p.coupling) == (3, 8, 0.6)
        assert len(p.weights((64, 64))) == 11 and plan(f"objective.path={path}").coupling == 1
    assert plan().coupling == plan("objective.name=kto").coupling == 0


def test_a_first_state_without_more_noise_than_the_image_is_refused():
    alpha = torch.tensor([0.99, 0.99, 0.5], dtype=torch.float64)
    flat = Grid(torch.tensor([0, 0, 5]), Levels(alpha, (1 - alpha**2).sqrt()))
    with pytest.raises(ConfigError, match=r"objective.t_min=0.75, or"):
        plan(grid=flat)
    assert plan("objective.t_min=0.75", grid=flat).low == 2
    assert plan("objective.name=diffusion_dpo", "objective.t_min=0.0", grid=flat).low == 0


def test_values_arrive_where_they_belong():
    p = plan(
        "objective.beta=7",
        "objective.link=ipo",
        "objective.label_smoothing=0.125",
        "objective.states=3",
        "training.gradient_accumulation=2",
        "training.seed=5",
        "training.batch_size=6",
        "data.prompt_dropout=0.25",
    )
    assert (p.settings.beta, p.settings.link, p.settings.label_smoothing) == (7, "ipo", 0.125)
    p2 = plan(
        "objective.anchor=2",
        "objective.sft_weight=0.5",
        "objective.safeguard=true",
        "objective.safeguard_margin=0.25",
    )
    assert (p2.settings.anchor, p2.settings.sft_weight, p2.safeguard_margin) == (2, 0.5, 0.25)
    p3 = plan("objective.gap_weighted=true", "objective.path=noise", "objective.reference_every=4")
    assert (p3.soft_labels, p3.gap, p3.reference_every) == (True, 1.0, 4) and p2.gap is None
    assert (p.states, p.accumulation, p.seed, p.batch_size) == (3, 2, 5, 6)
    assert (p.prompt_dropout, p.graph_dropout, p.caption_dropout) == (0.25, 0, 0)


def test_beta_may_adapt_where_the_logit_is_in_proportion_to_it():
    p = plan("objective.beta=auto", "objective.gradient_factor=0.1")
    assert (p.settings.beta, p.gradient_factor) == (2000.0, 0.1)
    assert plan().gradient_factor is None and plan("objective.beta=7").gradient_factor is None
    for loss in ("kto", "nft", "dpo_bounded", "mapo"):
        with pytest.raises(ConfigError, match=f"dmpo, dpo, smpo, not for {loss}"):
            plan("objective.beta=auto", f"objective.loss={loss}", "objective.path=noise")


def test_the_mean_gap_is_that_of_the_training_pairs():
    """Probabilities 1, .8 and .3: gaps of 1, .6 and .4, whichever way round."""
    p = torch.tensor([1.0, 0.8, 0.3])
    cache = SimpleNamespace(preference=lambda pairs: p[pairs])
    assert with_gap(plan(), cache, [0, 1, 2]).gap == pytest.approx(2 / 3)
    assert with_gap(plan(), cache, [0, 1]).gap == pytest.approx(0.8)


def test_a_loss_without_beta_has_one_of_one():
    assert plan("objective.name=sft", "objective.path=noise").settings.beta == 1.0


@pytest.mark.parametrize(
    ("single", "liked", "share", "weights"),
    [
        (True, [1, 0, 0, 0, 1, 0, 0, 0], 0.5, (2.0, 2 / 3)),  # two of eight
        (True, [1, 1, 1, 0], 0.5, (2 / 3, 2.0)),
        (False, [1, 1, 1], 0.8, (1.6, 0.4)),  # three pairs: as many of both
        (True, [1, 1], 0.5, (1.0, 1.0)),  # nothing to balance
        (True, [0, 0], 0.5, (1.0, 1.0)),
        (True, [1, 0, 0], None, (1.0, 1.0)),
    ],
)
def test_liked_images_weigh_their_share_of_all(single, liked, share, weights):
    given = torch.tensor(liked, dtype=torch.bool)
    cache = SimpleNamespace(single=single, liked=lambda pairs: given[pairs])
    found = balanced(plan(), share, cache, list(range(len(liked)))).settings
    assert (found.liked, found.disliked) == pytest.approx(weights)
