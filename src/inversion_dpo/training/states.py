"""Where a training step looks: one state per image, what to predict there, what the reference does.

Three sources: the cached trajectories of the frozen reference, fresh noise, or an inversion under
the policy as it is now.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from inversion_dpo.data.transforms import drops_caption, drops_graph, drops_prompt
from inversion_dpo.maths.losses import target_prediction
from inversion_dpo.maths.records import TrainingPoints
from inversion_dpo.maths.schedule import add_noise, error_scale, posterior_std, prediction_of, step
from inversion_dpo.models.base import GRAPH_KEYS, Condition, guided
from inversion_dpo.training.generators import Generators, integers, normal
from inversion_dpo.training.recipe import Session

INPO_ETA = 0.1  # DDIM-InPO's noise beside the inversion, in standard deviations of the posterior


def with_dropout(session: Session, batch: list[tuple[int, int]], condition: Condition) -> None:
    """Replace the condition of dropped pairs by the empty one, for winner and loser alike.

    Without its prompt a pair has no scene graph either; without its graph it keeps the prompt, and
    without its caption the graph.
    """
    recipe, empty = session.recipe, session.cache.empty
    seen = [(recipe.seed, session.cache.digests[p], epoch) for p, epoch in batch]
    prompts = [drops_prompt(*pair, recipe.prompt_dropout) for pair in seen]
    graphs = [drops_graph(*pair, recipe.graph_dropout) for pair in seen]
    captions = [drops_caption(*pair, recipe.caption_dropout) for pair in seen]
    every, graph = set(empty), set(empty) & set(GRAPH_KEYS)
    for dropped, names in ((prompts, every), (graphs, graph), (captions, every - graph)):
        rows = torch.tensor([*dropped, *dropped])
        for name in names:
            condition[name][rows] = empty[name].to(condition[name])


def trajectory_points(
    session: Session, pairs: list[int], condition: Condition, generators: Generators
) -> TrainingPoints:
    """One uniformly drawn state of each pair's cached trajectories."""
    cache, recipe = session.cache, session.recipe
    first, last = cache.positions(recipe.low, recipe.high)
    drawn = integers(first, last, generators).tolist()
    return cache.points(pairs, drawn, recipe.target)


def noise_points(
    session: Session, pairs: list[int], condition: Condition, generators: Generators
) -> TrainingPoints:
    """Fresh noise and timestep per pair, the same for both images; no reference yet."""
    schedule = session.model.schedule
    x_0 = session.cache.gather("clean", pairs)
    low, high = session.recipe.timesteps
    i = integers(low, high, generators).repeat(2)
    eps = normal(x_0.shape[1:], generators).repeat(2, *[1] * (x_0.ndim - 1))
    x_t = add_noise(x_0, eps, schedule.levels[i])
    target = prediction_of(x_0, eps, schedule.levels[i], schedule.kind)
    scale = error_scale(schedule.levels[i], schedule.kind).float()
    return TrainingPoints(i, x_t, schedule.timesteps[i], scale, target, target)


@torch.no_grad()
def policy_points(
    session: Session, pairs: list[int], condition: Condition, generators: Generators
) -> TrainingPoints:
    """A state of each pair's inversion under the policy as it is now; target x0.

    ``policy``: noise of ``INPO_ETA`` posterior deviations after every step (DDIM-InPO, 2025,
    https://arxiv.org/abs/2503.18454). ``renoise``: each step along the mean of the predictions at
    its two ends, both at the clean end's timestep (SmPO, 2025, https://arxiv.org/abs/2506.02698).
    Each state is evaluated at its own timestep; the authors' scripts evaluate it at another.
    """
    grid, kind, recipe = session.cache.grid, session.cache.kind, session.recipe
    device, renoise = session.accelerator.device, recipe.objective.source == "renoise"
    i = integers(recipe.low, recipe.high, generators).repeat(2)
    x_0 = session.cache.gather("clean", pairs).to(device)
    x, inner = x_0, (-1, *[1] * (x_0.ndim - 1))
    for j in range(int(i.max())):
        low, high = grid.levels[j], grid.levels[j + 1]
        t = grid.timesteps[j].to(device).expand(len(x))
        prediction = predict(session, session.network, x, t, condition)
        if renoise:
            further = step(x, prediction, low, high, kind)
            prediction = (prediction + predict(session, session.network, further, t, condition)) / 2
        there = step(x, prediction, low, high, kind)
        if not renoise:
            noise = normal(x.shape[1:], [*generators, *generators]).to(device)
            there = there + INPO_ETA * float(posterior_std(low, high)) * noise
        x = torch.where((i > j).to(device).reshape(inner), there, x)
    x_0, x = x_0.cpu(), x.cpu()
    target = target_prediction("x0", i, (x_0, x_0, x), x, grid.levels, kind)
    scale = error_scale(grid.levels[i], kind).float()
    spent = int(i.max()) * (2 if renoise else 1)
    return TrainingPoints(i, x, grid.timesteps[i], scale, target, target, spent)


Source = Callable[[Session, list[int], Condition, Generators], TrainingPoints]
SOURCES: dict[str, Source] = {
    "trajectory": trajectory_points,
    "noise": noise_points,
    "policy": policy_points,
    "renoise": policy_points,
}


@torch.no_grad()
def live_reference(
    session: Session, points: TrainingPoints, condition: Condition
) -> TrainingPoints:
    """The points with the reference's prediction computed now."""
    points = to_device(points, session.accelerator.device)
    with session.policy.reference(session.network) as network:
        found = predict(session, network, points.x_t, points.timesteps, condition)
    return replace(points, reference=found, spent=points.spent + 1)


def predict(
    session: Session, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition
) -> Tensor:
    """The network's prediction in the run's own precision, for policy and reference alike.

    Under ``objective.guidance_scale`` it is the guided one: what a sampler with that guidance
    follows is what is trained, and compared.
    """
    model, scale = session.model, session.recipe.guidance_scale
    with session.accelerator.autocast():
        return guided(model, network, x_t, t, condition, session.cache.empty, scale)


def to_device(points: TrainingPoints, device: torch.device) -> TrainingPoints:
    """Move every tensor."""
    tensors = {f.name: getattr(points, f.name) for f in fields(points) if f.name != "spent"}
    return replace(points, **{k: v.to(device) for k, v in tensors.items()})
