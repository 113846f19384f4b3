"""Every method where the optimum is known in closed form: ``python benchmarks/mixture.py``.

See ``mixture_model.py``. Every method gets the same number of trials of learning
rate x beta (seed 100, chosen by the distance to the optimum) and then the same seeds. Prints a
table; ``--curves FILE`` draws what target ``reference`` and the released sign do, seed by seed;
``--reach FILE --goal DISTANCE`` draws the distance against network evaluations and prints what each
method takes until it is that near for good, with the rate and beta of its trials that are fastest.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from mixture_model import (
    METHODS,
    REFERENCE,
    SCHEDULE,
    Budget,
    MixturePolicy,
    outcome,
    reference_eps,
    train_mixture,
    tune_and_run,
)

from inversion_dpo.compare.curves import figure, legend, style
from inversion_dpo.compare.summary import over_seeds
from inversion_dpo.evaluation.figures import GREY, PAPER, bare
from inversion_dpo.maths.methods import METHODS as OBJECTIVES

RATES = (3e-4, 1e-3, 3e-3)
BETAS = {"dspo": (0.01, 0.1, 0.3, 1.0, 3.0), "mapo": (0.1, 0.3, 1.0, 10.0, 100.0)}
USUAL = (3.0, 10.0, 30.0, 100.0, 300.0)
NO_BETA = tuple(np.geomspace(1e-5, 1e-2, 15).tolist())  # sft: as many trials, all on the rate
COLUMNS = ("distance", "reward", "kl", "excess_kl")
JITTER = 1e-4


def trials(name: str) -> list[tuple[float, float]]:
    """Fifteen pairs of learning rate and beta."""
    if name == "sft":
        return [(rate, 1.0) for rate in NO_BETA]
    return [(rate, beta) for rate in RATES for beta in BETAS.get(name, USUAL)]


def row(name: str, found: dict[str, Any]) -> list[str]:
    """Write a line of the table: means over seeds with 95% t intervals."""
    ends = [end["distance"] for end in found["seeds"]]
    if not np.isfinite(ends).all():
        stayed = [e for e in ends if np.isfinite(e)]
        text = f"{len(ends) - len(stayed)} of {len(ends)} seeds diverged"
        text += f"; the others {min(stayed):.3f} to {max(stayed):.3f}" if stayed else ""
        return [name, f"{found['rate']:.2g}, {found['beta']:g}", text, "", "", ""]
    cells = [over_seeds([end[c] for end in found["seeds"]]) for c in COLUMNS]
    texts = [f"{c['mean']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells]
    return [name, f"{found['rate']:.2g}, {found['beta']:g}", *texts]


def fixed(name: str, end: dict[str, float]) -> list[str]:
    """Write a line without seeds."""
    return [name, "", *(f"{end[c]:.3f}" for c in COLUMNS)]


def table(methods: Sequence[str], seeds: int) -> tuple[list[list[str]], dict[str, Any]]:
    """All lines, and the numbers behind them."""
    best = REFERENCE.tilted(1.0)
    lines = [["method", "rate, beta", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    lines.append(fixed("the reference, untrained", outcome(reference_eps)))
    lines.append(
        fixed("the optimum, its exact noise", outcome(lambda x, i: best.eps(x, SCHEDULE.levels[i])))
    )
    found = {}
    for name in methods:
        found[name] = tune_and_run(name, trials(name), seeds)
        lines.append(row(name, found[name]))
        print(" | ".join(lines[-1]), flush=True)
    return lines, found


def curves(path: Path, seeds: int = 8, rate: float = 1e-3, beta: float = 10.0) -> None:
    """Mean reward by step for x0, ``reference`` and the released sign, each seed a line."""
    page = Figure((8.4, 3.0), dpi=160, facecolor=PAPER, layout="constrained")
    budget = Budget(jitter=JITTER)
    for k, name in enumerate(("x0", "reference", "released")):
        axes = page.add_subplot(1, 3, k + 1)
        bare(axes)
        axes.axhline(REFERENCE.tilted(1.0).mean(), color=GREY, lw=0.8, ls=(0, (4, 3)))
        ends = []
        for seed in range(seeds):
            steps, rewards = list[int](), list[float]()

            def watch(step: int, policy: MixturePolicy, s=steps, r=rewards) -> None:  # type: ignore[no-untyped-def]
                if step % 25 == 0:
                    s.append(step)
                    r.append(outcome(policy)["reward"])

            train_mixture(METHODS[name], rate, beta, seed, budget, watch)
            axes.plot(steps, rewards, lw=1.1)
            ends.append(rewards[-1])
        axes.set_title(name, size=10, loc="left")
        axes.set_xlabel("step", size=9, color=GREY)
        axes.set_ylim(-5, 5)
        print(
            f"{name}: reward of {seeds} seeds at the last point "
            f"{', '.join(f'{e:+.2f}' for e in ends)}",
            flush=True,
        )
    page.savefig(path)


def distance_curve(name: str, rate: float, beta: float, seed: int) -> list[dict[str, float]]:
    """Return the distance to the optimum, every tenth step and at the end."""
    budget, rows = Budget(), []

    def watch(step: int, policy: MixturePolicy) -> None:
        if step % 10 == 0:
            rows.append({"step": step, "distance": outcome(policy)["distance"]})

    watch(budget.steps, train_mixture(METHODS[name], rate, beta, seed, budget, watch))
    return rows


def spent(name: str) -> tuple[int, int]:
    """Network evaluations before the first step, and of a step; a forward pass of one image is 1.

    For methods on trajectories and on fresh noise.
    """
    setting = METHODS[name]
    budget, source = Budget(), setting.path or OBJECTIVES[setting.objective].path
    if source not in ("trajectory", "noise"):
        raise SystemExit(f"--reach: {name} inverts under the policy: its steps differ in cost")
    if source == "trajectory":
        return 2 * budget.pairs * (budget.grid + 1), 3 * 2 * budget.batch
    return 0, 4 * 2 * budget.batch


def settled(rows: Sequence[dict[str, float]], goal: float) -> float:
    """Return the step after which the distance stays below the goal; infinite if none."""
    step = float("inf")
    for row in reversed(rows):
        if not row["distance"] <= goal:
            break
        step = row["step"]
    return step


def reached(path: Path, goal: float, methods: Sequence[str], seeds: int) -> None:
    """Each method with the rate and beta of its trials that settle first: a table and a picture."""
    costs = {name: spent(name) for name in methods}
    page, axes = figure(6.4)
    print("| method | rate, beta | steps, by seed | evaluations, inversion included, sorted |")
    print("| --- | --- | --- | --- |")
    for k, name in enumerate(methods):
        first, each = costs[name]
        fastest = min(
            trials(name), key=lambda t: settled(distance_curve(name, t[0], t[1], 100), goal)
        )
        runs = [distance_curve(name, *fastest, seed) for seed in range(seeds)]
        steps = [settled(rows, goal) for rows in runs]
        cells = [name, f"{fastest[0]:.2g}, {fastest[1]:g}"]
        cells.append(", ".join(f"{s:.0f}" for s in steps))
        cells.append(", ".join(f"{first + each * s:,.0f}" for s in sorted(steps)))
        print("|", " | ".join(cells), "|", flush=True)
        for seed, rows in enumerate(runs):
            cost = [first + each * r["step"] for r in rows]
            axes.plot(
                cost,
                [r["distance"] for r in rows],
                lw=0.9,
                alpha=0.8,
                label=None if seed else name,
                **style(k),
            )
    axes.axhline(goal, color=GREY, lw=0.8, ls=(0, (4, 3)))
    axes.set_ylim(0, 1.7)
    axes.set_xlabel("network evaluations, inversion included", size=9, color=GREY)
    axes.set_ylabel("distance to the optimum", size=9, color=GREY)
    legend(axes)
    page.savefig(path)


def main() -> None:
    """Print the table, or draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    parser.add_argument("--curves", type=Path, help="draw this PNG instead")
    parser.add_argument("--reach", type=Path, help="draw this PNG of distance by evaluations")
    parser.add_argument("--goal", type=float, default=0.312, help="of --reach: a distance")
    args = parser.parse_args()
    if args.reach:
        return reached(args.reach, args.goal, args.methods, args.seeds)
    if args.curves:
        return curves(args.curves)
    begun = time.time()
    lines, found = table(args.methods, args.seeds)
    print("\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    print(f"\n{time.time() - begun:.0f} s")
    if args.output:
        args.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
