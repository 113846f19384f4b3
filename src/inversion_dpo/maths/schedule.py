"""Relate noise levels, and a network's prediction, to images and noise.

Every model here moves on x_t = alpha_t x_0 + sigma_t eps. From x_t and its ``prediction`` one
knows both ends of the line through x_t, an image x_0 and a noise eps:

    epsilon          eps                     Ho et al., 2020, https://arxiv.org/abs/2006.11239
    v_prediction     alpha eps - sigma x_0   Salimans & Ho, 2022, https://arxiv.org/abs/2202.00512
    flow_prediction  eps - x_0               Lipman et al., 2022, https://arxiv.org/abs/2210.02747

A deterministic step goes along that line to another level: for eps and v it is DDIM's (Song et
al., 2020, https://arxiv.org/abs/2010.02502), for flows it is Euler's. Coefficients are computed in
float64 and cast to the latents' dtype last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inversion_dpo.maths.records import Grid, Levels

KINDS = ("epsilon", "v_prediction", "flow_prediction")


@dataclass(frozen=True)
class Schedule:
    """A model's own schedule.

    kind: the network's prediction, one of ``KINDS``.
    timesteps: [T] ascending, as the network takes them: int64, or float64 in flow matching.
    levels: [T], of those timesteps.
    sampler: N -> the grid on which the model's own sampler takes N steps, ascending.
    """

    kind: str
    timesteps: Tensor
    levels: Levels
    sampler: Callable[[int], Grid]

    def grid(self, steps: int, spacing: str = "even") -> Grid:
        """Return the levels of an inversion in N ``steps``.

        Args:
            steps: N, from 1 to T - 1.
            spacing: even: timesteps spread evenly over the schedule, the first one free of noise.
                sampler: those of the model's own sampler, whose path is then read backwards.
                released: those of the authors' script, see :meth:`released`.

        Raises:
            ValueError: ``steps`` is out of range.
        """
        last = len(self.timesteps) - 1
        if not 1 <= steps <= last:
            raise ValueError(f"the model's schedule takes 1 to {last} steps, not {steps}")
        if spacing == "sampler":
            return self.sampler(steps)
        if spacing == "released":
            return self.released(steps)
        index = torch.linspace(0, last, steps + 1, dtype=torch.float64).round().long()
        alpha, sigma = self.levels.alpha[index], self.levels.sigma[index]
        alpha[0], sigma[0] = 1.0, 0.0
        return Grid(self.timesteps[index], Levels(alpha, sigma))

    def released(self, steps: int) -> Grid:
        """Return the grid of Inversion-DPO's released script: a state is told the next timestep.

        With D = T // N the told timesteps are 0, D, ..., (N-1) D. The clean image stands at t_0, at
        t_1, told 0, and at t_2, told D; after that, the state at level k D is told (k+1) D. Source:
        ``ddim_inversion`` of https://github.com/MIGHTYEZ/Inversion-DPO, commit 3e2af58.
        """
        told, clean = torch.arange(steps) * (len(self.timesteps) // steps), torch.zeros(2).long()
        here = torch.cat([clean, told[:-1]])
        return Grid(self.timesteps[torch.cat([clean[:1], told])], self.levels[here])


def unknown_kind(kind: str) -> ValueError:
    """Make the error for a prediction type outside ``KINDS``."""
    return ValueError(f"unknown prediction type {kind!r}; one of {', '.join(KINDS)}")


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Shape a per-image coefficient (scalar or [B]) to broadcast over x (B, *), in x's dtype.

    No device is waited for: a scalar stays on the CPU, where every operation takes it from.
    """
    if not coefficient.ndim:
        return coefficient.to(x.dtype)
    coefficient = coefficient.to(x.device, x.dtype, non_blocking=True)
    return coefficient.reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x_0: Tensor, eps: Tensor, level: Levels) -> Tensor:
    """Compute x_t = alpha x_0 + sigma eps.

    Args:
        x_0: clean latents, (B, *).
        eps: standard normal noise, (B, *).
        level: of each latent, [B], or one for all.
    """
    return like(level.alpha, x_0) * x_0 + like(level.sigma, x_0) * eps


def prediction_of(x_0: Tensor, eps: Tensor, level: Levels, kind: str) -> Tensor:
    """Compute the prediction of a network of this kind that knows x_0 and eps.

    Args:
        x_0: clean latents, (B, *).
        eps: the noise in x_t, (B, *).
        level: of each latent, [B], or one for all.
        kind: of the prediction: epsilon, v_prediction or flow_prediction.

    Returns:
        (B, *): eps, v = alpha eps - sigma x_0, or the velocity eps - x_0.
    """
    if kind == "epsilon":
        return eps
    if kind == "v_prediction":
        return like(level.alpha, x_0) * eps - like(level.sigma, x_0) * x_0
    if kind == "flow_prediction":
        return eps - x_0
    raise unknown_kind(kind)


def error_scale(level: Levels, kind: str) -> Tensor:
    """Return the factor of a squared prediction error, float64 like the level.

    Errors of diffusion models are compared as errors of eps, whatever the network predicts: an
    error dv of v is an error alpha dv of eps. Those of flow models are errors of the velocity.
    """
    return level.alpha**2 if kind == "v_prediction" else torch.ones_like(level.alpha)


def step_coefficients(start: Levels, end: Levels, kind: str) -> tuple[Tensor, Tensor]:
    """Compute (c_x, c_p) of the step x_end = c_x x_start + c_p prediction.

    Args:
        start: the level at which the prediction was made.
        end: the level that the step leads to.
        kind: of the prediction: epsilon, v_prediction or flow_prediction.
    """
    a, s, a_to, s_to = start.alpha, start.sigma, end.alpha, end.sigma
    if kind == "epsilon":  # x_0 = (x - s p) / a, eps = p
        return a_to / a, s_to - a_to / a * s
    if kind == "v_prediction":  # x_0 = a x - s p, eps = s x + a p
        return a_to * a + s_to * s, s_to * a - a_to * s
    if kind == "flow_prediction":  # x_0 = x - s p, eps = x + a p
        return a_to + s_to, s_to * a - a_to * s
    raise unknown_kind(kind)


def step(x: Tensor, prediction: Tensor, start: Levels, end: Levels, kind: str) -> Tensor:
    """Move x from one level to another along the line that the prediction at x gives.

    It is DDIM's step (Song et al., 2020, https://arxiv.org/abs/2010.02502) or Euler's, down or up.

    Args:
        x: states at ``start``, (B, *).
        prediction: the network's at x, (B, *).
        start: level of x.
        end: level of the result.
        kind: of the prediction: epsilon, v_prediction or flow_prediction.

    Returns:
        States at ``end``, (B, *).
    """
    c_x, c_p = step_coefficients(start, end, kind)
    return like(c_x, x) * x + like(c_p, x) * prediction


def step_back(x: Tensor, prediction: Tensor, start: Levels, end: Levels, kind: str) -> Tensor:
    """Compute the state at ``start`` from which :func:`step`, given this prediction, leads to x.

    Args:
        x: states at ``end``, (B, *).
        prediction: that the step would use, (B, *).
        start: level of the result.
        end: level of x.
        kind: of the prediction: epsilon, v_prediction or flow_prediction.
    """
    c_x, c_p = step_coefficients(start, end, kind)
    return like(1 / c_x, x) * x - like(c_p / c_x, x) * prediction


def prediction_between(
    x_low: Tensor, low: Levels, x_high: Tensor, high: Levels, kind: str
) -> Tensor:
    """Compute the prediction at x_high with which one step leads exactly to x_low.

    From a noise-free x_low this is the noise, v or velocity that leads straight to it.

    Args:
        x_low: states with less noise, (B, *).
        low: their level, [B] or one for all.
        x_high: states with more noise, (B, *).
        high: their level, which must not be ``low``.
        kind: of the prediction: epsilon, v_prediction or flow_prediction.

    Returns:
        (B, *).
    """
    c_x, c_p = step_coefficients(high, low, kind)
    return like(1 / c_p, x_low) * x_low - like(c_x / c_p, x_low) * x_high


def posterior_std(low: Levels, high: Levels) -> Tensor:
    """Compute the standard deviation of q(x_low | x_high, x_0) in the diffusion of Ho et al., 2020.

    sigma_low / sigma_high sqrt(sigma_high^2 - (alpha_high / alpha_low)^2 sigma_low^2); 0 where
    x_low is free of noise. https://arxiv.org/abs/2006.11239
    """
    kept = (high.alpha / low.alpha * low.sigma) ** 2
    return low.sigma / high.sigma * (high.sigma**2 - kept).clamp(min=0).sqrt()
