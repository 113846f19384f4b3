"""Put the result of an evaluation in words, for the terminal, the report and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inversion_dpo.data.traits import Share, shares_text
from inversion_dpo.evaluation.metrics import (
    OTHER_GUIDANCE,
    interval_text,
    metric_rows,
    verdict,
)

FEW_PROMPTS = 20  # below this a percentile interval is noticeably too narrow


def headline(metrics: Mapping[str, Any], preference: str, setting: str) -> str:
    """Write the result by ``preference`` in one sentence; metric names stand in backticks.

    It calls the result a win or a loss only if the win rate's interval excludes one half.
    """
    if "preference" not in metrics:
        return f"{metrics['n_prompts']:,} {setting}, were sampled but not scored: no claim is made."
    where = f"On {metrics['n_prompts']:,} {setting}, the policy"
    share, by = share_text(metrics), f"the reference by `{preference}`"
    outcome = {
        "gain": f"wins {share} against {by}",
        "loss": f"loses to {by}: it wins only {share}",
        "none": f"cannot be distinguished from {by}: it wins {share}",
    }[verdict(metrics["win_rate_low"], metrics["win_rate_high"], null=0.5)]
    text = f"{where} {outcome}. {_statement(preference, metrics['preference'])}"
    if metrics["n_prompts"] < FEW_PROMPTS:
        text += " So few prompts make the intervals too narrow: read this as a trial, not a result."
    return text


def statements(metrics: Mapping[str, Any], preference: str) -> list[tuple[str, str]]:
    """List (verdict, sentence) for every metric but the preferred one."""
    return [
        (verdict(row["gain_low"], row["gain_high"]), _statement(name, row))
        for name, row in metric_rows(metrics).items()
        if name != preference
    ]


def lines(metrics: Mapping[str, Any]) -> list[str]:
    """Write the result for a terminal: every metric, the win rate, and the same by category."""
    out = [
        f"{name:14s} reference {row['reference']:.4f}  policy {row['policy']:.4f}  gain "
        f"{gain_text(row, digits=4)}"
        for name, row in metric_rows(metrics).items()
    ]
    if "win_rate" in metrics:
        seeds = f" of {metrics['seeds']} images" if metrics.get("seeds", 1) > 1 else ""
        out.append(f"win rate {win_text(metrics)} on {metrics['n_prompts']} prompts{seeds}")
    for name, part in metrics.get("categories", {}).items():
        out.append(
            f"  {name}: gain {gain_text(part['preference'])}, win rate {part['win_rate']:.3f}, "
            f"{part['n_prompts']} prompts"
        )
    if other := metrics.get(OTHER_GUIDANCE):
        out.append(
            f"  at the guidance of training, {other['guidance_scale']:g}, not "
            f"{other['instead_of']:g}: win rate {win_text(other)}"
        )
        out += [f"    {name}: gain {gain_text(r)}" for name, r in metric_rows(other).items()]
    out = out or [f"{metrics['n_prompts']} prompts were sampled but not scored"]
    if shares := shares_of(metrics):
        out.append(f"  policy's images beside the reference's: {shares_text(shares)}")
    return out


def _statement(name: str, row: Mapping[str, float]) -> str:
    words = {"gain": "a gain", "loss": "a loss", "none": "no measurable change"}
    outcome = words[verdict(row["gain_low"], row["gain_high"])]
    return f"Mean `{name}` changes by {gain_text(row)}: {outcome}."


def share_text(metrics: Mapping[str, Any]) -> str:
    """Write the win rate in percent, with its interval."""
    value, low, high = (100 * metrics[k] for k in ("win_rate", "win_rate_low", "win_rate_high"))
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


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


def gain_text(row: Mapping[str, float], digits: int | None = None) -> str:
    """Write a metric's gain with its interval, see :func:`metrics.interval_text`."""
    return interval_text(row["gain"], row["gain_low"], row["gain_high"], digits=digits)


def win_text(metrics: Mapping[str, Any], digits: int = 4) -> str:
    """Write the win rate with its interval, between 0 and 1."""
    bounds = (metrics[name] for name in ("win_rate", "win_rate_low", "win_rate_high"))
    return interval_text(*bounds, digits=digits, sign="")
