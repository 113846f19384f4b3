"""Read latents, conditions and trajectories from disk, in any order.

A cache is a folder named by the hash of everything that its content depends on. :mod:`.fill` fills
it, by :mod:`.writing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from inversion_dpo.maths.inversion import follow
from inversion_dpo.maths.records import Extent, Grid, NoisyStates
from inversion_dpo.maths.schedule import add_noise, error_scale
from inversion_dpo.maths.targets import target_prediction
from inversion_dpo.models.base import Condition
from inversion_dpo.run.disk import read_json
from inversion_dpo.trajectories.reading import SHARD, Block, Rows, Shards, climb
from inversion_dpo.trajectories.storing import form_of, twice
from inversion_dpo.trajectories.writing import EMPTY, MANIFEST

if TYPE_CHECKING:
    from inversion_dpo.data.transforms import Size

CPU = torch.device("cpu")
SMALL = 64 * 1024  # bytes of a batch


class TrajectoryCache:
    """Random access to the trajectories of numbered pairs.

    A shard holds, in the order winner, loser, winner, loser ...: ``clean`` [2P, *] (x_0),
    ``preference`` [P] (probability that the winner is the better one), ``framing.*`` [2P, ...],
    ``pair.source`` [P, *], the latents of what both images edit, if there are any; and
    ``condition.*`` [.., ...] of the prompts that no shard before has. All pairs of a shard have one
    size; so must those that are read at once. If there are trajectories, see :mod:`.storing`:
    ``predictions`` [P K, 2, *], ``moves``, ``noise`` [P, *] that was added; or, where only some
    states are kept, ``anchors`` [.., 2, *] and the grid indices ``steps`` [P, K]. On the paths line
    and known there is ``endpoint`` [2P, *] alone, each image's noise. A single image stands once.
    """

    def __init__(self, folder: Path, grid_at: Callable[[Size], Grid], kind: str) -> None:
        self.folder, self.kind = folder, kind
        manifest = read_json(folder / MANIFEST)
        key = manifest["key"]
        self.pairs: int = manifest["pairs"]
        self.counts: dict[str, int] = manifest["counts"]  # rows read, and rows left out by reason
        self.reference: str = key["model"][:16]  # hash of the reference's weights
        self.overlong: dict[str, int] = manifest["overlong"]  # captions cut, by tokenizer
        self.digests: list[str] = manifest["digests"]
        self.images: list[list[str]] = manifest.get("images", [])  # marks of each pair's
        self.errors: list[float] = manifest["errors"]  # of a reconstruction, the worse of a pair's
        self.extent = Extent(**key["extent"])  # of the trajectories
        guidances = key["guidance_scale"], key["reference_guidance"]
        self.form = form_of(self.extent, key["keep"], *guidances)
        self.endpoint: str = key.get("endpoint", "")
        self.single: bool = key.get("single", False)  # a row is one image, as winner and as loser
        self.sides = 2 - self.single  # images of a row
        self.inverted: bool = self.extent.last > 0  # or only encoded
        self.left_out: list[int] = manifest["left_out"]  # usable pairs, by place, not in here
        self.places: list[tuple[int, int]] = [(s, r) for s, r in manifest["places"]]
        self.texts: list[tuple[int, int]] = [(s, r) for s, r in manifest["texts"]]
        self.sizes: list[Size] = [(h, w) for h, w in manifest["sizes"]]  # of each shard's pictures
        self.grid_at = lru_cache(None)(grid_at)  # flow models shift theirs by the size
        self.grid = self.grid_at(self.sizes[0])
        self.of_shard: list[list[int]] = [[] for _ in self.sizes]  # its pairs, by row
        for shard, pair in sorted((s, p) for p, (s, _) in enumerate(self.places)):
            self.of_shard[shard].append(pair)
        self.device = CPU  # where batches go
        self._shards, self._swapped = Shards(folder), frozenset[int]()
        self._thread = ThreadPoolExecutor(1, "read ahead")
        self._ahead: dict[tuple[int, ...], tuple[list[int] | None, Future[Block]]] = {}

    def shard(self, number: int) -> Any:
        """Open a shard."""
        return safe_open(self.folder / SHARD.format(number), framework="pt")

    def swap(self, pairs: Sequence[int], share: float, seed: int) -> None:
        """Exchange winner and loser of a seeded share of the pairs: label noise, for controls.

        Args:
            pairs: of the training.
            share: in [0, 1], drawn for each pair by itself.
            seed: of the draw.
        """
        drawn = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < share
        self._swapped = frozenset(p for p, d in zip(pairs, drawn.tolist(), strict=True) if d)
        self._ahead.clear()  # of the images as they stood before

    def positions(self, low: int, high: int) -> tuple[int, int]:
        """Return first and last position of the states between grid indices low and high.

        If only some states of each pair were kept, they were drawn from these indices.
        """
        return (0, self.form.kept - 1) if self.form.kept else (low - 1, high - 1)

    def size(self, pair: int) -> Size:
        """Tell the (height, width) of a pair's pictures, in pixels."""
        return self.sizes[self.places[pair][0]]

    def liked(self, pairs: Sequence[int]) -> Tensor:
        """Tell of each single image whether it is liked, [P]; label noise turns it."""
        swapped = torch.tensor([pair in self._swapped for pair in pairs])
        return (self.preference(pairs).cpu() > 0.5) ^ swapped

    @cached_property
    def empty(self) -> Condition:
        """The condition of the empty prompt, [1, ...] each."""
        return load_file(self.folder / EMPTY)

    # ---- one tensor

    def of_images(self, name: str, pairs: Sequence[int]) -> Tensor:
        """Stack a tensor of both images (2P, *): winners of all pairs, then their losers."""
        return self._one(name, pairs, self._of_images).on(self.device)[name]

    def of_pairs(self, name: str, pairs: Sequence[int]) -> Tensor:
        """Stack a tensor that both images of a pair share, [P, ...]; label noise leaves it."""
        return self._one(name, pairs, self._of_pairs).on(CPU)[name]

    def preference(self, pairs: Sequence[int]) -> Tensor:
        """Tell the probability that the winner is the better one, [P]."""
        return self._preferences[list(pairs)]

    @cached_property
    def _preferences(self) -> Tensor:
        """Those of all pairs, read at once: most runs look at none, others at every one."""
        return self.of_pairs("preference", range(self.pairs))

    def region(self, pairs: Sequence[int]) -> Tensor | None:
        """Read the weights of latent pixels [P, 1, h, w], of mean 1; None if all count alike."""
        return self.of_pairs("region", pairs) if "region" in self._shards.places(0) else None

    # ---- a batch

    def read_ahead(self, pairs: Sequence[int], positions: list[int] | None) -> None:
        """Read a later batch in a thread: what the next functions would read for these pairs.

        A small batch is left to them, and the system told of it: to wake the thread takes longer
        than to read it.

        positions: of the states to be read, None for no states.
        """
        while len(self._ahead) > 1:  # this batch and the next
            del self._ahead[next(iter(self._ahead))]
        pairs = tuple(pairs)
        one = self._of_batch(pairs[:1], positions and positions[:1])
        if len(pairs) * self._shards.size(one) < SMALL:
            return self._shards.announce(self._of_batch(pairs, positions))
        waiting = self._thread.submit(lambda: self._read(self._of_batch(pairs, positions)))
        self._ahead[pairs] = positions, waiting

    def condition(self, pairs: Sequence[int]) -> Condition:
        """Read conditions of winners then losers, [2P, ...]: these share all but the framing."""
        block = self._held(pairs) or self._read(self._conditions(pairs))
        conditions: Condition = {}
        for name, rows in block.on(self.device).items():
            part, _, key = name.partition(".")
            if key:
                conditions[key] = rows if part == "framing" else torch.cat([rows, rows])
        return conditions

    def states(self, pairs: Sequence[int], positions: list[int], target: str) -> NoisyStates:
        """Read a state of each pair's two trajectories, with its target.

        States are made again from the predictions that lead to them, those of all pairs at once.

        Args:
            pairs: P pairs of one size.
            positions: of each pair's state, see :meth:`positions`.
            target: x0, transition or reference, see :func:`maths.targets.target_prediction`.
        """
        block = self._held(pairs, positions)
        if block is None:
            wanted = [*self._of_images("clean", pairs), *self._of_paths(pairs, positions)]
            block = self._read(wanted)
        t, host, count = block.on(self.device), block.on(CPU), len(pairs)
        t = twice(t) if self.sides == 1 else t
        grid = self.grid_at(self.size(pairs[0]))
        levels = grid.levels
        order, begins = climb([self.form.transitions(k) for k in positions])
        transitions = torch.tensor([self.form.transitions(k) for k in positions])
        level = torch.tensor(positions) + 1
        if self.form.kept:
            level = host["steps"][torch.arange(count), positions]
        start = (level - transitions)[order].repeat_interleave(2)
        image = [k + count * (s ^ (pairs[k] in self._swapped)) for k in order for s in (0, 1)]
        # of a stored row, its image in the batch
        here = torch.tensor(image).to(self.device, non_blocking=True)
        x_0, known = t["clean"], t["predictions"]
        x = t["anchors"].flatten(0, 1) if self.form.kept else x_0[here]
        below = x
        if "noise" in t:
            noise = t["noise"].repeat_interleave(2, 0)
            below = torch.where(_wide(start > 1, x), add_noise(x, noise, levels[start - 1]), x)
            x = add_noise(x, noise, levels[start])
        moves = t.get("moves", known)
        x_t, before = follow(
            x,
            [moves[a:b].flatten(0, 1) for a, b in pairwise(begins)],
            start,
            grid,
            self.kind,
            refined=self.extent.iterations > 0,
        )
        added = (transitions == 0)[order].repeat_interleave(2)
        before = torch.where(_wide(added, x), below, before)
        row = here.argsort()
        x_t, before = x_t[row], before[row]
        reference = known[-count:].flatten(0, 1).to(x_0)[row]
        level = level.repeat(2)
        return NoisyStates(
            level=level,
            x_t=x_t,
            timesteps=grid.timesteps[level],
            scale=error_scale(levels[level], self.kind).float(),
            target=target_prediction(
                target, level, (x_0, before, x_t), reference, levels, self.kind
            ),
            reference=reference,
        )

    # ---- which rows

    def _held(self, pairs: Sequence[int], positions: list[int] | None = None) -> Block | None:
        """Wait for a batch that was read ahead, if it is this one."""
        there, waiting = self._ahead.get(tuple(pairs), (None, None))
        return waiting.result() if waiting and positions in (None, there) else None

    def _one(
        self, name: str, pairs: Sequence[int], rows: Callable[[str, Sequence[int]], list[Rows]]
    ) -> Block:
        block = self._held(pairs)
        return block if block and name in block.places else self._read(rows(name, pairs))

    def _read(self, wanted: Sequence[Rows]) -> Block:
        return self._shards.read(wanted, pinned=self.device.type == "cuda")

    def _of_batch(self, pairs: Sequence[int], positions: list[int] | None) -> list[Rows]:
        rows = [*self._conditions(pairs), *self._of_images("clean", pairs)]
        rows += self._of_pairs("region", pairs) if "region" in self._shards.places(0) else []
        rows += self._of_images("endpoint", pairs) if self.endpoint else []
        return rows if positions is None else [*rows, *self._of_paths(pairs, positions)]

    def _of_pairs(self, name: str, pairs: Sequence[int]) -> list[Rows]:
        return [Rows(name, *self.places[pair], [k]) for k, pair in enumerate(pairs)]

    def _of_images(self, name: str, pairs: Sequence[int]) -> list[Rows]:
        places, rows = [self.places[pair] for pair in pairs], []
        for k, (pair, (shard, row)) in enumerate(zip(pairs, places, strict=True)):
            to = [k, k + len(pairs)][:: -1 if pair in self._swapped else 1]
            one = [Rows(name, shard, row, [place]) for place in to]
            rows += one if self.sides == 1 else [Rows(name, shard, 2 * row, to)]
        return rows

    def _conditions(self, pairs: Sequence[int]) -> list[Rows]:
        rows: list[Rows] = []
        for name in self._shards.places(0):
            if name.startswith("condition."):
                rows += [Rows(name, *self.texts[pair], [k]) for k, pair in enumerate(pairs)]
            elif name.startswith("framing."):
                rows += self._of_images(name, pairs)
            elif name.startswith("pair."):
                rows += self._of_pairs(name, pairs)
        return rows

    def _of_paths(self, pairs: Sequence[int], positions: Sequence[int]) -> list[Rows]:
        """List what makes the states at these positions, those after most transitions first.

        Of a transition, the predictions of all pairs that take it lie together.
        """
        form, rows = self.form, list[Rows]()
        order, begins = climb([form.transitions(k) for k in positions])
        for rank, k in enumerate(order):
            (shard, row), position = self.places[pairs[k]], positions[k]
            column, count = form.column(position), form.transitions(position)
            moves = [begins[j] + rank for j in range(count)]
            if form.apart:
                first = row * form.predictions + column
                rows.append(Rows("predictions", shard, first, [rank]))
                if count:
                    first = row * form.moves + (position // form.run if form.kept else 0)
                    rows.append(Rows("moves", shard, first, moves))
            else:
                first = row * form.predictions + column - count
                rows.append(Rows("predictions", shard, first, [*moves, begins[-1] + rank]))
            if form.kept:
                first = row * (form.kept // form.run) + position // form.run
                rows += [Rows("anchors", shard, first, [rank]), Rows("steps", shard, row, [k])]
            elif form.extent.start:
                rows.append(Rows("noise", shard, row, [rank]))
        return rows


def _wide(rows: Tensor, x: Tensor) -> Tensor:
    """Shape a flag of each image to broadcast over x (B, *)."""
    return rows.to(x.device, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))
