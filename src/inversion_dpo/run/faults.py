"""What can go wrong in a run that is otherwise right: being stopped, numbers that are not finite,
memory that runs out.
"""  # noqa: D205

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from inversion_dpo.run.processes import total

if TYPE_CHECKING:
    from inversion_dpo.training.recipe import Session

logger = logging.getLogger(__name__)
_SETTINGS = {
    "inversion": "lower inversion.batch_size (images at once)",
    "training": (
        "raise training.gradient_accumulation (training.batch_size stays what it is), set "
        "training.gradient_checkpointing=true, model.dtype=bfloat16, policy.kind=lora or "
        "training.optimizer=adafactor; then lower training.batch_size or model.resolution"
    ),
    "sampling": "lower evaluation.batch_size (images at once)",
}


class Terminated(BaseException):
    """The run was asked to stop, as schedulers do with SIGTERM, and everything is saved.

    As KeyboardInterrupt it is no Exception: whoever takes any error of a decoder or a download for
    damage must not take this one.
    """


class Waiting(Terminated):
    """Nothing is left to do before people have done what the message says."""


class NotFiniteError(RuntimeError):
    """Too many steps gave a loss or gradient that is not finite; names steps, pairs, remedies."""


class OutOfMemoryError(RuntimeError):
    """The device's memory ran out; names the settings that need less."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM changes nothing but the answer of what is given: whether it has come.

    Outside the main thread, where Python takes no signals, the answer is always no.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def raise_terminated(number: int, frame: Any) -> None:
    """A handler of SIGTERM for stages whose finished parts are on disk at any moment."""
    raise Terminated("stopped by SIGTERM; finished parts are saved")


@contextmanager
def memory_advice(stage: str) -> Iterator[None]:
    """Turn running out of memory in ``inversion``, ``training`` or ``sampling`` into advice."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_memory(error):
            raise
        first = (str(error) or "no more memory").splitlines()[0]
        raise OutOfMemoryError(f"out of memory in {stage} ({first}): {_SETTINGS[stage]}") from error


def _is_memory(error: RuntimeError) -> bool:
    """CUDA has a class of its own; the CPU's allocator only says so."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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
    """Whether any process was: they must stop at the same step."""
    return total({"stop": float(stopping())}, session.accelerator.device, session.team)["stop"] > 0
