"""What can go wrong in a run that is otherwise right: being stopped, memory that runs out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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


class OutOfMemoryError(RuntimeError):
    """The device's memory ran out; names the settings that need less."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether SIGTERM has come, and hold its effect back inside.

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
    """Handle SIGTERM in stages whose finished parts are on disk at any moment."""
    raise Terminated("stopped by SIGTERM; finished parts are saved")


@contextmanager
def memory_advice(stage: str) -> Iterator[None]:
    """Turn running out of memory in ``inversion``, ``training`` or ``sampling`` into advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        import torch

        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "can't allocate memory" not in str(error):  # the CPU's allocator says so
            raise
        first = (str(error) or "no more memory").splitlines()[0]
        raise OutOfMemoryError(f"out of memory in {stage} ({first}): {_SETTINGS[stage]}") from error
