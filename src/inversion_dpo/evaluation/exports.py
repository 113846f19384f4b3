"""Write the data of a report's figures, as CSV and JSON beside the PNG files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inversion_dpo.evaluation.metrics import metric_rows
from inversion_dpo.run.disk import atomic_text, writing

GAIN = ("reference", "policy", "gain", "gain_low", "gain_high")
WINS = ("win_rate", "win_rate_low", "win_rate_high", "n_prompts")


def write_gains(metrics: Mapping[str, Any], path: Path) -> None:
    """Write ``gains.csv``: one row per metric, the numbers in gains.png."""
    rows = [{"metric": name, **row} for name, row in metric_rows(metrics).items()]
    write_csv(path, ("metric", *GAIN), rows)


def write_categories(metrics: Mapping[str, Any], path: Path) -> None:
    """Write ``categories.csv``: one row per category and metric, with the category's win rate."""
    rows = [
        {**part, **row, "category": category, "metric": name}
        for category, part in metrics["categories"].items()
        for name, row in metric_rows(part).items()
    ]
    write_csv(path, ("category", "metric", *GAIN, *WINS), rows)


def write_history(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write ``curves.csv``: one row per logged step with its numbers; other cells stay empty."""
    numbers = [{k: v for k, v in row.items() if isinstance(v, int | float)} for row in history]
    names = dict.fromkeys(name for row in numbers for name in row)
    write_csv(path, tuple(names), numbers)


def write_grid(captions: Sequence[str], scores: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write ``grid.json``: caption and scores of every pair of images in grid.png, in its order."""
    rows = [
        {"caption": caption, **(dict(scores[k]) if scores else {})}
        for k, caption in enumerate(captions)
    ]
    atomic_text(json.dumps(rows, indent=1, ensure_ascii=False), path)


def write_csv(path: Path, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file with a header; absent values are empty, other columns are left out."""
    with writing(path) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, names, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
