"""Pictures of a comparison: curves with intervals over seeds, gains, errors, drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inversion_dpo.evaluation.figures import GREY, INK, PAPER, bare
from inversion_dpo.run.disk import atomic_figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.4)))
DPI = 160
MOST_LINES = 12  # in one plot, where varied settings are among them
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


def drawn(summary: Summary) -> list[tuple[str, Summary]]:
    """The variants whose curves are drawn: all, or where they are many the methods as they are."""
    found = list(summary["variants"].items())
    return [(n, v) for n, v in found if len(found) <= MOST_LINES or not v["varied"]]


def score_curves(summary: Summary, preference: str, unit: str, path: Path) -> None:
    """Score against ``evaluations`` or ``seconds`` of training, the inversion included.

    Dashed lines: the reference's best of n samples, where the curves were scored on the same
    prompts, which are all.
    """
    page, axes = figure(6.4)
    for k, (name, v) in enumerate(drawn(summary)):
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
    atomic_figure(page, path)


def yardstick(axes: Axes, summary: Summary, preference: str) -> None:
    """Dashed lines at the reference's best of n samples."""
    for n, scores in summary["best_of"].items():
        axes.axhline(scores[preference]["mean"], color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=1)
        place = (1, scores[preference]["mean"])
        axes.annotate(
            f"best of {n}",
            place,
            xycoords=("axes fraction", "data"),
            size=7,
            color=GREY,
            ha="right",
            va="bottom",
        )


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
    atomic_figure(page, path)


def error_curves(summary: Summary, path: Path) -> None:
    """Held-out errors less the reference's by step, one scale: winners left, losers right.

    Bands: intervals over seeds of the policy's error.
    """
    page = Figure((8.4, 3.4), dpi=DPI, facecolor=PAPER, layout="constrained")
    left = page.add_subplot(1, 2, 1)
    right = page.add_subplot(1, 2, 2, sharey=left)
    for axes, side in ((left, "winner"), (right, "loser")):
        bare(axes)
        axes.axhline(0, color=GREY, lw=0.8, ls=(0, (4, 3)))
        for k, (name, v) in enumerate(drawn(summary)):
            key, ref = f"heldout_{side}_error", f"heldout_{side}_error_ref"
            rows = [r for r in v["history"] if key in r and ref in r]
            less = [
                {end: r[key][end] - r[ref]["mean"] for end in ("mean", "low", "high")} for r in rows
            ]
            band(axes, [r["step"] for r in rows], less, name, **style(k))
        axes.set_title(f"{side}: error less the reference's", size=10, color=INK, loc="left")
        axes.set_xlabel("step", size=9, color=GREY)
    legend(right)
    atomic_figure(page, path)


def drift_curves(summary: Summary, path: Path) -> None:
    """Held-out drift from the reference by step."""
    page, axes = figure(6.4, 3.2)
    for k, (name, v) in enumerate(drawn(summary)):
        rows = [r for r in v["history"] if "heldout_drift" in r]
        if rows:
            band(
                axes,
                [r["step"] for r in rows],
                [r["heldout_drift"] for r in rows],
                name,
                **style(k),
            )
    axes.set_xlabel("step", size=9, color=GREY)
    axes.set_ylabel("drift", size=9, color=GREY)
    legend(axes)
    atomic_figure(page, path)


def ablations(summary: Summary, preference: str, path: Path) -> None:
    """One panel a varied setting: the preference's gain by value, one colour a method.

    Dashed: the method as it is. Bars: 95% intervals over seeds, where there are several.
    """
    keys = varied_keys(summary)
    columns = min(4, len(keys))
    lines = -(-len(keys) // columns)
    page = Figure(
        (0.6 + 2.4 * columns, 2.3 * lines), dpi=DPI, facecolor=PAPER, layout="constrained"
    )
    methods = [v["method"] for v in summary["variants"].values() if not v["varied"]]
    first = None
    for place, (key, values) in enumerate(keys.items()):
        axes = page.add_subplot(lines, columns, place + 1, sharey=first)
        first = first or axes
        bare(axes)
        for k, method in enumerate(methods):
            shift = 0.16 * (k - (len(methods) - 1) / 2)
            one_setting(axes, summary, method, key, preference, shift, COLOURS[k % len(COLOURS)])
        axes.set_xticks(range(len(values)), values, size=8)
        axes.set_xlim(-0.6, len(values) - 0.4)
        axes.set_title(key, size=9, color=INK, loc="left")
        axes.tick_params(labelleft=place % columns == 0)
    page.supylabel(f"{preference} gain", size=8.5, color=GREY)
    if first and len(methods) > 1:
        page.legend(
            *first.get_legend_handles_labels(),
            fontsize=8,
            frameon=False,
            labelcolor=INK,
            loc="outside lower center",
            ncols=4,
        )
    atomic_figure(page, path)


def one_setting(
    axes: Axes, summary: Summary, method: str, key: str, preference: str, shift: float, colour: str
) -> None:
    """One method's gains by the values of one setting, ``shift`` to the right of their ticks."""
    found = [v for v in summary["variants"].values() if v["method"] == method]
    plain = next(v for v in found if not v["varied"])["gains"][preference]["mean"]
    axes.axhline(plain, color=colour, lw=1.0, ls=(0, (4, 3)), label=method)
    gains = [v["gains"][preference] for v in found if v["varied"] and v["varied"][0] == key]
    for at, g in enumerate(gains):
        if np.isfinite(g["low"]):
            axes.plot([at + shift] * 2, [g["low"], g["high"]], color=colour, lw=2.0)
        axes.plot(at + shift, g["mean"], "o", color=colour, ms=5.5, mec=PAPER)


def varied_keys(summary: Summary) -> dict[str, list[str]]:
    """Each varied key with its values, in their order."""
    found: dict[str, dict[str, None]] = {}
    for v in summary["variants"].values():
        if v["varied"]:
            found.setdefault(v["varied"][0], {})[v["varied"][1]] = None
    return {key: list(values) for key, values in found.items()}


def gains(summary: Summary, metrics: Sequence[str], path: Path) -> None:
    """Every metric's gain over the reference by variant, with 95% intervals over seeds."""
    names = list(summary["variants"])
    page = Figure(
        (2.6 * len(metrics) + 1.4, 0.5 + 0.28 * len(names)),
        dpi=DPI,
        facecolor=PAPER,
        layout="constrained",
    )
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
    atomic_figure(page, path)
