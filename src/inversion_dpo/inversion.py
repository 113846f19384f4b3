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
    noise: Tensor | None = None,
    start: int = 0,
) -> Trajectory:
    """Run x_0 (B, *) up the grid under ``predict``; N+1 evaluations (plus iterations).

    ``reference``, where given, is evaluated at every state beside ``predict``: under guidance the
    path follows guided noise while training compares with the plain conditional prediction.

    With ``fixed_point_iterations`` = 0 (naive) the transition i -> i+1 uses eps at its clean
    end, predict(x_i, t_i). With k > 0 each x_{i+1} is refined k times towards the solution of
    x_{i+1} = ddim_step(x_i, predict(x_{i+1}, t_{i+1})), from which sampling retraces exactly.

    The first ``start`` transitions use ``noise`` (B, *), standard normal: up to state ``start`` the
    path is the straight line sqrt(ab) x_0 + sqrt(1 - ab) noise, above it is inversion. An encoded
    image lacks the faint residual that a sampled latent has and from which inversion would have to
    recover the noise; without it x_T is much too small (docs/results.md).

    ValueError if ``start`` is not within the grid, or positive without ``noise``.
    """
    if not 0 <= start < grid.steps or (start and noise is None):
        raise ValueError(f"start={start} needs noise, and must be in 0..{grid.steps - 1}")
    x, ab = x_0, grid.alpha_bar
    eps = _at(predict, x, grid, 0)
    states, used, at_states = [x], [], [eps]
    for i in range(grid.steps):
        if noise is not None and i < start:
            eps = noise
        x_next = ddim_step(x, ab[i], ab[i + 1], eps)
        eps_next = _at(predict, x_next, grid, i + 1)
        for _ in range(fixed_point_iterations if i >= start else 0):
            eps = eps_next
            x_next = ddim_step(x, ab[i], ab[i + 1], eps)
            eps_next = _at(predict, x_next, grid, i + 1)
        used.append(eps)
        x, eps = x_next, eps_next
        states.append(x)
        at_states.append(eps)
    if reference is not None:
        at_states = [_at(reference, x, grid, i) for i, x in enumerate(states)]
    return Trajectory(grid, torch.stack(states), torch.stack(used), torch.stack(at_states))


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
