"""Collect what the report of a run shows, and write it."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from inversion_dpo.data.images import DataError, decode_image
from inversion_dpo.data.source import open_pairs
from inversion_dpo.evaluation.changes import distance
from inversion_dpo.evaluation.defaults import with_prompts_of
from inversion_dpo.evaluation.evaluate import EVALUATED, SAMPLES, both_sides
from inversion_dpo.evaluation.judges import independent, most_worsened
from inversion_dpo.evaluation.people import PEOPLE_JUDGE, judged_by, people_text
from inversion_dpo.evaluation.prompt_sets import read_prompts
from inversion_dpo.evaluation.repairs import some_of
from inversion_dpo.evaluation.report_page import ReportData, write_report
from inversion_dpo.evaluation.samples import pictures, read_images, read_scores
from inversion_dpo.evaluation.sides import opened, sources_for
from inversion_dpo.evaluation.wording import agreement_text
from inversion_dpo.run.config import Config, ConfigError, load_config
from inversion_dpo.run.disk import atomic_json, read_table
from inversion_dpo.run.folder import (
    read_config,
    read_metrics,
    read_rows,
    read_seconds,
    run_file,
    whole,
)
from inversion_dpo.run.judged import trained_since
from inversion_dpo.run.words import typed
from inversion_dpo.trajectories.method import takes_images

logger = logging.getLogger(__name__)
WRITTEN = ("n_prompts", "seeds", "traits", "seconds", "models", SAMPLES)  # by every evaluation
LARGEST = 6  # changes, or regressions, that a report shows


def most_changed(files: Sequence[Path], seeds: int, count: int) -> list[int]:
    """List the rows of the first image of ``count`` prompts whose images differ most, ascending."""
    away: dict[int, float] = {}
    for row, (before, after) in enumerate(zip(*map(pictures, files), strict=True)):
        if row % seeds == 0:
            away[row] = distance(before, after)
    return sorted(sorted(away, key=lambda row: -away[row])[:count])


def _shown(
    rows: list[int], files: Sequence[Path], every: Sequence[str], config: Config
) -> list[tuple[Any, ...]]:
    """Read caption, both images and any source of some rows, which ascend."""
    captions = [every[row] for row in rows]
    images = (read_images(file, rows) for file in files)
    both = zip(captions, *images, sources_for(config, captions), strict=True)
    return [(*shown, *([np.array(opened(file))] if file else [])) for *shown, file in both]


def pick(prompts: list[str], count: int) -> list[int]:
    """Draw the prompts to show with one seed, not the best ones."""
    rng = np.random.default_rng(0)
    return sorted(rng.choice(len(prompts), min(count, len(prompts)), replace=False).tolist())


def versions() -> dict[str, str]:
    """List the versions of this package, its libraries and the machine."""
    names = ("inversion-dpo", "torch", "diffusers", "transformers", "peft", "accelerate")
    packages = {n: version(n) for n in names}
    return packages | {"python": platform.python_version(), "machine": platform.machine()}


def title(models: list[str | None] | None) -> str:
    """Name the two models that the report compares."""
    if not models:
        return "Inversion-DPO: policy against reference"
    return f"{models[1]} against {models[0] or 'the base model'}"


def training_pairs(folder: Path) -> list[tuple[Any, ...]]:
    """Read caption, winner, loser and any source of the first pairs that a run trains on.

    Pairs that are not there any more are warned of.
    """
    config = read_config(folder)
    try:
        pairs = list(open_pairs(config.data, 6, alone=takes_images(config)))
    except DataError as error:
        logger.warning("the page shows no training pairs: %s", error)
        return []
    return [
        (x.caption, *(np.array(decode_image(i, "")) for i in (x.winner, x.loser, x.source) if i))
        for x in pairs
        if not x.single
    ]


def check_evaluated(folder: Path) -> None:
    """Refuse a folder that holds no run, or one that was not evaluated."""
    if not (folder / "metrics.json").exists():
        run_file(folder)  # says so if it is no run at all
        raise ConfigError(
            f"{folder} has no metrics.json: run `inversion-dpo evaluate {typed(folder)}`"
        )


def measured(folder: Path, config: Config, metrics: Mapping[str, Any]) -> list[Path]:
    """Return the samples behind ``metrics.json``, sampled again where they are gone or damaged.

    What has changed since, such as the prompts or the policy, thus changes no picture.

    Raises:
        ConfigError: they are gone, and there is another policy or number of prompts now.
    """
    files = [folder / SAMPLES / name for name in metrics.get(SAMPLES, ())]
    if files and all(file.is_file() and read_table(file) is not None for file in files):
        return files
    if not metrics.get("models") and trained_since(folder, metrics):
        raise ConfigError(
            f"{folder}: the samples behind metrics.json are gone, and the policy was trained "
            f"further since: run `inversion-dpo evaluate {typed(folder)}` again"
        )
    e = config.evaluation
    if (now := len(read_prompts(e.prompts, e.limit))) != metrics["n_prompts"]:
        raise ConfigError(
            f"{folder} was evaluated on {metrics['n_prompts']} prompts, and {e.prompts} holds "
            f"{now} now: run `inversion-dpo evaluate {typed(folder)}` again"
        )
    return both_sides(folder, config, folder / SAMPLES, metrics.get("models"))


def of_before(folder: Path, metrics: Mapping[str, Any]) -> str:
    """Say, and warn, that the run's policy was trained further since; empty if it was not."""
    if metrics.get("models") or not trained_since(folder, metrics):
        return ""
    logger.warning(
        "%s and the pictures are of the policy before it was trained further: run "
        "`inversion-dpo evaluate %s`, then `report` again, once the training is finished",
        folder / "metrics.json",
        typed(folder),
    )
    return " and before it was trained further"


def report(folder: Path, shown: int = 16) -> Path:
    """Write ``report.html`` of an evaluated run, with PNG copies of its figures."""
    check_evaluated(folder)
    metrics = read_metrics(folder)
    if lost := [name for name in WRITTEN if name not in metrics]:
        raise ConfigError(
            f"{folder / 'metrics.json'} has no {', no '.join(lost)}: it is damaged. Run "
            f"`inversion-dpo evaluate {typed(folder)}` again; kept samples are not drawn anew"
        )
    made_with = folder / EVALUATED
    config = load_config(whole(made_with), []) if made_with.exists() else read_config(folder)
    config = with_prompts_of(config, folder)
    e, models = config.evaluation, metrics.get("models")
    files = measured(folder, config, metrics)
    every = pq.read_table(files[0], columns=["prompt"])["prompt"].to_pylist()
    prompts = every[:: e.seeds]
    r, p = map(read_scores, files)
    show = pick(prompts, shown)
    first = [k * e.seeds for k in show]  # the first image of each prompt
    scores = [
        {"reference": float(r[e.preference][k]), "policy": float(p[e.preference][k])}
        for k in first
        if r
    ]
    each = f", {e.seeds} images each" if e.seeds > 1 else ""
    rows = [] if r else most_changed(files, e.seeds, LARGEST)
    worst = sorted(most_worsened(r, p, independent(metrics), LARGEST)) if r else []
    judged = None if models else judged_by(folder, config)
    if metrics.pop(PEOPLE_JUDGE, None) or judged:  # labels may have been taken back
        metrics |= {PEOPLE_JUDGE: judged} if judged else {}
        atomic_json(metrics, folder / "metrics.json")
    data = ReportData(
        title=title(models),
        setting=f"held-out prompts{each}, with the same noise{of_before(folder, metrics)}",
        metrics=metrics,
        preference=e.preference,
        samples=_shown(first, files, every, config),
        scores=scores,
        repairs=some_of(every, files, (r, p)),
        people=people_text(judged) if judged else "",
        pairs=[] if models else training_pairs(folder),
        history=read_rows(folder / "metrics.jsonl"),
        config=(folder / "config.yaml").read_text(),
        versions=versions(),
        seconds=read_seconds(folder),
        seeds={"training": config.training.seed, "evaluation, first prompt": e.seed},
        preference_note=agreement_text(metrics, e.preference),
        largest=_shown(rows, files, every, config),
        worst=_shown(worst, files, every, config),
        run=str(folder),
        selection=f"{len(show)} of {len(prompts)} prompts, drawn at random with seed 0.",
    )
    return write_report(folder, data)
