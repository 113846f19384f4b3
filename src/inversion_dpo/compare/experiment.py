"""Run ``inversion-dpo compare``: tune, run every method and seed, summarise, write the page."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inversion_dpo.compare import page as report
from inversion_dpo.compare.methods import Variant, check, overrides_of, tuned_settings, variants
from inversion_dpo.compare.rounds import Rounds, chain, check_rounds, round_scores, spent_before
from inversion_dpo.compare.runs import (
    DIVERSITY_PROMPTS,
    DIVERSITY_SEEDS,
    MOST,
    SNAPSHOTS,
    best_of,
    diversity,
    folder_of,
    inversion_evaluations,
    pictured,
)
from inversion_dpo.compare.summary import summarise
from inversion_dpo.compare.tuning import split_prompts, tune
from inversion_dpo.data.buckets import square
from inversion_dpo.evaluation.defaults import evaluation_prompts, settled
from inversion_dpo.evaluation.evaluate import check as check_evaluation
from inversion_dpo.evaluation.prompt_sets import read_prompts
from inversion_dpo.evaluation.report import versions
from inversion_dpo.models.loading import check_model
from inversion_dpo.run.config import Config, ConfigError, load_config
from inversion_dpo.run.disk import atomic_json, check_room, read_json
from inversion_dpo.run.folder import occupied
from inversion_dpo.training.beforehand import check_data, check_training
from inversion_dpo.training.recipe import prepare
from inversion_dpo.training.run_files import tracker_of
from inversion_dpo.trajectories.method import chosen_method

logger = logging.getLogger(__name__)
SETTLED = ("prompts", "preference")  # that evaluation.defaults fills in
SET_BY_ROUNDS = ("prompts", "samples", "seed", "by", "mining", "once", "splits")  # of build.*
WORDS = {"config": "config", "extra": "settings", "rounds": "rounds of"}  # of compare.json


@dataclass(frozen=True)
class Plan:
    """The plan of a comparison.

    config: preset or YAML file; extra: settings for all runs; vary: KEY=V1,V2 each;
    curve: number of prompts scored at every snapshot, 0 for no curves; rounds: of training.
    """

    config: str
    methods: tuple[str, ...]
    seeds: int
    extra: tuple[str, ...] = ()
    vary: tuple[str, ...] = ()
    tune: bool = False
    curve: int = 200
    rounds: Rounds = Rounds()


def claim_folder(root: Path, plan: Plan) -> None:
    """Reserve the folder for this comparison; ConfigError if it holds another one.

    Methods, seeds, varied values and rounds may be added later. The preset, common settings and
    the samples of the rounds may not change.
    """
    owner = root / "compare.json"
    mine: dict[str, Any] = {"config": plan.config, "extra": list(plan.extra)}
    r = plan.rounds
    if r.count > 1:
        mine["rounds"] = f"{r.prompts} prompts, {r.samples} samples each"
        if r.people:
            mine["rounds"] = f"{r.people} prompts of {r.prompts}, labelled by people"
    if owner.exists():
        theirs = {"rounds": None} | read_json(owner)
        mine = {"rounds": theirs["rounds"]} | mine
        for key in mine:
            if theirs[key] not in (mine[key], None):
                words = " ".join(theirs[key]) if key == "extra" else theirs[key]
                raise ConfigError(
                    f"{root} holds a comparison with {WORDS[key]} {words or '(none)'}: choose "
                    "another --output"
                )
    elif root.is_file() or (root.is_dir() and any(root.iterdir())):
        raise ConfigError(f"{root} is not empty and holds no comparison: choose another --output")
    root.mkdir(parents=True, exist_ok=True)
    atomic_json(mine, owner)


def lines(plan: Plan, root: Path) -> list[tuple[Variant, list[list[str]]]]:
    """List each variant with the overrides of its runs, one run per seed."""
    tuned = tuned_settings(plan.config, root / "tuned.json")
    untuned = [m for m in plan.methods if m not in tuned]
    if untuned and not plan.tune:
        logger.warning(
            "%s have no tuned settings for %s and run with the configuration's own; --tune finds "
            "some",
            ", ".join(untuned),
            plan.config,
        )
    return [
        (v, [overrides_of(v, tuned, plan.extra, s) for s in range(plan.seeds)])
        for v in variants(plan.methods, plan.vary)
    ]


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
    base = load_config(plan.config, list(plan.extra))
    if not base.evaluation.scorer:
        raise ConfigError(
            "compare needs evaluation.scorer: give a scorer's name or module:function"
        )
    if base.inversion.cache:
        raise ConfigError(
            "inversion.cache has no effect in `compare`, whose runs share OUTPUT/cache and time "
            "their inversion: leave it out"
        )
    check_rounds(plan.rounds, base)
    check_build(plan)
    plans = [overrides for _, runs in lines(plan, root) for overrides in runs]
    check(plan.config, plans, plan.extra, plan.vary)
    tracker_of(base.training.tracker)
    configs = [load_config(plan.config, overrides) for overrides in plans[:: plan.seeds]]
    for config in configs:
        check_data(config, root / "cache")
    check_evaluation(base, root)
    for config in configs:
        check_training(config, check_model(config.model), root)
    runs, count = len(plans), len(evaluation_prompts(base))
    images = (
        runs * DIVERSITY_PROMPTS * DIVERSITY_SEEDS
        + count * (MOST + runs)
        + runs * (SNAPSHOTS * min(plan.curve, count))
    )
    pixels = math.prod(square(base.model.resolution))
    check_room(root / "samples", images * 2 * pixels, f"samples of {runs} runs")
    claim_folder(root, plan)
    with occupied(root, run=False):
        e, given = settled(base, root).evaluation, base.evaluation
        filled = [f"evaluation.{k}={getattr(e, k)}" for k in SETTLED if e != given]
        plan = replace(plan, extra=(*plan.extra, *filled))
        return compare_alone(root, plan, load_config(plan.config, list(plan.extra)))


def check_build(plan: Plan) -> None:
    """Refuse settings of ``pairs build`` that the comparison does not read."""
    for text in (*plan.extra, *plan.vary):
        group, _, name = text.partition("=")[0].partition(".")
        if group == "build" and (plan.rounds.count == 1 or name in SET_BY_ROUNDS):
            raise ConfigError(
                f"{text} has no effect in `compare`: later rounds (--rounds) read --round-prompts, "
                "--round-samples and the other settings of build.*. Leave it out"
            )


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


def parse_extra(overrides: Sequence[str] | None) -> tuple[str, ...]:
    """Return common overrides; ConfigError for those that the comparison sets itself."""
    for text in overrides or ():
        if text.split("=")[0] in ("objective.name", "objective.target", "training.seed"):
            raise ConfigError(f"{text}: set methods and seeds with --methods and --seeds")
    return tuple(overrides or ())
