"""Summarise a comparison: means over seeds with intervals, wins, curves, compute to a score.

Intervals are Student's t over training seeds; all runs share prompts and noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import stats

from inversion_dpo.data.traits import TRAITS
from inversion_dpo.evaluation.metrics import metric_rows

Result = dict[str, Any]
BASELINE = "diffusion_dpo"  # its final score is the goal of the others


def over_seeds(values: Sequence[float], keep: bool = True) -> dict[str, Any]:
    """Compute the mean with a 95% t interval; one value has no interval (NaN bounds).

    keep: whether the result holds the values too.

    Source: Student, Biometrika 6(1), 1908.
    """
    x = np.asarray(values, float)
    mean, n = float(x.mean()), len(x)
    half = float(stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / n**0.5) if n > 1 else float("nan")
    row = {"mean": mean, "low": mean - half, "high": mean + half}
    return row | {"values": x.tolist()} if keep else row


def share_over_seeds(shares: Sequence[float]) -> dict[str, Any]:
    """Compute :func:`over_seeds` of shares, with an interval cut to [0, 1]."""
    row = over_seeds(shares)
    ends = np.clip([row["low"], row["high"]], 0.0, 1.0).tolist()  # NaN, of one seed, stays
    return row | {"low": ends[0], "high": ends[1]}


def variant_summary(results: Sequence[Result], inversion: Mapping[str, float]) -> Result:
    """Summarise one variant's runs, one per seed, as means over seeds.

    ``inversion`` holds the evaluations and seconds before the first step; zeros if none.
    """
    metrics = [r["metrics"] for r in results]
    names = list(metric_rows(metrics[0]))
    last, histories = [m["training"] for m in metrics], [r["history"] for r in results]
    return {
        "reference": {n: metrics[0][n]["reference"] for n in names},
        "scores": {n: over_seeds([m[n]["policy"] for m in metrics]) for n in names},
        "gains": {n: over_seeds([m[n]["gain"] for m in metrics]) for n in names},
        "preference": over_seeds([m["preference"]["gain"] for m in metrics]),
        "win_rate": share_over_seeds([m["win_rate"] for m in metrics]),
        "diversity": over_seeds([r["diversity"] for r in results]),
        "traits": traits_over_seeds(metrics),
        "one_colour": sum(len(m.get("one_colour", {}).get("policy", ())) for m in metrics),
        "training": {
            k: over_seeds([row[k] for row in last])
            for k in last[0]
            if k.startswith("heldout_") and all(k in row for row in last)
        },
        "step_seconds": float(np.median([r["step_seconds"] for r in results])),
        "step_evaluations": step_evaluations(histories[0]),
        "inversion": dict(inversion),
        "curve": rows_over_seeds([r["curve"] for r in results]),
        "history": rows_over_seeds(
            [[r for r in h if "heldout_drift" in r] for h in histories], prefix="heldout_"
        ),
    }


def traits_over_seeds(metrics: Sequence[Result]) -> Result:
    """Compute the share of images in which the policy has more of a trait.

    The result is empty if a run has too few images, or if none of its images differ. A single
    trait that never differs counts as even.
    """
    if not all(m.get("traits") for m in metrics):
        return {}
    even = {"share": 0.5}
    return {
        n: share_over_seeds([m["traits"].get(n, even)["share"] for m in metrics]) for n in TRAITS
    }


def step_evaluations(history: Sequence[Mapping[str, float]]) -> float:
    """Return network evaluations of one training step; one image's forward pass is 1."""
    return float(np.mean([r["evaluations"] for r in history if "loss" in r]))


def rows_over_seeds(runs: Sequence[Sequence[Mapping[str, Any]]], prefix: str = "") -> list[Result]:
    """List rows of one step each: ``step`` and the mean over seeds of every other number.

    runs: the rows of each seed. prefix: of the names that count.
    """
    return [
        {"step": rows[0]["step"]}
        | {
            k: over_seeds([r[k] for r in rows])
            for k in rows[0]
            if k != "step" and k.startswith(prefix)
        }
        for rows in zip(*runs, strict=True)
    ]


def wins(scores: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, dict[str, Result]]:
    """Compute the share of prompts on which one variant scores above another; ties count half.

    ``scores``: variant -> seed -> prompt. Runs of the same seed are compared.
    """
    arrays = {name: np.asarray(rows) for name, rows in scores.items()}
    return {
        a: {
            b: share_over_seeds(((x > y) + 0.5 * (x == y)).mean(1).tolist())
            for b, y in arrays.items()
            if a != b
        }
        for a, x in arrays.items()
    }


def crossing(cost: Sequence[float], score: Sequence[float], goal: float) -> float | None:
    """Find the least cost at which the piecewise linear curve reaches the goal; None if never."""
    if score[0] >= goal:
        return float(cost[0])
    for (c0, s0), (c1, s1) in pairwise(zip(cost, score, strict=True)):
        if s1 >= goal:
            return float(c0 + (c1 - c0) * (goal - s0) / (s1 - s0))
    return None


def reach(summary: Result, preference: str, goal: float) -> Result:
    """Compute the cost of reaching the goal by the mean curve, and count the seeds reaching it.

    Evaluations and seconds include the inversion; ``*_alone`` do not, as with a finished cache.
    """
    curve = summary["curve"]
    steps = [row["step"] for row in curve]
    means = [row[preference]["mean"] for row in curve]
    seeds = zip(*(row[preference]["values"] for row in curve), strict=True)
    crossed = crossing(steps, means, goal)
    result: Result = {
        "steps": crossed,
        "seeds_reaching": sum(crossing(steps, s, goal) is not None for s in seeds),
    }
    for unit in ("evaluations", "seconds"):
        alone = None if crossed is None else crossed * summary[f"step_{unit}"]
        result[f"{unit}_alone"] = alone
        result[unit] = None if alone is None else alone + summary["inversion"][unit]
    return result


def summarise(
    runs: Mapping[str, Sequence[Result]],
    inversions: Mapping[str, Mapping[str, float]],
    preference: str,
) -> Result:
    """Compute the part of ``results.json`` that depends on the runs, variant -> result per seed.

    Args:
        runs: variant -> a result of each seed.
        inversions: variant -> what its inversion took.
        preference: the score that decides.
    """
    variants = {name: variant_summary(r, inversions[name]) for name, r in runs.items()}
    scores = {name: [r["scores"] for r in results] for name, results in runs.items()}
    summary: Result = {"variants": variants, "wins": wins(scores)}
    curve = variants[BASELINE]["curve"] if BASELINE in variants else []
    if curve:
        goal = curve[-1][preference]["mean"]
        rows = {n: reach(s, preference, goal) for n, s in variants.items() if s["curve"]}
        summary["reach"] = {"goal": goal, "baseline": BASELINE, "variants": rows}
    return summary
