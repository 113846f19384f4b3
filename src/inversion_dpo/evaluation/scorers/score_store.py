"""Keep scores on disk by image, prompt and scorer, so that none is computed twice."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.evaluation.scorers.checkpoint import ScorerError

T = TypeVar("T")


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
            if isinstance(error, sqlite3.OperationalError):  # locked, or no place to write
                raise ScorerError(
                    f"{self.path} cannot be used now ({error}). If it is locked, wait for the "
                    "other command; else look at the disk's room and the folder's rights"
                ) from error
            raise ScorerError(f"{self.path} is damaged ({error}): delete it") from error
        return base


def kept(
    store: Store | None, jobs: Mapping[bytes, T], ask: Callable[[T], str], most: int
) -> tuple[dict[bytes, str], int]:
    """Return the answer to each job by its key, and how many of them were stored.

    New answers are stored at once.

    Args:
        store: None keeps none.
        jobs: by key.
        ask: answers a job.
        most: jobs that are asked about at once.
    """
    stored = store.get([*jobs]) if store else {}

    def one(key: bytes) -> str:
        answer = ask(jobs[key])
        if store:
            store.put([key], [answer])
        return answer

    new = [key for key in jobs if key not in stored]
    with ThreadPoolExecutor(max_workers=most) as pool:  # map drops jobs not begun after an error
        return stored | dict(zip(new, pool.map(one, new), strict=True)), len(stored)
