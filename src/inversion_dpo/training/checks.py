"""Checks of a run: refuse to start on nonsense, leave out broken steps, say what goes wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch

from inversion_dpo.maths.losses import as_pair_errors
from inversion_dpo.run.sharded import total
from inversion_dpo.training.health import Row
from inversion_dpo.training.session import Session, batch_of_step

logger = logging.getLogger(__name__)
NEAR = 0.1  # of log 2: what rounding may do to the first loss; a logit of rounding alone moves it
CHECKED_STEPS = 3  # LoRA's A only moves once B has: look after the third step


class StartupError(RuntimeError):
    """The run would train on nonsense; the message says why and what to change."""


class NotFiniteError(RuntimeError):
    """Too many steps gave a loss or gradient that is not finite; names steps, pairs, remedies."""


# ---------------------------------------------------------------- at the start


def check_step(session: Session, number: int, row: Row) -> None:
    """Run the checks that belong after a step, if any.

    Args:
        session: what is alive.
        number: of the step, from 0.
        row: its measurements.

    Raises:
        StartupError: nothing could be learned; says why and what to change.
    """
    plan, on_saddle = session.plan, session.plan.target == "reference"
    if not is_finite(row):
        return
    session.updates += 1
    if number == 0 and plan.loss.reference:
        exact = session.accelerator.mixed_precision == "no"
        exact = exact and session.model.pipeline.dtype == torch.float32
        check_is_reference(row, tolerance=1e-3 if exact else 5e-2)
        same = as_pair_errors(torch.ones(2), torch.ones(2))
        first = plan.loss.function(same, plan.settings).loss.item()
        if math.isclose(first, math.log(2), rel_tol=1e-6) and not plan.settings.sft_weight:
            check_is_log_2(row["loss"], exact=exact)
    if number == 0 and on_saddle:
        logger.warning(
            "objective.target=reference has exactly zero gradient while the policy is the "
            "reference: it starts on a saddle, and rounding noise decides where it goes. Kept to "
            "reproduce the paper's figure; use objective.target=x0 for results"
        )
    elif number == 0 and not row["grad_norm"] > 0:
        raise StartupError(
            f"the gradient at step 0 is {row['grad_norm']}: nothing would be learned. Check "
            "objective.beta, policy.target_modules, and that winner and loser images differ"
        )
    if not session.initial or session.updates < CHECKED_STEPS or on_saddle:
        return
    trainable, initial = session.policy.trainable(), session.initial
    if still := [n for n, p in trainable.items() if torch.equal(p.detach(), initial[n])]:
        raise StartupError(
            f"{len(still)} trainable tensors did not move in {CHECKED_STEPS} steps, e.g. "
            f"{still[0]}: they are not reached by the loss. Take them out of "
            "policy.target_modules, raise training.learning_rate if it is tiny, or raise "
            "model.resolution if an attention is left with one place"
        )
    session.initial = {}


def check_is_reference(row: Row, tolerance: float) -> None:
    """Compare the errors of policy and reference at step 0, where the loss is log 2.

    ``tolerance`` is relative to the reference's error: rounding of another batch or precision.
    """
    for side in [side for side in ("winner", "loser") if f"{side}_error" in row]:
        ours, theirs = row[f"{side}_error"], row[f"{side}_error_ref"]
        if not abs(ours - theirs) <= tolerance * max(theirs, 1e-3):
            raise StartupError(
                f"at step 0 the policy is not the reference: its error on {side}s is {ours:.6g}, "
                f"the reference's {theirs:.6g}, and the loss {row['loss']:.4f} instead of log 2 = "
                f"{math.log(2):.4f}. The cache or the adapter does not belong to this model: "
                "delete the cache folder and run again"
            )


def check_is_log_2(loss: float, *, exact: bool) -> None:
    """Look whether the loss of pairs at step 0 is log 2, within NEAR.

    Errors may differ by a few per cent, which a high beta turns into a large logit. In 16 bits that
    is rounding of mean zero, which makes a training noisier and not wrong.

    Args:
        loss: of step 0.
        exact: whether all is float32, where a difference is refused and not only warned of.
    """
    if abs(loss - math.log(2)) <= NEAR:
        return
    text = (
        f"at step 0 the loss is {loss:.4f}, where policy and reference are the same and it should "
        f"be log 2 = {math.log(2):.4f}, within {NEAR}: their predictions differ by rounding, and "
        "objective.beta magnifies that. Set model.dtype=float32, and "
        "training.mixed_precision=bf16 for its speed, or lower objective.beta"
    )
    if exact:
        raise StartupError(text)
    logger.warning(text)


# ---------------------------------------------------------------- during the run


def is_finite(row: Row) -> bool:
    """Say whether a step's loss and gradient can be used."""
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def leave_out(session: Session, number: int, row: dict[str, float], blamed: list[int]) -> None:
    """Count a step that could not be used, and name the first of the pairs it may be due to.

    Args:
        session: what is alive.
        number: of the step, from 0.
        row: its measurements, to which the count is added.
        blamed: pairs of this process whose own loss is not finite, counted among the usable ones
            from 0. If no process has any, the whole batch is named.

    Raises:
        NotFiniteError: more steps were left out than ``training.max_skipped``.
    """
    session.skipped += 1
    row["skipped"] = session.skipped
    plan, everywhere = session.plan, sorted(set(session.team.collect(blamed)))
    batch = batch_of_step(session.buckets, plan.batch_size, plan.seed, number)
    pairs = everywhere or [pair for pair, _ in batch]
    names = ", ".join(f"{pair} ({session.cache.digests[pair][:16]})" for pair in pairs[:5])
    more = f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
    text = (
        f"step {number} is left out: its loss is {row['loss']:g}, its gradient's norm "
        f"{row['grad_norm']:g}; pairs {names}{more}"
    )
    if session.skipped > session.max_skipped:
        raise NotFiniteError(
            f"{text}. {session.skipped} steps were left out, "
            f"training.max_skipped={session.max_skipped} may be: "
            "look at these pairs, lower training.learning_rate or objective.beta, or use "
            "training.mixed_precision=bf16 or no"
        )
    logger.warning(text)


def asked_to_stop(session: Session, stopping: Callable[[], bool]) -> bool:
    """Say whether any process has to stop: all must stop at the same step.

    A single process does not wait for the device.
    """
    if session.team.size == 1:
        return stopping()
    row = {"stop": float(stopping())}
    return total([(1.0, row)], session.accelerator.device, session.team)["stop"] > 0
