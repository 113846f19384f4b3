"""Preference objectives: pure functions from per-pair errors to per-pair losses.

An error is the mean over a latent's elements of ||target - prediction||^2, of eps in diffusion
models and of the velocity in flow models (``schedule.error_scale``). What the target is, and where
x_t comes from, a cached inversion trajectory or fresh noise, is decided before:
``target_prediction`` and ``OBJECTIVES``. Losses are per pair; nothing is averaged inside the
sigmoid. Equations and sources: docs/papers.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inversion_dpo.schedule import prediction_between
from inversion_dpo.types import Levels, LossOutput, PairErrors

TARGETS = ("transition", "x0", "reference")


def squared_error(target: Tensor, prediction: Tensor) -> Tensor:
    """||target - prediction||^2, mean over elements, in float32 at least: (B, *) -> [B]."""
    return (target.float() - prediction.float()).square().flatten(1).mean(1)


def target_prediction(
    target: str,
    i: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    reference: Tensor,
    levels: Levels,
    kind: str,
) -> Tensor:
    """What the policy should predict at a state x_t = x_{t_i} of a trajectory; (B, *).

    Args:
        target: transition: the prediction that leads back to x_{t_{i-1}}, the observed transition.
            x0: the prediction that leads straight to the clean image.
            reference: the reference's own, whose gradient is exactly zero at the reference.
        i: index on the grid [B], from 1 on.
        states: the clean x_0, x_{t_{i-1}} and x_t.
        reference: the reference's prediction at x_t.
        levels: of the grid.
        kind: what the network predicts.
    """
    x_0, x_before, x_t = states
    if target == "transition":
        return prediction_between(x_before, levels[i - 1], x_t, levels[i], kind)
    if target == "x0":
        return prediction_between(x_0, levels[0], x_t, levels[i], kind)
    if target == "reference":
        return reference
    raise ValueError(f"unknown target {target!r}; one of {', '.join(TARGETS)}")


def dpo_logit(errors: PairErrors, beta: float, weight: Tensor | float = 1.0) -> Tensor:
    """-(beta / 2) k (s_w - s_l) with s = error - reference error; [P]."""
    s_w, s_l = errors.winner - errors.winner_ref, errors.loser - errors.loser_ref
    return -(beta / 2) * weight * (s_w - s_l)


def dpo(errors: PairErrors, beta: float, weight: Tensor | float = 1.0) -> LossOutput:
    """-log sigmoid of :func:`dpo_logit`; log 2 where the policy is the reference.

    On an inverted trajectory this is Inversion-DPO (2025, https://arxiv.org/abs/2507.11554); on
    fresh noise shared by the two images it is Diffusion-DPO (Wallace et al., 2023,
    https://arxiv.org/abs/2311.12908).
    """
    logit = dpo_logit(errors, beta, weight)
    return LossOutput(-F.logsigmoid(logit), logit.detach())


def released_sign(errors: PairErrors, beta: float, weight: Tensor | float = 1.0) -> LossOutput:
    """:func:`dpo` with the sign of the authors' released script: for reproduction only.

    With target ``reference`` it pushes the policy away from the reference on winners.
    """
    logit = -dpo_logit(errors, beta, weight)
    return LossOutput(-F.logsigmoid(logit), logit.detach())


def sft(errors: PairErrors, beta: float = 0.0, weight: Tensor | float = 1.0) -> LossOutput:
    """Denoising loss on the winners alone; the baseline that any preference method must beat.

    ``beta`` has no part in it, and there is no margin: it is zero.
    """
    return LossOutput(weight * errors.winner, torch.zeros_like(errors.winner).detach())


@dataclass(frozen=True)
class Objective:
    """A loss, where its x_t come from, and whether it compares with the reference.

    source: ``trajectory`` (cached inversion) or ``noise`` (fresh, shared by the pair).
    """

    loss: Callable[[PairErrors, float, Tensor | float], LossOutput]
    source: str
    preference: bool = True


OBJECTIVES: dict[str, Objective] = {
    "inversion_dpo": Objective(dpo, "trajectory"),
    "inversion_dpo_released": Objective(released_sign, "trajectory"),
    "diffusion_dpo": Objective(dpo, "noise"),
    "sft": Objective(sft, "noise", preference=False),
}


def implicit_accuracy(margin: Tensor) -> Tensor:
    """Share of pairs with a positive margin; exact ties count half."""
    return ((margin > 0).float() + 0.5 * (margin == 0).float()).mean()


def as_pair_errors(policy: Tensor, reference: Tensor) -> PairErrors:
    """Split errors [2P], winners first, into their four parts [P]."""
    if policy.shape != reference.shape or policy.shape[0] % 2:
        raise ValueError(f"need two equal [2P] tensors, got {policy.shape} and {reference.shape}")
    (w, l), (w_ref, l_ref) = torch.chunk(policy, 2), torch.chunk(reference, 2)
    return PairErrors(w, l, w_ref, l_ref)
