"""Random draws of a training step, each pair's from a generator of its own.

What a pair draws depends on the run's seed, the step and the pair's place in the global batch, and
on nothing else: not on the number of processes, nor on the parts that a batch is computed in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Generators = Sequence[torch.Generator]  # one of each pair


def generator_for(*key: int) -> torch.Generator:
    """Make a generator on the CPU from non-negative numbers, of which any change changes it."""
    # torch's Mersenne Twister takes 32 bits of a seed: they have to be mixed beforehand
    word = np.random.SeedSequence(key).generate_state(1)[0]
    return torch.Generator().manual_seed(int(word))


def integers(low: int, high: int, generators: Generators) -> Tensor:
    """Draw one of low..high, both included, from each generator; int64 [B].

    Args:
        low: the smallest number.
        high: the largest number.
        generators: B of them, on the CPU.
    """
    drawn = [torch.randint(low, high + 1, (1,), generator=g) for g in generators]
    return torch.cat(drawn)


def normal(shape: Sequence[int], generators: Generators) -> Tensor:
    """Draw standard normal values of the given shape from each generator; [B, *shape]."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])
