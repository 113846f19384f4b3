"""Compare policy and reference on held-out prompts, from the same noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from inversion_dpo.evaluation.breakdown import scoring, structure
from inversion_dpo.evaluation.changes import changes
from inversion_dpo.evaluation.defaults import settled
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
EVALUATED = "evaluated.yaml"  # the settings behind metrics.json


def evaluate(
    folder: Path, config: Config | None = None, models: Models | None = None
) -> dict[str, Any]:
    """Compare reference and policy; write ``metrics.json`` and ``per_prompt.parquet``.

    If training and sampling have different guidance scales, both are compared. The comparison at
    the scale of training stands under ``at_training_guidance``. Every process must call this.

    Args:
        folder: a finished run, or a folder for the evaluation of any two models.
        config: settings, if they differ from the folder's own.
        models: reference and policy as :func:`sides.side` takes them; by default the
            configuration's model and the run's policy.

    Returns:
        What ``metrics.json`` holds.
    """
    config = settled(config or read_config(folder), folder)
    metrics = measure(folder, config, folder / "samples", models)
    if "win_rate" in metrics and (more := at_training_guidance(folder, config, models)):
        metrics |= more
        write_metrics(folder, metrics)
    return metrics


def measure(folder: Path, config: Config, memo: Path, models: Models | None) -> dict[str, Any]:
    """Compare two models at ``evaluation.guidance_scale``; write what :func:`evaluate` writes.

    memo: folder that keeps samples, so that many runs share the samples of one reference.
    """
    e = config.evaluation
    prompt_set = read_prompt_set(e.prompts, e.limit)
    files = both_sides(folder, config, memo, models)
    reference, policy = (read_scores(file) for file in files)
    metrics: dict[str, Any] = {"n_prompts": len(prompt_set.prompts), "seeds": e.seeds}
    if reference:
        metrics |= judged(prompt_set, reference, policy, config)
        if current_team().main:
            write_table(folder / "per_prompt.parquet", prompt_set, config, reference, policy)
    metrics |= structure(prompt_set, files, config) | scoring(memo, config) | changes(*files)
    metrics |= training_facts(folder, config)
    metrics |= {"seconds": read_seconds(folder), "models": list(models) if models else None}
    write_metrics(folder, metrics)
    if current_team().main:
        atomic_text(to_yaml(config), folder / EVALUATED)
    return metrics


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write ``metrics.json`` in the first process."""
    if current_team().main:
        atomic_text(json.dumps(metrics, indent=1), folder / "metrics.json")


def at_training_guidance(folder: Path, config: Config, models: Models | None) -> dict[str, Any]:
    """Compare both models at the guidance scale of the policy's training, on the same noise.

    The result is empty if that scale is the one already evaluated, or if the policy is not a run.
    """
    run, e = Path((models or (None, folder))[1] or ""), config.evaluation
    if not (run / "config.yaml").is_file():
        return {}
    trained = trained_guidance(read_config(run))
    if trained == e.guidance_scale:
        return {}
    config = replace(config, evaluation=replace(e, guidance_scale=trained))
    files = both_sides(folder, config, folder / "samples", models)
    prompt_set = read_prompt_set(e.prompts, e.limit)
    reference, policy = (read_scores(file) for file in files)
    other = {"guidance_scale": trained, "instead_of": e.guidance_scale}
    return {
        OTHER_GUIDANCE: other | judged(prompt_set, reference, policy, config),
        "seconds": read_seconds(folder),
    } | scoring(folder / "samples", config)


def both_sides(folder: Path, config: Config, memo: Path, models: Models | None) -> list[Path]:
    """Sample and score both sides, each in a timed stage; return their files, reference first.

    Samples at a second guidance scale add to the time of the same stage.
    """
    e, files = config.evaluation, []
    prompts = read_prompts(e.prompts, e.limit)
    sides = [side(config, name) for name in models or (None, str(folder))]
    for word, model in zip(("reference", "policy"), sides, strict=True):
        with stage(folder, f"sample {word}"):
            files.append(sampled_file(model.config, model.adapter, memo, prompts, word, e.seeds))
    return files


def judged(
    prompt_set: PromptSet, reference: Scores, policy: Scores, config: Config
) -> dict[str, Any]:
    """Compare over all prompts, and per category under ``categories``."""
    e = config.evaluation
    if e.preference not in reference:
        raise ConfigError(
            f"evaluation.preference={e.preference!r} is not a score of {e.scorer}: choose one of "
            f"{', '.join(reference)}"
        )
    shape = (len(prompt_set.prompts), e.seeds)
    r, p = ({k: v.reshape(shape) for k, v in side.items()} for side in (reference, policy))
    overall = compare(r, p, e.preference)
    by_category = {
        name: compare(
            {k: v[rows] for k, v in r.items()}, {k: v[rows] for k, v in p.items()}, e.preference
        )
        for name, rows in prompt_set.by_category.items()
    }
    return overall | ({"categories": by_category} if by_category else {})


def write_table(
    path: Path, prompt_set: PromptSet, config: Config, reference: Scores, policy: Scores
) -> None:
    """Write one row per image: prompt, category, seed, every score of both sides, and who won."""
    e = config.evaluation
    places = [(k, j) for k in range(len(prompt_set.prompts)) for j in range(e.seeds)]
    ours, theirs = policy[e.preference], reference[e.preference]
    columns: dict[str, Any] = {
        "prompt": [prompt_set.prompts[k] for k, _ in places],
        "category": [prompt_set.categories[k] for k, _ in places],
        "seed": [e.seed + k + REPEAT * j for k, j in places],
        "win": (ours > theirs) + 0.5 * (ours == theirs),
    }
    columns |= {f"reference.{name}": v for name, v in reference.items()}
    columns |= {f"policy.{name}": v for name, v in policy.items()}
    atomic_table(pa.table(columns), path)


def training_facts(folder: Path, config: Config) -> dict[str, Any]:
    """Read the last row of the run's training log; without a training it is empty."""
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        return {"pairs": 0, "steps": config.training.steps, "training": {}}
    last = {k: v for k, v in rows[-1].items() if k != "step"}
    return {"pairs": last.pop("pairs", 0), "steps": config.training.steps, "training": last}
