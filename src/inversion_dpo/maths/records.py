"""Define the small records that the rooms of the house exchange.

Shapes: B images, N inversion steps, (B, *) latents such as [B, C, h, w]. In a batch of pairs
the winners come first and the losers second, so B is twice the number of pairs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

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

    def __getitem__(self, index: int | slice | Tensor) -> Levels:
        return Levels(self.alpha[index], self.sigma[index])

    def to(self, device: torch.device | str) -> Levels:
        """Move the levels to a device."""
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
class Extent:
    """Which states of an inversion are made, and how exactly.

    start: the states up to this index are x_0 with noise added; 0: none is.
    first: lowest state whose prediction is needed; last: highest state that is made, at most N.
    iterations: refinements of each inverted state; 0 is naive DDIM inversion.
    """

    start: int = 0
    first: int = 1
    last: int = sys.maxsize
    iterations: int = 0


WHOLE = Extent()


@dataclass(frozen=True)
class Trajectory:
    """The states an inversion passes through, with the reference's prediction at each.

    states: x_{t_i}, [N+1, B, *]; states[0] is the clean latent.
    reference: the reference's prediction at (x_{t_i}, t_i, c), [N+1, B, *], of the kind that the
        network predicts: eps, v or a flow's velocity.
    moves: the prediction that leads from each state to the next, [N, B, *].
    """

    grid: Grid
    states: Tensor
    reference: Tensor
    moves: Tensor


@dataclass(frozen=True)
class PairErrors:
    """The inputs of a loss for its pairs, [P] each; errors are means over a latent's elements.

    winner, loser: squared errors of the policy; ``*_ref``: of the frozen reference.
    winner_moved, loser_moved: squared distance between the predictions of policy and reference.
    overlap: inner product of the policy's residuals on winner and loser, without gradient.
    weight: k, the weight of the noise level.
    preference: probability that the winner is the better one; 1 for a hard label.
    winner_share, loser_share: of each image in the mean over its row: a half each in a pair. Of a
        single image 1 and 0 if it is liked, else 0 and 1; the errors of the other side are 0.
    baseline: mean of ``*_ref`` minus the policy's error over all images of the
        micro-batch, on all processes; no gradient.
    """

    winner: Tensor
    loser: Tensor
    winner_ref: Tensor
    loser_ref: Tensor
    winner_moved: Tensor
    loser_moved: Tensor
    overlap: Tensor
    weight: Tensor
    preference: Tensor
    winner_share: Tensor
    loser_share: Tensor
    baseline: Tensor


@dataclass(frozen=True)
class LossSettings:
    """The settings of a loss.

    beta: strength of the tie to the reference, > 0; each loss scales it in its own way.
    link: function of the logit: sigmoid, hinge or ipo.
    label_smoothing: assumed share of wrong labels, in [0, 0.5).
    anchor, sft_weight: weights of the terms beside the loss, see ``losses.with_terms``.
    liked, disliked: weights of the two kinds of images, see ``losses.balance``.
    """

    beta: float
    link: str = "sigmoid"
    label_smoothing: float = 0.0
    anchor: float = 0.0
    sft_weight: float = 0.0
    liked: float = 1.0
    disliked: float = 1.0


@dataclass(frozen=True)
class LossOutput:
    """Per-pair losses [P] with gradient; ``margin`` [P] is the detached logit, where there is one.

    A positive margin means that the policy, relative to the reference, favours the winner.
    """

    loss: Tensor
    margin: Tensor


@dataclass(frozen=True)
class NoisyStates:
    """One state x_t for each image, winners first; (B, *) or [B].

    level: index [B] of the noise level, on the grid or (path ``noise``) in the schedule.
    timesteps: [B], as the network takes them. target: (B, *), what the network should predict.
    reference: (B, *), what the reference predicts. scale: [B], the weight of their squared errors.
    evaluations: of the network per image, to make the state.
    """

    level: Tensor
    x_t: Tensor
    timesteps: Tensor
    scale: Tensor
    target: Tensor
    reference: Tensor
    evaluations: int = 0

    def first(self, count: int) -> NoisyStates:
        """Take the states of the first images."""
        taken: dict[str, Any] = {k: v[:count] for k, v in vars(self).items() if k != "evaluations"}
        return replace(self, **taken)

    def to(self, device: torch.device) -> NoisyStates:
        """Move the states to a device, without waiting for it."""
        tensors: dict[str, Any] = {
            k: v.to(device, non_blocking=True)
            for k, v in vars(self).items()
            if isinstance(v, Tensor)
        }
        return replace(self, **tensors)
