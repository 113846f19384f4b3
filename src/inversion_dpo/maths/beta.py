"""Let beta differ from pair to pair, or follow the training: pure functions without a model."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from inversion_dpo.maths.records import PairErrors

BETA_DECAY = 0.95  # of the running mean of the logit, a step
BETA_RANGE = 10.0  # an adapted beta is at least the first one's share of so many


def gap_weighted(errors: PairErrors, mean: float) -> PairErrors:
    """Scale the beta of each pair by (2p - 1) / mean, the gap of its images in the data.

    The label is hard then. A pair whose p is below 1/2 is turned round. SmPO (2025,
    https://arxiv.org/abs/2506.02698) has 10 in the place of 1 / mean.

    Args:
        errors: have p as the pairs' preference, [P].
        mean: of abs(2p - 1) over all pairs, so that the mean beta stays what it is.
    """
    weight = errors.weight * (2 * errors.preference - 1) / mean
    return replace(errors, weight=weight, preference=torch.ones_like(errors.preference))


def adapted_beta(logit: float, factor: float, first: float) -> float:
    """Compute the beta, at most the first one, at which the mean gradient factor is ``factor``.

    beta = first log((1 - factor) / factor) / logit, clamped to first / 10 ... first. While the
    policy is near the reference the logit is near 0, and beta is the first one.

    Args:
        logit: running mean of log((1 - g) / g) at the first beta, g the mean of sigmoid(-logit).
        factor: the least gradient factor, below 1/2.
        first: the loss's usual beta.
    """
    least = math.log((1 - factor) / factor)
    return first * min(1.0, max(least / max(logit, least), 1 / BETA_RANGE))
