"""Read a run's measurements and say in plain words what they show and what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from inversion_dpo.maths.intervals import LEAST_PROMPTS, wilson
from inversion_dpo.maths.methods import USES
from inversion_dpo.run.config import ConfigError
from inversion_dpo.run.disk import DiskError
from inversion_dpo.run.folder import read_config, read_metrics, read_rows, run_file
from inversion_dpo.run.judged import trained_since
from inversion_dpo.run.words import counted, typed
from inversion_dpo.training.health import (
    FEW_PAIRS,
    SAME_IMAGES,
    WINDOW,
    Advice,
    Row,
    accuracy_text,
    beta_text,
    complaints,
    heldout_share,
    heldout_units,
)
from inversion_dpo.trajectories.method import chosen_method

DECIDED = 0.1  # mean gradient factor below which most pairs have no say any more
RISES = 3  # held-out measurements in a row that rise
GAIN = ": a gain"
NEEDS = {  # what a row with some columns has besides
    ("margin",): ("loss", "drift"),
    ("margin", "winner_error"): ("winner_error_ref",),
    ("heldout_pairs",): ("heldout_accuracy", "heldout_margin"),
    ("heldout_winner_error",): ("heldout_winner_error_ref",),
}


def advise(folder: Path) -> list[Advice]:
    """Judge the training in a run's folder, and its evaluation if there is one.

    Args:
        folder: of a run that trained for at least one step.

    Raises:
        ConfigError: nothing was trained there.
        DiskError: a file is damaged.
    """
    rows = read_rows(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    if not steps:
        run_file(folder)
        raise ConfigError(
            f"{folder} holds no training step: run `inversion-dpo train --config "
            f"{typed(folder / 'config.yaml')} --output {typed(folder)}`"
        )
    check_rows(folder / "metrics.jsonl", rows)
    config, held = read_config(folder), [row for row in rows if "heldout_pairs" in row]
    loss, metrics = chosen_method(config).loss, read_metrics(folder)
    warnings = warned(steps)
    causes = [*broken(steps), *warnings.values()]
    found = judged(metrics, held) if metrics else []
    reference, policy = metrics.get("models") or (None, None)
    if reference or (policy and Path(policy).resolve() != folder.resolve()):
        seen = f"metrics.json compares other models: {policy} with {reference or 'the base model'}"
        change = (
            f"Run `inversion-dpo evaluate {typed(folder)}`; compare other models in a new folder"
        )
        found = [Advice(seen, change)]
    elif metrics and trained_since(folder, metrics):
        seen = "The images are of the policy before it was trained further"
        again = f"Run `inversion-dpo evaluate {typed(folder)}` again"
        found = [Advice(seen, f"{again}, once the training is finished")]
    elif metrics.get("steps", rows[-1]["step"]) < rows[-1]["step"]:
        seen = f"The images are of step {metrics['steps']:.0f}, the training is further"
        found = [Advice(seen, f"Run `inversion-dpo evaluate {typed(folder)}` again")]
    if "margin" in steps[-1]:
        found = learned(steps, held, config.training.batch_size) + found
        found += decided(steps) if "link" in USES[loss] else []
    elif held and "heldout_winner_error" in held[-1]:
        found.insert(0, without_reference(held[-1]))
    if any(advice.seen.endswith(GAIN) for advice in found):  # what was feared did not happen
        causes = broken(steps) + [
            a if kind == SAME_IMAGES else Advice(f"{a.seen}. The images gained all the same")
            for kind, a in warnings.items()
        ]
    elif causes:  # mend these first: what follows from them needs no remedy of its own
        found = [Advice(advice.seen) for advice in found]
    return causes + found


def check_rows(file: Path, rows: Sequence[Row]) -> None:
    """Refuse rows of a training that lack a part, as nothing but damage makes them.

    Args:
        file: that they were read from.
        rows: of numbers.

    Raises:
        DiskError: names file, step and part.
    """
    for row in rows:
        lost = [k for has, more in NEEDS.items() if {*has} <= {*row} for k in more if k not in row]
        share, pairs = row.get("heldout_accuracy", 0.5), row.get("heldout_pairs", 1.0)
        if not lost and not (1 <= pairs < 1e9 and (0 <= share <= 1 or math.isnan(share))):
            lost = ["possible held-out accuracy"]
        if lost:
            raise DiskError(
                f"{file}: the line of step {row['step']} is damaged (it has no {lost[0]}): take "
                "that line out"
            )


def broken(steps: Sequence[Row]) -> list[Advice]:
    """Count the steps that were left out."""
    left = [row["step"] for row in steps if "skipped" in row]
    seen = (
        f"{len(left)} of {len(steps)} steps were left out, the first at step {left[0]:.0f}: their "
        "loss or gradient was not finite"
        if left
        else ""
    )
    change = "Lower training.learning_rate, or set training.mixed_precision=bf16"
    return [Advice(seen, change)] if left else []


def warned(steps: Sequence[Row]) -> dict[str, Advice]:
    """Repeat the warnings of the training by kind, each with the first step at which it holds."""
    first: dict[str, Advice] = {}
    for end in range(1, len(steps) + 1):
        for kind, advice in complaints(steps[max(0, end - WINDOW) : end]).items():
            at = f"From step {steps[end - 1]['step']:.0f} on: {advice.seen}"
            first.setdefault(kind, Advice(at, advice.change))
    if "drift" in first:  # then both errors rise
        first.pop("loser only", None)
    return first


def learned(steps: Sequence[Row], held: Sequence[Row], batch: int) -> list[Advice]:
    """Judge the held-out accuracy: beside chance, beside the training pairs, and over time.

    Args:
        steps: rows with a loss.
        held: rows with measurements of held-out pairs.
        batch: pairs of a step.
    """
    if not held or held[-1]["heldout_pairs"] < FEW_PAIRS:
        few = held[-1]["heldout_pairs"] if held else 0
        units = heldout_units(held[-1] if held else {})
        measured = counted(int(few), f"held-out {units.removesuffix('s')}")
        seen = f"{measured} cannot say what was learned"
        return [Advice(seen, f"Give more {units}, or raise data.holdout")]
    last = held[-1]
    if not math.isfinite(last["heldout_accuracy"]):
        seen = f"The held-out measurements of step {last['step']:.0f} are not finite"
        return [Advice(seen, "Lower training.learning_rate, or set training.mixed_precision=bf16")]
    _, low, high = heldout_share(last)
    if low <= 0.5:
        what = "no better than chance" if high >= 0.5 else "worse than chance"
        return [
            Advice(
                f"{accuracy_text(last).capitalize()}: {what}",
                "Look at the pairs (`inversion-dpo pairs check`): do people see what the winners "
                "have in common? If so, raise training.steps, then training.learning_rate",
            )
        ]
    found = [Advice(f"{accuracy_text(last).capitalize()}: better than chance")]
    recent = [row["accuracy"] for row in steps[-WINDOW:] if "accuracy" in row]
    share, least, _ = wilson(fmean(recent), len(recent) * batch)
    if least > high:
        units = heldout_units(last)
        seen = f"Training {units} are told apart in {share:.0%}, more than held-out ones: memorised"
        found.append(Advice(seen, "Give more pairs, lower training.steps or policy.rank"))
    best = max(held, key=lambda row: row["heldout_accuracy"])
    if heldout_share(best)[1] > high:
        seen = f"Held-out accuracy was {best['heldout_accuracy']:.2f} at step {best['step']:.0f}"
        change = (
            "Judge the policy in the run's best/ if there is one (inversion-dpo evaluate RUN "
            f"--policy RUN/best), or train with training.steps={best['step']:.0f} in another "
            "--output"
        )
        found.append(Advice(f"{seen} and fell since", change))
    margins = [row["heldout_margin"] for row in held[-RISES - 1 :]]
    if len(margins) > RISES and margins == sorted(margins) and last is best:
        seen = f"Held-out margin and accuracy still rise after {len(steps)} steps"
        found.append(Advice(seen, "Raise training.steps and run the same command again"))
    return found


def decided(steps: Sequence[Row]) -> list[Advice]:
    """Judge what is left of the pairs' gradient over the last steps."""
    factors = [row["gradient_factor"] for row in steps[-WINDOW:] if "gradient_factor" in row]
    if len(factors) < WINDOW or not (mean := fmean(factors)) < DECIDED:
        return []
    seen = f"The mean gradient factor of the last {WINDOW} steps is {mean:.2f}: pairs are decided"
    change = f"More steps change little; stop here, or {beta_text(steps[-1], raised=False)}"
    return [Advice(seen, change)]


def without_reference(row: Row) -> Advice:
    """Judge a loss that has no margin by its error on held-out winners."""
    ours, theirs = row["heldout_winner_error"], row["heldout_winner_error_ref"]
    seen = f"Held-out error on winners {ours:.4g}, the reference's {theirs:.4g}"
    if ours < theirs:
        return Advice(f"{seen}: winners are predicted better")
    change = "Lower training.learning_rate or training.steps"
    return Advice(f"{seen}: winners are predicted no better", change)


def judged(metrics: Mapping[str, Any], held: Sequence[Row]) -> list[Advice]:
    """Compare what the images show with what the pairs taught."""
    if "win_rate" not in metrics:
        seen = "Images were sampled but not scored"
        return [
            Advice(
                seen, "Set evaluation.scorer, or compare blind on the page of `inversion-dpo web`"
            )
        ]
    low, high = metrics["win_rate_low"], metrics["win_rate_high"]
    seen = f"Win rate of the images {metrics['win_rate']:.2f} ({low:.2f} to {high:.2f})"
    if metrics.get("n_prompts", LEAST_PROMPTS) < LEAST_PROMPTS:
        return [Advice(f"{seen}: too few prompts to tell")]
    if low > 0.5:
        return [Advice(f"{seen}{GAIN}")]
    what = "no measurable change" if high >= 0.5 else "a loss"
    taught = bool(held) and heldout_share(held[-1])[1] > 0.5
    if not taught:
        return [Advice(f"{seen}: {what}")]
    return [
        Advice(
            f"{seen}: {what}, although the policy tells the pairs apart",
            "Sample at the guidance of training, see whether the scorer agrees with the pairs "
            "(both are in report.html), and evaluate earlier snapshots",
        )
    ]


def text(found: Sequence[Advice]) -> str:
    """Write the findings as lines, those that ask for a change last and numbered."""
    fine = [advice.seen for advice in found if not advice.change]
    change = [f"{k}. {a.seen}.\n   {a.change}." for k, a in enumerate(wanted(found), 1)]
    return "\n".join([*fine, *(["To change:", *change] if change else ["Nothing to change."])])


def wanted(found: Sequence[Advice]) -> list[Advice]:
    """List the findings that ask for a change."""
    return [advice for advice in found if advice.change]
