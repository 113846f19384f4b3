"""Sections of the report that are tables of what ``metrics.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inversion_dpo.evaluation.breakdown import ERRORS, table_rows
from inversion_dpo.evaluation.metrics import (
    OTHER_GUIDANCE,
    decimals,
    gain_text,
    metric_rows,
    share_text,
    verdict,
)
from inversion_dpo.evaluation.page import Section, Table, reading
from inversion_dpo.evaluation.wording import TOO_FEW, halves, shares_of
from inversion_dpo.maths.intervals import LEAST_PROMPTS

VERDICT_WORDS = {"gain": "gain", "loss": "loss", "none": "no measurable change"}


def other_guidance(metrics: Mapping[str, Any]) -> Section | None:
    """Compare again at the guidance scale of training, if it is another one."""
    if not (other := metrics.get(OTHER_GUIDANCE)):
        return None
    trained = f"{other['guidance_scale']:g}, as trained"
    scales = {f"{other['instead_of']:g}": metrics, trained: other}
    rows = [
        {"sampled at guidance": scale, "win rate": share_text(part)}
        | {name: gain_text(row) for name, row in metric_rows(part).items()}
        for scale, part in scales.items()
    ]
    note = (
        "Training and sampling have different guidance scales. Both rows use the same prompts and "
        "noise. They show the win rate and the gain of each metric."
    )
    width = len(rows[0])
    return Section("At both guidances", note, Table.of(rows, numbers=range(1, width)))


def structure(metrics: Mapping[str, Any]) -> Section | None:
    """List the numbers by objects, relations and kind of error; fewer errors are better."""
    structure, rows = metrics.get("structure") or {}, []
    for name, prompts, measure, row in table_rows(structure):
        lower = name in ERRORS.values()
        rows.append(
            {"part": name, "measure": measure, "prompts": str(prompts), **cells(row)}
            | {"reading": read(row, prompts, lower_is_better=lower)}
        )
    note = (
        "The table compares the scene graph that a prompt asks for with the one read from its "
        "image. Rows by objects show the mean scene-graph IoU. Rows by relation show the share of "
        "its triples that hold. The last rows show errors per image; fewer are better. A wrong "
        "relation counts only between two objects that the image shows."
    )
    if left := structure.get("left_out"):
        note += (
            f" {left} prompts are left out: their graph is unknown or an image could not be read."
        )
    heading = "By objects, relations and kinds of error"
    return Section(heading, note, Table.of(rows, numbers=range(2, 7))) if rows else None


def traits(metrics: Mapping[str, Any]) -> Section | None:
    """List the share of images in which the policy has more of a trait, one row per trait."""
    words = {"gain": "more", "loss": "less", "none": "no measurable change"}
    rows = [
        {
            "the policy's image is": name,
            "share of images": f"{s.share:.1%}",
            "99% interval": f"[{100 * s.low:.1f}, {100 * s.high:.1f}]",
            "reading": words[verdict(s.low, s.high, null=0.5)],
        }
        for name, s in shares_of(metrics).items()
    ]
    note = (
        "The share of images in which the policy's has more of a trait than the reference's from "
        "the same noise, with a 99% interval. Half means no change. This needs no scorer. "
        "`inversion-dpo pairs check` measures the same on the winners of your pairs. If both lean "
        "one way, the policy may have learned the trait from them."
    )
    table = Table.of(rows, numbers=range(1, 3))
    return Section("What else changed", note, table) if rows else None


def cells(row: Mapping[str, float]) -> dict[str, str]:
    """Write both means, the gain and its interval."""
    digits = max(2, decimals((row["gain_high"] - row["gain_low"]) / 2))
    gain, interval = halves(gain_text(row))
    return {
        "reference": f"{row['reference']:.{digits}f}",
        "policy": f"{row['policy']:.{digits}f}",
        "gain": gain,
        "95% interval": interval,
    }


def read(row: Mapping[str, float], prompts: int, lower_is_better: bool = False) -> str:
    """Put the verdict on a gain in words, with its mark."""
    if prompts < LEAST_PROMPTS:
        return reading("none", TOO_FEW)
    low, high = row["gain_low"], row["gain_high"]
    kind = verdict(-high, -low) if lower_is_better else verdict(low, high)
    return reading(kind, VERDICT_WORDS[kind])
