"""Write the page and the Markdown of a comparison."""

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
from inversion_dpo.evaluation.page import Page, Picture, Section, Table
from inversion_dpo.run.disk import atomic_figure, atomic_text

Summary = Mapping[str, Any]
Row = dict[str, str]
Cards = Sequence[tuple[str, Sequence[Picture]]]
Part = tuple[Any, ...]  # heading, note, rows, names of pictures


def cell(x: Mapping[str, float], digits: int = 3, sign: str = "+") -> str:
    """Write mean and 95% interval; only the mean for a single seed."""
    return interval_text(x["mean"], x["low"], x["high"], digits=digits, sign=sign)


def preferred_first(summary: Summary, preference: str) -> list[str]:
    """List the names of the metrics, the preference first."""
    metrics = next(iter(summary["variants"].values()))["gains"]
    return [preference, *(m for m in metrics if m != preference)]


def gain_part(summary: Summary, preference: str) -> Part:
    """List every variant's gains over the reference, and what a step costs."""
    metrics, rows = preferred_first(summary, preference), []
    for name, v in summary["variants"].items():
        drift = v["training"].get("heldout_drift")
        row = {"method": name, "win rate": cell(v["win_rate"], sign="")}
        row |= {f"{m} gain": cell(v["gains"][m]) for m in metrics}
        row["diversity"] = cell(v["diversity"], sign="")
        row["drift"] = cell(drift, 4, "") if drift else "-"
        row["s / step"] = f"{v['step_seconds']:.2f}"
        rows.append(row | {"evaluations / step": f"{v['step_evaluations']:.0f}"})
    over = f"Means over {summary['seeds']} training seeds with 95% t intervals"
    if summary["seeds"] == 1:
        over = "One training seed, without intervals"
    note = (
        f"{over}, on "
        f"{summary['prompts']} held-out prompts with the same noise. {preference} decides the "
        f"win rate. The reference has diversity {summary['reference_diversity']:.3f}."
    )
    for name, v in summary["variants"].items():
        if blank := v.get("one_colour"):
            note += f" {name}: {blank} samples are of one colour and show nothing."
    return "Gains over the reference", note, rows, "gains"


def ablation_part(summary: Summary, preference: str) -> Part:
    """List the varied settings, each with the difference to its method alone."""
    variants, rows = summary["variants"].values(), []
    plain = {v["method"]: v["gains"][preference]["values"] for v in variants if not v["varied"]}
    for v in variants:
        key, value = v["varied"] or ("", "")
        gain, drift = v["gains"][preference], v["training"].get("heldout_drift")
        away = [a - b for a, b in zip(gain["values"], plain[v["method"]], strict=True)]
        rows.append(
            {
                "method": v["method"],
                "setting": key,
                "value": value,
                f"{preference} gain": cell(gain),
                "difference": cell(over_seeds(away)) if key else "",
                "drift": f"{drift['mean']:.4f}" if drift else "-",
                "s / step": f"{v['step_seconds']:.2f}",
                "inversion, s": f"{v['inversion']['seconds']:,.0f}",
                "evaluations / step": f"{v['step_evaluations']:.0f}",
                "inversion, evaluations": f"{v['inversion']['evaluations']:,.0f}",
            }
        )
    note = (
        f"The gain of {preference}, and its difference to the method without the setting, "
        "seed by seed. Dashed lines show that method."
    )
    return "One setting at a time", note, rows, "ablations"


def score_row(name: str, scores: Mapping[str, Any], metrics: Sequence[str]) -> Row:
    """Write the mean of every score, for one sample per prompt."""
    return {"one sample a prompt": name} | {m: cell(scores[m], sign="") for m in metrics}


def yardsticks(summary: Summary, metrics: Sequence[str]) -> list[Row]:
    """List the reference's single sample from the policies' noise, and its best of n."""
    same = next(iter(summary["variants"].values()))["reference"]
    first = {"one sample a prompt": "reference, the same noise"}
    best = summary["best_of"].items()
    return [
        first | {m: f"{same[m]:.3f}" for m in metrics},
        *(score_row(f"reference, best of {n}", scores, metrics) for n, scores in best),
    ]


def round_part(summary: Summary, preference: str) -> Part:
    """List the score by round, and the first reference's best of n."""
    metrics = preferred_first(summary, preference)
    rows = [
        score_row(f"{name}, round {r['round']}", r, metrics)
        for name, scores in summary["rounds"].items()
        for r in scores[1:]
    ]
    note = (
        "Each round samples its policy and labels the samples. The merged policy is the "
        "reference of the next round. Gains and win rates on this page are over the first "
        "reference, errors and drift over the round's own."
    )
    return "Round by round", note, rows + yardsticks(summary, metrics), "rounds"


def reach_part(summary: Summary) -> Part:
    """List the cost of reaching the baseline's final score."""
    reach, rows = summary["reach"], []
    spent = reach["variants"][reach["baseline"]]["evaluations"]
    for name, r in reach["variants"].items():
        reached = r["steps"] is not None
        # a baseline that ends below the reference reaches it before its first step
        shares = [
            f"{r[unit] / spent:.2f}" if reached and spent else "-" if reached else ""
            for unit in ("evaluations", "evaluations_alone")
        ]
        rows.append(
            {
                "method": name,
                "steps": f"{r['steps']:.0f}" if reached else "not reached",
                "evaluations, inversion included": f"{r['evaluations']:.0f}" if reached else "",
                "share": shares[0],
                "without inversion": f"{r['evaluations_alone']:.0f}" if reached else "",
                "share without": shares[1],
                "seconds": f"{r['seconds']:.0f}" if reached else "",
                "seeds reaching it": str(r["seeds_reaching"]),
            }
        )
    note = "The mean curve decides. Shares are relative to the baseline's own evaluations."
    return f"To the final score of {reach['baseline']}", note, rows


def win_part(summary: Summary, preference: str) -> Part:
    """List win rates between methods without varied settings: row against column."""
    wins = summary["wins"]
    names = [n for n in wins if not summary["variants"][n]["varied"]]
    rows = [
        {"row beats column": a} | {b: "" if a == b else cell(wins[a][b], 2, "") for b in names}
        for a in names
    ]
    note = f"Share of prompts on which the row's image has the higher {preference}."
    return "One against another", note, rows


def best_part(summary: Summary, preference: str) -> Part:
    """List the reference's best of n, and the policies' single sample."""
    metrics = preferred_first(summary, preference)
    ours = [score_row(n, v["scores"], metrics) for n, v in summary["variants"].items()]
    note = (
        f"Best of n takes the reference's sample with the highest {preference}. It averages over "
        "all choices of n from eight samples, with 95% t intervals over prompts. Policies have "
        "one sample, from the noise of the gains, with intervals over seeds. If the two are "
        "close, raise evaluation.seeds."
    )
    return "Best of n", note, yardsticks(summary, metrics) + ours


def trait_part(summary: Summary) -> Part:
    """List the traits that the policies' images have more or less of."""
    rows = [
        {"the policy's image is": name} | {t: cell(v["traits"][t], sign="") for t in TRAITS}
        for name, v in summary["variants"].items()
        if v["traits"]
    ]
    note = (
        "The share of images in which the policy's has more of a trait than the first "
        "reference's from the same noise. A share of 0.5 is no change. "
        "`inversion-dpo pairs check` measures the same on the winners."
    )
    return "What else changed", note, rows


def setting_part(summary: Summary) -> Part:
    """List the settings of every variant, a column for each setting that one of them has."""
    given = {
        n: dict(s.split("=", 1) for s in v["settings"]) for n, v in summary["variants"].items()
    }
    keys = dict.fromkeys(key for settings in given.values() for key in settings)
    rows = [{"method": n} | {k: s.get(k, "") for k in keys} for n, s in given.items()]
    note = "An empty cell is the configuration's own value. Later settings win over tuned ones."
    return "Methods and their settings", note, rows


def sections(summary: Summary, preference: str, pictures: Mapping[str, bytes]) -> list[Section]:
    """List every part of the page that the comparison has numbers for.

    pictures: name -> PNG bytes; a section without one has no picture.
    """
    compute = (
        f"Scores are means over the first {summary['curve_prompts']} prompts. A forward pass "
        "of one image counts 1, a backward pass 2. Curves start after the cost of inverting "
        "the pairs and of earlier rounds."
    )
    errors = "Held-out pairs. If a winner's error rises, the margin comes from losers alone."
    parts = [gain_part(summary, preference)]
    if curves.varied_keys(summary):
        parts.append(ablation_part(summary, preference))
    if "rounds" in summary:
        parts.append(round_part(summary, preference))
    if any(v["curve"] for v in summary["variants"].values()):
        parts.append(("Score against compute", compute, [], "evaluations", "seconds"))
    if "reach" in summary:
        parts.append(reach_part(summary))
    if len((wins := win_part(summary, preference))[2]) > 1:
        parts.append(wins)
    parts.append(best_part(summary, preference))
    if (traits := trait_part(summary))[2]:
        parts.append(traits)
    parts += [("Errors and drift", errors, [], "errors", "drift"), setting_part(summary)]
    return [
        Section(heading, note, Table.of(rows), plates=[pictures[n] for n in names if n in pictures])
        for heading, note, rows, *names in parts
    ]


def markdown(parts: Sequence[Section]) -> str:
    """Write every table, for documentation."""
    words = []
    for part in parts:
        words.append(f"### {part.heading}\n\n{part.note}\n")
        words += [part.table.markdown()] if part.table else []
    return "\n".join(words)


def strict(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, Mapping):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def title(summary: Summary) -> str:
    """Write the number of methods and of rounds; of a file its name, not the way to it."""
    rounds: Mapping[str, Any] = summary.get("rounds", {})
    count = len(rounds or summary["variants"])
    words = f"{count} {'method' if count == 1 else 'methods'} on {Path(summary['config']).name}"
    last = max((len(rows) for rows in rounds.values()), default=2) - 1  # the first is the reference
    return words if last == 1 else f"{words}, {last} rounds"


def write(root: Path, summary: Summary, preference: str, cards: Cards = ()) -> Path:
    """Write ``results.json``, ``results.md``, figures and ``report.html``; return the page.

    cards: prompts with an image of the reference and of each method.
    """
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
    note = (
        f"{len(cards)} of {summary['prompts']} prompts, drawn at random with seed 0. All images of "
        "a prompt come from the same noise; policies are those of the first training seed."
    )
    parts[1:1] = [Section("Samples", note, cards=cards)] if cards else []
    facts = [("Versions", list(summary["versions"].items()))]
    page = Page("inversion-dpo compare", title(summary), parts, facts=facts)
    return page.write(root / "report.html")
