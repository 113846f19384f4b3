"""Draw a report's figures as PNG files: image grid, training curves and gains.

Every figure is a :class:`matplotlib.figure.Figure` of its own: no pyplot, no global state, no
display. The colours are those of Okabe and Ito (2008, https://jfly.uni-koeln.de/color/), which
colour-blind readers can distinguish.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from inversion_dpo.data.images import png
from inversion_dpo.evaluation.metrics import gain_text, metric_rows, outcome
from inversion_dpo.run.disk import atomic_figure
from inversion_dpo.training.health import heldout_share

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#7A7A7A"
VERDICT_COLOUR = {"gain": BLUE, "loss": ORANGE, "none": GREY}
INK, FAINT, PAPER = "#24292F", "#D5D9DE", "#FFFFFF"
_DPI = 160

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Ends = Floats | None
History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Series:
    """Describe one line: the value of ``key`` in each row, less that of ``minus`` if it is named.

    A held-out series whose ``minus`` key is not in the history is drawn relative to its first
    value. That is the reference's own error if the first evaluation is at step 0.
    """

    label: str
    key: str
    colour: str = BLUE
    minus: str = ""
    held_out: bool = False


@dataclass(frozen=True)
class Panel:
    """Describe one small plot; ``note`` is a sentence that says how to read it."""

    title: str
    note: str
    series: tuple[Series, ...]
    baseline: float | None = None


def _both(key: str) -> tuple[Series, Series]:
    return Series("training", key), Series("held out", f"heldout_{key}", ORANGE, held_out=True)


PANELS = (
    Panel(
        "loss",
        "Objective on each training batch. Objectives of the DPO family start at log 2 = 0.693.",
        (Series("training", "loss"),),
    ),
    Panel(
        "implicit accuracy",
        "Share of pairs whose implicit reward puts the winner first, or of single images whose "
        "reward has the sign of their thumb; 0.5 is chance. Training accuracy that rises while "
        "held-out accuracy stays is memorisation. Bars: 95% intervals.",
        _both("accuracy"),
        0.5,
    ),
    Panel(
        "error against the reference",
        "Denoising error of the policy minus the reference's, winners and losers apart. If both "
        "rise, the margin only comes from losers getting worse faster.",
        (
            Series("winner", "winner_error", BLUE, "winner_error_ref"),
            Series("loser", "loser_error", ORANGE, "loser_error_ref"),
            Series(
                "winner, held out", "heldout_winner_error", BLUE, "heldout_winner_error_ref", True
            ),
            Series(
                "loser, held out", "heldout_loser_error", ORANGE, "heldout_loser_error_ref", True
            ),
        ),
        0.0,
    ),
    Panel(
        "margin",
        "Implicit reward of the winner minus that of the loser. A rising margin alone is no "
        "success: read it with the errors.",
        _both("margin"),
        0.0,
    ),
    Panel(
        "gradient factor",
        "What a pair's gradient is multiplied by: 0.5 at the reference, near 0 once the winner is "
        "far ahead, near 1 where it is far behind.",
        _both("gradient_factor"),
        0.5,
    ),
    Panel(
        "beta",
        "The tie to the reference, as objective.beta=auto adapts it. It falls as margins grow.",
        (Series("training", "beta"),),
    ),
    Panel(
        "drift",
        "Mean squared difference between the predictions of policy and reference. Quality "
        "suffers when it keeps growing after held-out accuracy has settled.",
        _both("drift"),
    ),
    Panel(
        "gradient norm",
        "Norm of the gradient at each step, before clipping. Spikes call for a lower rate.",
        (Series("training", "grad_norm"),),
    ),
)


def canvas(width: float, height: float) -> Figure:
    """Make a figure, in inches, whose parts do not overlap."""
    return Figure((width, height), dpi=_DPI, facecolor=PAPER, layout="constrained")


def thumbnail(image: Pixels, side: int) -> Pixels:
    """Bring uint8 [H, W, 3] near a longest edge of ``side`` pixels.

    Small images grow by a whole factor without smoothing, large ones shrink by Lanczos.
    """
    longest = max(image.shape[:2])
    if longest <= side:
        factor = max(1, round(side / longest))
        return image.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = (max(1, round(n * side / longest)) for n in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def sheet(
    captions: Sequence[str],
    both: Sequence[Sequence[Pixels]],
    columns: int = 4,
    right: Sequence[tuple[bool, bool]] = (),
) -> Image.Image:
    """Draw prompts in rows of ``columns``: reference left, policy right, caption beneath.

    Args:
        captions: one per prompt, at least one.
        both: for each prompt the reference's image and the policy's, uint8 [H, W, 3], shown at
            about 128 pixels, or 256 for larger ones.
        columns: prompts per row, at most.
        right: for each prompt which of the two images get a tick and not a cross; empty for none.
    """
    side = 128 if max(n for pair in both for i in pair for n in i.shape[:2]) <= 128 else 256
    pairs = [[thumbnail(image, side) for image in pair] for pair in both]
    letters = max(16, round(2 * side / 6.6))  # a mean one has 6.6 pixels
    texts = [textwrap.wrap(c, letters, max_lines=4, placeholder=" …") for c in captions]
    columns, edge, gap, head, line, between = min(columns, len(texts)), 24, 6, 26, 15, 18  # pixels
    box = max(n for pair in pairs for image in pair for n in image.shape[:2])
    cell = 2 * box + gap + 2 * between
    starts = range(0, len(texts), columns)
    most = [max(len(text) or 1 for text in texts[k : k + columns]) for k in starts]
    marks = 26 if right else 0  # beneath the images, so that nothing is hidden
    rows = [box + marks + gap + n * line + between for n in most]
    size = 2 * edge + columns * cell - 2 * between, 2 * edge + head + sum(rows) - between
    page = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(page)
    for k, (pair, text) in enumerate(zip(pairs, texts, strict=True)):
        row, column = divmod(k, columns)
        left, top = edge + column * cell, edge + head + sum(rows[:row])
        for n, (image, word) in enumerate(zip(pair, ("reference", "policy"), strict=True)):
            place = left + n * (box + gap)
            page.paste(Image.fromarray(image), (place, top))
            if right:
                _mark(pen, place + 10, top + box + marks // 2 + 3, right[k][n])
            if not row:
                pen.text((place, edge), word, INK, _font("bold", 14))
        for n, words in enumerate(text):
            pen.text((left, top + box + marks + gap + n * line), words, INK, _font("normal", 12))
    return page


def plate(parts: Sequence[tuple[str, Image.Image]]) -> bytes:
    """Put sheets under one another, each with a title, as bytes of a PNG file."""
    head, edge = 26, 24  # pixels
    width, height = max(p.width for _, p in parts), sum(p.height + head for _, p in parts)
    page, top = Image.new("RGB", (width, height), PAPER), 0
    for title, part in parts:
        ImageDraw.Draw(page).text((edge, top + edge), title, INK, _font("bold", 16))
        page.paste(part, (0, top + edge + head))
        top += part.height + head
    return png(np.asarray(page))


def _mark(pen: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    """Draw a tick or a cross on a disc around (x, y)."""
    pen.ellipse((x - 10, y - 10, x + 10, y + 10), BLUE if right else ORANGE, PAPER, 2)
    tick, cross = [[(-5, 0), (-1, 4), (5, -4)]], [[(-4, -4), (4, 4)], [(-4, 4), (4, -4)]]
    for stroke in tick if right else cross:
        pen.line([(x + dx, y + dy) for dx, dy in stroke], PAPER, 3)


@cache
def _font(weight: str, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont(FontProperties(weight=weight)), pixels)


def recorded(history: History) -> list[Panel]:
    """List the panels for which the history holds at least one value.

    history: one row per step: ``step`` and any of ``loss``, ``grad_norm``, ``accuracy``,
    ``margin``, ``drift``, ``winner_error``, ``loser_error``, the last two also with ``_ref``; all
    but the first two also with the prefix ``heldout_``.
    """
    return [p for p in PANELS if any(len(points(history, s)[0]) for s in p.series)]


def points(history: History, series: Series) -> tuple[Floats, Floats]:
    """Return the steps [n] and values [n] of the rows that hold the series."""
    paired = bool(series.minus) and any(_number(row, series.minus) for row in history)
    if series.minus and not paired and not series.held_out:
        return np.empty(0), np.empty(0)
    needed = ["step", series.key, *([series.minus] if paired else [])]
    rows = [row for row in history if all(_number(row, key) for key in needed)]
    steps = np.array([row["step"] for row in rows], float)
    values = np.array([row[series.key] for row in rows], float)
    if paired:
        values = values - np.array([row[series.minus] for row in rows], float)
    elif series.minus and len(values):
        values = values - values[0]
    return steps, values


def panel_png(panel: Panel, history: History) -> bytes:
    """Draw one panel as PNG bytes, without its title (the page writes that as text)."""
    figure = canvas(3.7, 2.5)
    draw_panel(figure.add_subplot(), replace(panel, title=""), history)
    figure.savefig(buffer := BytesIO(), format="png")
    return buffer.getvalue()


def small_multiples(drawn: Sequence[tuple[Panel, bytes]]) -> bytes:
    """Put panels of :func:`panel_png` side by side under their titles, as bytes of a PNG file."""
    images = [Image.open(BytesIO(data)).convert("RGB") for _, data in drawn]
    columns, head, (width, height) = min(3, len(images)), 40, images[0].size
    page = Image.new("RGB", (columns * width, -(-len(images) // columns) * (height + head)), PAPER)
    for k, ((panel, _), image) in enumerate(zip(drawn, images, strict=True)):
        left, top = k % columns * width, k // columns * (height + head)
        ImageDraw.Draw(page).text((left + 16, top + 10), panel.title, INK, _font("bold", 22))
        page.paste(image, (left, top + head))
    return png(np.asarray(page))


def draw_panel(axes: Axes, panel: Panel, history: History) -> None:
    """Draw raw values faint under their running mean, and held-out values as marked points."""
    bare(axes)
    if panel.baseline is not None:
        axes.axhline(panel.baseline, color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=1)
    drawn = [(s, *xy) for s in panel.series if len((xy := points(history, s))[0])]
    thin = any(series.held_out for series, *_ in drawn)
    for series, steps, values in drawn:
        _draw_series(axes, series, steps, values, thin, share_ends(history, series))
    axes.set_title(panel.title, size=11, color=INK, loc="left", weight="bold")
    axes.set_xlabel("step", size=9, color=GREY)
    if len(drawn) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK, handlelength=1.6)


def _draw_series(
    axes: Axes, series: Series, steps: Floats, values: Floats, thin: bool, ends: Ends = None
) -> None:
    if series.held_out:
        mark: dict[str, Any] = {"marker": "o", "ms": 4.5, "mec": PAPER, "mew": 0.8}
        axes.plot(steps, values, color=series.colour, lw=1.4, label=series.label, zorder=4, **mark)
        if ends is not None:
            axes.vlines(steps, *ends, color=series.colour, lw=0.9, alpha=0.6)
        return
    window = max(1, len(values) // 25)
    if window > 1:
        axes.plot(steps, values, color=series.colour, lw=0.6, alpha=0.22, zorder=2)
    smooth = running_mean(values, window)
    width, alpha = (1.2, 0.6) if thin else (1.8, 1.0)
    axes.plot(steps, smooth, color=series.colour, lw=width, alpha=alpha, label=series.label)


def share_ends(history: History, series: Series) -> Ends:
    """Return the ends [2, n] of the intervals of held-out accuracies; None for other series."""
    rows = [row for row in history if _number(row, series.key)]
    if series.key != "heldout_accuracy" or not all(row.get("heldout_pairs") for row in rows):
        return None
    return np.array([heldout_share(row)[1:] for row in rows]).T


def running_mean(values: Floats, window: int) -> Floats:
    """Average over a centred ``window`` of values [n], cut off at both ends."""
    ones = np.ones(min(window, len(values)))
    total = np.convolve(values, ones, "same")
    return np.asarray(total / np.convolve(np.ones(len(values)), ones, "same"))


def gains(metrics: Mapping[str, Any], path: Path) -> None:
    """Write each metric's mean gain as a dot with its 95% interval, from ``compare``'s result.

    Units differ between metrics, so every row has its own scale, symmetric about 0.
    """
    rows = metric_rows(metrics)
    figure = Figure((5.2, 0.4 + 0.4 * len(rows)), dpi=_DPI, facecolor=PAPER)
    texts = list(map(gain_text, rows.values()))
    left, right = (0.045 + 0.0137 * max(map(len, words)) for words in (rows, texts))
    left, right = min(left, 0.38), 1 - right
    figure.subplots_adjust(left, 0.36 / figure.get_figheight(), right, 0.98, hspace=0)
    for k, (name, row) in enumerate(rows.items()):
        colour = VERDICT_COLOUR[outcome(row, metrics["n_prompts"])]
        _draw_gain(figure.add_subplot(len(rows), 1, k + 1), name, row, (texts[k], colour))
    figure.text(
        (left + right) / 2,
        0.02,
        "policy minus reference, 95% interval; each row has its own scale",
        size=8,
        color=GREY,
        ha="center",
    )
    atomic_figure(figure, path)


def _draw_gain(axes: Axes, name: str, row: Mapping[str, float], told: tuple[str, str]) -> None:
    value, low, high = row["gain"], row["gain_low"], row["gain_high"]
    text, colour = told
    limit = 1.25 * max(abs(low), abs(high), abs(value)) or 1.0
    axes.set(xlim=(-limit, limit), ylim=(-1, 1), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.axhline(0, color=FAINT, lw=0.8, zorder=1)
    axes.axvline(0, color=GREY, lw=0.9, zorder=2)
    axes.plot([low, high], [0, 0], color=colour, lw=2.6, solid_capstyle="round", zorder=3)
    axes.plot(value, 0, "o", color=colour, ms=8, mec=PAPER, mew=1.2, zorder=4)
    beside: dict[str, Any] = {"transform": axes.transAxes, "va": "center", "size": 9}
    name = name if len(name) <= 26 else name[:25] + "…"
    axes.text(-0.04, 0.5, name, ha="right", color=INK, parse_math=False, **beside)
    axes.text(1.04, 0.5, text.replace("-", "\N{MINUS SIGN}"), ha="left", color=colour, **beside)


def _number(row: Mapping[str, Any], key: str) -> bool:
    value = row.get(key)
    return isinstance(value, Real) and isfinite(value)


def bare(axes: Axes) -> None:
    """Give the axes two thin lines, a faint horizontal grid and few ticks."""
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=8.5, length=3, color=FAINT)
    axes.grid(axis="y", color=FAINT, lw=0.6, alpha=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
