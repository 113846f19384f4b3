"""Policy against reference on held-out prompts, from the same noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from inversion_dpo.evaluation.breakdown import scoring, structure
from inversion_dpo.evaluation.changes import changes
from inversion_dpo.evaluation.metrics import OTHER_GUIDANCE, compare
from inversion_dpo.evaluation.prompt_sets import PromptSet, read_prompt_set, read_prompts
from inversion_dpo.evaluation.samples import REPEAT, read_scores, sampled_file
from inversion_dpo.evaluation.scorers.registry import Scores
from inversion_dpo.evaluation.sides import side
from inversion_dpo.run.config import Config, ConfigError, to_yaml
from inversion_dpo.run.disk import atomic_table, atomic_text
from inversion_dpo.run.folder import read_config, read_seconds, stage
from inversion_dpo.run.processes import current_team
from inversion_dpo.training.recipe import trained_guidance
from inversion_dpo.training.run_files import read_rows

Models = tuple[str | None, str | None]  # reference and policy, as sides.side takes them
EVALUATED = "evaluated.yaml"  # the settings that the metrics were made with


def evaluate(
    folder: Path,
    config: Config | None = None,
    models: Models | None = None,
) -> dict[str, Any]:
    """Compare reference and policy; write ``metrics.json`` and ``per_prompt.parquet``.

    A policy that was trained at another guidance than it is sampled at is compared at both; the
    comparison at the guidance of training stands under ``at_training_guidance``.

    Args:
        folder: a finished run's, or one to hold the evaluation of any two models.
        config: its settings, if they differ from the folder's own.
        models: reference and policy as :func:`sides.side` takes them; by default the
            configuration's model and the run's policy. Of several processes all must call it.
    """
    config = config or read_config(folder)
    metrics = measure(folder, config, folder / "samples", models)
    if "win_rate" in metrics and (more := at_training_guidance(folder, config, models)):
        metrics |= more
        write_metrics(folder, metrics)
    return metrics


def measure(folder: Path, config: Config, memo: Path, models: Models | None) -> dict[str, Any]:
    """Compare two models at ``evaluation.guidance_scale``; write what :func:`evaluate` writes.

    memo: keeps samples so that the same reference is sampled once for many runs.
    """
    e = config.evaluation
    asked = read_prompt_set(e.prompts, e.limit)
    files = both_sides(folder, config, memo, models)
    reference, policy = (read_scores(file) for file in files)
    metrics: dict[str, Any] = {"n_prompts": len(asked.prompts), "seeds": e.seeds}
    if reference:
        metrics |= judged(asked, reference, policy, config)
        if current_team().main:
            write_table(folder / "per_prompt.parquet", asked, config, reference, policy)
    metrics |= structure(asked, files, config) | scoring(memo, config) | changes(*files)
    metrics |= training_facts(folder, config)
    metrics |= {"seconds": read_seconds(folder), "models": list(models) if models else None}
    write_metrics(folder, metrics)
    if current_team().main:
        atomic_text(to_yaml(config), folder / EVALUATED)
    return metrics


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write ``metrics.json``; of several processes the first one does."""
    if current_team().main:
        atomic_text(json.dumps(metrics, indent=1), folder / "metrics.json")


def at_training_guidance(folder: Path, config: Config, models: Models | None) -> dict[str, Any]:
    """The comparison at the guidance of the policy's training; empty where that is the same.

    Of a policy that is no run it is not known. Prompts and noise are the same.
    """
    run, e = Path((models or (None, folder))[1] or ""), config.evaluation
    if not (run / "config.yaml").is_file():
        return {}
    trained = trained_guidance(read_config(run))
    if trained == e.guidance_scale:
        return {}
    config = replace(config, evaluation=replace(e, guidance_scale=trained))
    files = both_sides(folder, config, folder / "samples", models)
    asked = read_prompt_set(e.prompts, e.limit)
    reference, policy = (read_scores(file) for file in files)
    other = {"guidance_scale": trained, "instead_of": e.guidance_scale}
    return {
        OTHER_GUIDANCE: other | judged(asked, reference, policy, config),
        "seconds": read_seconds(folder),
    } | scoring(folder / "samples", config)


def both_sides(folder: Path, config: Config, memo: Path, models: Models | None) -> list[Path]:
    """The files of both sides' images and scores [n s], each made in a timed stage of the folder.

    What is sampled at another guidance than the folder's own adds to the time of its stage.
    """
    e, files = config.evaluation, []
    prompts = read_prompts(e.prompts, e.limit)
    sides = [side(config, name) for name in models or (None, str(folder))]
    for word, model in zip(("reference", "policy"), sides, strict=True):
        with stage(folder, f"sample {word}"):
            files.append(sampled_file(model.config, model.adapter, memo, prompts, word, e.seeds))
    return files


def judged(asked: PromptSet, reference: Scores, policy: Scores, config: Config) -> dict[str, Any]:
    """The comparison over all prompts, and under ``categories`` over each category's."""
    e = config.evaluation
    if e.preference not in reference:
        raise ConfigError(
            f"evaluation.preference={e.preference!r} is not a score of {e.scorer}; it gives "
            f"{', '.join(reference)}"
        )
    shape = (len(asked.prompts), e.seeds)
    r, p = ({k: v.reshape(shape) for k, v in side.items()} for side in (reference, policy))
    found = compare(r, p, e.preference)
    by_category = {
        name: compare(
            {k: v[rows] for k, v in r.items()}, {k: v[rows] for k, v in p.items()}, e.preference
        )
        for name, rows in asked.by_category.items()
    }
    return found | ({"categories": by_category} if by_category else {})


def write_table(
    path: Path, asked: PromptSet, config: Config, reference: Scores, policy: Scores
) -> None:
    """One row an image: prompt, category, seed, every score of both sides, and who won."""
    e = config.evaluation
    places = [(k, j) for k in range(len(asked.prompts)) for j in range(e.seeds)]
    ours, theirs = policy[e.preference], reference[e.preference]
    columns: dict[str, Any] = {
        "prompt": [asked.prompts[k] for k, _ in places],
        "category": [asked.categories[k] for k, _ in places],
        "seed": [e.seed + k + REPEAT * j for k, j in places],
        "win": (ours > theirs) + 0.5 * (ours == theirs),
    }
    columns |= {f"reference.{name}": v for name, v in reference.items()}
    columns |= {f"policy.{name}": v for name, v in policy.items()}
    atomic_table(pa.table(columns), path)


def training_facts(folder: Path, config: Config) -> dict[str, Any]:
    """What the run's own log says; of a folder without a training nothing."""
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        return {"pairs": 0, "steps": config.training.steps, "training": {}}
    last = {k: v for k, v in rows[-1].items() if k != "step"}
    return {"pairs": last.pop("pairs", 0), "steps": config.training.steps, "training": last}
