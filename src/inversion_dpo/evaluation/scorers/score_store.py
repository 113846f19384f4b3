"""Keep scores on disk by image, prompt and scorer, so that none is computed twice."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.evaluation.scorers.checkpoint import ScorerError


def score_key(scorer: str, image: NDArray[np.uint8], prompt: str) -> bytes:
    """Hash the scorer's identity, the image's size and pixels, and the prompt with SHA-256."""
    parts = (scorer.encode(), repr(image.shape).encode(), image.tobytes(), prompt.encode())
    return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).digest()


class Store:
    """One table of an SQLite file; several processes and threads may use it at once.

    ScorerError if the file is damaged.
    """

    table, column = "", ""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """Return the values that are stored, by key."""
        values: dict[bytes, Any] = {}
        query = f"SELECT * FROM {self.table} WHERE key = ?"
        with closing(self._open()) as base:
            for key in keys:
                row = base.execute(query, (key,)).fetchone()
                values |= {key: row[1]} if row else {}
        return values

    def put(self, keys: Sequence[bytes], values: Sequence[Any]) -> None:
        """Store values, all or none of them."""
        with closing(self._open()) as base, base:
            rows = list(zip(keys, values, strict=True))
            base.executemany(f"INSERT OR REPLACE INTO {self.table} VALUES (?, ?)", rows)

    def values(self) -> list[Any]:
        """List every stored value."""
        with closing(self._open()) as base:
            return [row[1] for row in base.execute(f"SELECT * FROM {self.table}")]

    def _open(self) -> sqlite3.Connection:
        base = sqlite3.connect(self.path, timeout=60)
        try:
            base.execute(
                f"CREATE TABLE IF NOT EXISTS {self.table} "
                f"(key BLOB PRIMARY KEY, {self.column} NOT NULL)"
            )
        except sqlite3.DatabaseError as error:
            base.close()
            raise ScorerError(f"{self.path} is damaged ({error}): delete it") from error
        return base


class ScoreStore(Store):
    """Scores, one number a key of :func:`score_key`."""

    table, column = "scores", "score REAL"


class AnswerStore(Store):
    """A vision-language model's answers and their cost, as JSON."""

    table, column = "answers", "answer TEXT"
