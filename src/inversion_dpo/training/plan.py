"""The plain values that a training step needs, taken out of the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from inversion_dpo.data.transforms import Size
from inversion_dpo.maths.losses import LOSSES, Loss, balance
from inversion_dpo.maths.methods import ADAPTED, BETAS, ENDPOINTS
from inversion_dpo.maths.records import Grid, LossSettings
from inversion_dpo.maths.schedule import Schedule
from inversion_dpo.maths.targets import level_weights
from inversion_dpo.run.config import Config, ConfigError
from inversion_dpo.trajectories.cache import TrajectoryCache
from inversion_dpo.trajectories.key import window
from inversion_dpo.trajectories.method import chosen_method


@dataclass(frozen=True)
class Plan:
    """What a step does, in plain values.

    path: on ``released`` a step looks at every state of a pair, averaged before the loss. target:
    with ``reference`` there is no gradient at first. low, high: lowest and highest level that is
    trained on: index on the inversion's grid, or in the schedule on the paths ``noise``, ``line``
    and ``known``. coupling: share of an image's own noise on the last two, 0 on others. iterations:
    of the step on the path ``stepped``. weights: size of the pictures -> k of each level, mean 1
    over those; flow models shift their levels by the size. states: of each pair in a step.
    soft_labels: whether the pairs' own p is read. gap: the mean of abs(2p - 1), where beta follows
    it. reference_every: steps after which the reference becomes the policy. guidance_scale: of the
    prediction that is trained, policy and reference alike. The dropouts are shares of pairs that
    are shown without prompt, graph or caption.
    """

    loss: Loss
    settings: LossSettings
    path: str
    target: str
    coupling: float
    iterations: int
    low: int
    high: int
    weights: Callable[[Size], Tensor]
    states: int
    safeguard: bool
    safeguard_margin: float
    gradient_factor: float | None  # that beta follows, if it does
    soft_labels: bool
    gap: float | None
    reference_every: int | None
    guidance_scale: float
    batch_size: int
    accumulation: int
    seed: int
    prompt_dropout: float
    graph_dropout: float
    caption_dropout: float


def make_plan(config: Config, at: Callable[[Size], tuple[Schedule, Grid]], size: Size) -> Plan:
    """Take out of a configuration what a step needs; ConfigError for a grid that cannot be used.

    Args:
        config: the run's settings.
        at: schedule and grid for pictures of a size.
        size: one of the sizes, for whatever is the same for all.
    """
    schedule, grid = at(size)
    o, t, d, method = config.objective, config.training, config.data, chosen_method(config)
    levels, (low, high) = grid.levels, window(config)
    beta = o.beta if isinstance(o.beta, float) else BETAS.get(method.loss, 1.0)
    if o.beta == "auto" and method.loss not in ADAPTED:
        raise ConfigError(
            f"objective.beta=auto works for the losses {', '.join(sorted(ADAPTED))}, not for "
            f"{method.loss}: give a number, or null for the usual value"
        )
    free = method.path == "noise" or method.path in ENDPOINTS  # of the grid
    if free:
        low, high = (round(t * (len(schedule.timesteps) - 1)) for t in (o.t_min, o.t_max))
    elif method.path != "released" and levels.sigma[low] <= levels.sigma[0]:
        raise ConfigError(
            "this scheduler's first noisy state is as noisy as its clean end (timestep 0, "
            f"set_alpha_to_one false): set objective.t_min={1.5 / grid.steps:g}, or "
            "inversion.spacing=even"
        )

    @cache
    def weights(size: Size) -> Tensor:
        schedule, grid = at(size)
        if method.path == "released":
            return released_weights(schedule, grid)
        levels = (schedule if free else grid).levels
        return level_weights(levels, schedule.kind, o.weighting, low, high)

    return Plan(
        loss=LOSSES[method.loss],
        settings=LossSettings(beta, o.link, o.label_smoothing, o.anchor, o.sft_weight),
        path=method.path,
        target=method.target,
        coupling=o.coupling if method.path in ENDPOINTS else 0.0,
        iterations=config.inversion.fixed_point_iterations,
        low=low,
        high=high,
        weights=weights,
        states=high if method.path == "released" else o.states,
        safeguard=o.safeguard,
        safeguard_margin=o.safeguard_margin,
        gradient_factor=o.gradient_factor if o.beta == "auto" else None,
        soft_labels=o.soft_labels or o.gap_weighted,
        gap=1.0 if o.gap_weighted else None,
        reference_every=o.reference_every,
        guidance_scale=o.guidance_scale,
        batch_size=t.batch_size,
        accumulation=t.gradient_accumulation,
        seed=t.seed,
        prompt_dropout=d.prompt_dropout,
        graph_dropout=d.graph_dropout,
        caption_dropout=d.caption_dropout,
    )


def balanced(plan: Plan, share: float | None, cache: TrajectoryCache, pairs: list[int]) -> Plan:
    """Weigh the two kinds of images in KTO's loss; in pairs there are as many of both.

    Args:
        plan: of the training.
        share: what liked images weigh; None takes all alike.
        cache: of the pairs.
        pairs: that are trained on.
    """
    if share is None:
        return plan
    liked = int(cache.liked(pairs).sum()) if cache.single else len(pairs)
    others = len(pairs) - liked if cache.single else liked
    if not liked or not others:
        return plan
    w, l = balance(share, liked, others)
    return replace(plan, settings=replace(plan.settings, liked=w, disliked=l))


def with_gap(plan: Plan, cache: TrajectoryCache, pairs: list[int]) -> Plan:
    """Measure the mean gap of the pairs that are trained on, abs(2p - 1).

    Args:
        plan: of the training.
        cache: of the pairs.
        pairs: that are trained on.
    """
    return replace(plan, gap=float((2 * cache.preference(pairs) - 1).abs().mean()))


def released_weights(schedule: Schedule, grid: Grid) -> Tensor:
    """Compute 1 / (2 alpha^2) at the timestep that each state is told, [N+1], as the script has it.

    They are not scaled to mean 1: the script's beta goes with these.
    """
    told = torch.searchsorted(schedule.timesteps, grid.timesteps)
    return (0.5 / schedule.levels.alpha[told].square()).float()
