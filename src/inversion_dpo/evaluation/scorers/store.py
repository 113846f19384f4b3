"""Scores on disk, by image, prompt and scorer: what was scored once is not scored again."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.evaluation.scorers.checkpoint import ScorerError

SCHEMA = "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL NOT NULL)"


def score_key(scorer: str, image: NDArray[np.uint8], prompt: str) -> bytes:
    """SHA-256 of the scorer's identity, the image's size and pixels, and the prompt."""
    parts = (scorer.encode(), repr(image.shape).encode(), image.tobytes(), prompt.encode())
    return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).digest()


class ScoreStore:
    """One SQLite file; several processes may use it at once.

    ScorerError if the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """The scores that are there."""
        found: dict[bytes, float] = {}
        with closing(self._open()) as base:
            for key in keys:
                row = base.execute("SELECT score FROM scores WHERE key = ?", (key,)).fetchone()
                found |= {key: row[0]} if row else {}
        return found

    def put(self, keys: Sequence[bytes], scores: Sequence[float]) -> None:
        """Keep scores, all or none of them."""
        with closing(self._open()) as base, base:
            rows = [(k, float(s)) for k, s in zip(keys, scores, strict=True)]
            base.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)

    def _open(self) -> sqlite3.Connection:
        base = sqlite3.connect(self.path, timeout=60)
        try:
            base.execute(SCHEMA)
        except sqlite3.DatabaseError as error:
            base.close()
            raise ScorerError(f"{self.path} is damaged ({error}): delete it") from error
        return base
