"""Pairs and labels in one SQLite file; a label is on the disk before it is acknowledged.

Choices are events that are only ever added, an undo too; what stands is each labeller's latest
event on a pair. Every request has an id of the client's, so that one sent twice counts once.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import RLock

from inversion_dpo.labels.questions import Question, WebError
from inversion_dpo.labels.votes import CHOICES, KINDS

APPLICATION = 0x49444C31  # "IDL1", in the file's header: a file of ours, in this form
UNDO = "undo"
_ALL = dict.fromkeys([choice for choices in KINDS.values() for choice in choices] + [UNDO])
SHARED = 5  # every fifth question is of the share of pairs that all labellers are asked
_SCHEMA = f"""
CREATE TABLE images (sha256 TEXT PRIMARY KEY, bytes BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE pairs (
  position INTEGER PRIMARY KEY, pair TEXT NOT NULL UNIQUE, caption TEXT NOT NULL,
  image_0 TEXT NOT NULL REFERENCES images, image_1 TEXT NOT NULL REFERENCES images,
  scene_graph TEXT);
CREATE TABLE events (
  number INTEGER PRIMARY KEY AUTOINCREMENT, request TEXT NOT NULL UNIQUE, labeller TEXT NOT NULL,
  pair TEXT NOT NULL REFERENCES pairs (pair), choice TEXT NOT NULL, shown_left TEXT NOT NULL,
  at TEXT NOT NULL, CHECK (choice IN ({", ".join(f"'{c}'" for c in _ALL)})));
CREATE INDEX events_of ON events (labeller, pair, number);
CREATE VIEW standing AS
  SELECT labeller, pair, choice, number FROM
    (SELECT labeller, pair, choice, max(number) AS number FROM events GROUP BY labeller, pair)
  WHERE choice != '{UNDO}';
PRAGMA application_id = {APPLICATION};
"""
_PRAGMAS = (
    *("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"),
    "wal_autocheckpoint=1",  # at each label, so that a copy of the one file has them all
)
_LATER = (  # tables that files of older versions do not have
    "CREATE TABLE IF NOT EXISTS seeds (image TEXT PRIMARY KEY REFERENCES images, seed INTEGER)",
    "CREATE TABLE IF NOT EXISTS sources"
    " (pair TEXT PRIMARY KEY REFERENCES pairs (pair), source TEXT NOT NULL REFERENCES images)",
    "CREATE TABLE IF NOT EXISTS masks"
    " (pair TEXT PRIMARY KEY REFERENCES pairs (pair), mask TEXT NOT NULL REFERENCES images)",
    "CREATE TABLE IF NOT EXISTS prompts"
    " (pair TEXT PRIMARY KEY REFERENCES pairs (pair), prompt_id TEXT NOT NULL)",
)


class Conflict(WebError):
    """A request id that was used for something else, or a pair that is not there."""


@dataclass(frozen=True)
class Asked:
    """A pair as one labeller sees it; images by SHA-256. A single image is on both sides.

    source: the image that both edit, if they do.
    """

    pair: str
    caption: str
    left: str
    right: str
    source: str | None = None


def _hash(labeller: str, pair: str) -> bytes:
    return hashlib.sha256(f"{labeller}\0{pair}".encode()).digest()


def swapped(labeller: str, pair: str) -> bool:
    """Tell whether this labeller sees the second image on the left: a hash of both, even odds."""
    return _hash(labeller, pair)[0] % 2 == 1


class LabelStore:
    """One SQLite file, shared by the threads of one server and by other processes.

    Write-ahead log with ``synchronous=FULL``: a commit returns when the disk has it. A file is of
    one ``kind`` of labels, of :data:`KINDS`; None takes a file as it is.

    Raises:
        WebError: the file is there and is not ours, or of another kind.
    """

    def __init__(self, path: Path, kind: str | None = "pairs") -> None:
        self.path, self._lock = path, RLock()
        self._file: int | None = None
        try:
            self._db = sqlite3.connect(
                path, timeout=30, check_same_thread=False, isolation_level=None
            )
            ours = self._number("PRAGMA application_id") == APPLICATION
            if not ours and self._number("SELECT count(*) FROM sqlite_master"):
                raise sqlite3.DatabaseError("it holds other data")
            for pragma in _PRAGMAS:
                self._db.execute(f"PRAGMA {pragma}")
            with self._transaction():
                if not self._number("SELECT count(*) FROM sqlite_master"):
                    for statement in _SCHEMA.split(";\n"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {list(KINDS).index(kind or 'pairs')}")
                for statement in _LATER:
                    self._db.execute(statement)
            self.kind = list(KINDS)[self._number("PRAGMA user_version")]
            self._file = self._there()
        except sqlite3.Error as error:
            raise WebError(
                f"{path} cannot be used for labels ({error}); give one that `inversion-dpo web` "
                "wrote, or name a new one to `web` (--labels)"
            ) from error
        if kind not in (None, self.kind):
            self.close()
            raise WebError(
                f"{path} holds {self.kind}: ask for them (--kind {self.kind}), or give another "
                "file as --labels"
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._db:  # which commits, or rolls back at an error
            if self._file is not None and self._file != self._there():
                raise sqlite3.OperationalError(
                    f"{self.path} was moved or deleted; put it back, or start `web` again"
                )
            self._db.execute("BEGIN IMMEDIATE")
            yield

    def _there(self) -> int | None:
        """Give the number of the file at the path: SQLite writes on into a deleted one."""
        return self.path.stat().st_ino if self.path.exists() else None

    def _rows(self, query: str, *values: object) -> list[tuple]:  # type: ignore[type-arg]
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _number(self, query: str, *values: object) -> int:
        return int(self._rows(query, *values)[0][0])

    def close(self) -> None:
        """Close the file; the log is folded into it."""
        with self._lock:
            self._db.close()

    def add(self, questions: Iterable[Question]) -> int:
        """Store pairs that are not there yet, in order; returns how many there are now.

        Of the others what the data say beside images and caption is brought up to date.
        """
        with self._transaction():
            for q in questions:
                beside = {k: v for k, v in (("source", q.source), ("mask", q.mask)) if v}
                images = [*q.images, *beside.values()]
                names = [hashlib.sha256(image).hexdigest() for image in images]
                self._db.executemany(
                    "INSERT OR IGNORE INTO images VALUES (?, ?)", zip(names, images, strict=True)
                )
                self._db.execute(
                    "INSERT INTO pairs (pair, caption, scene_graph, image_0, image_1)"
                    " VALUES (?, ?, ?, ?, ?)"
                    " ON CONFLICT (pair) DO UPDATE SET scene_graph = excluded.scene_graph",
                    (q.pair, q.caption, q.scene_graph, *names[:2]),
                )
                more = {"source": None, "mask": None, "prompt": q.group or None}
                for name, value in (more | dict(zip(beside, names[2:], strict=True))).items():
                    self._db.execute(f"DELETE FROM {name}s WHERE pair = ?", (q.pair,))
                    if value:
                        self._db.execute(f"INSERT INTO {name}s VALUES (?, ?)", (q.pair, value))
                self._db.executemany(
                    "INSERT OR IGNORE INTO seeds VALUES (?, ?)",
                    [pair for pair in zip(names, q.seeds, strict=False) if pair[1] is not None],
                )
        return self.total()

    def total(self) -> int:
        """Count the pairs."""
        return self._number("SELECT count(*) FROM pairs")

    def image(self, sha256: str) -> bytes | None:
        """Read an image by its hash; None if no pair has it."""
        found = self._rows("SELECT bytes FROM images WHERE sha256 = ?", sha256)
        return found[0][0] if found else None

    def pairs(self) -> Iterator[Question]:
        """Read all pairs in order, one in memory at a time."""
        query = (
            "SELECT pair, caption, a.bytes, b.bytes, scene_graph, c.seed, d.seed,"
            " e.bytes, f.bytes, prompt_id FROM pairs"
            " JOIN images a ON a.sha256 = image_0 JOIN images b ON b.sha256 = image_1"
            " LEFT JOIN seeds c ON c.image = image_0 LEFT JOIN seeds d ON d.image = image_1"
            " LEFT JOIN sources USING (pair) LEFT JOIN images e ON e.sha256 = source"
            " LEFT JOIN masks USING (pair) LEFT JOIN images f ON f.sha256 = mask"
            " LEFT JOIN prompts USING (pair)"
            " WHERE position = ?"
        )
        for (position,) in self._rows("SELECT position FROM pairs ORDER BY position"):
            pair, caption, a, b, graph, *seeds, source, mask, group = self._rows(query, position)[0]
            yield Question(pair, caption, (a, b), graph, tuple(seeds), source, mask, group)

    def has(self, table: str) -> bool:
        """Tell whether any pair has what a table of ``_LATER`` holds."""
        return bool(self._number(f"SELECT count(*) FROM {table}"))

    def ahead(self, labeller: str, count: int = 2) -> list[Asked]:
        """Choose at most ``count`` pairs to ask this labeller next.

        What the labeller took back comes first. Then every fifth pair is of the share that all are
        asked. The others are those that the fewest labelled, in an order of the labeller's own.
        """
        rows = self._rows(
            "SELECT pair, caption, image_0, image_1, ifnull(others, 0), withdrawn, source"
            " FROM pairs LEFT JOIN sources USING (pair)"
            " LEFT JOIN (SELECT pair, count(*) AS others FROM standing GROUP BY pair) USING (pair)"
            " LEFT JOIN (SELECT pair, max(number) AS withdrawn FROM events WHERE labeller = ?"
            " GROUP BY pair) USING (pair)"
            " WHERE pair NOT IN (SELECT pair FROM standing WHERE labeller = ?) ORDER BY position",
            labeller,
            labeller,
        )
        chosen = sorted((r for r in rows if r[5]), key=lambda r: -r[5])[:count]
        fresh = [r for r in rows if not r[5]]
        common = [r for r in fresh if int(r[0], 16) % SHARED == 0]
        own = [r for r in fresh if int(r[0], 16) % SHARED]
        own.sort(key=lambda r: (r[4], _hash(labeller, r[0])))
        done = self.done(labeller)
        for place in range(done + len(chosen), done + count):
            first, second = (common, own) if place % SHARED == SHARED - 1 else (own, common)
            if queue := first or second:
                chosen.append(queue.pop(0))
        asked = []
        for pair, caption, first, second, _, _, source in chosen:
            left, right = (second, first) if swapped(labeller, pair) else (first, second)
            asked.append(Asked(pair, caption, left, right, source))
        return asked

    def label(self, request: str, labeller: str, pair: str, choice: str) -> None:
        """Record ``left``, ``right`` or a choice of the kind; durable on return.

        A repeat is ignored.

        Raises:
            Conflict: there is no such pair or choice, or the request id was used for another label.
        """
        with self._transaction():
            images = self._rows("SELECT image_0, image_1 FROM pairs WHERE pair = ?", pair)
            if not images:
                raise Conflict("there is no such pair")
            second_left = swapped(labeller, pair)
            sides = {"left": CHOICES[second_left], "right": CHOICES[not second_left]}
            shown, choice = images[0][second_left], sides.get(choice, choice)
            if choice not in KINDS[self.kind]:
                raise Conflict(f"{self.kind} have no choice {choice}")
            self._event(request, labeller, pair, choice, shown)

    def undo(self, request: str, labeller: str) -> None:
        """Withdraw the labeller's latest standing label, if there is one; a repeat is ignored."""
        with self._transaction():
            if self._known(request, labeller, None, UNDO):
                return
            last = self._rows(
                "SELECT pair FROM standing WHERE labeller = ? ORDER BY number DESC LIMIT 1",
                labeller,
            )
            if last:
                self._event(request, labeller, last[0][0], UNDO, "")

    def _known(self, request: str, labeller: str, pair: str | None, choice: str) -> bool:
        """Whether this very request is recorded already."""
        found = self._rows("SELECT labeller, pair, choice FROM events WHERE request = ?", request)
        if found and found[0] != (labeller, pair or found[0][1], choice):
            raise Conflict("this request id was used for another label")
        return bool(found)

    def _event(self, request: str, labeller: str, pair: str, choice: str, shown: str) -> None:
        if not self._known(request, labeller, pair, choice):
            self._db.execute(
                "INSERT INTO events (request, labeller, pair, choice, shown_left, at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (request, labeller, pair, choice, shown, datetime.now(UTC).isoformat()),
            )

    def done(self, labeller: str) -> int:
        """Count the pairs that this labeller has labelled."""
        return self._number("SELECT count(*) FROM standing WHERE labeller = ?", labeller)

    def covered(self) -> int:
        """Count the pairs that somebody has labelled."""
        return self._number("SELECT count(DISTINCT pair) FROM standing")

    def votes(self) -> dict[str, dict[str, str]]:
        """Map pair -> labeller -> choice, of all standing labels."""
        votes: dict[str, dict[str, str]] = defaultdict(dict)
        for labeller, pair, choice in self._rows("SELECT labeller, pair, choice FROM standing"):
            votes[pair][labeller] = choice
        return dict(votes)
