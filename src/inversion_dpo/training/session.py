"""What is alive during a training, and the order in which it visits the pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from inversion_dpo.models.base import DiffusionModel
from inversion_dpo.run.processes import Team
from inversion_dpo.training.plan import Plan
from inversion_dpo.training.policy import Policy
from inversion_dpo.trajectories.cache import TrajectoryCache


@dataclass
class Session:
    """Everything that is alive during training.

    network: the prepared policy network, which every forward goes through. coefficients: whatever
    adapts, kept in checkpoints. skipped: steps whose loss or gradient was not finite; updates: the
    others. initial: the trainable tensors before step 0, until they are seen to move.
    """

    accelerator: Accelerator
    model: DiffusionModel
    policy: Policy
    network: nn.Module
    optimizer: Any
    cache: TrajectoryCache
    train_pairs: list[int]
    heldout_pairs: list[int]
    plan: Plan
    clip: float
    max_skipped: int
    keep_checkpoints: int
    team: Team = field(default_factory=Team)
    coefficients: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    updates: int = 0
    initial: dict[str, Tensor] = field(default_factory=dict)


def pairs_of_step(pairs: list[int], batch: int, seed: int, number: int) -> list[tuple[int, int]]:
    """List the global batch of a step as (pair, epoch): permutations laid end to end."""
    chosen: list[tuple[int, int]] = []
    while len(chosen) < batch:
        epoch, offset = divmod(number * batch + len(chosen), len(pairs))
        order = epoch_order(len(pairs), seed, epoch)[offset : offset + batch - len(chosen)]
        chosen += [(pairs[i], epoch) for i in order.tolist()]
    return chosen


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Shuffle an epoch; kept, for a million pairs take longer to shuffle than a step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)
