"""Store latents, conditions and trajectories on disk, and read them in any order.

A cache is a folder named by the hash of everything that its content depends on. It holds sharded
safetensors, written whole or not at all, and ``manifest.json`` last. :mod:`.fill` fills it.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from inversion_dpo.maths.records import Extent, Grid, NoisyStates
from inversion_dpo.maths.schedule import error_scale
from inversion_dpo.maths.targets import target_prediction
from inversion_dpo.models.base import Condition, joined
from inversion_dpo.run.disk import atomic_save, atomic_text, sha256_of
from inversion_dpo.run.processes import Team

if TYPE_CHECKING:
    from inversion_dpo.data.transforms import Size

logger = logging.getLogger(__name__)
OPEN = 1024  # shards held open: each is a mapping, and Linux allows a process 65,530
MANIFEST, EMPTY, SHARD = "manifest.json", "empty.safetensors", "shard-{:05d}.safetensors"


def damaged_files(folder: Path, team: Team | None = None) -> list[Path]:
    """List files of a finished cache that are missing or differ from the manifest's checksum.

    With a team each process reads its share of the files, and all get the whole list.
    """
    team = team or Team()
    listed = sorted(json.loads((folder / MANIFEST).read_text())["shards"].items())
    mine = [(folder / name, digest) for name, digest in listed[team.rank :: team.size]]
    damaged = [str(p) for p, digest in mine if not p.exists() or sha256_of(p) != digest]
    return [Path(p) for p in sorted(team.collect(damaged))]


def is_whole(folder: Path, team: Team) -> bool:
    """Tell whether a cache is finished and every file intact; name and delete damaged ones."""
    finished = (folder / MANIFEST).exists()
    damaged = damaged_files(folder, team) if finished else []
    if damaged and team.main:
        for path in damaged:
            logger.warning("%s is missing or damaged (checksum differs): making it again", path)
            path.unlink(missing_ok=True)
        (folder / MANIFEST).unlink()
    team.wait()
    return finished and not damaged


def is_intact(path: Path, digests: list[str]) -> bool:
    """Tell whether a shard of these pairs was finished and has its checksum."""
    try:
        entry = json.loads(path.with_suffix(".json").read_text())
        same = entry["digests"] == digests and entry["sha256"] == sha256_of(path)
    except (FileNotFoundError, ValueError, KeyError):
        return False
    if not same:
        logger.warning("%s is damaged or of other pairs: making it again", path)
    return bool(same)


def write_shard(path: Path, tensors: dict[str, Tensor], entry: dict[str, Any]) -> None:
    """Write a shard, then its part of the manifest: without one it counts as missing."""
    atomic_save(tensors, path)
    atomic_text(json.dumps(entry | {"sha256": sha256_of(path)}), path.with_suffix(".json"))


def write_manifest(folder: Path, about: dict[str, Any], names: Sequence[str]) -> None:
    """Join the parts of all shards, whichever process wrote them, and what is known besides.

    ``digests``, ``errors`` and ``places``, each pair's [shard, row], are in the order of the
    numbers of pairs; ``sizes`` has one (height, width) for each shard.
    """
    entries = [json.loads((folder / name).with_suffix(".json").read_text()) for name in names]
    cut: Counter[str] = Counter()
    for entry in entries:
        cut.update(entry["overlong"])
    rows = sorted(
        (number, [shard, row])
        for shard, entry in enumerate(entries)
        for row, number in enumerate(entry["pairs"])
    )
    places = [place for _, place in rows]
    manifest = about | {
        "pairs": len(places),
        "overlong": dict(cut),
        "digests": [entries[shard]["digests"][row] for shard, row in places],
        "errors": [e for s, r in places for e in entries[s]["errors"][r : r + 1]],
        "places": places,
        "sizes": [entry["size"] for entry in entries],
        "shards": {n: e["sha256"] for n, e in zip(names, entries, strict=True)},
    }
    if (folder / EMPTY).exists():
        manifest["shards"][EMPTY] = sha256_of(folder / EMPTY)
    atomic_text(json.dumps(manifest, indent=1), folder / MANIFEST)


class TrajectoryCache:
    """Random access to the trajectories of numbered pairs.

    A shard holds, in the order winner, loser, winner, loser ...: ``clean`` [2P, *] (x_0),
    ``preference`` [P] (probability that the winner is the better one), ``condition.*`` [P, ...] and
    ``framing.*`` [2P, ...]. All pairs of a shard have one size; so must those that are read at
    once. If there are trajectories, ``states`` and ``reference`` [2P, K, *] at
    the grid indices ``steps`` [P, K].
    """

    def __init__(self, folder: Path, grid_at: Callable[[Size], Grid], kind: str) -> None:
        self.folder, self.kind = folder, kind
        manifest = json.loads((folder / MANIFEST).read_text())
        key = manifest["key"]
        self.pairs: int = manifest["pairs"]
        self.counts: dict[str, int] = manifest["counts"]  # rows read, and rows left out by reason
        self.reference: str = key["model"][:16]  # hash of the reference's weights
        self.overlong: dict[str, int] = manifest["overlong"]  # captions cut, by tokenizer
        self.digests: list[str] = manifest["digests"]
        self.errors: list[float] = manifest["errors"]  # of a reconstruction, the worse of a pair's
        self.all_steps: bool = key["keep"] is None
        self.extent = Extent(**key["extent"])  # of the trajectories
        self.inverted: bool = self.extent.last > 0  # or only encoded
        self.left_out: list[int] = manifest["left_out"]  # usable pairs, by place, not in here
        self.places: list[tuple[int, int]] = [(s, r) for s, r in manifest["places"]]
        self.sizes: list[Size] = [(h, w) for h, w in manifest["sizes"]]  # of each shard's pictures
        self.grid_at = lru_cache(None)(grid_at)  # flow models shift theirs by the size
        self.grid = self.grid_at(self.sizes[0])
        self.of_shard: list[list[int]] = [[] for _ in self.sizes]  # its pairs, by row
        for shard, pair in sorted((s, p) for p, (s, _) in enumerate(self.places)):
            self.of_shard[shard].append(pair)
        self._handles: dict[int, Any] = {}
        self._swapped: frozenset[int] = frozenset()

    def shard(self, number: int) -> Any:
        """Open a shard; beyond OPEN, the one opened first is closed."""
        if number not in self._handles:
            if len(self._handles) >= OPEN:
                del self._handles[next(iter(self._handles))]
            self._handles[number] = safe_open(self.folder / SHARD.format(number), framework="pt")
        return self._handles[number]

    def swap(self, pairs: Sequence[int], share: float, seed: int) -> None:
        """Exchange winner and loser of a seeded share of the pairs: label noise, for controls."""
        drawn = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < share
        self._swapped = frozenset(p for p, d in zip(pairs, drawn.tolist(), strict=True) if d)

    def positions(self, low: int, high: int) -> tuple[int, int]:
        """Return first and last position of the stored states between grid indices low and high.

        If only some states of each pair were kept, they were drawn from these indices.
        """
        if self.all_steps:
            return low - 1, high - 1
        return 0, self.shard(0).get_slice("steps").get_shape()[1] - 1

    def of_images(
        self, name: str, pairs: Sequence[int], positions: Sequence[int] | None = None
    ) -> Tensor:
        """Stack a tensor of both images (2P, *): winners of all pairs, then their losers.

        positions: the stored state of each pair to read, if the tensor has states.
        """
        rows = []
        for side in (0, 1):
            for place, pair in enumerate(pairs):
                shard, offset = self.places[pair]
                row = 2 * offset + (side ^ (pair in self._swapped))
                tensor = self.shard(shard).get_slice(name)
                rows.append(tensor[row, positions[place]] if positions else tensor[row])
        return torch.stack(rows)

    def of_pairs(self, name: str, pairs: Sequence[int]) -> Tensor:
        """Join a tensor that both images of a pair share, [P, ...]; label noise leaves it."""
        places = [self.places[pair] for pair in pairs]
        return joined([self.shard(s).get_slice(name)[k : k + 1] for s, k in places])

    def size(self, pair: int) -> Size:
        """Tell the (height, width) of a pair's pictures, in pixels."""
        return self.sizes[self.places[pair][0]]

    def preference(self, pairs: Sequence[int]) -> Tensor:
        """Read the probability that the winner is the better one, [P]."""
        return self.of_pairs("preference", pairs)

    def condition(self, pairs: Sequence[int]) -> Condition:
        """Read conditions of winners then losers, [2P, ...]: prompts are shared, framing is not."""
        conditions: Condition = {}
        for name in self.shard(0).keys():
            part, _, key = name.partition(".")
            if part == "condition":
                rows = self.of_pairs(name, pairs)
                conditions[key] = torch.cat([rows, rows])
            elif part == "framing":
                conditions[key] = self.of_images(name, pairs)
        return conditions

    @cached_property
    def empty(self) -> Condition:
        """The condition of the empty prompt, [1, ...] each."""
        return load_file(self.folder / EMPTY)

    def states(self, pairs: Sequence[int], positions: Sequence[int], target: str) -> NoisyStates:
        """Read a stored state of each pair's two trajectories, with its target."""
        steps = torch.tensor(positions) + 1
        if not self.all_steps:
            steps = self.of_pairs("steps", pairs)[torch.arange(len(pairs)), positions]
        level = steps.repeat(2)
        x_0, x_t = self.of_images("clean", pairs), self.of_images("states", pairs, positions)
        reference = self.of_images("reference", pairs, positions)
        x_before = self._before(pairs, positions, x_0) if target == "transition" else x_0
        grid, states = self.grid_at(self.size(pairs[0])), (x_0, x_before, x_t)
        levels = grid.levels
        return NoisyStates(
            level=level,
            x_t=x_t,
            timesteps=grid.timesteps[level],
            scale=error_scale(levels[level], self.kind).float(),
            target=target_prediction(target, level, states, reference, levels, self.kind),
            reference=reference,
        )

    def _before(self, pairs: Sequence[int], positions: Sequence[int], x_0: Tensor) -> Tensor:
        """Read the states one transition below; needs a cache with all states."""
        lower = self.of_images("states", pairs, [max(0, k - 1) for k in positions])
        first = (torch.tensor(positions) == 0).repeat(2)
        return torch.where(first.reshape(-1, *[1] * (x_0.ndim - 1)), x_0, lower)
