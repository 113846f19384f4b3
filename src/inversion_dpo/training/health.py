"""Look at a run's measurements as they come: complaints, status, accuracy; without torch."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from inversion_dpo.maths.intervals import wilson
from inversion_dpo.run.words import counted

logger = logging.getLogger(__name__)
Row = Mapping[str, float]
WINDOW = 30  # steps that are looked at together
EARLY = 10  # steps within which nothing should be perfect
# Times the reference's error on winners. A rise by half came with better images, one by 47 with
# ruined ones (benchmarks/health.py).
TOO_FAR = 2.0
FEW_PAIRS = 30  # held out: an accuracy of fewer is hardly one
# Mean relative gap of the reference's errors on the two images of a pair: .013 at most where both
# are one picture with faint noise, .26 and more in other pairs (the pairs of benchmarks/health.py).
SAME = 0.04
# Losses of a policy that is the reference: of sigmoid, KTO, IPO, hinge and DMPO.
STARTS = (math.log(2), 0.5, 0.25, 1.0, 1.6145)
UNDECIDED = 0.45  # mean gradient factor above which a tie of beta has not been felt
SAME_IMAGES = "same images"


@dataclass(frozen=True)
class Advice:
    """What a run shows, and what to do about it; no ``change`` where nothing need be done."""

    seen: str
    change: str = ""

    def __str__(self) -> str:
        return ". ".join(part for part in (self.seen, self.change) if part)


def beta_text(row: Row, raised: bool = True) -> str:
    """Word how to raise or lower beta: one that adapts, as the row tells, is replaced by a number.

    Args:
        row: of the last step.
        raised: or lowered.
    """
    if "beta" not in row:
        return f"{'raise' if raised else 'lower'} objective.beta"
    return f"set objective.beta to a number {'above' if raised else 'below'} auto's {row['beta']:g}"


def complaints(rows: Sequence[Row]) -> dict[str, Advice]:
    """Look at consecutive rows of a loss with a reference: advice for each kind of trouble."""
    rows = [r for r in rows if {"margin", "winner_error"} <= {*r} and math.isfinite(r["loss"])]
    early = [r["accuracy"] for r in rows if 0 < r["step"] <= EARLY and "accuracy" in r]
    found = {}
    if len(early) >= EARLY and min(early) == 1.0:
        found["perfect at once"] = Advice(
            f"every pair was ranked right in each of the first {EARLY} steps: winners and losers "
            "differ in something trivial (another model, size or compression), or the rate is far "
            "too high",
            "Run `inversion-dpo pairs check`, and lower training.learning_rate",
        )
    if len(rows) < WINDOW:
        return found
    tie = beta_text(rows[-1])
    keys = ("margin", "winner_error", "winner_error_ref", "drift")
    margin, winner, winner_ref, drift = (fmean(r[k] for r in rows) for k in keys)
    gaps = [r["pair_gap"] for r in rows if "pair_gap" in r]
    if gaps and fmean(gaps) < SAME:
        found[SAME_IMAGES] = Advice(
            "the two images of a pair are nearly the same: the reference's errors on winners and "
            f"losers differ by {fmean(gaps):.1%}. Such pairs hold no preference, and still change "
            "the images",
            "Leave out pairs that look alike (`inversion-dpo pairs check` counts them), unless "
            "they are meant to differ in a small part",
        )
    for start in STARTS:
        if not all(abs(r["loss"] - start) <= 2e-3 for r in rows):
            continue
        found["flat loss"] = Advice(
            f"the loss has stayed at {start:.3f}, its value at the reference, for {len(rows)} "
            "steps: the policy does not leave the reference",
            f"Raise training.learning_rate, or {tie}, or see whether winners and losers differ at "
            "all",
        )
    if margin > 0 and winner > TOO_FAR * winner_ref:
        found["loser only"] = Advice(
            f"the margin rises only through the losers: the error on winners is {winner:.4g}, more "
            f"than twice the reference's {winner_ref:.4g}. Images get worse while accuracy rises",
            f"Lower training.learning_rate or {tie}, and stop early",
        )
    if drift > winner_ref:
        found["drift"] = Advice(
            f"the policy has drifted: its distance to the reference, {drift:.4g}, exceeds the "
            f"reference's own error on winners, {winner_ref:.4g}",
            f"Lower training.learning_rate or training.steps, or {tie}"
            if fmean(r.get("gradient_factor", 0.0) for r in rows) < UNDECIDED
            else f"{tie[0].upper()}{tie[1:]}: at this one margins stay small, and nothing holds "
            "the policy. If that is not enough, lower training.learning_rate",
        )
    return found


def heldout_share(row: Row) -> tuple[float, float, float]:
    """Return the held-out accuracy of a row that has one, with the ends of its 95% interval.

    Of single images it is the mean of two shares, of those that are liked and those that are not.
    It varies as a share of 4 / (1/n + 1/m) trials does, for n of one kind and m of the other.
    """
    total = row["heldout_pairs"]
    liked = row.get("heldout_liked", 0.0)
    trials = 4 * liked * (total - liked) / total if 0 < liked < total else total
    return wilson(row["heldout_accuracy"], trials)


def heldout_units(row: Row) -> str:
    """Name what the held-out measurements of a row are of: pairs, or single images."""
    return "images" if "heldout_liked" in row else "pairs"


def accuracy_text(row: Row) -> str:
    """Write the held-out accuracy with its number of pairs or images, and Wilson's 95% interval."""
    share, low, high = heldout_share(row)
    total = counted(round(row["heldout_pairs"]), heldout_units(row).removesuffix("s"))
    return f"held-out accuracy {share:.2f} of {total} (95% interval {low:.2f} to {high:.2f})"


def status(row: Row) -> str:
    """Write one line on the state of a run, from a row with held-out measurements."""
    keys = (
        "loss",
        "winner_error",
        "loser_error",
        "margin",
        "gradient_factor",
        "beta",
        "drift",
        "grad_norm",
    )
    parts = [f"{key.replace('_', ' ')} {row[key]:.4g}" for key in keys if key in row]
    if "heldout_accuracy" in row:
        parts.append(accuracy_text(row))
    return f"step {row['step']:.0f}: " + ", ".join(parts)


class Watch:
    """Looks at a run's last rows as they come; every kind of complaint is made once."""

    def __init__(self) -> None:
        self._rows: deque[Row] = deque(maxlen=WINDOW)
        self._said: set[str] = set()

    def see(self, row: Row) -> None:
        """Take the row of a step; log its state if it was measured, and new complaints."""
        self._rows.append(row)
        if row["step"] == 0 or any(key.startswith("heldout_") for key in row):
            logger.info(status(row))
        for name, advice in complaints(tuple(self._rows)).items():
            if name not in self._said:
                self._said.add(name)
                logger.warning("step %d: %s", row["step"], advice)
