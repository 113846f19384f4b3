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

from collections.abc import Callable

import torch
from torch import Tensor

from inversion_dpo.maths.records import Grid, Trajectory
from inversion_dpo.maths.schedule import add_noise, like, step, step_back

Predict = Callable[[Tensor, Tensor], Tensor]  # prediction = predict(x_t (B, *), timesteps [B])
Compare = Callable[[Tensor, Tensor, Tensor], Tensor]  # the path's own prediction comes third


def _at(predict: Callable[..., Tensor], x: Tensor, grid: Grid, i: int, *known: Tensor) -> Tensor:
    return predict(x, grid.timesteps[i].to(x.device).expand(x.shape[0]), *known)


def _climb(
    x: Tensor, prediction: Tensor, i: int, grid: Grid, predict: Predict, kind: str, iterations: int
) -> tuple[Tensor, Tensor]:
    """Return state i and the prediction at it, from those at i-1, after ``iterations`` refinements.

    Unrefined (naive), the transition follows the prediction at its clean end, predict(x_{i-1},
    t_{i-1}). Each refinement goes towards the state from which sampling, with predict(x_i, t_i),
    retraces to x_{i-1} exactly.
    """
    low, high = grid.levels[i - 1], grid.levels[i]
    x_next = step(x, prediction, low, high, kind)
    prediction = _at(predict, x_next, grid, i)
    for _ in range(iterations):
        x_next = step_back(x, prediction, high, low, kind)
        prediction = _at(predict, x_next, grid, i)
    return x_next, prediction


@torch.no_grad()
def invert(
    x_0: Tensor,
    grid: Grid,
    predict: Predict,
    kind: str,
    fixed_point_iterations: int = 0,
    reference: Compare | None = None,
    noise: Tensor | None = None,
    start: int = 0,
    first: int = 1,
    last: int | None = None,
) -> Trajectory:
    """Run x_0 (B, *) up the grid under ``predict``.

    Args:
        x_0: clean latents (B, *).
        grid: noise levels t_0 ... t_N.
        predict: (x_t (B, *), timesteps [B]) -> prediction (B, *).
        kind: of the prediction, one of ``schedule.KINDS``.
        fixed_point_iterations: refinements of each transition; 0 is naive DDIM inversion.
        reference: gives the stored predictions, if path and training differ in guidance.
        noise: standard normal (B, *).
        start: the first ``start`` states are x_0 with ``noise`` added.
        first: lowest state whose prediction is needed. Below, predictions that the path does not
            need are not evaluated and are NaN.
        last: highest state that is made; None for N.

    Returns:
        States 0 to ``last`` with their predictions.

    Raises:
        ValueError: ``start`` is outside the grid, or positive without ``noise``.
    """
    last = grid.steps if last is None else last
    if not 0 <= start < grid.steps or (start and noise is None):
        raise ValueError(f"start={start} needs noise, and must be in 0..{grid.steps - 1}")
    unknown = torch.full_like(x_0, torch.nan)
    states, predictions = [x_0], [unknown if start else _at(predict, x_0, grid, 0)]
    for i in range(1, last + 1):
        if noise is not None and i <= start:
            x = add_noise(x_0, noise, grid.levels[i])
            prediction = _at(predict, x, grid, i) if i >= min(start, first) else unknown
        else:
            below = states[-1], predictions[-1]
            x, prediction = _climb(*below, i, grid, predict, kind, fixed_point_iterations)
        states.append(x)
        predictions.append(prediction)
    if reference is not None:
        needed = range(first, last + 1)
        stored = [_at(reference, states[i], grid, i, predictions[i]) for i in needed]
        predictions = [unknown] * first + stored
    return Trajectory(grid, torch.stack(states), torch.stack(predictions))


def recovered_noise(trajectory: Trajectory) -> Tensor:
    """Solve the highest state for its noise (B, *), on the straight line from x_0."""
    x_0, x_t = trajectory.states[0], trajectory.states[-1]
    level = trajectory.grid.levels[len(trajectory.states) - 1]
    return like(1 / level.sigma, x_0) * (x_t - like(level.alpha, x_0) * x_0)


def evaluations_per_image(
    start: int, first: int, last: int, iterations: int, guidance: float, reference: float
) -> int:
    """Count the network evaluations that :func:`invert` spends on one image.

    The path needs one for each state up to ``last`` from min(start, first) on, and ``iterations``
    for each inverted state; under guidance each of them is two. If ``reference`` differs from
    ``guidance``, each state from ``first`` on needs one more. Arguments as of :func:`invert`;
    ``guidance`` and ``reference`` are guidance scales.
    """
    path = last + 1 - min(start, first) + iterations * max(0, last - start)
    return passes(guidance) * path + (guidance != reference) * (last + 1 - first)


def passes(guidance_scale: float) -> int:
    """Count the network evaluations of one prediction: two under guidance."""
    return 1 if guidance_scale == 1 else 2


@torch.no_grad()
def reconstruct(x_T: Tensor, grid: Grid, predict: Predict, kind: str) -> Tensor:
    """Sample down the grid from x_T (B, *), deterministically, to a clean latent (B, *)."""
    x = x_T
    for i in range(grid.steps, 0, -1):
        x = step(x, _at(predict, x, grid, i), grid.levels[i], grid.levels[i - 1], kind)
    return x


def reconstruction_error(x_0: Tensor, x_0_again: Tensor) -> Tensor:
    """Compute the relative error of each image, ||x_0' - x_0|| / ||x_0||: [B]."""
    difference = (x_0_again - x_0).flatten(1).double().norm(dim=1)
    return difference / x_0.flatten(1).double().norm(dim=1)
