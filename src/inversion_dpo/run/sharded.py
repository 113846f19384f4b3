"""Tensors that FSDP has cut over the processes, and sums over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from inversion_dpo.run.processes import Team


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
    if isinstance(network, FSDPModule):
        network.reshard()


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
