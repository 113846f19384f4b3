"""Samples of a prompt on their way to pairs, and pairs as a Parquet file.

The files have Pick-a-Pic's columns (Kirstain et al., 2023, https://arxiv.org/abs/2305.01569) and
are read by :mod:`inversion_dpo.data` like anybody else's.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from inversion_dpo.data.columns import WRITTEN
from inversion_dpo.run.disk import atomic_table

_SCHEMA = pa.schema(
    [
        *WRITTEN,
        ("preference_0", pa.float64()),
        ("scene_graph", pa.string()),
        ("scores_0", pa.string()),
        ("scores_1", pa.string()),
        ("seed_0", pa.int64()),
        ("seed_1", pa.int64()),
        ("detected_0", pa.string()),
        ("detected_1", pa.string()),
        ("source_0", pa.string()),
        ("source_1", pa.string()),
    ]
)
_IF_ANY = ("preference_0", "detected_0", "detected_1", "source_0", "source_1")


@dataclass(frozen=True, eq=False)
class Candidate:
    """One sample of a prompt as it is stored: a JPEG, and the scores of that very JPEG.

    scene_graph, detected: LAION-SG JSON of what is asked for and of what was found in the image;
    empty without. source: which model made it, and how, in words.
    """

    caption: str
    scene_graph: str
    seed: int
    jpg: bytes
    scores: dict[str, float]
    detected: str = ""
    source: str = ""


def encode_image(image: NDArray[np.uint8], quality: int = 90) -> bytes:
    """JPEG of a uint8 image [H, W, 3], without chroma subsampling; about 1.5 kB for 64x64.

    At 64 pixels WebP's forced 4:2:0 smears thin shapes (rms error 5 of 255 against 3).
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def save_chunk(path: Path, candidates: list[Candidate]) -> None:
    """Write candidates, whole or not at all."""
    rows = [asdict(c) | {"scores": json.dumps(c.scores)} for c in candidates]
    atomic_table(pa.Table.from_pylist(rows), path)


def load_chunk(path: Path) -> list[Candidate]:
    """Inverse of :func:`save_chunk`."""
    return [
        Candidate(**r | {"scores": json.loads(r["scores"])})
        for r in pq.read_table(path).to_pylist()
    ]


def write_pairs(
    path: Path,
    pairs: Sequence[tuple[Candidate, Candidate]],
    seed: int,
    preferences: Sequence[float] | None = None,
) -> None:
    """Write :func:`pair_rows` as Parquet; an old file is replaced only once all is written.

    Columns that no row has anything in are left out.
    """
    rows = pair_rows(pairs, seed, preferences)
    write_rows(path, rows, schema_of(rows))


def pair_rows(
    pairs: Sequence[tuple[Candidate, Candidate]],
    seed: int,
    preferences: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """(winner, loser) pairs as rows in Pick-a-Pic's columns.

    ``seed`` decides which half of the rows has the winner first. ``preferences``: of each pair the
    probability that the winner is preferred; it is stored as ``preference_0``, of image 0.

    Raises:
        ValueError: no pairs, or a pair of two captions or scene graphs.
    """
    if not pairs:
        raise ValueError("no pairs to write")
    for winner, loser in pairs:
        if (winner.caption, winner.scene_graph) != (loser.caption, loser.scene_graph):
            raise ValueError(f"pair of two prompts: {winner.caption!r} and {loser.caption!r}")
    winner_first = np.random.default_rng(seed).permutation(len(pairs)) % 2 == 0
    rows = [
        _columns(pair if first else pair[::-1], bool(first))
        for pair, first in zip(pairs, winner_first, strict=True)
    ]
    for row, sure in zip(rows, preferences or (), strict=bool(preferences)):
        row["preference_0"] = sure if row["label_0"] == 1.0 else 1 - sure
    return rows


def schema_of(rows: Sequence[dict[str, Any]]) -> Any:
    """The Arrow schema of a pair file, without the optional columns that are empty."""
    empty = {name for name in _IF_ANY if not any(row.get(name) not in (None, "") for row in rows)}
    return pa.schema([column for column in _SCHEMA if column.name not in empty])


def _columns(shown: tuple[Candidate, Candidate], first_preferred: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "label_0": float(first_preferred),
        "caption": shown[0].caption,
        "scene_graph": shown[0].scene_graph,
    }
    for k, c in enumerate(shown):
        row |= {f"jpg_{k}": c.jpg, f"scores_{k}": json.dumps(c.scores), f"seed_{k}": c.seed}
        row |= {f"detected_{k}": c.detected, f"source_{k}": c.source}
    return row


def write_rows(path: Path, rows: Sequence[dict[str, Any]], schema: Any) -> None:
    """Write rows as one Parquet file, whole or not at all."""
    table = pa.Table.from_pylist(list(rows), schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_table(table, path, compression="zstd", use_dictionary=["caption"])
