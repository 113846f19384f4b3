"""Latents, text conditions and trajectories on disk, computed once under the frozen reference.

A cache is a folder named by the hash of everything that its content depends on: sharded
safetensors, written whole or not at all, and ``manifest.json`` last. An interrupted inversion
continues with the first missing shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from inversion_dpo.data.pairs import Pair, decode_image, to_pixels
from inversion_dpo.inversion import Predict, invert, reconstruct, reconstruction_error
from inversion_dpo.models.base import Condition, DiffusionModel
from inversion_dpo.objectives import target_eps
from inversion_dpo.types import Grid, TrainingPoints


class CacheError(RuntimeError):
    """A cache that is damaged or does not belong to this run; names the file and the remedy."""


@dataclass(frozen=True)
class CacheKey:
    """Everything that the cached numbers depend on."""

    pairs: str  # fingerprint of the pair file
    limit: int | None
    model: str  # identity of the frozen weights
    resolution: int
    steps: int
    guidance_scale: float
    fixed_point_iterations: int
    t_start: float
    batch_size: int
    precision: str = "no"  # autocast of the network, the policy's own

    def name(self) -> str:
        """The folder's name: sixteen hex digits."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


def atomic_save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write safetensors beside ``path``, flush to disk, then rename."""
    partial = path.with_name(path.name + ".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial)
    _flush(partial)
    os.replace(partial, path)


def atomic_text(text: str, path: Path) -> None:
    """Write a text file beside ``path``, flush to disk, then rename."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    _flush(partial)
    os.replace(partial, path)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def conditional(model: DiffusionModel, condition: Condition) -> Predict:
    """eps(x_t, t) of the model's network under a fixed condition."""
    return lambda x, t: model.predict(model.network, x, t, condition)


def guided(model: DiffusionModel, condition: Condition, empty: Condition, scale: float) -> Predict:
    """Classifier-free guidance: eps_u + scale (eps_c - eps_u) (Ho & Salimans, 2022)."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        eps_c = model.predict(model.network, x, t, condition)
        eps_u = model.predict(model.network, x, t, empty)
        return eps_u + scale * (eps_c - eps_u)

    return predict


def _repeat(condition: Condition, times: int) -> Condition:
    return {k: v.repeat_interleave(times, 0) for k, v in condition.items()}


def pair_noise(first: int, shape: torch.Size) -> Tensor:
    """Standard normal (B, *) for consecutive pairs from number ``first``; both images share it."""
    seeds = (first + k // 2 for k in range(shape[0]))
    return torch.stack(
        [torch.randn(shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


def invert_pairs(
    model: DiffusionModel,
    pairs: Sequence[Pair],
    first: int,
    key: CacheKey,
    grid: Grid,
    device: torch.device,
) -> dict[str, Tensor]:
    """One shard: images in the order winner, loser, winner, loser ...; [2P, N+1, *] each.

    ``first`` is the number of the first pair.
    """
    images = [decode_image(d, f"row {p.row}") for p in pairs for d in (p.winner, p.loser)]
    x_0 = model.encode(to_pixels(images, key.resolution)).to(device)
    condition = model.condition([p.caption for p in pairs])
    per_image = _repeat(condition, 2)
    predict = reference = conditional(model, per_image)
    if key.guidance_scale != 1.0:
        empty = _repeat(model.condition([""]), len(images))
        predict = guided(model, per_image, empty, key.guidance_scale)
    start = round(key.t_start * grid.steps)
    trajectory = invert(
        x_0, grid, predict, key.fixed_point_iterations,
        None if predict is reference else reference,
        pair_noise(first, x_0.shape).to(x_0), start,
    )  # fmt: skip
    tensors = {"states": trajectory.states, "reference": trajectory.reference}
    if key.guidance_scale != 1.0 or key.fixed_point_iterations or start:
        tensors["noises"] = trajectory.noises
    shard = {k: v.transpose(0, 1).float().cpu() for k, v in tensors.items()}
    return shard | {f"condition.{k}": v.cpu() for k, v in condition.items()}


def build_cache(
    root: Path, model: DiffusionModel, pairs: Sequence[Pair], key: CacheKey, device: torch.device
) -> TrajectoryCache:
    """Invert all pairs, or what is missing, and return the cache; idempotent."""
    folder, grid = root / key.name(), model.schedule.grid(key.steps)
    if not (folder / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        per_shard = max(1, key.batch_size // 2)
        starts = range(0, len(pairs), per_shard)
        bar = tqdm(starts, desc="invert", unit="shard", mininterval=1.0)
        for number, start in enumerate(bar):
            path = folder / f"shard-{number:05d}.safetensors"
            if not path.exists():
                chunk = pairs[start : start + per_shard]
                atomic_save(invert_pairs(model, chunk, start, key, grid, device), path)
        shards = sorted(folder.glob("shard-*.safetensors"))
        manifest = {
            "key": asdict(key),
            "pairs": len(pairs),
            "pairs_per_shard": per_shard,
            "shards": {p.name: sha256_of(p) for p in shards},
        }
        atomic_text(json.dumps(manifest, indent=1), folder / "manifest.json")
    return TrajectoryCache(folder, grid)


class TrajectoryCache:
    """Random access to the trajectories of numbered pairs."""

    def __init__(self, folder: Path, grid: Grid) -> None:
        self.folder, self.grid = folder, grid
        self._swapped: frozenset[int] = frozenset()
        manifest = json.loads((folder / "manifest.json").read_text())
        self.pairs: int = manifest["pairs"]
        self._per_shard: int = manifest["pairs_per_shard"]
        self._handles: dict[int, Any] = {}
        for name, digest in manifest["shards"].items():
            path = folder / name
            if not path.exists() or sha256_of(path) != digest:
                raise CacheError(
                    f"{path} is missing or damaged (checksum differs): delete "
                    f"{folder / 'manifest.json'} and that shard, then run again to rebuild it"
                )

    def _shard(self, number: int) -> Any:
        if number not in self._handles:
            path = self.folder / f"shard-{number:05d}.safetensors"
            self._handles[number] = safe_open(path, framework="pt")
        return self._handles[number]

    def swap(self, pairs: Sequence[int], share: float, seed: int) -> None:
        """Exchange winner and loser of a seeded share of the pairs: label noise, for controls."""
        drawn = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < share
        self._swapped = frozenset(p for p, d in zip(pairs, drawn.tolist(), strict=True) if d)

    def read(self, name: str, pair: int, side: int, step: int) -> Tensor:
        """One tensor (*): name is states, noises or reference; side 0 winner, 1 loser."""
        shard, offset = divmod(pair, self._per_shard)
        handle = self._shard(shard)
        if name == "noises" and "noises" not in handle.keys():
            name = "reference"
        side ^= pair in self._swapped
        value: Tensor = handle.get_slice(name)[2 * offset + side, step]
        return value

    def gather(self, name: str, pairs: Sequence[int], steps: Sequence[int]) -> Tensor:
        """Stack (2P, *): the winners of all pairs, then their losers; one step per pair."""
        rows = [(p, side, k) for side in (0, 1) for p, k in zip(pairs, steps, strict=True)]
        return torch.stack([self.read(name, *row) for row in rows])

    @cached_property
    def _conditions(self) -> Condition:
        shards = range(-(-self.pairs // self._per_shard))
        parts = [load_conditions(self._shard(k)) for k in shards]
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def condition(self, pairs: Sequence[int]) -> Condition:
        """Conditions of winners then losers, [2P, ...]: the same prompt for both."""
        index = torch.as_tensor([*pairs, *pairs])
        return {k: v[index] for k, v in self._conditions.items()}

    def points(self, pairs: Sequence[int], steps: Sequence[int], target: str) -> TrainingPoints:
        """The state ``steps[p]`` (1..N) of each pair's two trajectories, with its eps*."""
        index = torch.as_tensor([*steps, *steps])
        alpha_bar = self.grid.alpha_bar[index]
        x_t = self.gather("states", pairs, steps)
        x_0 = self.gather("states", pairs, [0] * len(pairs))
        eps_previous = self.gather("noises", pairs, [k - 1 for k in steps])
        eps_ref = self.gather("reference", pairs, steps)
        eps_star = target_eps(target, x_t, x_0, eps_previous, eps_ref, alpha_bar)
        return TrainingPoints(x_t, self.grid.timesteps[index], alpha_bar, eps_star, eps_ref)


def load_conditions(handle: Any) -> Condition:
    """The conditions stored in one open shard."""
    names = [n for n in handle.keys() if n.startswith("condition.")]
    return {n.removeprefix("condition."): handle.get_tensor(n) for n in names}


def noise_variance(cache: TrajectoryCache) -> float:
    """Variance of the recovered x_T over the first shard; sampling starts from variance 1."""
    with safe_open(cache.folder / "shard-00000.safetensors", framework="pt") as handle:
        x_T: Tensor = handle.get_slice("states")[:, -1]
    return float(x_T.double().square().mean())


def cached_reconstruction_error(
    model: DiffusionModel, cache: TrajectoryCache, device: torch.device
) -> float:
    """Mean relative error of sampling the first shard back to its latents, unguided."""
    tensors = load_file(cache.folder / "shard-00000.safetensors", device=str(device))
    condition = {k[10:]: v for k, v in tensors.items() if k.startswith("condition.")}
    states = tensors["states"].transpose(0, 1)
    predict = conditional(model, _repeat(condition, 2))
    again = reconstruct(states[-1], cache.grid, predict)
    return float(reconstruction_error(states[0], again).mean())
