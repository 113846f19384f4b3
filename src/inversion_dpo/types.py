"""The small records that pass between the rooms of the house.

Shapes: B images, N inversion steps, (B, *) latents such as [B, C, h, w]. In a batch of pairs
the winners come first and the losers second, so B is twice the number of pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The noise levels 0 = t_0 < t_1 < ... < t_N of an inversion.

    timesteps: int64 [N+1], the network's own timesteps.
    alpha_bar: float64 [N+1], cumulative signal power; alpha_bar[0] = 1 means "no noise".
    """

    timesteps: Tensor
    alpha_bar: Tensor

    @property
    def steps(self) -> int:
        """N, the number of transitions."""
        return len(self.timesteps) - 1


@dataclass(frozen=True)
class Trajectory:
    """The states an inversion passes through, with the reference's prediction at each.

    states: x_{t_i}, [N+1, B, *]; states[0] is the clean latent.
    noises: [N, B, *]; noises[i] is the eps that the transition between states i and i+1 used.
    reference: eps_ref(x_{t_i}, t_i, c), [N+1, B, *]. Under naive, unguided inversion
        noises[i] is reference[i].
    """

    grid: Grid
    states: Tensor
    noises: Tensor
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
    """One sampled state per image, winners first: all (B, *) but timesteps and alpha_bar [B].

    ``target`` is eps*; ``reference`` is eps_ref(x_t, t, c).
    """

    x_t: Tensor
    timesteps: Tensor
    alpha_bar: Tensor
    target: Tensor
    reference: Tensor
