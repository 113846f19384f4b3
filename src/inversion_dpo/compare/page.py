"""The page and the Markdown of a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inversion_dpo.compare import curves as figures
from inversion_dpo.compare.summary import over_seeds
from inversion_dpo.data.images import data_uri
from inversion_dpo.data.traits import TRAITS
from inversion_dpo.evaluation.report import environment
from inversion_dpo.run.disk import atomic_text

Summary = Mapping[str, Any]


def cell(x: Mapping[str, float], digits: int = 3, sign: str = "+") -> str:
    """Mean and 95% interval; without the interval if there is only one seed."""
    spec = f"{sign}.{digits}f"
    if not math.isfinite(x["low"]):
        return f"{x['mean']:{spec}}"
    return f"{x['mean']:{spec}} [{x['low']:{spec}}, {x['high']:{spec}}]"


def preferred_first(summary: Summary, preference: str) -> list[str]:
    """The metrics' names, that of the preference first."""
    metrics = next(iter(summary["variants"].values()))["gains"]
    return [preference, *(m for m in metrics if m != preference)]


def main_rows(summary: Summary, preference: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of gains."""
    metrics = preferred_first(summary, preference)
    head = [
        "method",
        "win rate",
        *(f"{m} gain" for m in metrics),
        "diversity",
        "drift",
        "s / step",
        "evaluations / step",
    ]
    rows = []
    for name, v in summary["variants"].items():
        drift = v["training"].get("heldout_drift")
        rows.append(
            [
                name,
                cell(v["win_rate"], sign=""),
                *(cell(v["gains"][m]) for m in metrics),
                cell(v["diversity"], sign=""),
                cell(drift, 4, "") if drift else "-",
                f"{v['step_seconds']:.2f}",
                f"{v['step_evaluations']:.0f}",
            ]
        )
    return head, rows


def ablation_rows(summary: Summary, preference: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the varied settings, each beside its method as it is."""
    found = summary["variants"].values()
    plain = {v["method"]: v["gains"][preference]["values"] for v in found if not v["varied"]}
    rows = []
    for v in found:
        key, value = v["varied"] or ("", "")
        gain, drift = v["gains"][preference], v["training"].get("heldout_drift")
        away = [a - b for a, b in zip(gain["values"], plain[v["method"]], strict=True)]
        rows.append(
            [
                v["method"],
                key,
                value,
                cell(gain),
                cell(over_seeds(away)) if key else "",
                f"{drift['mean']:.4f}" if drift else "-",
                f"{v['step_seconds']:.2f}",
                f"{v['inversion']['seconds']:,.0f}",
                f"{v['step_evaluations']:.0f}",
                f"{v['inversion']['evaluations']:,.0f}",
            ]
        )
    return [
        "method",
        "setting",
        "value",
        f"{preference} gain",
        "difference",
        "drift",
        "s / step",
        "inversion, s",
        "evaluations / step",
        "inversion, evaluations",
    ], rows


def win_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the win rates between methods as they are: row against column."""
    names = [n for n in summary["wins"] if not summary["variants"][n]["varied"]]
    rows = [
        [a, *("" if a == b else cell(summary["wins"][a][b], 2, "") for b in names)] for a in names
    ]
    return ["row beats column", *names], rows


def reach_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what it takes to the baseline's final score."""
    found = summary["reach"]
    spent = found["variants"][found["baseline"]]["evaluations"]
    head = [
        "method",
        "steps",
        "evaluations, inversion included",
        "share",
        "without inversion",
        "share",
        "seconds",
        "seeds reaching it",
    ]
    rows = []
    for name, r in found["variants"].items():
        if r["steps"] is None:
            rows.append([name, "not reached", "", "", "", "", "", str(r["seeds_reaching"])])
            continue
        ours, alone = r["evaluations"], r["evaluations_alone"]
        # a baseline that ends below the reference is there before its first step
        shares = [f"{x / spent:.2f}" if spent else "-" for x in (ours, alone)]
        rows.append(
            [
                name,
                f"{r['steps']:.0f}",
                f"{ours:.0f}",
                shares[0],
                f"{alone:.0f}",
                shares[1],
                f"{r['seconds']:.0f}",
                str(r["seeds_reaching"]),
            ]
        )
    return head, rows


def best_rows(summary: Summary, preference: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the reference's best of n, and of the policies' single sample."""
    metrics = preferred_first(summary, preference)
    rows = yardstick_rows(summary, metrics)
    for name, v in summary["variants"].items():
        rows.append([name, *(cell(v["scores"][m], sign="") for m in metrics)])
    return ["one sample a prompt", *metrics], rows


def yardstick_rows(summary: Summary, metrics: Sequence[str]) -> list[list[str]]:
    """The reference's one sample from the policies' noise, and its best of n."""
    best: Mapping[str, Any] = summary["best_of"]
    same = next(iter(summary["variants"].values()))["reference"]
    rows = [["reference, the same noise", *(f"{same[m]:.3f}" for m in metrics)]]
    return rows + [
        [f"reference, best of {n}", *(cell(s[m], sign="") for m in metrics)]
        for n, s in best.items()
    ]


def round_rows(summary: Summary, preference: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the score by round, and of the first reference's best of n."""
    metrics = preferred_first(summary, preference)
    rows = [
        [f"{name}, round {r['round']}", *(cell(r[m], sign="") for m in metrics)]
        for name, found in summary["rounds"].items()
        for r in found[1:]
    ]
    return ["one sample a prompt", *metrics], rows + yardstick_rows(summary, metrics)


def trait_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what the policies' images have more or less of."""
    rows = [
        [name, *(cell(v["traits"][t], sign="") for t in TRAITS)]
        for name, v in summary["variants"].items()
        if v["traits"]
    ]
    return ["the policy's image is", *TRAITS], rows


def sections(summary: Summary, preference: str) -> list[tuple[str, str, Any, list[str]]]:
    """(heading, note, (head, rows) or None, names of the pictures)."""
    seeds = summary["seeds"]
    found: list[tuple[str, str, Any, list[str]]] = [
        (
            "Gains over the reference",
            f"Means over {seeds} training seeds and 95% t intervals, on {summary['prompts']} "
            f"held-out prompts with the same noise. The pairs prefer {preference}; the win rate is "
            f"by it. Diversity of the reference: {summary['reference_diversity']:.3f}.",
            main_rows(summary, preference),
            ["gains.png"],
        ),
    ]
    if figures.varied_keys(summary):
        found.append(
            (
                "One setting at a time",
                f"Gain of {preference}; beside it the difference to the method as it is (in "
                "the picture dashed), seed by seed.",
                ablation_rows(summary, preference),
                ["ablations.png"],
            )
        )
    if "rounds" in summary:
        found.append(
            (
                "Round by round",
                "Each round's policy is sampled and its samples are labelled; merged, it is "
                "the reference of the next. Gains and win rates on this page are over the "
                "first reference, errors and drift over the round's own.",
                round_rows(summary, preference),
                ["rounds.png"],
            )
        )
    if any(v["curve"] for v in summary["variants"].values()):
        found.append(
            (
                "Score against compute",
                f"On the first {summary['curve_prompts']} of the prompts. A forward pass of "
                "one image counts 1, a backward pass 2; what the inversion of the pairs "
                "costs, and earlier rounds, come before the first step.",
                None,
                ["evaluations.png", "seconds.png"],
            )
        )
    if "reach" in summary:
        found.append(
            (
                f"To the final score of {summary['reach']['baseline']}",
                "By the mean curve; share is of the baseline's own evaluations.",
                reach_rows(summary),
                [],
            )
        )
    if len(win_rows(summary)[1]) > 1:
        found.append(
            (
                "One against another",
                f"Share of prompts on which the row's image has the higher {preference}.",
                win_rows(summary),
                [],
            )
        )
    found.append(
        (
            "Best of n",
            f"Of n samples of the reference the one with the highest {preference}: the mean "
            "over all choices of n of eight samples, 95% t intervals over prompts. Each "
            "policy's one sample: over seeds, from the noise of the gains. Where the two "
            "are close, give more noise: evaluation.seeds.",
            best_rows(summary, preference),
            [],
        )
    )
    if trait_rows(summary)[1]:
        found.append(
            (
                "What else changed",
                "Share of images in which the policy's has more of a trait than the first "
                "reference's from the same noise; 0.5 is no change. `inversion-dpo pairs "
                "check` says the same of the winners.",
                trait_rows(summary),
                [],
            )
        )
    found.append(
        (
            "Errors and drift",
            "On held-out pairs. A winner's error that rises says that the margin comes from losers "
            "alone.",
            None,
            ["errors.png", "drift.png"],
        )
    )
    return found


def markdown(summary: Summary, preference: str) -> str:
    """Every table, for documentation."""
    parts = []
    for heading, note, table, _ in sections(summary, preference):
        parts.append(f"### {heading}\n\n{note}\n")
        if table:
            head, rows = table
            lines = [head, ["---"] * len(head), *rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def draw(summary: Summary, preference: str, folder: Path) -> None:
    """Every picture that the sections name."""
    folder.mkdir(exist_ok=True)
    figures.gains(summary, preferred_first(summary, preference)[:5], folder / "gains.png")
    if "rounds" in summary:
        figures.round_curves(summary, preference, folder / "rounds.png")
    if figures.varied_keys(summary):
        figures.ablations(summary, preference, folder / "ablations.png")
    for unit in ("evaluations", "seconds"):
        figures.score_curves(summary, preference, unit, folder / f"{unit}.png")
    figures.error_curves(summary, folder / "errors.png")
    figures.drift_curves(summary, folder / "drift.png")


def strict(value: Any) -> Any:
    """The same for JSON, which knows no NaN and no infinity: null stands for them."""
    if isinstance(value, Mapping):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def title(summary: Summary) -> str:
    """Of the page: how many methods, and rounds of them."""
    rounds: Mapping[str, Any] = summary.get("rounds", {})
    count = len(rounds or summary["variants"])
    words = f"{count} {'method' if count == 1 else 'methods'} on {summary['config']}"
    last = max((len(rows) for rows in rounds.values()), default=2) - 1  # the first is the reference
    return words if last == 1 else f"{words}, {last} rounds"


def write(root: Path, summary: Summary, preference: str) -> Path:
    """``results.json``, ``results.md``, ``figures/*.png`` and ``report.html``; returns the page."""
    text = json.dumps(strict(summary), indent=1, allow_nan=False)
    atomic_text(text, root / "results.json")
    atomic_text(markdown(summary, preference), root / "results.md")
    draw(summary, preference, root / "figures")
    pictures = {p.name: data_uri(p.read_bytes()) for p in (root / "figures").glob("*.png")}
    page = (
        environment("inversion_dpo.compare")
        .get_template("compare.html.jinja")
        .render(
            title=title(summary),
            sections=sections(summary, preference),
            pictures=pictures,
            settings=[(n, ", ".join(v["settings"])) for n, v in summary["variants"].items()],
            versions=summary["versions"],
        )
    )
    atomic_text(page, root / "report.html")
    return root / "report.html"
