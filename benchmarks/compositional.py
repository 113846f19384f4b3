"""Several arms by number of objects, relation and kind of error, over training seeds, as Markdown.

    python benchmarks/compositional.py --arm "captions, Inversion-DPO" runs/a-0 runs/a-1 runs/a-2

reads ``structure`` of every run's ``metrics.json`` (docs/how-to/evaluate.md): of each arm the
policies' mean over its runs with a 95% t interval, and of every set of runs with the same
reference a row.
``--gains`` shows policy minus reference instead.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from inversion_dpo.evaluation.breakdown import ERRORS

Structure = Mapping[str, Any]
Rows = dict[str, Mapping[str, float]]  # column of a table -> gain_row


def read_structure(run: Path) -> Structure:
    """Return the breakdown of an evaluated run; SystemExit names a run that has none."""
    try:
        found: Structure = json.loads((run / "metrics.json").read_text())["structure"]
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(
            f"error: {run} has no breakdown ({error!r}): evaluate it with scenes or scene-graph; "
            "samples of an older version have to be deleted first"
        ) from None
    return found


def by_objects(measure: str) -> Callable[[Structure], Rows]:
    """Return a measure by number of intended objects, then of all prompts."""

    def rows(structure: Structure) -> Rows:
        parts = {name: part[measure] for name, part in structure["objects"].items()}
        return parts | {"all": structure["all"][measure]}

    return rows


def by_relation(structure: Structure) -> Rows:
    """Return the share of each relation's triples that hold."""
    return {name: part["held"] for name, part in structure["relations"].items()}


def by_error(structure: Structure) -> Rows:
    """Errors an image, over all prompts."""
    return {name: structure["all"][key] for key, name in ERRORS.items()}


TABLES: dict[str, Callable[[Structure], Rows]] = {
    "Scene-graph IoU by number of objects": by_objects("sg_iou"),
    "Exact match by number of objects": by_objects("exact"),
    "Share of triples that hold, by relation": by_relation,
    "Errors an image (lower is better)": by_error,
}


def cell(values: Sequence[float]) -> str:
    """Mean with a 95% t interval over runs; of one run the number alone.

    >>> cell([0.5]), cell([0.4, 0.5, 0.6])
    ('0.500', '0.500 [0.252, 0.748]')
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return f"{mean:.3f}"
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


def table(
    arms: Mapping[str, Sequence[Structure]], rows_of: Callable[[Structure], Rows], side: str
) -> str:
    """Markdown: a row an arm. SystemExit if two runs were evaluated on different prompts."""
    parts = {name: [rows_of(s) for s in runs] for name, runs in arms.items()}
    if side == "policy":
        parts = {"reference": [], **parts}
    columns = list(next(iter(p for p in parts.values() if p))[0])
    for name, runs in parts.items():
        if any(list(run) != columns for run in runs):
            raise SystemExit(f"error: {name!r} was evaluated on other prompts than the first arm")
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    for name, runs in parts.items():
        if name == "reference" and not runs:
            lines += references(parts, columns)
        else:
            cells = [cell([run[c][side] for run in runs]) for c in columns]
            lines.append([f"{name} ({len(runs)} seeds)" if len(runs) > 1 else name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def references(parts: Mapping[str, Sequence[Rows]], columns: Sequence[str]) -> list[list[str]]:
    """One line for every distinct reference, named by the arms that start from it."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, runs in parts.items():
        for run in runs:
            key = tuple(cell([run[c]["reference"]]) for c in columns)
            names = found.setdefault(key, [])
            names += [name] if name not in names else []
    one = len(found) == 1
    return [
        ["reference" if one else f"reference of {', '.join(names)}", *key]
        for key, names in found.items()
    ]


def main() -> None:
    """Read the runs and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arm",
        nargs="+",
        action="append",
        required=True,
        metavar="NAME RUN",
        help="a name and the folders of its runs, one a seed",
    )
    parser.add_argument("--gains", action="store_true", help="policy minus reference")
    args = parser.parse_args()
    if short := [arm[0] for arm in args.arm if len(arm) < 2]:
        parser.error(f"--arm {short[0]!r}: give a name and at least one run")
    arms = {name: [read_structure(Path(run)) for run in runs] for name, *runs in args.arm}
    side = "gain" if args.gains else "policy"
    for heading, rows_of in TABLES.items():
        print(f"### {heading}\n\n{table(arms, rows_of, side)}\n")


if __name__ == "__main__":
    main()
