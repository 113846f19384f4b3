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

    ``scores`` keeps numbers by :func:`score_key`, ``answers`` a vision-language model's answers and
    their cost as JSON. ScorerError if the file is damaged.
    """

    def __init__(self, path: Path, table: str = "scores", column: str = "score REAL") -> None:
        self.path, self.table, self.column = path, table, column
        path.parent.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of_answers(cls, path: Path) -> Store:
        """Return the file's table of answers."""
        return cls(path, "answers", "answer TEXT")

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """Return the values that are stored, by key."""
        query = f"SELECT * FROM {self.table} WHERE key = ?"
        with closing(self._open()) as base:
            rows = [base.execute(query, (key,)).fetchone() for key in keys]
        return {row[0]: row[1] for row in rows if row}

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
        columns = f"(key BLOB PRIMARY KEY, {self.column} NOT NULL)"
        try:
            base.execute(f"CREATE TABLE IF NOT EXISTS {self.table} {columns}")
        except sqlite3.DatabaseError as error:
            base.close()
            raise ScorerError(f"{self.path} is damaged ({error}): delete it") from error
        return base
