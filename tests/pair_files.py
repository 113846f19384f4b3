"""Pairs of small files, all in memory."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from inversion_dpo.data import check, source
from inversion_dpo.data.source import Pair, PairSource
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.run.fields import DataConfig


def open_pairs(data: object, **settings: Any) -> PairSource:
    """Open pairs with the settings of ``data.*``."""
    return source.open_pairs(DataConfig(pairs=str(data), **settings))


def check_pairs(
    data: object, measure: check.Measure | None = None, resolution: int = 1024, **settings: Any
) -> check.PairReport:
    """Check pairs with the settings of ``data.*``."""
    return check.check_pairs(DataConfig(pairs=str(data), **settings), measure, resolution)


def write_annotations(graphs: Iterable[SceneGraph], path: Path) -> None:
    """Write graphs to a .jsonl file, one a line, or else as a JSON list."""
    lines = [graph.to_json() for graph in graphs]
    text = "".join(f"{line}\n" for line in lines)
    path.write_text(text if path.suffix == ".jsonl" else f"[{','.join(lines)}]")


PORTRAIT, LANDSCAPE, SQUARE = (120, 72), (48, 80), (64, 64)  # (height, width); of 3:5, 5:3 and 1:1


def write_shapes(path: Path, count: int) -> Path:
    """Write pairs of noise whose shapes are in turn portrait, landscape and square."""
    rng, rows = np.random.default_rng(0), []
    for k in range(count):
        size, row = (PORTRAIT, LANDSCAPE, SQUARE)[k % 3], {"caption": f"number {k}", "label_0": 1.0}
        for name, level in (("jpg_0", 60), ("jpg_1", 20)):
            buffer = io.BytesIO()
            pixels = rng.integers(level, level + 180, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            row[name] = buffer.getvalue()
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@dataclass(frozen=True)
class PairFile:
    """All usable pairs of some data, and how many of its rows were left out and why.

    rows: rows read; ties: label 0.5; identical: both images are the same bytes.
    fingerprint: of the source, see :class:`PairSource`.
    """

    path: Path
    pairs: tuple[Pair, ...]
    rows: int
    ties: int
    identical: int
    fingerprint: str


def read_pairs(path: Path, limit: int | None = None) -> PairFile:
    """Collect the pairs of small local data in memory; :func:`open_pairs` streams.

    Raises:
        DataError: whatever :func:`open_pairs` and iterating raise.
        ValueError: a limit below 1.
    """
    opened = open_pairs(path, limit=limit)
    pairs, counts = tuple(opened), opened.counts
    return PairFile(
        path=Path(path),
        pairs=pairs,
        rows=counts["rows"],
        ties=counts["ties"],
        identical=counts["identical"],
        fingerprint=opened.fingerprint,
    )


def write_edits(path: Path, count: int, size: tuple[int, int] = (64, 64)) -> Path:
    """Write pairs of noise that edit a source; every two edit the same one."""
    rng, rows = np.random.default_rng(0), []
    for k in range(count):
        row = {"caption": f"edit {k}", "label_0": 1.0}
        for name, level in (("jpg_0", 60), ("jpg_1", 20), ("source_image", 40)):
            buffer = io.BytesIO()
            pixels = rng.integers(level, level + 180, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            row[name] = rows[-1][name] if name[0] == "s" and k % 2 else buffer.getvalue()
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
