"""Where a training step looks: one noisy state for each image, and what to predict there.

A state comes from the cached trajectories of the frozen reference, from fresh noise, or from an
inversion under the policy as it is now.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from inversion_dpo.data.transforms import chance
from inversion_dpo.maths.methods import STORED
from inversion_dpo.maths.records import NoisyStates
from inversion_dpo.maths.schedule import (
    add_noise,
    error_scale,
    posterior_std,
    prediction_of,
    step,
    step_back,
)
from inversion_dpo.maths.targets import target_prediction
from inversion_dpo.models.base import (
    GRAPH_KEYS,
    Condition,
    Guidance,
    guided,
    joined,
    without_prompt,
)
from inversion_dpo.training.generators import Generators, integers, normal
from inversion_dpo.training.policy import having
from inversion_dpo.training.session import Session

INPO_ETA = 0.1  # DDIM-InPO's noise beside the inversion, in standard deviations of the posterior


def with_dropout(session: Session, batch: list[tuple[int, int]], condition: Condition) -> None:
    """Replace the condition of dropped pairs by the empty one, for winner and loser alike.

    Without its prompt a pair has no scene graph either; without its graph it keeps the prompt, and
    without its caption the graph.

    Args:
        session: everything that is alive.
        batch: P pairs, each with its epoch.
        condition: of winners, then losers, [2P, ...] each; changed in place.
    """
    plan, alone = session.plan, without_prompt(condition, session.cache.empty)
    keys = [(plan.seed, session.cache.digests[p], epoch) for p, epoch in batch]
    prompts = [chance("prompt", *key) < plan.prompt_dropout for key in keys]
    graphs = [chance("graph", *key) < plan.graph_dropout for key in keys]
    captions = [chance("caption", *key) < plan.caption_dropout for key in keys]
    every = {name for name in condition if alone[name] is not condition[name]}
    graph = every & set(GRAPH_KEYS)
    for dropped, names in ((prompts, every), (graphs, graph), (captions, every - graph)):
        rows = torch.tensor([*dropped, *dropped])
        for name in names:
            given, none = joined([condition[name], alone[name]]).chunk(2)
            there = rows.to(given.device, non_blocking=True)
            condition[name] = torch.where(there.reshape(-1, *[1] * (given.ndim - 1)), none, given)


def stored_positions(session: Session, generators: Generators) -> list[int] | None:
    """Choose the stored state of each pair that a step looks at; None if the path stores none.

    It is drawn uniformly, or on the path ``released`` every state of a pair in its order.
    """
    plan = session.plan
    if plan.path not in STORED:
        return None
    first, last = session.cache.positions(plan.low, plan.high)
    if plan.path == "released":
        return [first + k % plan.states for k in range(len(generators))]
    return integers(first, last, generators).tolist()


def stored_states(
    session: Session, pairs: list[int], condition: Condition, generators: Generators
) -> NoisyStates:
    """Take a state of each pair's cached trajectories."""
    positions = stored_positions(session, generators) or []
    return session.cache.states(pairs, positions, session.plan.target)


def noise_states(
    session: Session, pairs: list[int], condition: Condition, generators: Generators
) -> NoisyStates:
    """Draw noise and timestep of each pair, for both images; no reference yet.

    Fresh noise eps is the same for both. Where each image has noise eps* of its own, the noise is
    rho eps* + sqrt(1 - rho^2) eps, with rho = ``objective.coupling``.
    """
    schedule, plan = session.model.schedule_at(session.cache.size(pairs[0])), session.plan
    x_0 = session.cache.of_images("clean", pairs).float()
    level = integers(plan.low, plan.high, generators).repeat(2)
    eps = normal(x_0.shape[1:], generators).repeat(2, *[1] * (x_0.ndim - 1))
    eps = eps.to(x_0, non_blocking=True)
    if rho := plan.coupling:
        eps = rho * session.cache.of_images("endpoint", pairs) + math.sqrt(1 - rho**2) * eps
    x_t = add_noise(x_0, eps, schedule.levels[level])
    target = prediction_of(x_0, eps, schedule.levels[level], schedule.kind)
    scale = error_scale(schedule.levels[level], schedule.kind).float()
    return NoisyStates(level, x_t, schedule.timesteps[level], scale, target, target)


@torch.no_grad()
def policy_states(
    session: Session, pairs: list[int], condition: Condition, generators: Generators
) -> NoisyStates:
    """Make a state of each pair's inversion under the policy as it is now; target x0.

    ``policy``: noise of ``INPO_ETA`` posterior deviations after every step (DDIM-InPO, 2025,
    https://arxiv.org/abs/2503.18454). ``renoise``: each step along the mean of the predictions at
    its two ends, both at the clean end's timestep (SmPO, 2025, https://arxiv.org/abs/2506.02698).
    Each state is evaluated at its own timestep; the authors' scripts evaluate it at another.
    """
    grid, kind = session.cache.grid_at(session.cache.size(pairs[0])), session.cache.kind
    plan, device = session.plan, session.accelerator.device
    renoise = plan.path == "renoise"
    level = integers(plan.low, plan.high, generators).repeat(2)
    x_0 = session.cache.of_images("clean", pairs).to(device, non_blocking=True)
    x, inner = x_0, (-1, *[1] * (x_0.ndim - 1))
    for j in range(int(level.max())):
        low, high = grid.levels[j], grid.levels[j + 1]
        t = grid.timesteps[j].to(device, non_blocking=True).expand(len(x))
        prediction = predict(session, session.network, x, t, condition)
        x_next = step(x, prediction, low, high, kind)
        if renoise:
            again = predict(session, session.network, x_next, t, condition)
            x_next = step(x, (prediction + again) / 2, low, high, kind)
        else:
            noise = normal(x.shape[1:], [*generators, *generators]).to(device, non_blocking=True)
            x_next = x_next + INPO_ETA * float(posterior_std(low, high)) * noise
        there = (level > j).to(device, non_blocking=True)
        x = torch.where(there.reshape(inner), x_next, x)
    x_0, x = x_0.cpu(), x.cpu()
    target = target_prediction("x0", level, (x_0, x_0, x), x, grid.levels, kind)
    scale = error_scale(grid.levels[level], kind).float()
    evaluations = int(level.max()) * (2 if renoise else 1)
    timesteps = grid.timesteps[level]
    return NoisyStates(level, x, timesteps, scale, target, target, evaluations)


@torch.no_grad()
def stepped_states(
    session: Session, pairs: list[int], condition: Condition, generators: Generators
) -> NoisyStates:
    """Take one inversion step from fresh noise one level below; target x0.

    The pair shares noise and level. The step and its fixed-point iterations follow the reference
    from before the training. No source: it parts what the whole path does from what a step does.
    """
    grid, kind = session.cache.grid_at(session.cache.size(pairs[0])), session.cache.kind
    plan, device = session.plan, session.accelerator.device
    level = integers(plan.low, plan.high, generators).repeat(2)
    low, high = grid.levels[level - 1], grid.levels[level]
    x_0 = session.cache.of_images("clean", pairs).to(device, non_blocking=True)
    eps = normal(x_0.shape[1:], generators).repeat(2, *[1] * (x_0.ndim - 1))
    x = add_noise(x_0, eps.to(x_0), low)
    with session.policy.reference(session.network) as network:
        t_low, t_high = (grid.timesteps[i].to(device) for i in (level - 1, level))
        up = step(x, predict(session, network, x, t_low, condition), low, high, kind)
        for _ in range(plan.iterations):
            up = step_back(x, predict(session, network, up, t_high, condition), high, low, kind)
    target = target_prediction("x0", level, (x_0, x, up), up, grid.levels, kind)
    scale = error_scale(high, kind).float()
    evaluations = 1 + plan.iterations
    return NoisyStates(level, up, grid.timesteps[level], scale, target, target, evaluations)


StatesOf = Callable[[Session, list[int], Condition, Generators], NoisyStates]
STATES: dict[str, StatesOf] = {
    "trajectory": stored_states,
    "released": stored_states,
    "noise": noise_states,
    "line": noise_states,
    "known": noise_states,
    "stepped": stepped_states,
    "policy": policy_states,
    "renoise": policy_states,
}


@torch.no_grad()
def with_reference(
    session: Session, states: NoisyStates, condition: Condition, *, first: bool = False
) -> NoisyStates:
    """Compute the reference's prediction at the states now.

    Args:
        session: everything that is alive.
        states: (B, *), without a reference.
        condition: of every image, [B, ...] each.
        first: take the reference from before the training, even if it has moved since.
    """
    states = states.to(session.accelerator.device)
    policy, network, moved = session.policy, session.network, session.moved
    there = policy.reference(network)
    if moved and not first:
        there = having(network, policy.trainable(), moved)
    with there as reference_network:
        reference = predict(session, reference_network, states.x_t, states.timesteps, condition)
    return replace(states, reference=reference, evaluations=states.evaluations + 1)


def predict(
    session: Session, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition
) -> Tensor:
    """Predict in the run's own precision, for policy and reference alike.

    Under ``objective.guidance_scale`` it is the guided one: what a sampler with that guidance
    follows is what is trained, and compared.

    Args:
        session: everything that is alive.
        network: the policy's or the reference's.
        x_t: noisy latents (B, *).
        t: timesteps [B].
        condition: of every image, [B, ...] each.

    Returns:
        The prediction (B, *), float32.
    """
    model, scale = session.model, session.plan.guidance_scale
    with session.accelerator.autocast():
        denoiser = partial(model.predict, network)
        guidance = Guidance(scale, session.cache.empty, model.combine)
        return guided(denoiser, x_t, t, condition, guidance)
