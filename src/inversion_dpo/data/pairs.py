"""Preference pairs: what the rest of the package imports.

Every format is read to the same rows and checked by the same rules (:mod:`.rows`); a row is kept
whole or left out whole, so winners and losers cannot come apart. Rows count from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from inversion_dpo.data.check import PairReport as PairReport
from inversion_dpo.data.check import check_pairs as check_pairs
from inversion_dpo.data.check import format_report as format_report
from inversion_dpo.data.check import tokens_of as tokens_of
from inversion_dpo.data.formats import Reading as Reading
from inversion_dpo.data.images import DataError as DataError
from inversion_dpo.data.images import decode_image as decode_image
from inversion_dpo.data.images import to_pixels as to_pixels
from inversion_dpo.data.source import Pair as Pair
from inversion_dpo.data.source import PairSource as PairSource
from inversion_dpo.data.source import graph_of as graph_of
from inversion_dpo.data.source import open_pairs as open_pairs


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
