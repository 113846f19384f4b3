"""Invert deterministically, from a clean latent to the noise that leads to it.

Source: Song et al., "Denoising Diffusion Implicit Models", 2020,
https://arxiv.org/abs/2010.02502 (section 4.3); for preference optimization: "Inversion-DPO",
2025, https://arxiv.org/abs/2507.11554. For flow models the same is Euler's method on the
velocity, run from data to noise.

An encoded image lacks the faint residual that a sampled latent has, and inversion needs that
residual to recover the noise. Without noise added at the start, x_T is much too small
(docs/results/inversion.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from inversion_dpo.maths.records import WHOLE, Extent, Grid, Trajectory
from inversion_dpo.maths.schedule import add_noise, like, step, step_back, step_coefficients

Predict = Callable[[Tensor, Tensor], Tensor]  # prediction = predict(x_t (B, *), timesteps [B])
Compare = Callable[[Tensor, Tensor, Tensor], Tensor]  # the path's own prediction comes third


def _at(predict: Callable[..., Tensor], x: Tensor, grid: Grid, i: int, *known: Tensor) -> Tensor:
    t = grid.timesteps[i].to(x.device, non_blocking=True)
    return predict(x, t.expand(x.shape[0]), *known)


@torch.no_grad()
def invert(
    x_0: Tensor,
    grid: Grid,
    predict: Predict,
    kind: str,
    *,
    noise: Tensor | None = None,
    extent: Extent = WHOLE,
) -> Trajectory:
    """Run x_0 (B, *) up the grid under ``predict``.

    Unrefined (naive), a transition follows the prediction at its clean end, predict(x_{i-1},
    t_{i-1}). Each refinement goes towards the state from which sampling, with predict(x_i, t_i),
    retraces to x_{i-1} exactly.

    Args:
        x_0: clean latents (B, *).
        grid: noise levels t_0 ... t_N.
        predict: (x_t (B, *), timesteps [B]) -> prediction (B, *).
        kind: of the prediction, one of ``schedule.KINDS``.
        noise: standard normal (B, *), of the states up to ``extent.start``.
        extent: which states are made; by default all, and none with added noise.

    Returns:
        States 0 to ``extent.last`` with their predictions. A prediction below ``extent.first`` that
        the path does not need is not evaluated: it is NaN. :func:`follow` makes the states again.

    Raises:
        ValueError: ``extent.start`` is outside the grid, or positive without ``noise``.
    """
    start, first = extent.start, extent.first
    if not 0 <= start < grid.steps or (start and noise is None):
        raise ValueError(f"start={start} needs noise, and must be in 0..{grid.steps - 1}")
    unknown = torch.full_like(x_0, torch.nan)
    states, predictions = [x_0], [unknown if start else _at(predict, x_0, grid, 0)]
    moves, move = list[Tensor](), unknown  # unrefined, they are the predictions themselves
    for i in range(1, min(extent.last, grid.steps) + 1):
        low, high = grid.levels[i - 1], grid.levels[i]
        if noise is not None and i <= start:
            x = add_noise(x_0, noise, high)
            prediction = _at(predict, x, grid, i) if i >= min(start, first) else unknown
        else:
            x = step(states[-1], predictions[-1], low, high, kind)
            prediction = _at(predict, x, grid, i)
            for _ in range(extent.iterations):
                x, move = step_back(states[-1], prediction, high, low, kind), prediction
                prediction = _at(predict, x, grid, i)
        if extent.iterations:
            moves.append(move)
        states.append(x)
        predictions.append(prediction)
    known = torch.stack(predictions)
    return Trajectory(grid, torch.stack(states), known, torch.stack(moves) if moves else known[:-1])


@torch.no_grad()
def follow(
    x: Tensor, moves: Sequence[Tensor], start: Tensor, grid: Grid, kind: str, *, refined: bool
) -> tuple[Tensor, Tensor]:
    """Go up the grid again by the predictions that a path followed: the same states to the bit.

    A transition is one product and one sum of float32 numbers, rounded one by one, so any device
    makes the same states. A prediction may come in fewer bits that hold it exactly.

    Args:
        x: states (B, *), those with the most transitions first.
        moves: for each transition the predictions [n, *] of the first n images, which take it.
        start: index on the grid of each state [B].
        grid: of the path.
        kind: of the predictions.
        refined: whether the path was refined, see :func:`invert`.

    Returns:
        The states after the last transition of each image, and those before it.
    """
    low, high = grid.levels[slice(None, -1)], grid.levels[slice(1, None)]
    c_x, c_p = step_coefficients(high, low, kind) if refined else step_coefficients(low, high, kind)
    if refined:  # the way back of such a step
        c_x, c_p = 1 / c_x, -c_p / c_x
    at = (start + torch.arange(len(moves))[:, None]).clamp(max=grid.steps - 1)
    c_x, c_p = (like(c[at].flatten(), x).unflatten(0, at.shape) for c in (c_x, c_p))
    before, ended = x, []
    for j, move in enumerate(moves):
        n = len(move)
        if n < len(x):
            ended.append((x[n:], before[n:]))
            x = x[:n]
        x, before = c_x[j, :n] * x + c_p[j, :n] * move.to(x), x
    ended.append((x, before))
    again, before = (torch.cat(parts) for parts in zip(*ended[::-1], strict=True))
    return again, before


@torch.no_grad()
def compared(path: Trajectory, reference: Compare, first: int) -> Trajectory:
    """Replace a path's predictions by others, where path and training differ in guidance.

    Args:
        path: from :func:`invert`.
        reference: gives the predictions (B, *), from those of the path too.
        first: lowest state whose prediction is needed; below they are NaN.
    """
    x, known = path.states, path.reference
    needed = [_at(reference, x[i], path.grid, i, known[i]) for i in range(first, len(x))]
    unknown = torch.full_like(x[0], torch.nan)
    return replace(path, reference=torch.stack([unknown] * first + needed))


def recovered_noise(trajectory: Trajectory) -> Tensor:
    """Solve the highest state for its noise (B, *), on the straight line from x_0."""
    x_0, x_t = trajectory.states[0], trajectory.states[-1]
    level = trajectory.grid.levels[len(trajectory.states) - 1]
    return like(1 / level.sigma, x_0) * (x_t - like(level.alpha, x_0) * x_0)


def evaluations_per_image(extent: Extent, guidance: float, reference: float, again: int = 1) -> int:
    """Count the network evaluations that a path and its stored predictions cost for one image.

    The path needs one for each state up to ``last`` from min(start, first) on, and ``iterations``
    for each inverted state; under guidance each of them is two. If ``reference`` differs from
    ``guidance``, each state from ``first`` on needs ``again`` more.

    Args:
        extent: of :func:`invert`.
        guidance: scale of the path.
        reference: scale of the stored predictions.
        again: evaluations of a stored prediction of another scale than the path's.
    """
    start, first, last = extent.start, extent.first, extent.last
    path = last + 1 - min(start, first) + extent.iterations * max(0, last - start)
    return passes(guidance) * path + again * (guidance != reference) * (last + 1 - first)


def passes(guidance_scale: float) -> int:
    """Count the network evaluations of one prediction: two under guidance."""
    return 1 if guidance_scale == 1 else 2


@torch.no_grad()
def reconstruct(x_T: Tensor, grid: Grid, predict: Predict, kind: str) -> Tensor:
    """Sample down the grid, deterministically: the way back of an inversion.

    Args:
        x_T: states at the grid's highest level, (B, *).
        grid: N levels and the clean end.
        predict: the network's prediction at (x, t), (B, *).
        kind: of the prediction: epsilon, v_prediction or flow_prediction.

    Returns:
        Clean latents (B, *).
    """
    x = x_T
    for i in range(grid.steps, 0, -1):
        x = step(x, _at(predict, x, grid, i), grid.levels[i], grid.levels[i - 1], kind)
    return x


def reconstruction_error(x_0: Tensor, x_0_again: Tensor) -> Tensor:
    """Compute the relative error of each image, ||x_0' - x_0|| / ||x_0||: [B]."""
    difference = (x_0_again - x_0).flatten(1).double().norm(dim=1)
    return difference / x_0.flatten(1).double().norm(dim=1)
