"""Pairs of small files, all in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from inversion_dpo.data.source import Pair, open_pairs


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
    source = open_pairs(path, limit=limit)
    pairs, counts = tuple(source), source.counts
    return PairFile(
        path=Path(path),
        pairs=pairs,
        rows=counts["rows"],
        ties=counts["ties"],
        identical=counts["identical"],
        fingerprint=source.fingerprint,
    )
