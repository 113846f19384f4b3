"""Pictures of a comparison: curves with intervals over seeds, gains, errors, drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inversion_dpo.evaluation.figures import GREY, INK, PAPER, bare

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.4)))
DPI = 160
Summary = Mapping[str, Any]


def style(number: int) -> dict[str, Any]:
    """Colour and dash of the variant of that number; 24 before they repeat."""
    dash = STYLES[number // len(COLOURS) % len(STYLES)]
    return {"color": COLOURS[number % len(COLOURS)], "ls": dash}


def figure(width: float = 5.6, height: float = 3.6) -> tuple[Figure, Axes]:
    """One plot on paper, in inches."""
    page = Figure((width, height), dpi=DPI, facecolor=PAPER, layout="constrained")
    axes = page.add_subplot()
    bare(axes)
    return page, axes


def band(axes: Axes, x: Sequence[float], rows: Sequence[Summary], label: str, **look: Any) -> None:
    """A mean line with its interval over seeds as a band, where there is one."""
    mean, low, high = (np.array([r[k] for r in rows]) for k in ("mean", "low", "high"))
    axes.plot(x, mean, lw=1.8, label=label, **look)
    if np.isfinite(low).all():
        axes.fill_between(x, low, high, color=look["color"], alpha=0.13, lw=0)


def legend(axes: Axes) -> None:
    """Outside, on the right: it never hides a curve. None where nothing was drawn."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            fontsize=8, frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5)
        )


def score_curves(summary: Summary, preference: str, unit: str, path: Path) -> None:
    """Score against ``evaluations`` or ``seconds`` of training, the inversion included.

    Dashed lines: the reference's best of n samples, where the curves were scored on the same
    prompts, which are all.
    """
    page, axes = figure(6.4)
    for k, (name, v) in enumerate(summary["variants"].items()):
        if not v["curve"]:
            continue
        cost = [v["inversion"][unit] + r["step"] * v[f"step_{unit}"] for r in v["curve"]]
        band(axes, cost, [r[preference] for r in v["curve"]], name, **style(k))
    if summary["curve_prompts"] == summary["prompts"]:
        yardstick(axes, summary, preference)
    label = {"evaluations": "network evaluations (one image forward = 1)", "seconds": "seconds"}
    axes.set_xlabel(f"{label[unit]}, inversion included", size=9, color=GREY)
    axes.set_ylabel(preference, size=9, color=GREY)
    legend(axes)
    page.savefig(path)


def yardstick(axes: Axes, summary: Summary, preference: str) -> None:
    """Dashed lines at the reference's best of n samples."""
    for n, scores in summary["best_of"].items():
        axes.axhline(scores[preference], color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=1)
        place = (1, scores[preference])
        axes.annotate(
            f"best of {n}", place, xycoords=("axes fraction", "data"), size=7, color=GREY,
            ha="right", va="bottom",
        )  # fmt: skip


def round_curves(summary: Summary, preference: str, path: Path) -> None:
    """Score by round, one sample a prompt, beside the first reference's best of n."""
    page, axes = figure(6.4)
    for k, (name, rows) in enumerate(summary["rounds"].items()):
        numbers = [r["round"] for r in rows]
        band(axes, numbers, [r[preference] for r in rows], name, marker="o", ms=5, **style(k))
    yardstick(axes, summary, preference)
    axes.set_xticks(range(max(len(rows) for rows in summary["rounds"].values())))
    axes.set_xlabel("round (0: the reference)", size=9, color=GREY)
    axes.set_ylabel(preference, size=9, color=GREY)
    legend(axes)
    page.savefig(path)


def error_curves(summary: Summary, path: Path) -> None:
    """Held-out errors less the reference's by step: winners left, losers right, one scale."""
    page = Figure((8.4, 3.4), dpi=DPI, facecolor=PAPER, layout="constrained")
    left = page.add_subplot(1, 2, 1)
    right = page.add_subplot(1, 2, 2, sharey=left)
    for axes, side in ((left, "winner"), (right, "loser")):
        bare(axes)
        axes.axhline(0, color=GREY, lw=0.8, ls=(0, (4, 3)))
        for k, (name, v) in enumerate(summary["variants"].items()):
            key, ref = f"heldout_{side}_error", f"heldout_{side}_error_ref"
            rows = [r for r in v["history"] if key in r and ref in r]
            steps = [r["step"] for r in rows]
            axes.plot(
                steps, [r[key]["mean"] - r[ref]["mean"] for r in rows], label=name, **style(k)
            )
        axes.set_title(f"{side}: error less the reference's", size=10, color=INK, loc="left")
        axes.set_xlabel("step", size=9, color=GREY)
    legend(right)
    page.savefig(path)


def drift_curves(summary: Summary, path: Path) -> None:
    """Held-out drift from the reference by step."""
    page, axes = figure(6.4, 3.2)
    for k, (name, v) in enumerate(summary["variants"].items()):
        rows = [r for r in v["history"] if "heldout_drift" in r]
        if rows:
            band(axes, [r["step"] for r in rows], [r["heldout_drift"] for r in rows], name,
                 **style(k))  # fmt: skip
    axes.set_xlabel("step", size=9, color=GREY)
    axes.set_ylabel("drift", size=9, color=GREY)
    legend(axes)
    page.savefig(path)


def gains(summary: Summary, metrics: Sequence[str], path: Path) -> None:
    """Every metric's gain over the reference by variant, with 95% intervals over seeds."""
    names = list(summary["variants"])
    page = Figure((2.6 * len(metrics) + 1.4, 0.5 + 0.28 * len(names)), dpi=DPI, facecolor=PAPER,
                  layout="constrained")  # fmt: skip
    first = None
    for column, metric in enumerate(metrics):
        axes = page.add_subplot(1, len(metrics), column + 1, sharey=first)
        first = first or axes
        bare(axes)
        axes.grid(axis="x", lw=0.5, alpha=0.5)
        axes.axvline(0, color=GREY, lw=0.9)
        for k, name in enumerate(names):
            g, colour = summary["variants"][name]["gains"][metric], COLOURS[k % len(COLOURS)]
            if np.isfinite(g["low"]):
                axes.plot([g["low"], g["high"]], [-k, -k], color=colour, lw=2.2)
            axes.plot(g["mean"], -k, "o", color=colour, ms=6, mec=PAPER)
        axes.set_title(metric, size=9.5, color=INK, loc="left")
        axes.set_yticks([-k for k in range(len(names))], names)
        if column:
            axes.tick_params(labelleft=False)
    page.savefig(path)
