"""Run one run of a comparison: train, evaluate on the held-out prompts, keep the result."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.compare.summary import over_seeds
from inversion_dpo.data.source import open_pairs
from inversion_dpo.evaluation.defaults import HELDOUT_FILE, MEASURING_FILE
from inversion_dpo.evaluation.evaluate import measure
from inversion_dpo.evaluation.page import Picture, inlined
from inversion_dpo.evaluation.prompt_sets import read_prompts
from inversion_dpo.evaluation.report import pick
from inversion_dpo.evaluation.samples import (
    model_digest,
    pictures,
    read_images,
    read_scores,
    sampled_file,
)
from inversion_dpo.maths.inversion import evaluations_per_image
from inversion_dpo.run.config import Config, ConfigError
from inversion_dpo.run.disk import atomic_json, checksum_of, read_json
from inversion_dpo.run.folder import (
    claim,
    differences,
    read_config,
    read_rows,
    read_seconds,
    stage,
    steps_in,
)
from inversion_dpo.training.recipe import Prepared, prepare, reproducible, train
from inversion_dpo.training.split import split_pairs
from inversion_dpo.trajectories.cost import evaluations_again
from inversion_dpo.trajectories.method import chosen_method, takes_images

DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 32, 4
PICTURED = 6  # prompts that the page shows
MOST = 8  # samples that the best is taken of
SNAPSHOTS = 6  # points of a curve, the end included
FILES = "files"  # in a result: hashes of what the settings name
Result = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """The beginning of a later round, and the reference of its gains.

    origin: the first round's settings, whose model is that reference. make: makes the run's model
    and pairs in its folder, unless they are there, and returns their network evaluations.
    """

    origin: Config
    make: Callable[[Path], float]


def folder_of(root: Path, name: str) -> Path:
    """Return the folder of a run of a comparison."""
    return root / "runs" / name.replace(" ", "_").replace("/", "_")


def run(root: Path, name: str, config: Config, curve: int, start: Start | None = None) -> Result:
    """Train and evaluate a run, unless it is finished.

    Args:
        root: folder of the comparison.
        name: of the run.
        config: its settings.
        curve: number of prompts scored at every snapshot; 0 for no curve.
        start: None for a first round.

    Returns:
        What the run's ``result.json`` holds.

    Raises:
        ConfigError: a finished run of that name had other settings.
    """
    folder = folder_of(root, name)
    t = config.training
    every = max(1, t.steps // SNAPSHOTS) if curve else t.snapshot_every
    config = replace(config, training=replace(t, snapshot_every=every))
    if (folder / "result.json").exists():
        result: Result = read_json(folder / "result.json")
        prompts = [read_config(folder).evaluation.prompts, config.evaluation.prompts]
        names = {Path(name).name for name in prompts}
        moved = len(names) == 1 and names <= {HELDOUT_FILE, MEASURING_FILE}  # with the comparison
        other = [
            text
            for key, text in differences(folder, config).items()
            if key != "evaluation.prompts" or not moved
        ]
        if (scored := result.get("curve_prompts")) != curve:
            other.insert(0, f"its curve has {scored} prompts, not {curve}")
        if other:
            raise ConfigError(
                f"{folder} holds a finished run with other settings ({other[0]}): choose another "
                "--output, or delete that folder to run it again"
            )
        return result
    claim(folder, config)
    result = {"curve_prompts": curve} | ({} if start else {FILES: digests(config)})
    if start:
        result["spent"] = begin(folder, config, start)
    train(config, folder, cache_root=(folder if start else root) / "cache")
    origin = start.origin if start else None
    result |= judged(config, folder, root / "samples", curve, origin)
    atomic_json(result, folder / "result.json")
    for part in ("checkpoints", "snapshots", "cache"):
        shutil.rmtree(folder / part, ignore_errors=True)
    return result


def digests(config: Config) -> dict[str, str]:
    """Hash what a run's settings only name: its pairs, its prompts and the model's files."""
    e = config.evaluation
    return {
        "data.pairs": open_pairs(config.data, alone=takes_images(config)).fingerprint,
        "evaluation.prompts": checksum_of({"prompts": read_prompts(e.prompts, e.limit)}),
        "model.path": checksum_of({"model": model_digest(config, None)}),
    }


def refuse_other_files(root: Path, runs: Iterable[tuple[str, Config]]) -> None:
    """Refuse finished runs of files that have changed since under their names.

    Args:
        root: folder of the comparison.
        runs: each first round's name and settings.

    Raises:
        ConfigError: names run and setting.
    """
    known = dict[str, dict[str, str]]()
    for name, config in runs:
        folder, e = folder_of(root, name), config.evaluation
        there = folder / "result.json"
        for key, before in (read_json(there).get(FILES, {}) if there.exists() else {}).items():
            about = f"{config.data} {config.model} {e.prompts} {e.limit} {takes_images(config)}"
            if about not in known:
                known[about] = digests(config)
            if known[about][key] != before:
                raise ConfigError(
                    f"{folder} holds a finished run, and what {key} names has changed since: its "
                    "scores are not comparable with those of new runs. Choose another --output, "
                    "or delete that folder to run it again"
                )


def begin(folder: Path, config: Config, start: Start) -> dict[str, float]:
    """Make a later round's pairs and trajectories; return the evaluations and seconds spent."""
    with stage(folder, "pairs"):
        sampling = start.make(folder)
    with stage(folder, "invert"):
        cost = inversion_evaluations(config, prepare(config, folder / "cache"))
    seconds = read_seconds(folder)
    return {
        "evaluations": sampling + cost,
        "seconds": seconds["pairs"] + (seconds["invert"] if cost else 0.0),
    }


def inversion_evaluations(config: Config, prepared: Prepared) -> float:
    """Count network evaluations of inverting the pairs that training visits.

    Pairs beyond steps x batch, and held-out ones, are inverted too but do not count.
    """
    if not chosen_method(config).inverts:
        return 0.0
    t, usable = config.training, reproducible(prepared, config.inversion.max_error)
    trained, _ = split_pairs(usable, config.data.holdout, prepared.cache.images)
    visited = min(len(trained), t.steps * t.batch_size)
    scales = config.inversion.guidance_scale, config.objective.guidance_scale
    again = evaluations_again(prepared.model, *scales)
    return (
        prepared.cache.sides
        * visited
        * evaluations_per_image(prepared.cache.extent, *scales, again)
    )


def judged(
    config: Config, folder: Path, memo: Path, curve: int, origin: Config | None = None
) -> Result:
    """Collect scores by prompt, gains, curve, diversity and costs of a trained run."""
    e = config.evaluation
    prompts = read_prompts(e.prompts, e.limit)
    metrics = measure(folder, origin or config, memo, None)
    scores = read_scores(sampled_file(config, folder / "adapter", memo, prompts, "policy"))
    rows = read_rows(folder / "metrics.jsonl")
    return {
        "metrics": metrics,
        "scores": scores[e.preference].tolist(),
        "curve": curve_of(config, folder, memo, prompts[:curve]) if curve else [],
        "diversity": diversity(config, folder / "adapter", memo, prompts),
        "history": [r for r in rows if "loss" in r or "heldout_drift" in r],
        "step_seconds": step_seconds(rows),
    }


def curve_of(
    config: Config, folder: Path, memo: Path, prompts: list[str]
) -> list[dict[str, float]]:
    """Average the scores after 0 steps (the reference) and at every snapshot."""
    places = [(0, None), *steps_in(folder / "snapshots").items()]
    if places[-1][0] < config.training.steps:
        places.append((config.training.steps, folder / "adapter"))
    rows = []
    for step, adapter in places:
        scores = read_scores(sampled_file(config, adapter, memo, prompts, f"step {step}"))
        rows.append({"step": step, **{k: float(np.mean(v)) for k, v in scores.items()}})
    return rows


def pictured(
    config: Config, memo: Path, runs: Mapping[str, Path]
) -> list[tuple[str, list[Picture]]]:
    """Show some prompts: caption, then the reference's image and that of each run's policy.

    Args:
        config: the reference's, with the evaluation of all.
        memo: folder of the samples.
        runs: name -> folder of a finished run.
    """
    e = config.evaluation
    prompts = read_prompts(e.prompts, e.limit)
    chosen = pick(prompts, PICTURED)
    files = {"reference": sampled_file(config, None, memo, prompts, "reference", e.seeds)}
    for name, folder in runs.items():
        own = replace(read_config(folder), evaluation=e)
        files[name] = sampled_file(own, folder / "adapter", memo, prompts, "policy", e.seeds)
    rows = [k * e.seeds for k in chosen]
    images = zip(*(read_images(file, rows) for file in files.values()), strict=True)
    return [
        (prompts[k], [Picture(n, inlined(i)) for n, i in zip(files, of_prompt, strict=True)])
        for k, of_prompt in zip(chosen, images, strict=True)
    ]


def step_seconds(rows: Sequence[dict[str, Any]]) -> float:
    """Return the median seconds of a training step, without pauses and held-out measurements."""
    times = [
        after["seconds"] - before["seconds"]
        for before, after in pairwise(rows)
        if "loss" in after and "heldout_drift" not in after
    ]
    return float(np.median(times)) if times else float("nan")


def diversity(config: Config, adapter: Path | None, memo: Path, prompts: list[str]) -> float:
    """Measure the mean distance between samples of one prompt from different noise, in [0, 1].

    It is the root mean square over the pixels of images of at most 64 x 64, over all pairs of four
    samples of 32 prompts. A policy that collapses falls below the reference.
    """
    part, samples = prompts[:DIVERSITY_PROMPTS], list[list[NDArray[np.float64]]]()
    for k in range(DIVERSITY_SEEDS):
        own = seeded(config, 50_000 + 1000 * k)
        small = [*pictures(sampled_file(own, adapter, memo, part, "diversity"))]
        for picture in small:
            picture.thumbnail((64, 64))
        samples.append([np.asarray(picture, float) / 255 for picture in small])
    pairs = [pair for ours in zip(*samples, strict=True) for pair in combinations(ours, 2)]
    return float(np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in pairs]))


def seeded(config: Config, offset: int) -> Config:
    """Shift the seed of the evaluation."""
    e = config.evaluation
    return replace(config, evaluation=replace(e, seed=e.seed + offset))


def best_of(config: Config, memo: Path) -> dict[str, dict[str, Result]]:
    """Score the reference's best of n samples by the preference: n -> score -> over prompts."""
    e = config.evaluation
    prompts = read_prompts(e.prompts, e.limit)
    drawn = [
        read_scores(sampled_file(seeded(config, 100_000 * k), None, memo, prompts, "best of n"))
        for k in range(MOST)
    ]
    return best_of_n({name: np.stack([s[name] for s in drawn]) for name in drawn[0]}, e.preference)


def best_of_n(
    scores: Mapping[str, NDArray[np.float64]], preference: str
) -> dict[str, dict[str, Result]]:
    """Compute the best of n = 1, 2, 4 ...: n -> score -> mean and 95% t interval over prompts.

    ``scores`` are [S, P] each. All choices of n among a prompt's S samples count: the r-th from
    below, by the preference, is the best of (r-1 over n-1) of them.
    """
    order = np.argsort(scores[preference], axis=0, kind="stable")
    most = len(order)
    best, n = {}, 1
    while n <= most:
        share = np.array([math.comb(r, n - 1) for r in range(most)]) / math.comb(most, n)
        best[str(n)] = {
            name: over_seeds((share @ np.take_along_axis(v, order, 0)).tolist(), keep=False)
            for name, v in scores.items()
        }
        n *= 2
    return best
