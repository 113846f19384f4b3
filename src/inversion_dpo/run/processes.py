"""The processes of one launch, and what they need of each other.

Started by ``accelerate launch`` or ``torchrun`` there are several, otherwise one. All of them share
one file system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """Which of how many processes this is, and where it computes; the first one writes."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def main(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.size > 1:
            PartialState().wait_for_everyone()

    def collect(self, found: list[Any]) -> list[Any]:
        """Join the lists of all processes, the same in each."""
        return list(gather_object(found)) if self.size > 1 else found


def current_team() -> Team:
    """Find the processes of this launch.

    PartialState alone does not look at ACCELERATE_USE_CPU, as Accelerator does: on CPUs every
    process would take itself for the only one.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    return Team(state.process_index, state.num_processes, state.device)


def share(items: Sequence[T], parts: int, part: int) -> Sequence[T]:
    """Take the ``part``-th of ``parts`` runs of consecutive items, all of nearly equal length."""
    return items[len(items) * part // parts : len(items) * (part + 1) // parts]


def whole(tensor: Tensor) -> Tensor:
    """Put together a tensor that FSDP has cut; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detach tensors, whole and on the CPU; every process must call it."""
    return {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """Take this process's part of a whole tensor, cut and placed as ``like`` is."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def is_cut(tensors: Mapping[str, Tensor]) -> bool:
    """Say whether FSDP has cut any of the tensors."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def settle(network: nn.Module) -> None:
    """Have FSDP put its outermost parameters away, which it keeps whole after a forward alone."""
    inner = getattr(network, "_orig_mod", network)
    if isinstance(inner, FSDPModule):
        inner.reshard()


def total(
    rows: Sequence[tuple[float, Mapping[str, Tensor | float]]],
    device: torch.device,
    team: Team,
    same: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Sum measurements by key, each times its weight, over all processes; waits once.

    Args:
        rows: of this process, at least one, all with the same keys: weight and measurements.
        device: which the processes send from.
        team: all of them must call this.
        same: measurements that are the same in every process, and need no sum.
    """
    keys, same = list(rows[0][1]), same or {}
    cells = [r[k] for _, r in rows for k in keys] + list(same.values())
    sent = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device) for v in cells])
    sent = (sent.cpu() if team.size == 1 else sent).double()
    table = sent[: len(rows) * len(keys)].reshape(len(rows), -1)
    summed = torch.zeros_like(table[0])
    for (weight, _), row in zip(rows, table, strict=True):
        summed += weight * row
    if team.size > 1:
        torch.distributed.all_reduce(summed)
    values = torch.cat([summed, sent[table.numel() :]])
    return dict(zip([*keys, *same], values.tolist(), strict=True))
