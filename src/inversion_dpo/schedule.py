"""Exact discrete noise schedules and conversions between what networks predict.

x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, with alpha_bar the cumulative product of
the model's own alphas (Ho et al., 2020, https://arxiv.org/abs/2006.11239). Coefficients are
computed in float64 and cast to the latents' dtype last; timesteps stay integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inversion_dpo.types import Grid

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Schedule:
    """alphas_cumprod: float64 [T]; prediction_type: what the network's output means."""

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"unknown prediction_type {self.prediction_type!r}; one of {PREDICTION_TYPES}"
            )

    @property
    def num_train_timesteps(self) -> int:
        """T: timesteps run from 0 to T-1."""
        return len(self.alphas_cumprod)

    def alpha_bar(self, timesteps: Tensor) -> Tensor:
        """alpha_bar at integer timesteps [B] -> float64 [B]; TypeError on float timesteps."""
        if timesteps.is_floating_point():
            raise TypeError(f"timesteps must be integers, got {timesteps.dtype}")
        return self.alphas_cumprod.to(timesteps.device)[timesteps]

    def grid(self, steps: int) -> Grid:
        """Evenly spaced 0 = t_0 < ... < t_N = T-1 with alpha_bar[0] = 1.

        ValueError unless 1 <= steps <= T-1.
        """
        last = self.num_train_timesteps - 1
        if not 1 <= steps <= last:
            raise ValueError(f"inversion steps must be between 1 and {last}, got {steps}")
        timesteps = torch.linspace(0, last, steps + 1, dtype=torch.float64).round().long()
        alpha_bar = self.alphas_cumprod[timesteps].double().clone()
        alpha_bar[0] = 1.0
        return Grid(timesteps, alpha_bar)


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Shape a per-image coefficient (scalar or [B]) to broadcast over x (B, *), in x's dtype."""
    coefficient = coefficient.to(x.device, x.dtype)
    return coefficient.reshape(-1, *[1] * (x.ndim - 1)) if coefficient.ndim else coefficient


def add_noise(x_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps."""
    return like(alpha_bar.sqrt(), x_0) * x_0 + like((1 - alpha_bar).sqrt(), x_0) * eps


def eps_towards(x_t: Tensor, x_0: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise that leads from x_t straight to x_0: (x_t - sqrt(ab) x_0) / sqrt(1 - ab).

    alpha_bar must be below 1: at "no noise" there is nothing to predict.
    """
    return (x_t - like(alpha_bar.sqrt(), x_t) * x_0) / like((1 - alpha_bar).sqrt(), x_t)


def to_eps(output: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """Convert a network output to eps; v as in Salimans & Ho (2022, arXiv:2202.00512)."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return like(alpha_bar.sqrt(), x_t) * output + like((1 - alpha_bar).sqrt(), x_t) * x_t
    if prediction_type == "sample":
        return eps_towards(x_t, output, alpha_bar)
    raise ValueError(f"unknown prediction_type {prediction_type!r}; one of {PREDICTION_TYPES}")
