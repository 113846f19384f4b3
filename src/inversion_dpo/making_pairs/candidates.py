"""Samples of a prompt on their way to pairs, and pairs as a Parquet file.

The files have Pick-a-Pic's columns (Kirstain et al., 2023, https://arxiv.org/abs/2305.01569) and
are read by :mod:`inversion_dpo.data` like anybody else's.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from inversion_dpo.data.columns import WRITTEN
from inversion_dpo.graphs.graph import SceneGraph
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
        ("source_image", pa.binary()),
    ]
)
_IF_ANY = ("detected_0", "detected_1", "source_0", "source_1", "source_image")


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


@dataclass(frozen=True)
class Labelled:
    """A pair and the probability, above one half, that its winner is preferred."""

    winner: Candidate
    loser: Candidate
    preference: float


def encode_image(image: NDArray[np.uint8], quality: int = 90) -> bytes:
    """Encode uint8 [H, W, 3] as JPEG, without chroma subsampling; about 1.5 kB for 64x64.

    At 64 pixels WebP's forced 4:2:0 smears thin shapes (rms error 5 of 255 against 3).
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def graph_of(caption: str, scene_graph: str) -> SceneGraph:
    """Read what is asked for; without a scene graph the caption alone."""
    return SceneGraph.from_json(scene_graph) if scene_graph else SceneGraph((), (), caption)


def pair_rows(
    pairs: Sequence[Labelled], seed: int, edited: Mapping[str, Path] | None = None
) -> list[dict[str, Any]]:
    """Make rows in Pick-a-Pic's columns.

    Args:
        pairs: at least one.
        seed: says in which half the winner comes first.
        edited: caption -> file of the image that both edit, if they do.
    """
    if not pairs:
        raise ValueError("no pairs to write")
    rows = []
    winner_first = np.random.default_rng(seed).permutation(len(pairs)) % 2 == 0
    for pair, first in zip(pairs, winner_first.tolist(), strict=True):
        winner, loser = pair.winner, pair.loser
        if (winner.caption, winner.scene_graph) != (loser.caption, loser.scene_graph):
            raise ValueError(f"pair of two prompts: {winner.caption!r} and {loser.caption!r}")
        row: dict[str, Any] = {
            "label_0": float(first),
            "caption": winner.caption,
            "scene_graph": winner.scene_graph,
            "preference_0": pair.preference if first else 1 - pair.preference,
        }
        if file := (edited or {}).get(winner.caption):
            row["source_image"] = file.read_bytes()
        for k, c in enumerate((winner, loser) if first else (loser, winner)):
            row |= {f"jpg_{k}": c.jpg, f"scores_{k}": json.dumps(c.scores), f"seed_{k}": c.seed}
            row |= {f"detected_{k}": c.detected, f"source_{k}": c.source}
        rows.append(row)
    return rows


def schema_of(rows: Sequence[dict[str, Any]]) -> Any:
    """Give the Arrow schema of a pair file, without the optional columns that are empty."""
    empty = {name for name in _IF_ANY if not any(row.get(name) not in (None, "") for row in rows)}
    return pa.schema([column for column in _SCHEMA if column.name not in empty])


def write_rows(path: Path, rows: Sequence[dict[str, Any]], schema: Any) -> None:
    """Write rows as one Parquet file, whole or not at all."""
    table = pa.Table.from_pylist(list(rows), schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_table(table, path, compression="zstd", use_dictionary=["caption"])
