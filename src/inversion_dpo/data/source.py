"""Preference pairs from any format, one at a time."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image

from inversion_dpo.data.formats import Opened, Reading, fingerprint, open_rows
from inversion_dpo.data.images import DataError, decode_image
from inversion_dpo.data.rows import Row, inspect, rows_of
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.run.config import resolve
from inversion_dpo.run.fields import DataConfig

ON_BAD_ROW = ("error", "skip")
_LISTED = 5  # rows that the warning about skipped ones spells out
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """One preference: ``winner`` and ``loser`` are encoded images (JPEG, PNG or WebP).

    row: place among all rows read, from 0; in a folder the count runs on from file to file, and of
    a ranking every pair counts. scene_graph: LAION-SG JSON, if the data has it. where: file and row
    for messages. preference: how probably the winner is the better one; 1 if the data do not say.
    decoded: winner and loser as pictures, if reading decoded them; use :attr:`images`.
    """

    row: int
    caption: str
    winner: bytes
    loser: bytes
    scene_graph: str | None
    where: str
    preference: float = 1.0
    decoded: tuple[Image.Image, ...] = field(default=(), compare=False, repr=False)

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """Winner and loser as pictures, decoded once; DataError names the row of a broken one."""
        return self.decoded or (
            decode_image(self.winner, self.where),
            decode_image(self.loser, self.where),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the SHA-256 of caption, winner and loser: the pair, wherever it stands."""
        parts = (self.caption.encode(), self.winner, self.loser)
        return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


def graph_of(pair: Pair) -> SceneGraph | None:
    """The pair's scene graph, if it has one; DataError names the row of one that cannot be read."""
    if pair.scene_graph is None:
        return None
    try:
        return SceneGraph.from_json(pair.scene_graph)
    except (ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{pair.where}: scene_graph: {reason}; write LAION-SG's items and relations, or nothing"
        ) from error


class PairSource:
    """Pairs to be iterated as often as one likes; a few rows are in memory at a time.

    name: the data as it was given. fingerprint: SHA-256 of the source and of all that changes
    which pairs come out. counts, of the iteration begun last: rows, pairs; left out: ties,
    identical (one image twice), unpaired (a ranking of one image); duplicates and single (one
    image, annotated; both kept); and of rows
    skipped as unusable: skipped, and by reason bad_labels, empty_captions, broken_images,
    bad_paths, bad_rows.

    Iterating raises DataError for a file that cannot be read, for a bad row unless ``on_bad_row``
    is skip, and when there is no usable pair at all.
    """

    def __init__(
        self,
        name: str,
        opened: Opened,
        reading: Reading,
        limit: int | None,
        on_bad_row: str,
    ) -> None:
        self.name, self.limit, self.on_bad_row = name, limit, on_bad_row
        self.counts: Counter[str] = Counter()
        self._opened, self._reading = opened, reading

    @cached_property
    def fingerprint(self) -> str:
        """Reads local files once; of a hub stream nothing."""
        return fingerprint(self._opened, self._reading, self.limit, self.on_bad_row)

    def expected(self) -> int | None:
        """How many pairs there may be, without reading an image; None if that cannot be known."""
        count = self._opened.count()
        return self.limit if count is None else min(count, self.limit or count)

    def __iter__(self) -> Iterator[Pair]:
        return self.read(lambda number: True)

    def read(self, ours: Callable[[int], bool]) -> Iterator[Pair]:
        """All pairs, of which only those whose number is ``ours`` have their images decoded.

        For several processes that share the work; where bad rows are skipped every image is decoded
        all the same, since the numbers depend on it.
        """
        counts = self.counts = Counter()
        bad: list[str] = []
        seen: set[bytes] = set()
        for index, row in enumerate(rows_of(self._opened.rows(), self._reading.ranking)):
            counts["rows"] += 1
            if reason := row.left_out:
                counts[reason] += 1
                continue
            decode = self.on_bad_row == "skip" or ours(counts["pairs"])
            faults, images = inspect(row, decode)
            if faults and self.on_bad_row == "error":
                raise DataError(faults[0].text)
            if faults:
                counts.update(["skipped", *sorted({fault.kind for fault in faults})])
                bad += [faults[0].text][: _LISTED - len(bad)]
                continue
            pair = _pair(index, row, images)
            key = content(row)
            counts.update(pairs=1, duplicates=int(key in seen))
            if row.single:
                counts["single"] += 1
            seen.add(key)
            yield pair
            if counts["pairs"] == self.limit:
                break
        if counts["skipped"]:
            _log.warning(skipped_text(self.name, counts, bad))
        if not counts["pairs"]:
            raise DataError(no_pairs(self.name, counts))


def open_pairs(
    data: str | Path,
    reading: Reading | None = None,
    limit: int | None = None,
    on_bad_row: str = "error",
) -> PairSource:
    """Open preference pairs of any format; see docs/reference/formats.md.

    Every image of a pair is decoded once when it is yielded, so that a broken one is found there.

    Args:
        data: a file, a folder, or ``hf:OWNER/NAME`` with an optional ``:CONFIGURATION``.
        reading: how to read it; by default the format is found out.
        limit: stop after this many pairs; the counts then speak of the part that was read.
        on_bad_row: ``error`` stops at a row that cannot be used, ``skip`` leaves it out, counts it
            and warns.

    Raises:
        DataError: there is no such data, or its format is not known.
        ValueError: a limit below 1, or an unknown ``on_bad_row``.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"on_bad_row {on_bad_row!r} is not one of {', '.join(ON_BAD_ROW)}")
    how = reading or Reading()
    return PairSource(str(data), open_rows(data, how), how, limit, on_bad_row)


def configured_pairs(d: DataConfig, limit: int | None = None) -> PairSource:
    """Open the configured pairs, or the first ``limit`` of them."""
    reading = Reading(d.format, d.split, d.revision, dict(d.columns), d.ranking)
    return open_pairs(resolve(d.pairs), reading, limit or d.limit, d.on_bad_row)


def content(row: Row) -> bytes:
    """Eight bytes that stand for caption and images, the same for either order of the images."""
    parts = [hashlib.sha256(i if isinstance(i, bytes) else b"").digest() for i in row.images]
    return hashlib.sha256(b"".join([*sorted(parts), (row.caption or "").encode()])).digest()[:8]


def no_pairs(name: str | Path, counts: Counter[str]) -> str:
    """What to say of data without a usable pair."""
    if not counts["rows"]:
        return f"{name} has no rows; export it again with at least one labelled pair"
    return (
        f"{name}: no usable pair in {counts['rows']} rows ({counts['ties']} ties, "
        f"{counts['identical']} with identical images, {counts['unpaired']} of one image, "
        f"{counts['skipped']} skipped); add rows that prefer one image (label_0 0 or 1)"
    )


def skipped_text(name: str, counts: Counter[str], bad: list[str]) -> str:
    """The warning after an iteration that skipped rows: how many, why, and the first of them."""
    kinds = ("bad_labels", "empty_captions", "broken_images", "bad_paths", "bad_rows")
    reasons = ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind])
    more = counts["skipped"] - len(bad)
    lines = [f"{name}: {counts['skipped']} rows cannot be used and were skipped ({reasons}):", *bad]
    return "\n  ".join([*lines, f"... and {more} more"] if more else lines)


def _pair(index: int, row: Row, decoded: list[Image.Image]) -> Pair:
    first, second = (image if isinstance(image, bytes) else b"" for image in row.images)
    winner, loser = (first, second) if row.label == 1.0 else (second, first)
    seen = tuple(decoded if row.label == 1.0 else reversed(decoded))
    p = row.preference
    p_first = p if isinstance(p, float) else float(row.label == 1.0)
    preference = p_first if row.label == 1.0 else 1 - p_first
    caption, graph = row.caption or "", row.scene_graph
    return Pair(index, caption, winner, loser, graph, row.where, preference, seen)
