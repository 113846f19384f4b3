"""The small records that pass between the rooms of the house.

Shapes: B images, N inversion steps, (B, *) latents such as [B, C, h, w]. In a batch of pairs
the winners come first and the losers second, so B is twice the number of pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Levels:
    """Noise levels, x_t = alpha x_0 + sigma eps; float64 [K], or scalars for a single level.

    Diffusion models: alpha^2 + sigma^2 = 1, alpha^2 being ``alphas_cumprod``. Flow matching:
    alpha + sigma = 1. No noise is alpha = 1, sigma = 0.
    """

    alpha: Tensor
    sigma: Tensor

    def __getitem__(self, index: int | Tensor) -> Levels:
        return Levels(self.alpha[index], self.sigma[index])

    def to(self, device: torch.device | str) -> Levels:
        """The same levels on a device."""
        return Levels(self.alpha.to(device), self.sigma.to(device))


@dataclass(frozen=True)
class Grid:
    """The noise levels t_0 < t_1 < ... < t_N of an inversion; t_0 is the clean end.

    timesteps: [N+1], as the network takes them: int64, or float64 in flow matching.
    """

    timesteps: Tensor
    levels: Levels

    @property
    def steps(self) -> int:
        """N, the number of transitions."""
        return len(self.timesteps) - 1


@dataclass(frozen=True)
class Trajectory:
    """The states an inversion passes through, with the reference's prediction at each.

    states: x_{t_i}, [N+1, B, *]; states[0] is the clean latent.
    reference: the reference's prediction at (x_{t_i}, t_i, c), [N+1, B, *], of the kind that the
        network predicts: eps, v or a flow's velocity.
    """

    grid: Grid
    states: Tensor
    reference: Tensor


@dataclass(frozen=True)
class PairErrors:
    """Squared prediction errors, mean over a latent's elements; each [P], one per pair.

    ``winner`` and ``loser`` are the policy's, ``*_ref`` the frozen reference's.
    """

    winner: Tensor
    loser: Tensor
    winner_ref: Tensor
    loser_ref: Tensor


@dataclass(frozen=True)
class LossOutput:
    """Per-pair losses [P] with gradient; ``margin`` [P] is the detached logit, where there is one.

    A positive margin means that the policy, relative to the reference, favours the winner.
    """

    loss: Tensor
    margin: Tensor


@dataclass(frozen=True)
class TrainingPoints:
    """One state per image, winners first: all (B, *) but timesteps and scale [B].

    ``target`` is what the network should predict at x_t, ``reference`` what the reference does;
    ``scale`` is what their squared errors count for.
    """

    x_t: Tensor
    timesteps: Tensor
    scale: Tensor
    target: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Framing:
    """How an image came to its size; (height, width) in pixels.

    original: as stored. crop: (top, left) corner of what is seen, in pixels of the resized image;
    (0, 0) unless it was cropped. target: what the network sees.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]
