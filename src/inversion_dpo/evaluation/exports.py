"""Write the data of a report's figures, as CSV beside the PNG files."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inversion_dpo.evaluation.figures import History, recorded
from inversion_dpo.evaluation.metrics import metric_rows
from inversion_dpo.run.disk import writing

GAIN = ("reference", "policy", "gain", "gain_low", "gain_high")
WINS = ("win_rate", "win_rate_low", "win_rate_high", "n_prompts")


def write_tables(folder: Path, metrics: Mapping[str, Any], history: History) -> None:
    """Write the CSV files that have rows: training by step, gains, gains by category.

    Args:
        folder: where they go.
        metrics: of ``metrics.json``.
        history: rows of ``metrics.jsonl``.
    """
    numbers = [{k: v for k, v in row.items() if isinstance(v, int | float)} for row in history]
    columns = dict.fromkeys(name for row in numbers for name in row)
    gains = [{"metric": name, **row} for name, row in metric_rows(metrics).items()]
    by_category = [
        {**part, **row, "category": category, "metric": name}
        for category, part in metrics.get("categories", {}).items()
        for name, row in metric_rows(part).items()
    ]
    for file, names, rows in (
        ("curves", columns, numbers if recorded(history) else []),
        ("gains", ("metric", *GAIN), gains),
        ("categories", ("category", "metric", *GAIN, *WINS), by_category),
    ):
        if rows:
            with (
                writing(folder / f"{file}.csv") as partial,
                partial.open("w", encoding="utf-8", newline="") as stream,
            ):
                writer = csv.DictWriter(stream, names, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
