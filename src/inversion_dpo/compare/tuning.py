"""Tune every method with the same number of trials, on validation prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inversion_dpo.compare.methods import METHODS
from inversion_dpo.compare.runs import run
from inversion_dpo.evaluation.metrics import metric_rows
from inversion_dpo.run.config import load_config
from inversion_dpo.run.disk import atomic_text

SEED = 100  # of the trials' training; the comparison's seeds count from 0
PROMPTS = ("evaluation.prompts=asset:prompts-validation.txt", "evaluation.limit=200")


def utility(metrics: dict[str, Any], preference: str) -> float:
    """Compute the goal of tuning: the gain of the preference minus the losses of other metrics."""
    falls = sum(min(0.0, r["gain"]) for n, r in metric_rows(metrics).items() if n != preference)
    return float(metrics["preference"]["gain"]) + falls


def tune(
    root: Path, preset: str, methods: Sequence[str], extra: Sequence[str], preference: str
) -> dict[str, list[str]]:
    """Return the best of each method's trials; ``tuning.json`` keeps every trial."""
    best: dict[str, list[str]] = {}
    rows = []
    for method in methods:
        scored = []
        for k, trial in enumerate(METHODS[method].trials()):
            overrides = [*extra, *trial, *METHODS[method].settings, *PROMPTS]
            config = load_config(preset, [*overrides, f"training.seed={SEED}"])
            result = run(root, f"tune-{method}-{k}", config, 0)
            scored.append((utility(result["metrics"], preference), list(trial)))
            rows.append({"method": method, "settings": list(trial), "utility": scored[-1][0]})
        best[method] = max(scored)[1]
        atomic_text(json.dumps(rows, indent=1), root / "tuning.json")
    return best
