"""Preference pairs from samples of the embedded world: best against worst of one prompt.

The files have Pick-a-Pic's columns (Kirstain et al., 2023, https://arxiv.org/abs/2305.01569) and
are read by :mod:`inversion_dpo.data.pairs` like anybody else's.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from inversion_dpo.data.images import decode_image
from inversion_dpo.disk import atomic_table
from inversion_dpo.scenes.checker import detect, score
from inversion_dpo.scenes.graph import SceneGraph

LABELLINGS: dict[str, Callable[[Mapping[str, float]], float]] = {
    "taste": lambda scores: scores["warmth"],  # a warm ground, which no caption asks for
    "composition": lambda scores: scores["composition"],  # what the caption asks for
}
_SCHEMA = pa.schema(
    [
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("caption", pa.string()),
        ("scene_graph", pa.string()),
        ("scores_0", pa.string()),
        ("scores_1", pa.string()),
        ("seed_0", pa.int64()),
        ("seed_1", pa.int64()),
    ]
)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One sample of a prompt as it is stored: a JPEG, and the scores of that very JPEG."""

    caption: str
    scene_graph: str
    seed: int
    jpg: bytes
    scores: dict[str, float]


def score_image(graph: SceneGraph, image: NDArray[np.uint8]) -> dict[str, float]:
    """Every score of the checker, and ``composition``, for one image [64, 64, 3] of a prompt."""
    scores = score(graph, detect(image))
    return {**asdict(scores), "composition": scores.composition}


def candidate(graph: SceneGraph, seed: int, image: NDArray[np.uint8]) -> Candidate:
    """Encode a sample [64, 64, 3], then score what is left: the label fits what training sees."""
    jpg = encode_image(image)
    stored = np.asarray(decode_image(jpg, f"seed {seed}"))
    return Candidate(graph.caption, graph.to_json(), seed, jpg, score_image(graph, stored))


def encode_image(image: NDArray[np.uint8], quality: int = 90) -> bytes:
    """JPEG of a uint8 image [H, W, 3], without chroma subsampling; about 1.5 kB for 64x64.

    At 64 pixels WebP's forced 4:2:0 smears thin shapes (rms error 5 of 255 against 3).
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def best_against_worst(
    candidates: Sequence[Candidate], key: str, margin: float
) -> tuple[Candidate, Candidate] | None:
    """(winner, loser) of one prompt's candidates; None if their scores differ by less than margin.

    Equal scores are decided by the lowest seed. Candidates that all score the same are no pair,
    whatever the margin.

    Raises:
        ValueError: ``key`` is not in LABELLINGS, or the candidates are of several captions.
    """
    if key not in LABELLINGS:
        raise ValueError(f"unknown labelling {key!r}; one of {', '.join(LABELLINGS)}")
    if len({c.caption for c in candidates}) > 1:
        raise ValueError("candidates of one pair must share their caption")
    if not candidates:
        return None
    value = LABELLINGS[key]
    winner = min(candidates, key=lambda c: (-value(c.scores), c.seed))
    loser = min(candidates, key=lambda c: (value(c.scores), c.seed))
    gap = value(winner.scores) - value(loser.scores)
    return (winner, loser) if gap > 0 and gap >= margin else None


def write_pairs(path: Path, pairs: Sequence[tuple[Candidate, Candidate]], seed: int) -> None:
    """Write (winner, loser) pairs as Parquet; an old file is replaced only once all is written.

    ``seed`` decides which half of the rows has the winner first.

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
    _write(path, pa.Table.from_pylist(rows, _SCHEMA))


def _columns(shown: tuple[Candidate, Candidate], first_preferred: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "label_0": float(first_preferred),
        "caption": shown[0].caption,
        "scene_graph": shown[0].scene_graph,
    }
    for k, c in enumerate(shown):
        row |= {f"jpg_{k}": c.jpg, f"scores_{k}": json.dumps(c.scores), f"seed_{k}": c.seed}
    return row


def _write(path: Path, table: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_table(table, path, compression="zstd", use_dictionary=["caption"])
