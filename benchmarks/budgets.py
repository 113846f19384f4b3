"""Who is ahead for the same network evaluations? ``python benchmarks/budgets.py [OUTPUT]``.

Trains Inversion-DPO (target ``x0``) and Diffusion-DPO on the shipped ``composition`` pairs, each
with three budgets of network evaluations, inversion included: a forward pass of one image counts
1, its backward pass 2. The rate falls to 0 at the end of every budget, so each line is a training
of its own and not a point on the way of a longer one. How Inversion-DPO shares a budget between
inversion and steps (one fixed-point iteration, as many pairs as stand here) and every setting of
both was chosen on validation prompts with one seed (docs/diary.md). Prints the gain in composition
over the reference on the 500 test prompts with 95% t intervals over seeds, and writes
OUTPUT/budgets.png. Resumable: a finished run is not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from inversion_dpo.compare.experiment import inversion_cost
from inversion_dpo.compare.methods import METHODS
from inversion_dpo.compare.runs import run
from inversion_dpo.compare.summary import over_seeds, step_evaluations
from inversion_dpo.run.config import Config, load_config

COMMON = (
    "training.batch_size=16",
    "training.learning_rate=3e-4",
    "training.lr_scheduler=linear",
    "objective.beta=1000",
)
LEAN = ("inversion.fixed_point_iterations=1", "objective.t_min=0.4")
NAMES = {"x0": "Inversion-DPO (x0)", "diffusion_dpo": "Diffusion-DPO"}
FRESH = ("inversion.steps=1", "inversion.t_start=0")  # trajectories that nothing looks at
# method -> its own settings, and (pairs with those held out, steps) for each budget
ARMS: Mapping[str, tuple[Sequence[str], Sequence[tuple[int, int]]]] = {
    "x0": (LEAN, [(389, 116), (777, 230), (2000, 322)]),
    "diffusion_dpo": (FRESH, [(2000, 180), (2000, 360), (2000, 720)]),
}


def settings(method: str, pairs: int, steps: int, seed: int) -> Config:
    """Return the configuration of one run."""
    own = (*ARMS[method][0], f"data.limit={pairs}", f"training.steps={steps}")
    chosen = (*COMMON, *METHODS[method].settings, *own, f"training.seed={seed}")
    return load_config("composition", list(chosen))


def lines(root: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Train what is not yet trained; a line for each method and budget.

    Seconds are the median step's, times the steps, and those of the inversion, timed when its
    cache is made.
    """
    arms = [(m, *budget) for m, (_, budgets) in ARMS.items() for budget in budgets]
    costs = {arm: inversion_cost(root, settings(*arm, 0)) for arm in arms}
    runs: dict[tuple[str, int, int], list[Any]] = {}
    for seed in seeds:
        for arm in arms:
            name = "-".join(map(str, (*arm, seed)))
            runs.setdefault(arm, []).append(run(root, name, settings(*arm, seed), 0))
    found = []
    for (method, pairs, steps), results in runs.items():
        cost = costs[method, pairs, steps]
        step = float(np.median([r["step_seconds"] for r in results]))
        training = steps * step_evaluations(results[0]["history"])
        gains = {
            n: over_seeds([r["metrics"][n]["gain"] for r in results])
            for n in ("composition", "sg_iou", "exact")
        }
        found.append(
            {
                "method": method,
                "pairs": pairs,
                "steps": steps,
                "inversion": cost["evaluations"],
                "all": cost["evaluations"] + training,
                "seconds": cost["seconds"] + steps * step,
                **gains,
            }
        )
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each method and budget."""
    rows = [
        "| method | pairs | steps | evaluations | of these inversion | seconds "
        "| composition gain | sg_iou gain | exact gain |",
        "|" + " --- |" * 9,
    ]
    for line in found:
        cells = [
            f"{line[n]['mean']:+.3f} [{line[n]['low']:+.3f}, {line[n]['high']:+.3f}]"
            for n in ("composition", "sg_iou", "exact")
        ]
        counted = ("pairs", "steps", "all", "inversion", "seconds")
        counts = " | ".join(f"{line[n]:,.0f}" for n in counted)
        rows.append(f"| {line['method']} | {counts} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Gain against evaluations, a line a method, intervals as bars."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    for method in ARMS:
        own = [line for line in found if line["method"] == method]
        gains = [line["composition"] for line in own]
        sides = [[g["mean"] - g["low"] for g in gains], [g["high"] - g["mean"] for g in gains]]
        axes.errorbar(
            [line["all"] for line in own],
            [g["mean"] for g in gains],
            sides,
            marker="o",
            capsize=3,
            label=NAMES[method],
        )
    axes.set_xscale("log")
    axes.minorticks_off()
    ticks = sorted({round(line["all"], -3) for line in found})
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.set_xlabel("network evaluations, inversion included")
    axes.set_ylabel("gain in composition")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/budgets"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    found = lines(args.output, args.seeds)
    print(table(found))
    draw(found, args.output / "budgets.png")


if __name__ == "__main__":
    main()
