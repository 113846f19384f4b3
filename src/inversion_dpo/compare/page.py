"""The page and the Markdown of a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inversion_dpo.compare import curves
from inversion_dpo.compare.summary import over_seeds
from inversion_dpo.data.traits import TRAITS
from inversion_dpo.evaluation.metrics import interval_text
from inversion_dpo.evaluation.page import Page, Section, Table
from inversion_dpo.run.disk import atomic_figure, atomic_text

Summary = Mapping[str, Any]
Row = dict[str, str]
Part = tuple[Any, ...]  # heading, note, rows, names of pictures


def cell(x: Mapping[str, float], digits: int = 3, sign: str = "+") -> str:
    """Mean and 95% interval; without the interval if there is only one seed."""
    return interval_text(x["mean"], x["low"], x["high"], digits=digits, sign=sign)


def preferred_first(summary: Summary, preference: str) -> list[str]:
    """The metrics' names, that of the preference first."""
    metrics = next(iter(summary["variants"].values()))["gains"]
    return [preference, *(m for m in metrics if m != preference)]


def costs(variant: Summary) -> Row:
    """What a training step takes."""
    return {
        "s / step": f"{variant['step_seconds']:.2f}",
        "evaluations / step": f"{variant['step_evaluations']:.0f}",
    }


def main_rows(summary: Summary, preference: str) -> list[Row]:
    """Every variant's gains."""
    metrics, rows = preferred_first(summary, preference), []
    for name, v in summary["variants"].items():
        drift = v["training"].get("heldout_drift")
        row = {"method": name, "win rate": cell(v["win_rate"], sign="")}
        row |= {f"{m} gain": cell(v["gains"][m]) for m in metrics}
        row |= {"diversity": cell(v["diversity"], sign="")}
        rows.append(row | {"drift": cell(drift, 4, "") if drift else "-"} | costs(v))
    return rows


def ablation_rows(summary: Summary, preference: str) -> list[Row]:
    """The varied settings, each beside its method as it is."""
    found, rows = summary["variants"].values(), []
    plain = {v["method"]: v["gains"][preference]["values"] for v in found if not v["varied"]}
    for v in found:
        key, value = v["varied"] or ("", "")
        gain, drift = v["gains"][preference], v["training"].get("heldout_drift")
        away = [a - b for a, b in zip(gain["values"], plain[v["method"]], strict=True)]
        step = costs(v)
        rows.append(
            {
                "method": v["method"],
                "setting": key,
                "value": value,
                f"{preference} gain": cell(gain),
                "difference": cell(over_seeds(away)) if key else "",
                "drift": f"{drift['mean']:.4f}" if drift else "-",
                "s / step": step["s / step"],
                "inversion, s": f"{v['inversion']['seconds']:,.0f}",
                "evaluations / step": step["evaluations / step"],
                "inversion, evaluations": f"{v['inversion']['evaluations']:,.0f}",
            }
        )
    return rows


def win_rows(summary: Summary) -> list[Row]:
    """Win rates between methods as they are: row against column."""
    names = [n for n in summary["wins"] if not summary["variants"][n]["varied"]]
    return [
        {"row beats column": a}
        | {b: "" if a == b else cell(summary["wins"][a][b], 2, "") for b in names}
        for a in names
    ]


def reach_rows(summary: Summary) -> list[Row]:
    """What it takes to the baseline's final score."""
    found, rows = summary["reach"], []
    spent = found["variants"][found["baseline"]]["evaluations"]
    for name, r in found["variants"].items():
        there = r["steps"] is not None
        # a baseline that ends below the reference is there before its first step
        shares = [
            f"{r[unit] / spent:.2f}" if there and spent else "-" if there else ""
            for unit in ("evaluations", "evaluations_alone")
        ]
        rows.append(
            {
                "method": name,
                "steps": f"{r['steps']:.0f}" if there else "not reached",
                "evaluations, inversion included": f"{r['evaluations']:.0f}" if there else "",
                "share": shares[0],
                "without inversion": f"{r['evaluations_alone']:.0f}" if there else "",
                "share without": shares[1],
                "seconds": f"{r['seconds']:.0f}" if there else "",
                "seeds reaching it": str(r["seeds_reaching"]),
            }
        )
    return rows


def score_row(name: str, scores: Summary, metrics: Sequence[str]) -> Row:
    """One sample a prompt: the mean of every score."""
    return {"one sample a prompt": name} | {m: cell(scores[m], sign="") for m in metrics}


def yardstick_rows(summary: Summary, metrics: Sequence[str]) -> list[Row]:
    """The reference's one sample from the policies' noise, and its best of n."""
    same = next(iter(summary["variants"].values()))["reference"]
    first = {"one sample a prompt": "reference, the same noise"}
    best = summary["best_of"].items()
    return [
        first | {m: f"{same[m]:.3f}" for m in metrics},
        *(score_row(f"reference, best of {n}", scores, metrics) for n, scores in best),
    ]


def best_rows(summary: Summary, preference: str) -> list[Row]:
    """The reference's best of n, and the policies' single sample."""
    metrics = preferred_first(summary, preference)
    ours = [score_row(n, v["scores"], metrics) for n, v in summary["variants"].items()]
    return yardstick_rows(summary, metrics) + ours


def round_rows(summary: Summary, preference: str) -> list[Row]:
    """The score by round, and the first reference's best of n."""
    metrics = preferred_first(summary, preference)
    rows = [
        score_row(f"{name}, round {r['round']}", r, metrics)
        for name, found in summary["rounds"].items()
        for r in found[1:]
    ]
    return rows + yardstick_rows(summary, metrics)


def trait_rows(summary: Summary) -> list[Row]:
    """What the policies' images have more or less of."""
    return [
        {"the policy's image is": name} | {t: cell(v["traits"][t], sign="") for t in TRAITS}
        for name, v in summary["variants"].items()
        if v["traits"]
    ]


def sections(summary: Summary, preference: str, pictures: Mapping[str, bytes]) -> list[Section]:
    """Every part of the page that the comparison has something for.

    pictures: name -> PNG bytes; without one its section has none.
    """
    found = gain_parts(summary, preference) + cost_parts(summary)
    found += other_parts(summary, preference)
    return [
        Section(heading, note, Table.of(rows), plates=[pictures[n] for n in names if n in pictures])
        for heading, note, rows, *names in found
    ]


def gain_parts(summary: Summary, preference: str) -> list[Part]:
    """What training brings: over the reference, by setting, by round."""
    found: list[Part] = [
        (
            "Gains over the reference",
            f"Means over {summary['seeds']} training seeds and 95% t intervals, on "
            f"{summary['prompts']} held-out prompts with the same noise. The pairs prefer "
            f"{preference}; the win rate is by it. Diversity of the reference: "
            f"{summary['reference_diversity']:.3f}.",
            main_rows(summary, preference),
            "gains",
        )
    ]
    if curves.varied_keys(summary):
        note = (
            f"Gain of {preference}; beside it the difference to the method as it is (in the "
            "picture dashed), seed by seed."
        )
        rows = ablation_rows(summary, preference)
        found.append(("One setting at a time", note, rows, "ablations"))
    if "rounds" in summary:
        note = (
            "Each round's policy is sampled and its samples are labelled; merged, it is the "
            "reference of the next. Gains and win rates on this page are over the first "
            "reference, errors and drift over the round's own."
        )
        found.append(("Round by round", note, round_rows(summary, preference), "rounds"))
    return found


def cost_parts(summary: Summary) -> list[Part]:
    """What training takes."""
    found: list[Part] = []
    if any(v["curve"] for v in summary["variants"].values()):
        note = (
            f"On the first {summary['curve_prompts']} of the prompts. A forward pass of one image "
            "counts 1, a backward pass 2; what the inversion of the pairs costs, and earlier "
            "rounds, come before the first step."
        )
        found.append(("Score against compute", note, [], "evaluations", "seconds"))
    if "reach" in summary:
        heading = f"To the final score of {summary['reach']['baseline']}"
        note = "By the mean curve; share is of the baseline's own evaluations."
        found.append((heading, note, reach_rows(summary)))
    return found


def other_parts(summary: Summary, preference: str) -> list[Part]:
    """Methods against each other and against best of n, and what else changed."""
    found: list[Part] = []
    if len(wins := win_rows(summary)) > 1:
        note = f"Share of prompts on which the row's image has the higher {preference}."
        found.append(("One against another", note, wins))
    note = (
        f"Of n samples of the reference the one with the highest {preference}: the mean over all "
        "choices of n of eight samples, 95% t intervals over prompts. Each policy's one sample: "
        "over seeds, from the noise of the gains. Where the two are close, give more noise: "
        "evaluation.seeds."
    )
    found.append(("Best of n", note, best_rows(summary, preference)))
    if traits := trait_rows(summary):
        note = (
            "Share of images in which the policy's has more of a trait than the first reference's "
            "from the same noise; 0.5 is no change. `inversion-dpo pairs check` says the same of "
            "the winners."
        )
        found.append(("What else changed", note, traits))
    note = (
        "On held-out pairs. A winner's error that rises says that the margin comes from losers "
        "alone."
    )
    return [*found, ("Errors and drift", note, [], "errors", "drift")]


def markdown(parts: Sequence[Section]) -> str:
    """Every table, for documentation."""
    words = []
    for part in parts:
        words.append(f"### {part.heading}\n\n{part.note}\n")
        words += [part.table.markdown()] if part.table else []
    return "\n".join(words)


def strict(value: Any) -> Any:
    """The same for JSON, which knows no NaN and no infinity: null stands for them."""
    if isinstance(value, Mapping):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def title(summary: Summary) -> str:
    """The page's title: how many methods, and how many rounds of them."""
    rounds: Mapping[str, Any] = summary.get("rounds", {})
    count = len(rounds or summary["variants"])
    words = f"{count} {'method' if count == 1 else 'methods'} on {summary['config']}"
    last = max((len(rows) for rows in rounds.values()), default=2) - 1  # the first is the reference
    return words if last == 1 else f"{words}, {last} rounds"


def write(root: Path, summary: Summary, preference: str) -> Path:
    """``results.json``, ``results.md``, ``figures/*.png`` and ``report.html``; returns the page."""
    text = json.dumps(strict(summary), indent=1, allow_nan=False)
    atomic_text(text, root / "results.json")
    (root / "figures").mkdir(exist_ok=True)
    pictures = {}
    for name, figure in curves.draw(summary, preferred_first(summary, preference)).items():
        file = root / "figures" / f"{name}.png"
        atomic_figure(figure, file)
        pictures[name] = file.read_bytes()
    parts = sections(summary, preference, pictures)
    atomic_text(markdown(parts), root / "results.md")
    settings = [(n, ", ".join(v["settings"])) for n, v in summary["variants"].items()]
    facts = [("Methods", settings), ("Versions", list(summary["versions"].items()))]
    page = Page("inversion-dpo compare", title(summary), parts, facts=facts)
    return page.write(root / "report.html")
