"""What can go wrong in a run that is otherwise right: being stopped, memory that runs out."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from inversion_dpo.run.words import counted

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
T = TypeVar("T")
PIXELS = 2**21  # of images at once outside a GPU: two of 1024 by 1024

_SETTINGS = {
    "inversion": "the model, or it with a single pair, does not fit: set model.offload=true, "
    "model.quantize=int8 or model.dtype=bfloat16, or lower model.resolution",
    "training": (
        "raise training.gradient_accumulation (training.batch_size stays what it is), set "
        "training.gradient_checkpointing=true, model.dtype=bfloat16, policy.kind=lora or "
        "training.optimizer=adafactor; for a LoRA also model.offload=true or model.quantize=int8; "
        "then lower model.resolution"
    ),
    "sampling": "lower evaluation.batch_size (images at once), or set model.offload=true",
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
        if not out_of_memory(error):
            raise
        first = (str(error) or "no more memory").splitlines()[0]
        raise OutOfMemoryError(f"out of memory in {stage} ({first}): {_SETTINGS[stage]}") from error


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the device's or the computer's memory ran out."""
    import torch

    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    said = str(error)  # by the CPU's allocator, and by Apple's
    return known or "can't allocate memory" in said or "MPS backend out of memory" in said


class Parts:
    """How many items are computed at once: all, and half as many each time memory runs out."""

    most = sys.maxsize

    def limit(self, size: tuple[int, int], device: torch.device) -> None:
        """Take few images outside a GPU: there the system ends a process that takes too much.

        Args:
            size: (height, width) of an image in pixels.
            device: where the network computes.
        """
        if device.type != "cuda":
            self.most = min(self.most, max(1, PIXELS // (2 * size[0] * size[1])))

    def of(self, count: int, work: Callable[[slice], T]) -> list[T]:
        """Do the work on items 0 to ``count``, in order and part by part.

        Raises:
            MemoryError or RuntimeError: memory runs out for a single item.
        """
        done, first = list[T](), 0
        while first < count:
            part = slice(first, min(first + self.most, count))
            try:
                done.append(work(part))
                first = part.stop
                continue
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or part.stop - first == 1:
                    raise
            # outside the handler, whose error holds on to what is to be freed
            self.most = (part.stop - first + 1) // 2
            most = counted(self.most, "pair")
            logger.warning("memory ran out: computing at most %s at once", most)
            free_memory()
        return done


def free_memory() -> None:
    """Give memory back that nothing holds any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
