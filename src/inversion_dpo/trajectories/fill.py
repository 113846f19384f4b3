"""Fill the cache: encode every pair, invert it under the frozen reference, write shards.

Where the objective looks at no trajectories, pairs are encoded and that is all.
An interrupted inversion continues with the missing shards, on any number of processes.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from inversion_dpo.data.images import decode_image, stack_pixels
from inversion_dpo.data.source import Pair, PairSource, graph_of
from inversion_dpo.data.transforms import fit, flip, flips
from inversion_dpo.maths.inversion import (
    Compare,
    Predict,
    evaluations_per_image,
    invert,
    passes,
    reconstruct,
    reconstruction_error,
    recovered_noise,
)
from inversion_dpo.maths.records import Framing, Grid
from inversion_dpo.models.base import (
    Condition,
    DiffusionModel,
    encode,
    guided,
    network_of,
    without_prompt,
)
from inversion_dpo.models.prompts import overlong
from inversion_dpo.run.disk import atomic_save, atomic_text, sha256_of
from inversion_dpo.run.processes import Team
from inversion_dpo.trajectories.cache import (
    CacheKey,
    TrajectoryCache,
    damaged_files,
    open_cache,
)

logger = logging.getLogger(__name__)


def conditional(model: DiffusionModel, condition: Condition) -> Predict:
    """The prediction at (x_t, t) of the model's network under a fixed condition."""
    return lambda x, t: model.predict(network_of(model), x, t, condition)


def under_guidance(
    model: DiffusionModel, condition: Condition, empty: Condition, scale: float
) -> Predict:
    """:func:`models.base.guided` of the model's network under a fixed condition."""
    return lambda x, t: guided(model, network_of(model), x, t, condition, empty, scale)


def under_another(
    model: DiffusionModel, condition: Condition, empty: Condition, path: float, wanted: float
) -> Compare:
    """The prediction under guidance ``wanted``, from that of a path under guidance ``path``.

    One evaluation, not two: p_s = p_u + s (p_c - p_u), so p_w = p_u + w / s (p_s - p_u).
    """
    plain = conditional(model, condition)
    if wanted == 1:
        return lambda x, t, _: plain(x, t)
    alone = conditional(model, without_prompt(condition, empty))

    def compare(x: Tensor, t: Tensor, along: Tensor) -> Tensor:
        p_u = alone(x, t)
        return p_u + wanted / path * (along - p_u)

    return compare


def _repeat(condition: Condition, times: int) -> Condition:
    return {k: v.repeat_interleave(times, 0) for k, v in condition.items()}


def pair_noise(first: int, shape: torch.Size) -> Tensor:
    """Standard normal (B, *) for consecutive pairs from number ``first``; both images share it."""
    seeds = (first + k // 2 for k in range(shape[0]))
    return torch.stack(
        [torch.randn(shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


def kept_steps(first: int, count: int, keep: tuple[int, int, int] | None, steps: int) -> Tensor:
    """Grid indices [P, K] to store of consecutive pairs: all, or k stratified draws each.

    ``keep`` = (k, low, high): the indices low..high are cut into k strata of equal size, and one
    is drawn from each, by the pair's number; fewer than k if there are fewer indices.
    """
    if keep is None:
        return torch.arange(1, steps + 1).expand(count, steps)
    k, low, high = keep
    edges = np.unique(np.linspace(low, high + 1, k + 1).round().astype(int))
    rows = []
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        rows.append([int(rng.integers(a, b)) for a, b in itertools.pairwise(edges)])
    return torch.tensor(rows)


def encode_pairs(
    model: DiffusionModel, pairs: list[Pair], key: CacheKey
) -> tuple[Tensor, Condition, Condition]:
    """Latents (2P, *), conditions [P, ...] of the prompts and framing [2P, ...] of the images."""
    fitted, size = [], (key.resolution, key.resolution)
    for pair in pairs:
        both = decode_image(pair.winner, pair.where), decode_image(pair.loser, pair.where)
        if key.flip_seed is not None and flips(pair.caption, key.flip_seed, pair.digest, 0):
            both = flip(*both)
        fitted += [fit(image, size, key.fit) for image in both]
    x_0 = encode(model.pipeline.vae, stack_pixels([f.image for f in fitted]))
    framing = model.framing([f.framing for f in fitted])
    captions, graphs = [p.caption for p in pairs], [graph_of(p) for p in pairs]
    return x_0, model.condition(captions, graphs), framing


def invert_pairs(
    model: DiffusionModel,
    pairs: list[Pair],
    first: int,
    key: CacheKey,
    grid: Grid,
    device: torch.device,
) -> dict[str, Tensor]:
    """One shard, see :class:`TrajectoryCache`; ``first`` is the number of the first pair."""
    x_0, condition, framing = encode_pairs(model, pairs, key)
    shard = {"clean": x_0.cpu()}
    shard["preference"] = torch.tensor([p.preference for p in pairs])
    if key.inverts:
        shard |= paths(model, x_0.to(device), condition, framing, first, key, grid)
    shard |= {f"condition.{k}": v.cpu() for k, v in condition.items()}
    return shard | {f"framing.{k}": v.cpu() for k, v in framing.items()}


def paths(
    model: DiffusionModel,
    x_0: Tensor,
    condition: Condition,
    framing: Condition,
    first: int,
    key: CacheKey,
    grid: Grid,
) -> dict[str, Tensor]:
    """What a shard holds of the inversion of its latents x_0 [2P, *]."""
    per_image, kind = _repeat(condition, 2) | framing, model.schedule.kind
    scales = key.guidance_scale, key.reference_guidance
    empty = {} if scales == (1.0, 1.0) else model.condition([""])
    predict = under_guidance(model, per_image, empty, scales[0])
    reference = under_another(model, per_image, empty, *scales)
    trajectory = invert(
        x_0,
        grid,
        predict,
        kind,
        key.fixed_point_iterations,
        None if scales[0] == scales[1] else reference,
        pair_noise(first, x_0.shape).to(x_0),
        key.start,
        key.first,
        key.last,
    )
    steps = kept_steps(first, len(x_0) // 2, key.keep, key.last or grid.steps)
    rows, columns = torch.arange(len(x_0))[:, None], steps.repeat_interleave(2, 0)
    noise = recovered_noise(trajectory)
    found = {
        "steps": steps,
        "states": trajectory.states.transpose(0, 1).cpu()[rows, columns],
        "reference": trajectory.reference.transpose(0, 1).cpu()[rows, columns],
        "x_T_variance": noise.flatten(1).double().square().mean(1).cpu(),
    }
    if key.reconstruct:
        again = reconstruct(trajectory.states[-1], grid, predict, kind)
        found["reconstructed"] = again.cpu()
        found["reconstruction"] = reconstruction_error(x_0, again).cpu()
    return found


def announce(
    model: DiffusionModel, key: CacheKey, grid: Grid, count: int | None, device: str
) -> None:
    """Say, before the work begins, how large the cache will be and how long it may take."""
    per, count = ("", count) if count else ("for every 1,000 pairs of a stream, ", 1000)
    blank = torch.zeros(1, 3, key.resolution, key.resolution)
    x_0 = encode(model.pipeline.vae, blank).to(device)
    framing = Framing((key.resolution, key.resolution), (0, 0), (key.resolution, key.resolution))
    condition = model.condition(["a picture"])
    last = grid.steps if key.last is None else key.last
    states = key.keep[0] if key.keep else last
    text = sum(v.nbytes for v in condition.values())
    size = count * (2 * x_0.nbytes * (1 + 2 * states) + text) / 1e6
    if not key.inverts:
        logger.info("encoding pairs, none is inverted: %sabout %.0f MB on disk", per, size)
        return
    batch = min(key.batch_size, 2 * count)
    many = _repeat(condition | model.framing([framing]), batch)
    begun = time.time()
    with torch.no_grad():
        conditional(model, many)(
            x_0.repeat_interleave(batch, 0), grid.timesteps[1].to(device).expand(batch)
        )
    each = evaluations_per_image(
        key.start,
        key.first,
        last,
        key.fixed_point_iterations,
        key.guidance_scale,
        key.reference_guidance,
    ) + grid.steps * key.reconstruct * passes(key.guidance_scale)
    minutes = (time.time() - begun) * each * -(-2 * count // batch) / 60
    logger.info(
        "inverting pairs in %d steps: %sabout %.0f MB on disk and %.1f min",
        grid.steps,
        per,
        size,
        minutes,
    )


def build_cache(
    root: Path,
    model: DiffusionModel,
    pairs: PairSource,
    key: CacheKey,
    device: torch.device,
    team: Team | None = None,
) -> TrajectoryCache:
    """Invert all pairs, or what is missing or damaged, and return the cache; idempotent.

    The source is read once, a shard's worth at a time: a stream need not fit in memory or on disk.
    Several processes share the shards among them; all must call this.
    """
    folder, grid = root / key.name(), model.schedule.grid(key.steps, key.spacing)
    team, manifest = team or Team(), folder / "manifest.json"
    whole = manifest.exists() and not _forget_damaged(folder, team)
    team.wait()
    if not whole:
        count = pairs.expected() if team.main else None
        if team.main:
            folder.mkdir(parents=True, exist_ok=True)
            announce(model, key, grid, count, str(device))
            atomic_save(
                {k: v.cpu() for k, v in model.condition([""]).items()}, folder / "empty.safetensors"
            )
        team.wait()
        shards, per_shard = _fill(folder, model, pairs, count, key, grid, device, team)
        team.wait()
        if team.main:
            _write_manifest(folder, key, per_shard, shards, dict(pairs.counts))
        team.wait()
    return open_cache(folder, model.schedule, key.steps, key.spacing, verify=False)


def _forget_damaged(folder: Path, team: Team) -> bool:
    """Name damaged files and delete them and the manifest, so that they are made again."""
    damaged = damaged_files(folder, team)
    if damaged and team.main:
        for path in damaged:
            logger.warning("%s is missing or damaged (checksum differs): made again", path)
            path.unlink(missing_ok=True)
        (folder / "manifest.json").unlink()
    return bool(damaged)


def shard_path(folder: Path, number: int) -> Path:
    """Of the tensors; beside it, ending in .json, lies the shard's part of the manifest."""
    return folder / f"shard-{number:05d}.safetensors"


def _fill(
    folder: Path,
    model: DiffusionModel,
    pairs: PairSource,
    count: int | None,
    key: CacheKey,
    grid: Grid,
    device: torch.device,
    team: Team,
) -> tuple[int, int]:
    """Write this process's share of the missing shards; how many there are, pairs in each."""
    per_shard, first = max(1, key.batch_size // 2), 0
    stream = pairs.read(lambda pair: pair // per_shard % team.size == team.rank)
    doing = "invert" if key.inverts else "encode"
    with tqdm(total=count, desc=doing, unit="pair", mininterval=1.0, disable=not team.main) as bar:
        number = 0
        while chunk := list(itertools.islice(stream, per_shard)):
            path, digests = shard_path(folder, number), [p.digest for p in chunk]
            if number % team.size == team.rank and not _intact(path, digests):
                cut = overlong(model.pipeline, [p.caption for p in chunk], key.prompt_chunks)
                shard = invert_pairs(model, chunk, first, key, grid, device)
                write_shard(path, shard, digests, cut)
            first, number = first + len(chunk), number + 1
            bar.update(len(chunk))
    return number, per_shard


def write_shard(
    path: Path, tensors: dict[str, Tensor], digests: list[str], cut: Mapping[str, int]
) -> None:
    """A shard, then its entry: without one it counts as missing. ``cut``: overlong captions."""
    atomic_save(tensors, path)
    entry = {"digests": digests, "reconstruction": _pair_errors(path), "sha256": sha256_of(path)}
    entry["overlong"] = dict(cut)
    atomic_text(json.dumps(entry), path.with_suffix(".json"))


def _intact(path: Path, digests: list[str]) -> bool:
    """Whether a shard of these pairs was finished and is still what was written."""
    try:
        entry = json.loads(path.with_suffix(".json").read_text())
        same = entry["digests"] == digests and entry["sha256"] == sha256_of(path)
    except (FileNotFoundError, ValueError, KeyError):
        return False
    if not same:
        logger.warning("%s is damaged or of other pairs: made again", path)
    return same


def _write_manifest(
    folder: Path, key: CacheKey, per_shard: int, shards: int, counts: dict[str, int]
) -> None:
    """Put the entries of all shards together; whoever wrote them."""
    paths = [shard_path(folder, number) for number in range(shards)]
    entries = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    empty = folder / "empty.safetensors"
    sums = {p.name: e["sha256"] for p, e in zip(paths, entries, strict=True)}
    cut: Counter[str] = Counter()
    for entry in entries:
        cut.update(entry["overlong"])
    manifest = {
        "key": asdict(key),
        "pairs": sum(len(e["digests"]) for e in entries),
        "pairs_per_shard": per_shard,
        "counts": counts,
        "overlong": dict(cut),
        "digests": [d for e in entries for d in e["digests"]],
        "reconstruction": [r for e in entries for r in e["reconstruction"]],
        "shards": sums | {empty.name: sha256_of(empty)},
    }
    atomic_text(json.dumps(manifest, indent=1), folder / "manifest.json")


def _pair_errors(shard: Path) -> list[float]:
    """Relative reconstruction error of each pair, the worse of its two; empty if not measured."""
    with safe_open(shard, framework="pt") as handle:
        if "reconstruction" not in handle.keys():
            return []
        errors: Tensor = handle.get_tensor("reconstruction").reshape(-1, 2).amax(1)
    return [round(e, 6) for e in errors.tolist()]


def noise_variance(cache: TrajectoryCache) -> float:
    """Variance of the recovered x_T over the first shard; sampling starts from variance 1."""
    return float(cache.shard(0).get_tensor("x_T_variance").mean())


def round_trip_error(
    model: DiffusionModel, cache: TrajectoryCache, guidance_scale: float, device: torch.device
) -> float:
    """Mean relative error of inverting the first shard's latents and sampling back.

    Both ways naive, under one guidance: what guidance above 1 costs is seen beside 1.
    """
    tensors = load_file(cache.folder / "shard-00000.safetensors")
    tensors = {k: v.to(device) for k, v in tensors.items()}  # a launch's cpu:0 cannot be read to
    framing = {k[8:]: v for k, v in tensors.items() if k.startswith("framing.")}
    condition = {k[10:]: v for k, v in tensors.items() if k.startswith("condition.")}
    x_0 = tensors["clean"]
    per_image = _repeat(condition, 2) | framing
    predict = under_guidance(model, per_image, cache.empty, guidance_scale)
    x_T = invert(x_0, cache.grid, predict, cache.kind).states[-1]
    again = reconstruct(x_T, cache.grid, predict, cache.kind)
    return float(reconstruction_error(x_0, again).mean())
