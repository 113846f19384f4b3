"""Tune every method with the same number of trials, on validation prompts."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inversion_dpo.compare.methods import METHODS
from inversion_dpo.compare.runs import run
from inversion_dpo.data.buckets import named
from inversion_dpo.evaluation.defaults import MEASURING_FILE
from inversion_dpo.evaluation.metrics import metric_rows
from inversion_dpo.evaluation.prompt_sets import read_prompt_set
from inversion_dpo.run.config import load_config
from inversion_dpo.run.disk import atomic_json, atomic_text, read_json
from inversion_dpo.run.fields import ConfigError, EvaluationConfig

logger = logging.getLogger(__name__)
SEED = 100  # of the trials' training; the comparison's seeds count from 0
VALIDATION = ("evaluation.prompts=asset:prompts-validation.txt", "evaluation.limit=200")


def split_prompts(root: Path, e: EvaluationConfig) -> tuple[Sequence[str], Sequence[str]]:
    """Return the settings of the prompts to tune on, and of those to measure on: no prompt is both.

    The embedded world has validation prompts. Of any other set every second prompt is tuned on.
    """
    if e.prompts == EvaluationConfig.prompts:
        return VALIDATION, ()
    whole, halves = read_prompt_set(e.prompts, e.limit), []
    sizes = whole.size_of
    rows = list(zip(whole.prompts, whole.categories, whole.graphs, strict=True))
    if len(rows) < 2:
        raise ConfigError(f"--tune needs two prompts or more, and {e.prompts} has {len(rows)}")
    for name, part in (("tuning-prompts.jsonl", rows[1::2]), (MEASURING_FILE, rows[::2])):
        lines = [
            json.dumps(
                {"prompt": p, "category": c, "scene_graph": graph and graph.to_dict()}
                | ({"size": named(sizes[p])} if p in sizes else {})
            )
            for p, c, graph in part
        ]
        file = root / name
        atomic_text("\n".join(lines) + "\n", file)
        halves.append((f"evaluation.prompts={file}", "evaluation.limit=null"))
    logger.info(
        "--tune: %d prompts for tuning, %d to measure on", len(rows) // 2, -(-len(rows) // 2)
    )
    return halves[0], halves[1]


def utility(metrics: dict[str, Any], preference: str) -> float:
    """Compute the goal of tuning: the gain of the preference minus the losses of other metrics."""
    falls = sum(min(0.0, r["gain"]) for n, r in metric_rows(metrics).items() if n != preference)
    return float(metrics["preference"]["gain"]) + falls


def tune(
    root: Path, preset: str, methods: Sequence[str], extra: Sequence[str], preference: str
) -> dict[str, list[str]]:
    """Return the best of each method's trials; ``tuning.json`` keeps every trial, earlier ones too.

    Args:
        root: the folder of all runs.
        preset: or a YAML file.
        methods: that are tuned.
        extra: settings of every trial, with its prompts (:func:`split_prompts`).
        preference: the score that decides.
    """
    best: dict[str, list[str]] = {}
    file = root / "tuning.json"
    before = read_json(file, list) if file.exists() else []
    rows = [row for row in before if row["method"] not in methods]
    for method in methods:
        scored = []
        for k, trial in enumerate(METHODS[method].trials()):
            overrides = [*extra, *trial, *METHODS[method].settings]
            config = load_config(preset, [*overrides, f"training.seed={SEED}"])
            result = run(root, f"tune-{method}-{k}", config, 0)
            scored.append((utility(result["metrics"], preference), list(trial)))
            rows.append({"method": method, "settings": list(trial), "utility": scored[-1][0]})
        best[method] = max(scored)[1]
        atomic_json(rows, file)
    return best
