"""Draw a comparison's figures: curves with intervals over seeds, gains, errors, drift."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inversion_dpo.evaluation.figures import GREY, INK, PAPER, bare, canvas

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.4)))
DASHED: dict[str, Any] = {"color": GREY, "lw": 0.8, "ls": (0, (4, 3))}
MOST_LINES = 12  # in one plot, where varied settings are among them
MOST_METRICS = 5  # in the picture of gains
Summary = Mapping[str, Any]
Line = tuple[str, Sequence[float], Sequence[Summary]]  # name, x, and means with their bounds


def draw(summary: Summary, metrics: Sequence[str]) -> dict[str, Figure]:
    """Draw every picture that the comparison has numbers for, by name.

    metrics: names of the scores, the preference first.
    """
    figures = {"gains": gains(summary, metrics[:MOST_METRICS])}
    if "rounds" in summary:
        figures["rounds"] = round_curves(summary, metrics[0])
    if varied_keys(summary):
        figures["ablations"] = ablations(summary, metrics[0])
    for unit in ("evaluations", "seconds"):
        figures[unit] = score_curves(summary, metrics[0], unit)
    return figures | {"errors": error_curves(summary), "drift": drift_curves(summary)}


def style(number: int) -> dict[str, Any]:
    """Return the colour and dash of variant ``number``; 24 differ before they repeat."""
    dash = STYLES[number // len(COLOURS) % len(STYLES)]
    return {"color": COLOURS[number % len(COLOURS)], "ls": dash}


def figure(width: float = 5.6, height: float = 3.6) -> tuple[Figure, Axes]:
    """Make a figure with one plot; sizes in inches."""
    page = canvas(width, height)
    axes = page.add_subplot()
    bare(axes)
    return page, axes


def bands(axes: Axes, lines: Iterable[Line], xlabel: str, ylabel: str = "", **look: Any) -> None:
    """Plot mean lines, with their intervals over seeds as bands, and label both axes."""
    for k, (label, x, rows) in enumerate(lines):
        if not rows:
            continue
        mean, low, high = (np.array([r[end] for r in rows]) for end in ("mean", "low", "high"))
        axes.plot(x, mean, lw=1.8, label=label, **style(k), **look)
        if np.isfinite(low).all():
            axes.fill_between(x, low, high, color=style(k)["color"], alpha=0.13, lw=0)
    axes.set_xlabel(xlabel, size=9, color=GREY)
    axes.set_ylabel(ylabel, size=9, color=GREY)


def legend(axes: Axes) -> None:
    """Put the legend right of the plot, where it hides no curve."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            fontsize=8, frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5)
        )


def drawn(summary: Summary) -> list[tuple[str, Summary]]:
    """Select the variants to draw: all, or only the methods without a varied setting if many."""
    variants = list(summary["variants"].items())
    return [(n, v) for n, v in variants if len(variants) <= MOST_LINES or not v["varied"]]


def history_lines(summary: Summary, key: str, reference: str = "") -> list[Line]:
    """Collect a held-out measurement by step, minus the mean under ``reference`` if it is named."""
    lines: list[Line] = []
    for name, v in drawn(summary):
        rows = [r for r in v["history"] if key in r and (not reference or reference in r)]
        less = [r[reference]["mean"] if reference else 0.0 for r in rows]
        values = [
            {end: r[key][end] - away for end in ("mean", "low", "high")}
            for r, away in zip(rows, less, strict=True)
        ]
        lines.append((name, [r["step"] for r in rows], values))
    return lines


def score_curves(summary: Summary, preference: str, unit: str) -> Figure:
    """Plot the score against ``evaluations`` or ``seconds`` of training, inversion included.

    Dashed lines show the reference's best of n samples, if the curves cover all prompts.
    """
    page, axes = figure(6.4)
    label = {"evaluations": "network evaluations (one image forward = 1)", "seconds": "seconds"}
    lines = [
        (
            name,
            [v["inversion"][unit] + r["step"] * v[f"step_{unit}"] for r in v["curve"]],
            [r[preference] for r in v["curve"]],
        )
        for name, v in drawn(summary)
    ]
    bands(axes, lines, f"{label[unit]}, inversion included", preference)
    if summary["curve_prompts"] == summary["prompts"]:
        yardstick(axes, summary, preference)
    legend(axes)
    return page


def yardstick(axes: Axes, summary: Summary, preference: str) -> None:
    """Draw dashed lines at the reference's best of n samples; name those out of the curves' range.

    They do not widen the axis, so that they squeeze no curve.
    """
    low, high = axes.get_ylim()
    look: dict[str, Any] = {"size": 7, "color": GREY, "ha": "right"}
    beyond: dict[str, list[str]] = {"above": [], "below": []}
    for n, scores in summary["best_of"].items():
        height = scores[preference]["mean"]
        if not low <= height <= high:
            beyond["above" if height > high else "below"].append(f"best of {n} ({height:.3g})")
            continue
        axes.axhline(height, zorder=1, **DASHED)
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "bottom"}
        axes.annotate(f"best of {n}", (1, height), **place, **look)
    for (side, names), y in zip(beyond.items(), (0.99, 0.01), strict=True):
        if names:
            words, va = f"{side} this plot: {', '.join(names)}", "top" if y > 0.5 else "bottom"
            axes.text(1, y, words, transform=axes.transAxes, va=va, **look)
    axes.set_ylim(low, high)


def round_curves(summary: Summary, preference: str) -> Figure:
    """Plot the score by round, one sample per prompt, with the first reference's best of n."""
    page, axes = figure(6.4)
    rounds = summary["rounds"].items()
    lines = [(n, [r["round"] for r in rows], [r[preference] for r in rows]) for n, rows in rounds]
    bands(axes, lines, "round (0: the reference)", preference, marker="o", ms=5)
    yardstick(axes, summary, preference)
    axes.set_xticks(range(max(len(rows) for rows in summary["rounds"].values())))
    legend(axes)
    return page


def error_curves(summary: Summary) -> Figure:
    """Plot held-out errors minus the reference's by step: winners left, losers right, one scale.

    Bands are intervals over seeds of the policy's error.
    """
    page = canvas(8.4, 3.4)
    left = page.add_subplot(1, 2, 1)
    right = page.add_subplot(1, 2, 2, sharey=left)
    for axes, side in ((left, "winner"), (right, "loser")):
        bare(axes)
        axes.axhline(0, **DASHED)
        key = f"heldout_{side}_error"
        bands(axes, history_lines(summary, key, f"{key}_ref"), "step")
        axes.set_title(f"{side}: error less the reference's", size=10, color=INK, loc="left")
    legend(right)
    return page


def drift_curves(summary: Summary) -> Figure:
    """Plot the held-out drift from the reference by step."""
    page, axes = figure(6.4, 3.2)
    bands(axes, history_lines(summary, "heldout_drift"), "step", "drift")
    legend(axes)
    return page


def ablations(summary: Summary, preference: str) -> Figure:
    """Plot the preference's gain by value: one panel per varied setting, one colour per method.

    Dashed lines show the methods without a varied setting, bars 95% intervals over several seeds.
    """
    keys = varied_keys(summary)
    columns = min(4, len(keys))
    lines = -(-len(keys) // columns)
    page = canvas(0.6 + 2.4 * columns, 2.3 * lines)
    methods = [v["method"] for v in summary["variants"].values() if not v["varied"]]
    first = None
    for place, (key, values) in enumerate(keys.items()):
        axes = page.add_subplot(lines, columns, place + 1, sharey=first)
        first = first or axes
        bare(axes)
        for k, method in enumerate(methods):
            own = [v for v in summary["variants"].values() if v["method"] == method]
            plain = next(v for v in own if not v["varied"])["gains"][preference]["mean"]
            colour, shift = COLOURS[k % len(COLOURS)], 0.16 * (k - (len(methods) - 1) / 2)
            axes.axhline(plain, color=colour, lw=1.0, ls=(0, (4, 3)), label=method)
            rows = [v["gains"][preference] for v in own if v["varied"] and v["varied"][0] == key]
            for at, gain in enumerate(rows):
                interval(axes, at + shift, gain, colour, upright=True)
        axes.set_xticks(range(len(values)), values, size=8)
        axes.set_xlim(-0.6, len(values) - 0.4)
        axes.set_title(key, size=9, color=INK, loc="left")
        axes.tick_params(labelleft=place % columns == 0)
    page.supylabel(f"{preference} gain", size=8.5, color=GREY)
    if first and len(methods) > 1:
        look: dict[str, Any] = {"fontsize": 8, "frameon": False, "labelcolor": INK, "ncols": 4}
        page.legend(*first.get_legend_handles_labels(), loc="outside lower center", **look)
    return page


def interval(axes: Axes, place: float, gain: Summary, colour: str, upright: bool = False) -> None:
    """Draw a dot at the mean, on a bar between the bounds if there is an interval."""
    bar, at = [gain["low"], gain["high"]], [place] * 2
    if np.isfinite(gain["low"]):
        axes.plot(*((at, bar) if upright else (bar, at)), color=colour, lw=2.1)
    dot = (place, gain["mean"]) if upright else (gain["mean"], place)
    axes.plot(*dot, "o", color=colour, ms=5.8, mec=PAPER)


def varied_keys(summary: Summary) -> dict[str, list[str]]:
    """Map each varied key to its values, in their order."""
    keys: dict[str, dict[str, None]] = {}
    for v in summary["variants"].values():
        if v["varied"]:
            keys.setdefault(v["varied"][0], {})[v["varied"][1]] = None
    return {key: list(values) for key, values in keys.items()}


def gains(summary: Summary, metrics: Sequence[str]) -> Figure:
    """Plot every metric's gain over the reference by variant, with 95% intervals over seeds."""
    names = list(summary["variants"])
    page = canvas(2.6 * len(metrics) + 1.4, 0.5 + 0.28 * len(names))
    first = None
    for column, metric in enumerate(metrics):
        axes = page.add_subplot(1, len(metrics), column + 1, sharey=first)
        first = first or axes
        bare(axes)
        axes.grid(axis="x", lw=0.5, alpha=0.5)
        axes.axvline(0, color=GREY, lw=0.9)
        for k, name in enumerate(names):
            gain = summary["variants"][name]["gains"][metric]
            interval(axes, -k, gain, COLOURS[k % len(COLOURS)])
        axes.set_title(metric, size=9.5, color=INK, loc="left")
        axes.set_yticks([-k for k in range(len(names))], names)
        if column:
            axes.tick_params(labelleft=False)
    return page
