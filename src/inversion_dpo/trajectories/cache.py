"""Latents, conditions and trajectories on disk: the files, and random access to them.

A cache is a folder named by the hash of everything that its content depends on: sharded
safetensors, written whole or not at all, and ``manifest.json`` last. :mod:`.trajectories` fills it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from inversion_dpo.maths.losses import target_prediction
from inversion_dpo.maths.records import Grid, TrainingPoints
from inversion_dpo.maths.schedule import Schedule, error_scale
from inversion_dpo.models.base import Condition
from inversion_dpo.run.disk import sha256_of
from inversion_dpo.run.processes import Team

LAYOUT = 4  # of the files; part of the key
OPEN = 1024  # shards held open: each is a mapping, of which Linux gives a process 65,530


class CacheError(RuntimeError):
    """A cache that is damaged or does not belong to this run; names the file and the remedy."""


@dataclass(frozen=True)
class CacheKey:
    """Everything that the cached numbers depend on."""

    pairs: str  # fingerprint of the pairs' source
    fit: str  # how images come to their size
    flip_seed: int | None  # of the mirrored pairs; None: no pair is
    model: str  # identity of the frozen weights
    schedule: str  # the scheduler's configuration
    resolution: int
    guidance_embed: float
    steps: int
    spacing: str
    guidance_scale: float
    fixed_point_iterations: int
    t_start: float
    batch_size: int
    keep: tuple[int, int, int] | None  # states per pair, lowest and highest index; None: all
    reconstruct: bool
    precision: str  # autocast of the network, the policy's own
    # Younger than the first caches: at its default, a key is what it was without it.
    prompt_chunks: int = 1
    scene_graph: str | None = None  # identity of the encoder, if there is one
    first: int = 1  # index of the lowest state with a prediction
    last: int | None = None  # of the highest state; None: N; 0: no path is made, none is looked at
    reference_guidance: float = 1.0  # of the reference's stored predictions

    @property
    def start(self) -> int:
        """As :attr:`config.InversionConfig.start`."""
        return round(self.t_start * self.steps)

    @property
    def inverts(self) -> bool:
        """Whether there are trajectories, and not latents and conditions alone."""
        return self.last != 0

    def name(self) -> str:
        """The folder's name: sixteen hex digits."""
        young = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        told = {k: v for k, v in asdict(self).items() if k not in young or v != young[k]}
        text = json.dumps(told | {"layout": LAYOUT})
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def damaged_files(folder: Path, team: Team | None = None) -> list[Path]:
    """Files of a finished cache that are missing or have another checksum than its manifest's.

    With a team each process reads its share of the files, and all know of all.
    """
    team = team or Team()
    listed = sorted(json.loads((folder / "manifest.json").read_text())["shards"].items())
    mine = [(folder / name, digest) for name, digest in listed[team.rank :: team.size]]
    found = [str(p) for p, digest in mine if not p.exists() or sha256_of(p) != digest]
    return [Path(p) for p in sorted(team.collect(found))]


class TrajectoryCache:
    """Random access to the trajectories of numbered pairs.

    A shard holds, images in the order winner, loser, winner, loser ...: ``clean`` [2P, *] (x_0),
    ``preference`` [P] (how probably the winner is the better one), ``condition.*`` [P, ...] and
    ``framing.*`` [2P, ...]; of trajectories, where there are any, ``states`` and ``reference``
    [2P, K, *] at the grid indices ``steps`` [P, K]. ``digest`` and ``reconstruction`` are in the
    manifest.
    """

    def __init__(self, folder: Path, grid: Grid, kind: str, verify: bool = True) -> None:
        self.folder, self.grid, self.kind = folder, grid, kind
        self._swapped: frozenset[int] = frozenset()
        manifest = json.loads((folder / "manifest.json").read_text())
        self.pairs: int = manifest["pairs"]
        self.counts: dict[str, int] = manifest["counts"]  # rows read, and left out by reason
        self.reference: str = manifest["key"]["model"][:16]  # hash of the reference's weights
        self.overlong: dict[str, int] = manifest.get("overlong", {})  # captions cut, by tokenizer
        self.digests: list[str] = manifest["digests"]
        self.errors: list[float] = manifest["reconstruction"]  # relative, the worse of a pair
        self.all_steps: bool = manifest["key"]["keep"] is None
        self.inverted: bool = manifest["key"].get("last") != 0  # or only encoded
        self._per_shard: int = manifest["pairs_per_shard"]
        self._handles: dict[int, Any] = {}
        if verify and (damaged := damaged_files(folder)):
            raise CacheError(
                f"{damaged[0]} is missing or damaged (checksum differs): run again to rebuild it"
            )

    def shard(self, number: int) -> Any:
        """An open shard; of more than OPEN the one that was opened first is closed."""
        if number not in self._handles:
            if len(self._handles) >= OPEN:
                del self._handles[next(iter(self._handles))]
            path = self.folder / f"shard-{number:05d}.safetensors"
            self._handles[number] = safe_open(path, framework="pt")
        return self._handles[number]

    def swap(self, pairs: Sequence[int], share: float, seed: int) -> None:
        """Exchange winner and loser of a seeded share of the pairs: label noise, for controls."""
        drawn = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < share
        self._swapped = frozenset(p for p, d in zip(pairs, drawn.tolist(), strict=True) if d)

    def positions(self, low: int, high: int) -> tuple[int, int]:
        """First and last of the stored states between grid indices low and high.

        Where only some states of each pair were kept, they were drawn from these indices.
        """
        if self.all_steps:
            return low - 1, high - 1
        return 0, self.shard(0).get_slice("steps").get_shape()[1] - 1

    def _read(self, name: str, pair: int, side: int, position: int | None) -> Tensor:
        shard, offset = divmod(pair, self._per_shard)
        row = 2 * offset + (side ^ (pair in self._swapped))
        tensor = self.shard(shard).get_slice(name)
        value: Tensor = tensor[row] if position is None else tensor[row, position]
        return value

    def gather(
        self, name: str, pairs: Sequence[int], positions: Sequence[int | None] | None = None
    ) -> Tensor:
        """Stack (2P, *): winners of all pairs, then their losers; one stored state per pair."""
        where = positions or [None] * len(pairs)
        rows = [(p, side, k) for side in (0, 1) for p, k in zip(pairs, where, strict=True)]
        return torch.stack([self._read(name, *row) for row in rows])

    def preference(self, pairs: Sequence[int]) -> Tensor:
        """How probably the winner is the better one, [P]; label noise leaves it as it is."""
        places = [divmod(p, self._per_shard) for p in pairs]
        return torch.stack([self.shard(s).get_slice("preference")[k] for s, k in places])

    def condition(self, pairs: Sequence[int]) -> Condition:
        """Conditions of winners then losers, [2P, ...]: one prompt for both, framing for each."""
        places = [divmod(p, self._per_shard) for p in pairs]
        found: Condition = {}
        for name in self.shard(0).keys():
            part, _, key = name.partition(".")
            if part == "condition":
                rows = [self.shard(s).get_slice(name)[k] for s, k in places]
                found[key] = torch.stack([*rows, *rows])
            elif part == "framing":
                found[key] = self.gather(name, pairs)
        return found

    @cached_property
    def empty(self) -> Condition:
        """The condition of the empty prompt, [1, ...] each."""
        return load_file(self.folder / "empty.safetensors")

    def steps_of(self, pairs: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Grid indices [P] of stored states."""
        if self.all_steps:
            return torch.tensor(positions) + 1
        rows = []
        for pair, position in zip(pairs, positions, strict=True):
            shard, offset = divmod(pair, self._per_shard)
            rows.append(self.shard(shard).get_slice("steps")[offset, position])
        return torch.stack(rows)

    def points(self, pairs: Sequence[int], positions: Sequence[int], target: str) -> TrainingPoints:
        """A stored state of each pair's two trajectories, with its target."""
        i = self.steps_of(pairs, positions).repeat(2)
        x_t = self.gather("states", pairs, positions)
        x_0 = self.gather("clean", pairs)
        reference = self.gather("reference", pairs, positions)
        x_before = self._before(pairs, positions, x_0) if target == "transition" else x_0
        star = target_prediction(
            target, i, (x_0, x_before, x_t), reference, self.grid.levels, self.kind
        )
        scale = error_scale(self.grid.levels[i], self.kind).float()
        return TrainingPoints(i, x_t, self.grid.timesteps[i], scale, star, reference)

    def _before(self, pairs: Sequence[int], positions: Sequence[int], x_0: Tensor) -> Tensor:
        """The states one transition below, where all states are stored."""
        lower = self.gather("states", pairs, [max(0, k - 1) for k in positions])
        first = (torch.tensor(positions) == 0).repeat(2)
        return torch.where(first.reshape(-1, *[1] * (x_0.ndim - 1)), x_0, lower)


def open_cache(
    folder: Path, schedule: Schedule, steps: int, spacing: str, verify: bool = True
) -> TrajectoryCache:
    """The finished cache in a folder; CacheError if a shard is damaged."""
    return TrajectoryCache(folder, schedule.grid(steps, spacing), schedule.kind, verify)
