"""The processes of one launch, and what they need of each other.

Started by ``accelerate launch`` or ``torchrun`` there are several, otherwise one. All of them share
one file system. torch and accelerate are imported when a process is first looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


@dataclass(frozen=True)
class Team:
    """Which of how many processes this is, and where it computes; the first one writes."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=_cpu)

    @property
    def main(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def collect(self, found: list[Any]) -> list[Any]:
        """Join the lists of all processes, the same in each."""
        if self.size == 1:
            return found
        from accelerate.utils import gather_object

        return list(gather_object(found))


def current_team() -> Team:
    """Find the processes of this launch.

    PartialState must be told of a CPU: there, every process of ``torchrun`` would take itself for
    the only one. Apple's GPU (mps) has no float64, which the inversion measures in: a CPU, too.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    alone = device is None or device.type == "mps"
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU", alone))
    return Team(state.process_index, state.num_processes, state.device)


def share(items: Sequence[T], parts: int, part: int) -> Sequence[T]:
    """Take the ``part``-th of ``parts`` runs of consecutive items, all of nearly equal length."""
    return items[len(items) * part // parts : len(items) * (part + 1) // parts]
