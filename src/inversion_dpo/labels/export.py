"""Labels to pairs that ``train`` reads: Parquet in Pick-a-Pic's columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from inversion_dpo.data.columns import WRITTEN
from inversion_dpo.labels.questions import WebError
from inversion_dpo.labels.store import LabelStore
from inversion_dpo.labels.votes import CHOICES, outcome
from inversion_dpo.run.disk import writing

LABELS = {"first": 1.0, "second": 0.0, "tie": 0.5, "split": 0.5}
_WRITE_ROWS = 64  # rows in memory at a time
_SCHEMA = pa.schema(
    [
        *WRITTEN,
        ("scene_graph", pa.string()),
        *((f"votes_{choice}", pa.int64()) for choice in CHOICES),
    ]
)


def export(store: LabelStore, path: Path, labeller: str | None = None) -> Counter[str]:
    """Write the labelled pairs; an old file is replaced only once all is written.

    Several labellers: the choice with the most votes; without a single one the pair is a tie
    ("split"). Pairs whose outcome is "both bad" are left out.

    Args:
        store: the labels.
        path: of the Parquet file.
        labeller: take only this one's labels.

    Returns:
        Outcome -> pairs: first, second, tie, split, bad, unlabelled.

    Raises:
        WebError: no pair is labelled with a preference or a tie.
    """
    counts = Counter[str]()
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = _rows(store, labeller, counts)
    with writing(path, shared=True) as partial:
        with pq.ParquetWriter(partial, _SCHEMA, compression="zstd") as writer:
            while part := list(islice(rows, _WRITE_ROWS)):
                writer.write_table(pa.Table.from_pylist(part, _SCHEMA))
        if not any(counts[name] for name in LABELS):
            raise WebError(f"{store.path}: nothing to export ({summary(counts)}); label some pairs")
    return counts


def _rows(
    store: LabelStore, labeller: str | None, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Give the rows to be written; count every pair's outcome in ``counts``."""
    votes = store.votes()
    for question in store.pairs():
        by = votes.get(question.pair, {})
        chosen = [c for name, c in by.items() if labeller in (None, name)]
        found = outcome(chosen)
        counts[found] += 1
        if found in LABELS:
            yield {
                "jpg_0": question.images[0],
                "jpg_1": question.images[1],
                "label_0": LABELS[found],
                "caption": question.caption,
                "scene_graph": question.scene_graph,
                **{f"votes_{choice}": chosen.count(choice) for choice in CHOICES},
            }


def summary(counts: Mapping[str, int]) -> str:
    """Say what an export holds, in one line."""
    kept = sum(counts.get(name, 0) for name in LABELS)
    ties, split = counts.get("tie", 0), counts.get("split", 0)
    return (
        f"{kept} pairs: {kept - ties - split} preferences, {ties} ties, {split} contradicted "
        "without a majority (written as ties; training leaves ties out); left out: "
        f"{counts.get('bad', 0)} both bad, {counts.get('unlabelled', 0)} not labelled"
    )
