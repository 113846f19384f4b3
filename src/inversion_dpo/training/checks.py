"""Checks of a run: refuse to start on nonsense, leave out broken steps, say what goes wrong."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from inversion_dpo.run.processes import total
from inversion_dpo.training.session import Session

logger = logging.getLogger(__name__)
Row = Mapping[str, float]
CHECKED_STEPS = 3  # LoRA's A only moves once B has: look after the third step
WINDOW = 30  # steps that are looked at together
EARLY = 10  # steps within which nothing should be perfect


class StartupError(RuntimeError):
    """The run would train on nonsense; the message says why and what to change."""


class NotFiniteError(RuntimeError):
    """Too many steps gave a loss or gradient that is not finite; names steps, pairs, remedies."""


# ---------------------------------------------------------------- at the start


def check_step(session: Session, number: int, row: Row, before: dict[str, Tensor] | None) -> None:
    """Run the checks that belong after a step, if any; ``before`` is the policy at the start."""
    plan, precision = session.plan, session.accelerator.mixed_precision
    if not is_finite(row):
        return
    if number == 0 and plan.loss.reference:
        exact = precision == "no" and session.model.pipeline.dtype == torch.float32
        check_is_reference(row, tolerance=1e-3 if exact else 5e-2)
    if number == 0:
        check_gradient(row["grad_norm"], plan.on_saddle)
    if before is not None and number + 1 == CHECKED_STEPS and not plan.on_saddle:
        check_all_moved(before, session.policy.trainable())


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


def check_noise(variance: float, t_start: float) -> None:
    """Warn where the recovered x_T is not the noise that sampling starts from, of variance 1."""
    told = "the noise recovered by inversion has variance %.2f, where sampling starts from 1: %s"
    if variance <= 0.5:
        more = min(0.5, 2 * t_start or 0.1)
        remedy = (
            "encoded images are smoother than sampled latents. "
            f"inversion.t_start={more:g} adds the missing noise (it is {t_start:g})"
        )
        logger.warning(told, variance, remedy)
    if variance >= 2.0:
        less = f"lower inversion.t_start (it is {t_start:g}), " if t_start else ""
        remedy = (
            "the inversion leaves the paths that the model samples. "
            f"Try {less}more inversion.steps, inversion.guidance_scale=1, and look whether the "
            "autoencoder and the images fit the model"
        )
        logger.warning(told, variance, remedy)


# ---------------------------------------------------------------- during the run


def is_finite(row: Mapping[str, float]) -> bool:
    """Whether a step's loss and gradient can be used."""
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def skipped_text(step: int, row: Mapping[str, float], pairs: Sequence[str], shown: int = 5) -> str:
    """A step left out, and the pairs that it may be due to, of which the first are named."""
    names = ", ".join(pairs[:shown]) + (f" and {len(pairs) - shown} more" * (len(pairs) > shown))
    return (
        f"step {step} is left out: its loss is {row['loss']:g}, its gradient's norm "
        f"{row['grad_norm']:g}; pairs {names}"
    )


def leave_out(session: Session, number: int, row: dict[str, float], blamed: list[int]) -> None:
    """Count a step that could not be used and say so; NotFiniteError beyond the limit.

    blamed: pairs of this process whose own loss is not finite; if there are none on any, the whole
    batch is named. Pairs by number, among the usable ones from 0, and by digest.
    """
    session.skipped += 1
    row["skipped"] = session.skipped
    pairs = sorted(set(session.team.collect(blamed))) or [
        pair for pair, _ in session.batch_of(number)
    ]
    text = skipped_text(number, row, [f"{p} ({session.cache.digests[p][:16]})" for p in pairs])
    if session.skipped > session.max_skipped:
        raise NotFiniteError(
            f"{text}. {session.skipped} steps were left out, "
            f"training.max_skipped={session.max_skipped} may be: "
            "look at these pairs, lower training.learning_rate or objective.beta, or use "
            "training.mixed_precision=bf16 or no"
        )
    logger.warning(text)


def asked_to_stop(session: Session, stopping: Callable[[], bool]) -> bool:
    """Say whether any process has to stop: all must stop at the same step."""
    return total({"stop": float(stopping())}, session.accelerator.device, session.team)["stop"] > 0


def complaints(rows: Sequence[Row]) -> dict[str, str]:
    """What is wrong, by kind, of consecutive metrics rows of a loss with a reference."""
    rows = [r for r in rows if "margin" in r and math.isfinite(r["loss"])]
    early = [r["accuracy"] for r in rows if 0 < r["step"] <= EARLY]
    found = {}
    if len(early) >= EARLY and min(early) == 1.0:
        found["perfect at once"] = (
            f"every pair was ranked right in each of the first {EARLY} steps: winners and losers "
            "differ in something trivial (another model, size or compression), or "
            "training.learning_rate is far too high"
        )
    if len(rows) < WINDOW:
        return found
    keys = ("margin", "winner_error", "winner_error_ref", "drift")
    margin, winner, winner_ref, drift = (fmean(r[k] for r in rows) for k in keys)
    if all(abs(r["loss"] - math.log(2)) <= 2e-3 for r in rows):
        found["flat loss"] = (
            f"the loss has stayed at log 2 = 0.693 for {len(rows)} steps: the policy does not "
            "leave the reference. Raise training.learning_rate or objective.beta, or see whether "
            "winners and losers differ at all"
        )
    if margin > 0 and winner > 1.02 * winner_ref:
        found["loser only"] = (
            f"the margin rises only through the losers: the error on winners is {winner:.4g}, "
            f"above the reference's {winner_ref:.4g}. Samples may get worse while accuracy rises; "
            "lower training.learning_rate or raise objective.beta, and stop early"
        )
    if drift > winner_ref:
        found["drift"] = (
            f"the policy has drifted: its distance to the reference, {drift:.4g}, exceeds the "
            f"reference's own error on winners, {winner_ref:.4g}. Lower training.learning_rate or "
            "training.steps, or raise objective.beta"
        )
    return found


def status(row: Row) -> str:
    """One line on the state of a run, from a row with held-out measurements."""
    names = {
        "loss": "loss",
        "winner error": "winner_error",
        "loser error": "loser_error",
        "margin": "margin",
        "drift": "drift",
        "grad norm": "grad_norm",
        "held-out accuracy": "heldout_accuracy",
    }
    parts = [f"{name} {row[key]:.4g}" for name, key in names.items() if key in row]
    return f"step {row['step']:.0f}: " + ", ".join(parts)


class Watch:
    """Looks at a run's last rows as they come; every kind of complaint is made once."""

    def __init__(self) -> None:
        self._rows: deque[Row] = deque(maxlen=WINDOW)
        self._said: set[str] = set()

    def see(self, row: Row) -> None:
        """Take the row of a step; log its state if it was measured, and new complaints."""
        self._rows.append(row)
        if any(key.startswith("heldout_") for key in row):
            logger.info(status(row))
        for name, text in complaints(tuple(self._rows)).items():
            if name not in self._said:
                self._said.add(name)
                logger.warning("step %d: %s", row["step"], text)
