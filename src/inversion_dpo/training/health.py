"""Known ways for a training to go wrong, read off its metrics and said in plain words."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

logger = logging.getLogger(__name__)
Row = Mapping[str, float]
WINDOW = 30  # steps that are looked at together
EARLY = 10  # steps within which nothing should be perfect


def flat_loss(rows: Sequence[Row]) -> str | None:
    """The loss has not left log 2 for a whole window."""
    losses = [r["loss"] for r in rows]
    if len(rows) < WINDOW or any(abs(x - math.log(2)) > 2e-3 for x in losses):
        return None
    return (
        f"the loss has stayed at log 2 = 0.693 for {len(rows)} steps: the policy does not leave "
        "the reference. Raise training.learning_rate or objective.beta, or see whether winners "
        "and losers differ at all"
    )


def loser_only(rows: Sequence[Row]) -> str | None:
    """A margin that comes from losers getting worse, while winners get worse too."""
    if len(rows) < WINDOW or fmean(r["margin"] for r in rows) <= 0:
        return None
    ours, theirs = (fmean(r[k] for r in rows) for k in ("winner_error", "winner_error_ref"))
    if ours <= 1.02 * theirs:
        return None
    return (
        f"the margin rises only through the losers: the error on winners is {ours:.4g}, above the "
        f"reference's {theirs:.4g}. Samples may get worse while accuracy rises; lower "
        "training.learning_rate or raise objective.beta, and stop early"
    )


def drifted(rows: Sequence[Row]) -> str | None:
    """The policy is further from the reference than the reference is from the data."""
    if len(rows) < WINDOW:
        return None
    drift, error = (fmean(r[k] for r in rows) for k in ("drift", "winner_error_ref"))
    if drift <= error:
        return None
    return (
        f"the policy has drifted: its distance to the reference, {drift:.4g}, exceeds the "
        f"reference's own error on winners, {error:.4g}. Lower training.learning_rate or "
        "training.steps, or raise objective.beta"
    )


def perfect_at_once(rows: Sequence[Row]) -> str | None:
    """All pairs are told apart before anything could be learned."""
    early = [r["accuracy"] for r in rows if 0 < r["step"] <= EARLY]
    if len(early) < EARLY or min(early) < 1.0:
        return None
    return (
        f"every pair was ranked right in each of the first {EARLY} steps: winners and losers "
        "differ in something trivial (another model, size or compression), or "
        "training.learning_rate is far too high"
    )


CHECKS: dict[str, Callable[[Sequence[Row]], str | None]] = {
    "flat loss": flat_loss,
    "loser only": loser_only,
    "drift": drifted,
    "perfect at once": perfect_at_once,
}


def complaints(rows: Sequence[Row]) -> dict[str, str]:
    """What is wrong, by kind, of consecutive metrics rows of an objective with a reference."""
    compared = [r for r in rows if "margin" in r and math.isfinite(r["loss"])]
    found = {name: check(compared) for name, check in CHECKS.items()}
    return {name: text for name, text in found.items() if text}


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
