"""Deterministic DDIM inversion: from a clean latent to the noise that leads to it.

Source: Song et al., "Denoising Diffusion Implicit Models", 2020,
https://arxiv.org/abs/2010.02502 (section 4.3); as the carrier of preference optimization:
"Inversion-DPO", 2025, https://arxiv.org/abs/2507.11554.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inversion_dpo.schedule import like
from inversion_dpo.types import Grid, Trajectory

Predict = Callable[[Tensor, Tensor], Tensor]  # eps = predict(x_t (B, *), timesteps int64 [B])


def ddim_step(x: Tensor, alpha_bar_from: Tensor, alpha_bar_to: Tensor, eps: Tensor) -> Tensor:
    """Move x along eps from one noise level to another; the same formula in both directions.

    x_to = sqrt(ab_to) (x - sqrt(1 - ab_from) eps) / sqrt(ab_from) + sqrt(1 - ab_to) eps
    """
    ratio = (alpha_bar_to / alpha_bar_from).sqrt()
    noise = (1 - alpha_bar_to).sqrt() - ratio * (1 - alpha_bar_from).sqrt()
    return like(ratio, x) * x + like(noise, x) * eps


def _at(predict: Predict, x: Tensor, grid: Grid, i: int) -> Tensor:
    return predict(x, grid.timesteps[i].to(x.device).expand(x.shape[0]))


@torch.no_grad()
def invert(
    x_0: Tensor,
    grid: Grid,
    predict: Predict,
    fixed_point_iterations: int = 0,
    reference: Predict | None = None,
) -> Trajectory:
    """Run x_0 (B, *) up the grid under ``predict``; N+1 evaluations (plus iterations).

    ``reference``, where given, is evaluated at every state beside ``predict``: under guidance the
    path follows guided noise while training compares with the plain conditional prediction.

    With ``fixed_point_iterations`` = 0 (naive) the transition i -> i+1 uses eps at its clean
    end, predict(x_i, t_i). With k > 0 each x_{i+1} is refined k times towards the solution of
    x_{i+1} = ddim_step(x_i, predict(x_{i+1}, t_{i+1})), from which sampling retraces exactly.
    """
    x, ab = x_0, grid.alpha_bar
    eps = _at(predict, x, grid, 0)
    states, noises = [x], [eps]
    for i in range(grid.steps):
        x_next = ddim_step(x, ab[i], ab[i + 1], eps)
        eps = _at(predict, x_next, grid, i + 1)
        for _ in range(fixed_point_iterations):
            x_next = ddim_step(x, ab[i], ab[i + 1], eps)
            eps = _at(predict, x_next, grid, i + 1)
        x = x_next
        states.append(x)
        noises.append(eps)
    at_states = noises
    if reference is not None:
        at_states = [_at(reference, x, grid, i) for i, x in enumerate(states)]
    if fixed_point_iterations:
        noises = [step_noise(states[i], states[i + 1], ab[i], ab[i + 1]) for i in range(grid.steps)]
    return Trajectory(
        grid, torch.stack(states), torch.stack(noises[: grid.steps]), torch.stack(at_states)
    )


def step_noise(x: Tensor, x_to: Tensor, alpha_bar_from: Tensor, alpha_bar_to: Tensor) -> Tensor:
    """The eps with which :func:`ddim_step` takes x (B, *) to x_to (B, *)."""
    ratio = (alpha_bar_to / alpha_bar_from).sqrt()
    noise = (1 - alpha_bar_to).sqrt() - ratio * (1 - alpha_bar_from).sqrt()
    return (x_to - like(ratio, x) * x) / like(noise, x)


@torch.no_grad()
def reconstruct(x_T: Tensor, grid: Grid, predict: Predict) -> Tensor:
    """Sample back down the grid from x_T (B, *), deterministically, to a clean latent (B, *)."""
    x, ab = x_T, grid.alpha_bar
    for i in range(grid.steps, 0, -1):
        x = ddim_step(x, ab[i], ab[i - 1], _at(predict, x, grid, i))
    return x


def reconstruction_error(x_0: Tensor, x_0_again: Tensor) -> Tensor:
    """Relative error per image: ||x_0' - x_0|| / ||x_0||, [B]."""
    difference = (x_0_again - x_0).flatten(1).double().norm(dim=1)
    return difference / x_0.flatten(1).double().norm(dim=1)
