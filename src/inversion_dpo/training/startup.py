"""Start-up checks: refuse to train on nonsense, and say why."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
CHECKED_STEPS = 3  # LoRA's A only moves once B has: look after the third step


class StartupError(RuntimeError):
    """The run would train on nonsense; the message says why and what to change."""


def check_is_reference(row: Mapping[str, float], tolerance: float) -> None:
    """At step 0 the policy's errors are the reference's, so that the loss is log 2.

    tolerance is relative to the reference's error: rounding of another batch or precision.
    """
    for side in ("winner", "loser"):
        ours, theirs = row[f"{side}_error"], row[f"{side}_error_ref"]
        if not abs(ours - theirs) <= tolerance * max(theirs, 1e-3):
            raise StartupError(
                f"at step 0 the policy is not the reference: its error on {side}s is {ours:.6g}, "
                f"the reference's {theirs:.6g}, and the loss {row['loss']:.4f} instead of log 2 = "
                f"{math.log(2):.4f}. The cache or the adapter does not belong to this model: "
                "delete the cache folder and run again"
            )


def check_gradient(norm: float, saddle: bool) -> None:
    """The first gradient is not zero; on the known saddle of ``reference`` warn instead."""
    if saddle:
        logger.warning(
            "objective.target=reference has exactly zero gradient while the policy is the "
            "reference: it starts on a saddle, and rounding noise decides where it goes. Kept to "
            "reproduce the paper's figure; use objective.target=x0 for results"
        )
    elif not norm > 0:
        raise StartupError(
            f"the gradient at step 0 is {norm}: nothing would be learned. Check objective.beta, "
            "policy.target_modules, and that winner and loser images differ"
        )


def check_all_moved(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    """No trainable tensor is bit for bit where it was."""
    still = [n for n, p in now.items() if torch.equal(p.detach(), before[n])]
    if still:
        raise StartupError(
            f"{len(still)} trainable tensors did not move in {CHECKED_STEPS} steps, e.g. "
            f"{still[0]}: they are not reached by the loss. Take them out of "
            "policy.target_modules, raise training.learning_rate if it is tiny, or raise "
            "model.resolution if an attention is left with one place"
        )


def check_noise(variance: float) -> None:
    """Warn where the recovered x_T is not the noise that sampling starts from, of variance 1."""
    if not 0.5 < variance < 2.0:
        logger.warning(
            "the noise recovered by inversion has variance %.2f, where sampling starts from 1: the "
            "trajectories lie off the paths that the model samples. Encoded images are smoother "
            "than sampled latents; inversion.t_start=0.1 adds the missing noise",
            variance,
        )
