"""Compute the target of the prediction at a noisy state, and the weight of its error."""

from __future__ import annotations

import torch
from torch import Tensor

from inversion_dpo.maths.records import Levels
from inversion_dpo.maths.schedule import prediction_between, step_coefficients

TARGETS = ("x0", "transition", "reference")
WEIGHTS = ("uniform", "min_snr", "transition", "velocity")


def target_prediction(
    target: str,
    i: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    reference: Tensor,
    levels: Levels,
    kind: str,
) -> Tensor:
    """Compute the target of the policy's prediction at a state x_t = x_{t_i}: (B, *).

    Args:
        target: transition: the prediction that leads back to x_{t_{i-1}}, the observed transition.
            x0: the prediction that leads straight to the clean image.
            reference: the reference's own, whose gradient is exactly zero at the reference.
        i: index on the grid [B], from 1 on.
        states: the clean x_0, x_{t_{i-1}} and x_t.
        reference: the reference's prediction at x_t.
        levels: of the grid.
        kind: of the network's prediction.
    """
    x_0, x_before, x_t = states
    if target == "transition":
        return prediction_between(x_before, levels[i - 1], x_t, levels[i], kind)
    if target == "x0":
        return prediction_between(x_0, levels[0], x_t, levels[i], kind)
    if target == "reference":
        return reference
    raise ValueError(f"unknown target {target!r}; one of {', '.join(TARGETS)}")


def step_weights(levels: Levels, kind: str, name: str) -> Tensor:
    """Compute k of every level but the first, [n-1], before scaling to mean 1.

    Args:
        levels: n of them, the clean end first.
        kind: of the network's prediction.
        name: one of WEIGHTS, as follows.

    uniform: 1.
    min_snr: min(SNR, 5) on errors of x_0 (Hang et al., 2023, https://arxiv.org/abs/2303.09556).
    velocity: 1 / alpha^2, which makes errors of eps errors of v. High noise, where the layout
        of a picture is decided, counts in full (Salimans & Ho, 2022,
        https://arxiv.org/abs/2202.00512).
    transition: squared shift of the state one step below per error of the prediction: the
        exact k of Gaussian transitions that all have one variance.
    """
    flow, here = kind == "flow_prediction", levels[slice(1, None)]
    if name == "uniform":
        return torch.ones_like(here.alpha)
    if name == "min_snr":
        snr = (here.alpha / here.sigma).square()
        return snr.clamp(max=5) * here.sigma.square() if flow else (5 / snr).clamp(max=1)
    if name == "velocity":
        return torch.ones_like(here.alpha) if flow else here.alpha.pow(-2).nan_to_num(posinf=0.0)
    if name == "transition":
        _, c_p = step_coefficients(here, levels[slice(None, -1)], kind if flow else "epsilon")
        return c_p.square().nan_to_num(posinf=0.0)  # where alpha = 0 errors of eps count nothing
    raise ValueError(f"unknown weighting {name!r}; one of {', '.join(WEIGHTS)}")


def level_weights(levels: Levels, kind: str, name: str, first: int, last: int) -> Tensor:
    """Compute the weight k of every level, scaled to mean 1 over the trained levels.

    Args:
        levels: of a grid or a whole schedule, n of them.
        kind: of the network's prediction.
        name: one of WEIGHTS, see :func:`step_weights`.
        first: index of the lowest trained level.
        last: index of the highest.

    Returns:
        Weights [n], float32. The clean end has its neighbour's weight.
    """
    weights = step_weights(levels, kind, name)
    weights = torch.cat([weights[:1], weights])
    return (weights / weights[first : last + 1].mean()).float()
