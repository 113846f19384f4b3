"""Run ``inversion-dpo compare``: tune, run every method and seed, summarise, write the page."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from inversion_dpo.compare import page as report
from inversion_dpo.compare.beforehand import Plan, check_plan, claim_folder, lines
from inversion_dpo.compare.methods import tuned_settings
from inversion_dpo.compare.rounds import chain, round_scores, spent_before
from inversion_dpo.compare.runs import (
    best_of,
    diversity,
    folder_of,
    inversion_evaluations,
    pictured,
    refuse_other_files,
)
from inversion_dpo.compare.summary import summarise
from inversion_dpo.compare.tuning import split_prompts, tune
from inversion_dpo.evaluation.defaults import settled
from inversion_dpo.evaluation.prompt_sets import read_prompts
from inversion_dpo.evaluation.report import versions
from inversion_dpo.run.config import Config, load_config
from inversion_dpo.run.disk import atomic_json, read_json
from inversion_dpo.run.folder import occupied
from inversion_dpo.training.recipe import prepare
from inversion_dpo.trajectories.method import chosen_method

logger = logging.getLogger(__name__)
SETTLED = ("prompts", "preference")  # that evaluation.defaults fills in


def inversion_cost(root: Path, config: Config) -> dict[str, float]:
    """Return evaluations and seconds of inverting the training pairs; measured once.

    After a kill the seconds are those of the part that was missing, scaled to the whole.
    """
    if not chosen_method(config).inverts:
        return {"evaluations": 0.0, "seconds": 0.0}
    written = {p: p.stat().st_mtime for p in (root / "cache").glob("*/shard-*.json")}
    begun = time.time()
    prepared = prepare(config, root / "cache")
    folder, shards = prepared.cache.folder, len(prepared.cache.sizes)
    taken, file = time.time() - begun, root / "inversions.json"
    timed: dict[str, dict[str, float]] = read_json(file) if file.exists() else {}
    if (name := folder.name) not in timed:
        if there := sorted(at for path, at in written.items() if path.parent == folder):
            logger.warning("%s was begun earlier: what its inversion took is estimated", folder)
            if (made := shards - len(there)) > 0:
                taken *= shards / made
            else:  # killed between the last shard and its time
                taken += (there[-1] - there[0]) * shards / max(1, shards - 1)
        timed[name] = {"seconds": round(taken, 2)}
        atomic_json(timed, file)
    seconds = timed[name]["seconds"]
    return {"evaluations": inversion_evaluations(config, prepared), "seconds": seconds}


def compare(root: Path, plan: Plan) -> Path:
    """Finish all runs; write ``results.json``, ``results.md`` and ``report.html``.

    A finished run is never repeated; a crash loses at most the run in progress. The page is
    written after every seed.

    Args:
        root: folder of the comparison.
        plan: what to compare.

    Returns:
        The path of ``report.html``.

    Raises:
        ConfigError: a setting is wrong; raised before any training.
    """
    base = check_plan(root, plan)
    claim_folder(root, plan)
    with occupied(root, run=False):
        e, given = settled(base, root).evaluation, base.evaluation
        filled = [f"evaluation.{k}={getattr(e, k)}" for k in SETTLED if e != given]
        plan = replace(plan, extra=(*plan.extra, *filled))
        return compare_alone(root, plan, load_config(plan.config, list(plan.extra)))


def compare_alone(root: Path, plan: Plan, base: Config) -> Path:
    """Run :func:`compare` in a folder that this process has locked."""
    preference = base.evaluation.preference
    if plan.tune:
        tuned = dict(tuned_settings("", root / "tuned.json"))
        missing = [m for m in plan.methods if m not in tuned]
        tuning, measuring = split_prompts(root, base.evaluation)
        tuned |= tune(root, plan.config, missing, (*plan.extra, *tuning), preference)
        plan = replace(plan, extra=(*plan.extra, *measuring))
        base = load_config(plan.config, list(plan.extra))
        atomic_json(tuned, root / "tuned.json")
    todo = lines(plan, root)
    named = [(f"{v.name}-{k}", own) for v, runs in todo for k, own in enumerate(runs)]
    refuse_other_files(root, ((name, load_config(plan.config, own)) for name, own in named))
    inversions = {
        v.name: inversion_cost(root, load_config(plan.config, runs[0])) for v, runs in todo
    }
    results: dict[str, dict[str, list[dict[str, Any]]]] = {v.name: {} for v, _ in todo}
    page = root / "report.html"
    for seed in range(plan.seeds):
        for variant, runs in todo:
            logger.info("seed %d of %d: %s", seed + 1, plan.seeds, variant.name)
            config = load_config(plan.config, runs[seed])
            in_order = chain(root, variant.name, config, plan.curve, plan.rounds)
            for round_of, result in in_order.items():
                results[variant.name].setdefault(round_of, []).append(result)
        facts = common(root, plan, base, seed + 1)
        summary = summary_of(results, inversions, facts, preference)
        for variant, runs in todo:
            for round_of in results[variant.name]:
                summary["variants"][round_of] |= {
                    "settings": runs[0][:-1],
                    "method": variant.method,
                    "varied": variant.varied,
                }
        shown = {
            name: folder_of(root, f"{v.name}-0" + f"-round{number}" * (number > 1))
            for v, _ in todo
            if not v.varied
            for number, name in enumerate(results[v.name], start=1)
        }
        cards = pictured(base, root / "samples", shown)
        page = report.write(root, summary, preference, cards)
    return page


def summary_of(
    results: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]],
    inversions: Mapping[str, Mapping[str, float]],
    facts: dict[str, Any],
    preference: str,
) -> dict[str, Any]:
    """Compute all of ``results.json``.

    Every round is a line of its own; the cost of the rounds before it counts as inversion.

    Args:
        results: variant -> name of a round -> one result per seed.
        inversions: variant -> evaluations and seconds before its first step.
        facts: from :func:`common`.
        preference: the score that orders pairs.
    """
    runs: dict[str, Sequence[dict[str, Any]]] = {}
    costs: dict[str, dict[str, float]] = {}
    for variant, rounds in results.items():
        runs |= rounds
        costs |= spent_before(rounds, inversions[variant])
    summary = summarise(runs, costs, preference) | facts
    if any(len(rounds) > 1 for rounds in results.values()):
        summary["rounds"] = {v: round_scores(list(r.values())) for v, r in results.items()}
    return summary


def common(root: Path, plan: Plan, base: Config, seeds: int) -> dict[str, Any]:
    """Collect the facts on all runs: best of n, the reference, versions."""
    e, memo = base.evaluation, root / "samples"
    prompts = read_prompts(e.prompts, e.limit)
    return {
        "config": plan.config,
        "extra": list(plan.extra),
        "seeds": seeds,
        "prompts": len(prompts),
        "curve_prompts": min(plan.curve, len(prompts)),
        "best_of": best_of(base, memo),
        "reference_diversity": diversity(base, None, memo, prompts),
        "versions": versions(),
    }
