"""Plan a comparison, check it before its first run, and say what it takes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inversion_dpo.compare.methods import (
    METHODS,
    Variant,
    check,
    overrides_of,
    tuned_settings,
    variants,
)
from inversion_dpo.compare.rounds import Rounds, check_rounds
from inversion_dpo.compare.runs import (
    DIVERSITY_PROMPTS,
    DIVERSITY_SEEDS,
    MOST,
    SNAPSHOTS,
    folder_of,
)
from inversion_dpo.data.buckets import square
from inversion_dpo.data.source import open_pairs
from inversion_dpo.evaluation.defaults import evaluation_prompts
from inversion_dpo.evaluation.evaluate import check as check_evaluation
from inversion_dpo.evaluation.page import Table
from inversion_dpo.maths.inversion import passes
from inversion_dpo.maths.methods import carried_beta
from inversion_dpo.models.loading import check_model
from inversion_dpo.run.config import Config, ConfigError, load_config, load_given
from inversion_dpo.run.disk import atomic_json, check_room, read_json
from inversion_dpo.training.beforehand import check_data, check_training
from inversion_dpo.training.cost import job_of
from inversion_dpo.training.effects import without_effect
from inversion_dpo.training.trackers import check_tracker
from inversion_dpo.trajectories.cost import evaluations_again
from inversion_dpo.trajectories.method import chosen_method, takes_images

logger = logging.getLogger(__name__)
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


def check_folder(root: Path, plan: Plan) -> dict[str, Any]:
    """Return what ``compare.json`` is to hold; ConfigError if the folder holds something else.

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
    return mine


def claim_folder(root: Path, plan: Plan) -> None:
    """Reserve the folder for this comparison; ConfigError as :func:`check_folder`."""
    mine = check_folder(root, plan)
    root.mkdir(parents=True, exist_ok=True)
    atomic_json(mine, root / "compare.json")


Line = tuple[Variant, list[list[str]]]  # a variant with the overrides of its runs, one a seed


def every_line(plan: Plan, root: Path) -> list[Line]:
    """List each method, and each with every varied value, whether or not it has an effect."""
    tuned = tuned_settings(plan.config, root / "tuned.json")
    first = {m: [*beta_of(plan, m), *tuned.get(m, ())] for m in plan.methods}
    return [
        (v, [overrides_of(v, first, plan.extra, s) for s in range(plan.seeds)])
        for v in variants(plan.methods, plan.vary)
    ]


def beta_of(plan: Plan, method: str) -> tuple[str, ...]:
    """Carry the configuration's beta over to a method of another loss.

    One that the user gave holds for all.
    """
    base, given = load_given(plan.config, list(plan.extra))
    loss = chosen_method(load_config(plan.config, list(METHODS[method].settings))).loss
    before, beta = chosen_method(base).loss, base.objective.beta
    if loss == before or not isinstance(beta, float) or "objective.beta" in given:
        return ()
    carried = carried_beta(beta, before, loss)
    return () if carried is None else (f"objective.beta={carried}",)


def lines(plan: Plan, root: Path) -> list[Line]:
    """List what is run: a method is not varied by what has no effect on it."""
    return [
        (v, runs)
        for v, runs in every_line(plan, root)
        if not v.varied or v.varied[0] not in without_effect(load_config(plan.config, runs[0]))
    ]


def warn_of_lines(plan: Plan, root: Path) -> None:
    """Warn of methods without tuned settings, and of those that a key does not vary."""
    tuned = tuned_settings(plan.config, root / "tuned.json")
    untuned = [m for m in plan.methods if m not in tuned]
    if untuned and not plan.tune:
        logger.warning(
            "without tuned settings for %s: %s. They run with the configuration's own, "
            "and a beta of another loss carried over; --tune finds some",
            plan.config,
            ", ".join(untuned),
        )
    run = {v.name for v, _ in lines(plan, root)}
    left = [v for v, _ in every_line(plan, root) if v.name not in run]
    for key, method in dict.fromkeys((v.varied[0], v.method) for v in left if v.varied):
        logger.warning("--vary %s: it has no effect on %s, which is trained once", key, method)


def check_build(plan: Plan) -> None:
    """Refuse settings of ``pairs build`` that the comparison does not read."""
    for text in (*plan.extra, *plan.vary):
        group, _, name = text.partition("=")[0].partition(".")
        if group == "build" and (plan.rounds.count == 1 or name in SET_BY_ROUNDS):
            raise ConfigError(
                f"{text} has no effect in `compare`: later rounds (--rounds) read --round-prompts, "
                "--round-samples and the other settings of build.*. Leave it out"
            )


def check_plan(root: Path, plan: Plan) -> Config:
    """Check settings, data, model and disk, so that a mistake is reported before the first run.

    Args:
        root: folder of the comparison; nothing is written there.
        plan: what to compare.

    Returns:
        The settings that all runs have in common.

    Raises:
        ConfigError: a setting is wrong, or the folder holds something else.
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
    plans = [overrides for _, runs in every_line(plan, root) for overrides in runs]
    check(plan.config, plans, plan.extra, plan.vary)
    warn_of_lines(plan, root)
    check_tracker(base.training.tracker)
    plans = [overrides for _, runs in lines(plan, root) for overrides in runs]
    configs = [load_config(plan.config, overrides) for overrides in plans[:: plan.seeds]]
    for config in configs:
        check_data(config, root / "cache")
    check_evaluation(base, root)
    for config in configs:
        check_training(config, check_model(config.model), root)
    runs, images = len(plans), images_of(plan, base, len(plans))
    pixels = math.prod(square(base.model.resolution))
    check_room(root / "samples", images * 2 * pixels, f"samples of {runs} runs")
    check_folder(root, plan)
    return base


def images_of(plan: Plan, base: Config, runs: int) -> int:
    """Count the samples by which all runs are judged; those of later rounds' pairs come on top."""
    count, steps = len(evaluation_prompts(base)), base.training.steps
    curve = min(plan.curve, count)
    both = count * base.evaluation.seeds + min(count, DIVERSITY_PROMPTS) * DIVERSITY_SEEDS
    points = math.ceil(steps / max(1, steps // SNAPSHOTS))  # of a curve, as runs.run spaces them
    samples = count * MOST + both + curve + runs * plan.rounds.count * (both + points * curve)
    if base.evaluation.seeds > 1:
        return samples
    again = (1 + runs * plan.rounds.count) * (curve == count)  # ends of curves, sampled already
    return samples - count * (1 + again)  # the reference is the first of the best of n


def foretold(root: Path, plan: Plan, base: Config) -> str:
    """Say what a checked comparison takes: runs, and forward passes of the network by image.

    Args:
        root: folder of the comparison.
        plan: what to compare.
        base: the settings that all runs have in common.

    Returns:
        Markdown: a line for each variant, and sentences on what comes on top.
    """
    rows, r, e, every = [], plan.rounds, base.evaluation, 0
    for variant, runs in lines(plan, root):
        c = load_config(plan.config, runs[0])
        pairs = open_pairs(c.data, alone=takes_images(c)).expected()
        scales = c.inversion.guidance_scale, c.objective.guidance_scale
        job = job_of(c, pairs or 1000, evaluations_again(check_model(c.model), *scales))
        names = [f"{variant.name}-{seed}" for seed in range(plan.seeds)]
        done = sum((folder_of(root, name) / "result.json").exists() for name in names)
        steps = f"{c.training.steps:,} x {c.training.batch_size}"
        cost = f"{job.inversion:,.0f}", f"{job.training * plan.seeds:,.0f}"
        counts = f"{pairs:,}" if pairs else "unknown, as 1,000"
        rows.append([variant.name, str(plan.seeds), str(done), steps, counts, *cost])
        every += plan.seeds
    head = ["", "runs", "finished", "steps", "pairs", "passes to invert", "to train all runs"]
    images = images_of(plan, base, every)
    taken = images * e.sample_steps * passes(e.guidance_scale)
    text = [
        Table(head, rows).markdown(),
        "A pass is a forward pass of one image. Lines of equal inversion settings invert once.",
        f"To judge all runs, {images:,} images are sampled: {taken:,.0f} passes, "
        f"{e.sample_steps} steps at guidance {e.guidance_scale:g}. Finished runs are counted too.",
    ]
    if r.count > 1:
        text.append(f"{r.count} rounds: each later one trains every run again, on its own samples.")
    if plan.tune:
        trials = ", ".join(f"{m} {len(list(METHODS[m].trials()))}" for m in plan.methods)
        text.append(f"--tune comes on top: it trains and judges as many trials first: {trials}.")
        text.append("Of your own prompts half are set aside for them.")
    return "\n".join(text)


def parse_extra(overrides: Sequence[str] | None) -> tuple[str, ...]:
    """Return common overrides; ConfigError for those that the comparison sets itself."""
    for text in overrides or ():
        if text.split("=")[0] in ("objective.name", "objective.target", "training.seed"):
            raise ConfigError(f"{text}: set methods and seeds with --methods and --seeds")
    return tuple(overrides or ())
