"""Put the result of an evaluation in words, for the terminal, the report and the model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from inversion_dpo.data.images import one_colour_text
from inversion_dpo.data.traits import Share, shares_text
from inversion_dpo.evaluation.metrics import (
    OTHER_GUIDANCE,
    PAIRS_AGREE,
    gain_text,
    metric_rows,
    outcome,
    share_text,
    verdict,
    win_text,
    win_verdict,
)
from inversion_dpo.evaluation.people import PEOPLE_JUDGE
from inversion_dpo.evaluation.scorers.asked import SPATIAL
from inversion_dpo.maths.intervals import LEAST_PROMPTS
from inversion_dpo.run.words import counted, typed
from inversion_dpo.training.health import FEW_PAIRS, heldout_share, heldout_units

FEW_PROMPTS = 20  # below this a percentile interval is noticeably too narrow
READ_SHARES = ("vqa_read", "unifiedreward_read", "parsed")  # scores: which answers could be read
TOO_FEW = "too few prompts to tell"
REMARKS = {
    SPATIAL: f"`{SPATIAL}` has T2I-CompBench's rule, but OWLv2's boxes in place of UniDet's: do "
    "not compare it with published numbers."
}


def headline(metrics: Mapping[str, Any], preference: str, setting: str, run: str = "RUN") -> str:
    """Write the result by ``preference`` in one sentence; metric names stand in backticks.

    It calls the result a win or a loss only if the win rate's interval excludes one half, and there
    are prompts enough. Without scores it says what is known, and how to compare the models of the
    folder ``run`` by eye.

    Args:
        metrics: of ``metrics.json``.
        preference: the score that decides.
        setting: words for the prompts.
        run: the folder, for the advice.
    """
    if "preference" not in metrics:
        sampled = f"{metrics['n_prompts']:,} {setting}, were sampled but not scored."
        return " ".join([sampled, *unscored(metrics, run)])
    where = f"On {metrics['n_prompts']:,} {setting}, the policy"
    share, by = share_text(metrics), f"the reference by `{preference}`"
    told = {
        "gain": f"wins {share} against {by}",
        "loss": f"loses to {by}: it wins only {share}",
        "none": f"cannot be distinguished from {by}: it wins {share}",
    }[win_verdict(metrics)]
    last = _statement(preference, metrics["preference"], metrics["n_prompts"])
    return " ".join([f"{where} {told}.", last, *few_text(metrics["n_prompts"])])


def few_text(prompts: int) -> list[str]:
    """Warn in a sentence of so few prompts that intervals are too narrow; else nothing."""
    text = "So few prompts make the intervals too narrow: read this as a trial, not a result."
    return [text] if prompts < FEW_PROMPTS else []


def unscored(metrics: Mapping[str, Any], run: str) -> list[str]:
    """Write what is known without a scorer: held-out accuracy, what changed, what to do next."""
    training, shares, texts = metrics.get("training") or {}, shares_of(metrics), []
    if n := round(training.get("heldout_pairs", 0)):
        share, low, high = heldout_share(training)
        units = heldout_units(training)
        puts = "tells liked from disliked" if units == "images" else "puts the winner first"
        chance = {"gain": "more often than", "loss": "less often than", "none": "no different from"}
        texts.append(
            f"The policy {puts} in {share:.0%} [{100 * low:.0f}, {100 * high:.0f}] "
            f"of {n} held-out {units}, {chance[verdict(low, high, null=0.5)]} chance."
        )
    if n and n < FEW_PAIRS:
        texts.append(f"So few {heldout_units(training)} say little.")
    changed = {name: s for name, s in shares.items() if not s.chance}
    if changed:
        texts.append(
            "Share of prompts where the policy's image is: "
            f"{shares_text(changed).replace(' !', '')}."
        )
    elif shares:
        texts.append("No trait of its images changed measurably.")
    if away := metrics.get("distance"):
        digits = ".1f" if away["mean"] >= 0.1 else ".1g"  # 0.0 would contradict what follows
        texts.append(
            f"Its images are {away['mean']:{digits}} of 255 grey levels away from the reference's "
            f"on average; {away['identical']} are identical."
        )
    return [*texts, f"To compare the two blind, by eye: `inversion-dpo web {typed(run)}`."]


def statements(metrics: Mapping[str, Any], preference: str) -> list[tuple[str, str]]:
    """List (verdict, sentence): what spoils the numbers, and every metric but the preferred one."""
    return [("loss", text) for text in (*blank_texts(metrics), *unread_texts(metrics))] + [
        (outcome(row, metrics["n_prompts"]), _statement(name, row, metrics["n_prompts"]))
        for name, row in metric_rows(metrics).items()
        if name != preference
    ]


def blank_texts(metrics: Mapping[str, Any]) -> list[str]:
    """Write of each side how many samples are of one colour, if any."""
    total = metrics["n_prompts"] * metrics.get("seeds", 1)
    blank = metrics.get("one_colour", {}).items()
    return [f"{side}: {one_colour_text(names, total)}" for side, names in blank if names]


def unread_texts(metrics: Mapping[str, Any]) -> list[str]:
    """Write of each model that answers in words how many answers could not be read, if any."""
    rows = metric_rows(metrics)
    return [
        f"`{name}`: {1 - rows[name]['reference']:.0%} of the answers for the reference and "
        f"{1 - rows[name]['policy']:.0%} for the policy could not be read and have the lowest score"
        for name in READ_SHARES
        if name in rows and min(rows[name]["reference"], rows[name]["policy"]) < 1
    ]


def agreement_text(metrics: Mapping[str, Any], preference: str) -> str:
    """Say how often the pairs' winners have the higher ``preference``; empty if not measured."""
    if not (agree := metrics.get(PAIRS_AGREE)):
        return ""
    share, low, high = (100 * agree[key] for key in ("share", "low", "high"))
    text = (
        f"Measured on {counted(agree['n'], 'pair')}: the winner has the higher `{preference}` in "
        f"{share:.0f}% [{low:.0f}, {high:.0f}]."
    )
    if low <= 50:
        text += f" So `{preference}` does not measure what these pairs prefer."
    return text


def lines(metrics: Mapping[str, Any], run: str = "RUN") -> list[str]:
    """Write the result of the folder ``run`` for a terminal: metrics, win rate, by category."""
    out = [
        f"{name:14s} reference {row['reference']:.4f}  policy {row['policy']:.4f}  gain "
        f"{gain_text(row, digits=4)}"
        for name, row in metric_rows(metrics).items()
    ]
    if "win_rate" in metrics:
        seeds = f" of {metrics['seeds']} images" if metrics.get("seeds", 1) > 1 else ""
        out.append(
            f"win rate {win_text(metrics)} on {counted(metrics['n_prompts'], 'prompt')}{seeds}"
        )
    if people := metrics.get(PEOPLE_JUDGE):
        at = f", at guidance {people['guidance_scale']:g}" if "guidance_scale" in people else ""
        pairs = counted(people["pairs"], "pair")
        out.append(f"judged by people: win rate {win_text(people)} on {pairs}{at}")
    for name, part in metrics.get("categories", {}).items():
        out.append(
            f"  {name}: gain {gain_text(part['preference'])}, win rate {part['win_rate']:.3f}, "
            + counted(part["n_prompts"], "prompt")
        )
    if other := metrics.get(OTHER_GUIDANCE):
        out.append(
            f"  at the guidance of training, {other['guidance_scale']:g}, not "
            f"{other['instead_of']:g}: win rate {win_text(other)}"
        )
        out += [f"    {name}: gain {gain_text(r)}" for name, r in metric_rows(other).items()]
    if not out:
        out = [
            f"{counted(metrics['n_prompts'], 'prompt was', 'prompts were')} sampled but not scored",
            *unscored(metrics, run),
        ]
    out += [f"  {text}" for text in remarks(metric_rows(metrics))]
    few = few_text(metrics["n_prompts"]) if "win_rate" in metrics else []
    out += [f"  warning: {text}" for text in (*few, *blank_texts(metrics), *unread_texts(metrics))]
    if shares := shares_of(metrics):
        out.append(f"  policy's images beside the reference's: {shares_text(shares)}")
    return out


def remarks(names: Iterable[str]) -> list[str]:
    """List what a reader must know of some scores before comparing them with published ones."""
    return [REMARKS[name] for name in names if name in REMARKS]


def _statement(name: str, row: Mapping[str, float], prompts: int) -> str:
    words = {"gain": "a gain", "loss": "a loss", "none": "no measurable change"}
    told = words[outcome(row, prompts)] if prompts >= LEAST_PROMPTS else TOO_FEW
    return f"Mean `{name}` changes by {gain_text(row)}: {told}."


def duration(seconds: float) -> str:
    """Write a wall-clock time for readers.

    >>> [duration(s) for s in (0.42, 12.34, 83, 4000)]
    ['0.4 s', '12.3 s', '1 min 23 s', '1 h 7 min']
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def shares_of(metrics: Mapping[str, Any]) -> dict[str, Share]:
    """Map each trait to the share of images in which the policy has more of it."""
    return {name: Share(**row) for name, row in (metrics.get("traits") or {}).items()}


def halves(text: str) -> tuple[str, str]:
    """Split a value from its interval."""
    value, _, interval = text.partition(" ")
    return value, interval
