"""Choose what of a trajectory is stored: latents, and predictions in the fewest bits.

A network in bfloat16 predicts numbers of 16 bits. From x_0 and these the states are made again to
the bit, see :func:`inversion_dpo.maths.inversion.follow`; so no state need be stored. What a state
would lose in 16 bits is many times its distance to the prediction at the clean end, so states that
are stored, where only some are kept, are float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from inversion_dpo.maths.records import Extent, Trajectory
from inversion_dpo.models.base import OVERFLOW, ModelError

if TYPE_CHECKING:
    from inversion_dpo.data.source import Pair

PREDICTIONS = ("predictions", "moves")
STEPS = ("anchors", *PREDICTIONS)  # [.., 2, *], of both images of a pair; [.., 1, *] of one


@dataclass(frozen=True)
class Form:
    """Which numbers of a pair are stored, and where; :func:`form_of` makes it.

    extent: of the trajectories. kept: states of each pair, 0 for all from ``extent.first`` on.
    apart: the predictions that the path followed are others than those that training reads: the
    path is refined, or has another guidance. low: the lowest level whose prediction is stored, if
    all states are. run: kept states that follow one another, of which the first is stored; states
    with noise added do not follow from one another. latents: of a pair in float32: x_0, added noise
    and kept states, of both images. predictions: of an image, those that training reads. moves:
    those that only its path follows.
    """

    extent: Extent
    kept: int
    apart: bool
    low: int
    run: int
    latents: int
    predictions: int
    moves: int

    def column(self, position: int) -> int:
        """Find the prediction at a state among those of its image; ValueError if none is stored."""
        column = position if self.kept else position + 1 - self.low
        if not 0 <= column < self.predictions:
            raise ValueError(f"there is no prediction of state {position + 1} in the cache")
        return column

    def transitions(self, position: int) -> int:
        """Count the transitions that lead to a state from what is stored."""
        return position % self.run if self.kept else max(0, position + 1 - self.extent.start)

    def size(self, latent: int, bits: tuple[int, int]) -> int:
        """Compute the bytes of a pair without its condition.

        Args:
            latent: numbers of a latent.
            bits: of a stored prediction, and of one that the path follows.
        """
        if not self.extent.last:
            return 8 * latent
        known = self.predictions * bits[0] + self.moves * bits[1]
        return latent * (4 * self.latents + known // 4)


def endpoint_size(latent: int) -> int:
    """Compute the bytes of a pair that keeps x_0 and one noise of each image, in 16 bits."""
    return 2 * 2 * 2 * latent


def smallest(t: Tensor) -> Tensor:
    """Return the tensor in bfloat16 or float16 if that holds every number exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        small = t.to(dtype)
        if torch.equal(small.to(t.dtype), t):
            return small
    return t


def packed(
    path: Trajectory, form: Form, noise: Tensor | None, steps: Tensor | None, *, sides: int
) -> dict[str, Tensor]:
    """Take out of a path [.., 2P, *] the rows that are stored.

    Args:
        path: of P pairs, winner and loser in turn; or of P single images.
        form: which numbers.
        noise: that was added (2P, *), the same for both images of a pair.
        steps: the kept states [P, K], if not all are.
        sides: images of a pair, 2; or 1.
    """
    every = path.states, path.reference, path.moves
    states, known, moves = (t.unflatten(1, (-1, sides)).transpose(0, 1) for t in every)
    found = {}
    if steps is None:
        found["predictions"] = known[:, form.low :]
        if form.moves:
            found["moves"] = moves[:, form.extent.start :]
        if noise is not None:
            found["noise"] = noise[::sides, None]
    else:
        pairs, first = torch.arange(len(steps))[:, None], steps[:, :: form.run]
        found |= {"anchors": states[pairs, first], "predictions": known[pairs, steps]}
        if form.moves:
            found["moves"] = moves[pairs, first]
    rows = {k: t.flatten(0, 1) for k, t in found.items()}
    rows = {k: smallest(t) if k in PREDICTIONS else t for k, t in rows.items()}
    return rows if steps is None else rows | {"steps": steps}


def twice(t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give both images of a pair what is stored of the one that they are."""
    return {k: v.expand(-1, 2, *v.shape[2:]) if k in STEPS else v for k, v in t.items()}


def form_of(
    extent: Extent, keep: Sequence[int] | None, guidance: float, reference_guidance: float
) -> Form:
    """Choose the form from what a cache's key has.

    Args:
        extent: of the trajectories.
        keep: k, lowest and highest index of the kept states; None keeps all.
        guidance: that the path follows.
        reference_guidance: of the predictions that training reads.
    """
    apart = extent.iterations > 0 or guidance != reference_guidance
    kept = min(keep[0], keep[2] + 1 - keep[1]) if keep else 0
    start, first, last = extent.start, extent.first, extent.last
    low = first if apart else min(start, first)
    run = 1 if kept % 2 or start > first else 2
    if kept:
        latents, predictions, moves = 2 + 2 * kept // run, kept, kept // 2 * (run == 2)
    else:
        latents, predictions, moves = 2 + bool(start), last + 1 - low, max(0, last - start)
    return Form(extent, kept, apart, low, run, latents, predictions, moves * apart)


def kept_steps(numbers: Sequence[int], form: Form) -> Tensor:
    """Draw the grid indices [P, K] to store for each pair, stratified.

    The indices ``extent.first`` to ``last`` are cut into strata of equal size. From each a pair's
    number draws ``form.run`` indices that follow one another.
    """
    low, run, count = form.extent.first, form.run, form.extent.last + 1 - form.extent.first
    edges = np.linspace(0, count // run, form.kept // run + 1).round().astype(int)
    rows = []
    for number in numbers:
        rng = np.random.default_rng(number)
        first = [low + run * int(rng.integers(a, b)) for a, b in itertools.pairwise(edges)]
        shift = int(rng.integers(count % run + 1))  # of an odd number, one index is left over
        rows.append([i + shift + j for i in first for j in range(run)])
    return torch.tensor(rows)


def check_finite(shard: dict[str, Tensor], pairs: list[Pair]) -> None:
    """Refuse a shard with values that are not finite; ModelError names the image and the remedy."""
    for (pair,) in not_finite(shard["pair.source"], 1) if "pair.source" in shard else ():
        raise ModelError(f"{pairs[pair].where}, source: its latent has {OVERFLOW}")
    of_images = ("clean", "endpoint")
    for name in (*of_images, "anchors", *PREDICTIONS):
        if name not in shard:
            continue
        rows = shard[name].unflatten(0, (len(pairs), -1)) if name in of_images else shard[name]
        for row, side in not_finite(rows, 2):
            where = pairs[row // (len(rows) // len(pairs))].where
            what = "latent" if name == "clean" else "inverted path"
            raise ModelError(f"{where}, {('winner', 'loser')[side]}: its {what} has {OVERFLOW}")


def not_finite(t: Tensor, axes: int) -> list[list[int]]:
    """List the places along the first axes where a tensor has values that are not finite."""
    return (~t.isfinite().flatten(axes).all(axes)).nonzero().tolist()
