"""Steps that are left out because their numbers are not finite, and requests to stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from inversion_dpo.run.processes import total

if TYPE_CHECKING:
    from inversion_dpo.training.recipe import Session

logger = logging.getLogger(__name__)


class NotFiniteError(RuntimeError):
    """Too many steps gave a loss or gradient that is not finite; names steps, pairs, remedies."""


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


def leave_out(
    session: Session,
    step: int,
    row: dict[str, float],
    blamed: list[int],
    batch: list[int],
    limit: int,
) -> None:
    """Count a step that could not be used and say so; NotFiniteError beyond the limit.

    blamed: pairs of this process whose own loss is not finite; if there are none on any, the whole
    batch is named. Pairs by number, among the usable ones from 0, and by digest.
    """
    session.skipped += 1
    row["skipped"] = session.skipped
    pairs = sorted(set(session.team.collect(blamed))) or batch
    text = skipped_text(step, row, [f"{p} ({session.cache.digests[p][:16]})" for p in pairs])
    if session.skipped > limit:
        raise NotFiniteError(
            f"{text}. {session.skipped} steps were left out, training.max_skipped={limit} may be: "
            "look at these pairs, lower training.learning_rate or objective.beta, or use "
            "training.mixed_precision=bf16 or no"
        )
    logger.warning(text)


def asked_to_stop(session: Session, stopping: Callable[[], bool]) -> bool:
    """Say whether any process has to stop: all must stop at the same step."""
    return total({"stop": float(stopping())}, session.accelerator.device, session.team)["stop"] > 0
