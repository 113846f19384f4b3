"""Preference pairs from any format, one at a time."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

from PIL import Image

from inversion_dpo.data.columns import Table
from inversion_dpo.data.formats import HUB, Opened, open_rows
from inversion_dpo.data.images import DataError, decode_image, picture_size
from inversion_dpo.data.masks import decode_mask
from inversion_dpo.data.rankings import rows_of
from inversion_dpo.data.rows import NO_ROWS, Row, inspect
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.run.config import resolve
from inversion_dpo.run.fields import DataConfig
from inversion_dpo.run.words import counted

FEW = 20_000  # pairs that may be read twice
# Why a row or pair is left out, in words for one and for several of them.
LEFT_OUT = {
    "ties": ("tie", "ties"),
    "identical": ("with identical images", "with identical images"),
    "unpaired": ("ranking of one image", "rankings of one image"),
    "unlabelled": ("unlabelled", "unlabelled"),
    "hidden": ("hidden file", "hidden files"),
    "strays": ("file of no row", "files of no row"),
    "skipped": ("unusable row", "unusable rows"),
    "bad_labels": ("wrong label", "wrong labels"),
    "empty_captions": ("empty caption", "empty captions"),
    "broken_images": ("broken image", "broken images"),
    "bad_paths": ("wrong path", "wrong paths"),
    "bad_rows": ("damaged row", "damaged rows"),
    "mixed_shapes": ("pair of two shapes", "pairs of two shapes"),
    "odd_shapes": ("pair far from every size", "pairs far from every size"),
}
_LISTED = 5  # rows that the warning about skipped ones spells out
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """One preference: ``winner`` and ``loser`` are encoded images (JPEG, PNG or WebP).

    row: place among all rows read, from 0; in a folder the count runs on from file to file, and of
    a ranking every pair counts. scene_graph: LAION-SG JSON, if the data has it. where: file and row
    for messages. preference: how probably the winner is the better one; 1 if the data do not say.
    decoded: winner and loser as pictures, if reading decoded them; use :attr:`images`. names: what
    the data call the two. single: one image, given twice; the preference is then the share of those
    who like it. source: the encoded image that both edit, if the data are of edits. mask: an
    encoded image, white where errors count. seeds: of the noise that winner and loser were sampled
    from, if the data say.
    """

    row: int
    caption: str
    winner: bytes
    loser: bytes
    scene_graph: str | None
    where: str
    preference: float = 1.0
    decoded: tuple[Image.Image, ...] = field(default=(), compare=False, repr=False)
    names: tuple[str, ...] = ("winner", "loser")
    single: bool = False
    source: bytes | None = None
    mask: bytes | None = None
    seeds: tuple[int, ...] = ()

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """Winner and loser as pictures, decoded once; DataError names the row of a broken one."""
        return self.decoded or tuple(decode_image(*side) for side in self._sides)

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of winner, loser and any source, from headers if they are not decoded."""
        source = [picture_size(self.source, self._where_source)] if self.source else []
        if self.decoded:
            return (*((image.height, image.width) for image in self.decoded), *source)
        return (*(picture_size(*side) for side in self._sides), *source)

    @property
    def source_image(self) -> Image.Image | None:
        """The image to be edited, if there is one; DataError names the row of a broken one."""
        return decode_image(self.source, self._where_source) if self.source else None

    @property
    def mask_image(self) -> Image.Image | None:
        """The mask, if there is one; DataError names the row of one that cannot be used."""
        if self.mask is None:
            return None
        return decode_mask(self.mask, self.sizes[0], f"{self.where}, mask")

    @property
    def _where_source(self) -> str:
        return f"{self.where}, source"

    @property
    def _sides(self) -> list[tuple[bytes, str]]:
        """Each encoded image, and what an error calls it."""
        both = zip((self.winner, self.loser), self.names, strict=True)
        return [(data, f"{self.where}, {name}") for data, name in both]

    @property
    def marks(self) -> list[str]:
        """Sixteen hex digits of each image, by which it is found in other pairs."""
        return [hashlib.sha256(image).hexdigest()[:16] for image in (self.winner, self.loser)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of those of caption, winner, loser and any source: the pair, wherever it is."""
        parts = [self.caption.encode(), self.winner, self.loser]
        parts += [part for part in (self.source, self.mask) if part]
        return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


def graph_of(pair: Pair) -> SceneGraph | None:
    """Read the pair's scene graph, if it has one; DataError names the row of a wrong one."""
    if pair.scene_graph is None:
        return None
    try:
        return SceneGraph.from_json(pair.scene_graph)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{pair.where}: scene_graph: {reason}; write LAION-SG's items and relations, or nothing"
        ) from error


@dataclass
class PairSource:
    """Pairs to be iterated as often as one likes; a few rows are in memory at a time.

    alone: give images with a thumb one by one, in place of the pairs that they make.

    counts, of the iteration begun last: rows, pairs; left out: ties, identical (one image twice),
    unpaired (a ranking of one image), unlabelled, hidden and strays (files of the system and of the
    user, which are no rows); duplicates, edits, masked, single (one image) and disliked (of these;
    all kept); and of rows skipped as unusable: skipped, and by reason bad_labels, empty_captions,
    broken_images, bad_paths, bad_rows.

    Iterating raises DataError for a file that cannot be read, for a bad row unless
    ``data.on_bad_row`` is skip, and when there is no usable pair at all.
    """

    config: DataConfig
    opened: Opened
    limit: int | None
    alone: bool = False
    counts: Counter[str] = field(default_factory=Counter)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of local files or a stream's commit, and of all that changes the pairs."""
        d = self.config
        how = {
            "format": d.format,
            "split": d.split,
            "revision": d.revision,
            "columns": dict(sorted(d.columns.items())),
            "ranking": d.ranking,
        }
        if self.alone and self.thumbs:
            how["alone"] = "true"
        plain = json.dumps([self.opened.identity(), how, self.limit, d.on_bad_row])
        return hashlib.sha256(plain.encode()).hexdigest()

    @cached_property
    def _table(self) -> Table:
        """What the first sound row comes from; an empty table if there is none."""
        sound = (raw.table for raw in self.opened.rows() if not raw.fault)
        return next(sound, Table("", {}))

    @property
    def thumbs(self) -> bool:
        """Whether the first sound row has a thumb up or down."""
        return self._table.kind == "thumbs"

    @property
    def single(self) -> bool:
        """Whether a row is one image, given twice."""
        return self._table.kind == "single" or (self.alone and self.thumbs)

    @property
    def edits(self) -> bool:
        """Whether the first sound row has an image to be edited."""
        return "source" in self._table.names

    def expected(self) -> int | None:
        """How many pairs there may be, without reading an image; None if that cannot be known."""
        count = self.opened.count()
        return self.limit if count is None else min(count, self.limit or count)

    @property
    def quick(self) -> bool:
        """Whether to read all pairs once more takes little: few, none streamed or decoded."""
        few = (self.expected() or math.inf) <= FEW
        return few and not self.config.pairs.startswith(HUB) and self.config.on_bad_row != "skip"

    def shapes(self, most: int) -> Iterator[tuple[tuple[int, int], ...]]:
        """Read the sizes of the images of the first rows, from headers; without unusable rows."""
        rows = rows_of(self.opened.rows(), self.config.ranking, alone=self.alone)
        for row in islice(rows, most):
            images = [image for name, image in row.pictures if name != "mask"]
            with suppress(DataError):
                if not (row.fault or row.left_out):
                    yield tuple(picture_size(i, "") for i in images if isinstance(i, bytes))

    def __iter__(self) -> Iterator[Pair]:
        return self.read(None)

    def read(self, decoded: int | None = 0) -> Iterator[Pair]:
        """Read all pairs, and decode the images of the first ``decoded`` ones; None: of all.

        Where bad rows are skipped every image is tried, since the numbers depend on it.
        """
        counts = self.counts = Counter()
        skip = self.config.on_bad_row == "skip"
        bad: list[str] = []
        seen: set[bytes] = set()
        rows = rows_of(self.opened.rows(), self.config.ranking, alone=self.alone)
        for index, row in enumerate(rows):
            if reason := row.left_out:
                counts.update([reason, *["rows"] * (reason not in NO_ROWS)])
                continue
            counts["rows"] += 1
            wanted = decoded is None or counts["pairs"] < decoded
            faults, images = inspect(row, skip or wanted)
            if faults and not skip:
                raise DataError(faults[0].text)
            if faults:
                counts.update(["skipped", *sorted({fault.kind for fault in faults})])
                bad += [faults[0].text][: _LISTED - len(bad)]
                continue
            key = content(row)
            counts.update(pairs=1, duplicates=int(key in seen))
            counts.update(["single"] * row.single + ["disliked"] * (row.single and not row.label))
            counts.update(
                ["edits"] * (row.source is not None) + ["masked"] * (row.mask is not None)
            )
            if text := mixed(counts):
                raise DataError(f"{row.where}: {text}")
            seen.add(key)
            yield _pair(index, row, images[: 2 - row.single] if wanted else [])
            if counts["pairs"] == self.limit:
                break
        if counts["skipped"]:
            _log.warning(_skipped(self.config.pairs, counts, bad))
        if not counts["pairs"]:
            thumbs = self.thumbs and not self.alone
            raise DataError(no_pairs(resolve(self.config.pairs), counts, thumbs=thumbs))


def open_pairs(config: DataConfig, limit: int | None = None, *, alone: bool = False) -> PairSource:
    """Open the configured pairs, or the first ``limit`` of them; see docs/reference/formats.md.

    Args:
        config: ``data`` of the run.
        limit: read the first pairs only, instead of ``data.limit``.
        alone: take images with a thumb one by one, for losses that need no pair.
    """
    return PairSource(config, open_rows(config), limit or config.limit, alone)


def content(row: Row) -> bytes:
    """Eight bytes that stand for caption and images, the same for either order of the images."""
    parts = sorted(hashlib.sha256(image).digest() for image in row.encoded)
    source = row.source if isinstance(row.source, bytes) else b""
    return hashlib.sha256(b"".join([*parts, (row.caption or "").encode(), source])).digest()[:8]


def left_out_words(counts: Mapping[str, int]) -> str:
    """Say in words how many rows are left out, by reason; other counts are passed over.

    >>> left_out_words({"pairs": 9, "ties": 2, "mixed_shapes": 1})
    '2 ties, 1 pair of two shapes'

    Args:
        counts: by reason.
    """
    return ", ".join(counted(counts[k], *w) for k, w in LEFT_OUT.items() if counts.get(k))


def mixed(counts: Mapping[str, int]) -> str:
    """Say what kinds of rows are mixed that no training takes together; empty if none are.

    Args:
        counts: pairs, and how many of them are single, edits and masked.
    """
    found = [text for kind, text in _MIXED.items() if counts[kind] not in (0, counts["pairs"])]
    return found[0] if found else ""


def no_pairs(name: str | Path, counts: Counter[str], *, thumbs: bool = False) -> str:
    """Say why data has no usable pair; ``thumbs``: why those that it has make none."""
    if thumbs:
        return (
            f"{name}: no prompt has both a thumb up and a thumb down, so there is no pair in "
            f"{counted(counts['rows'], 'row')} ({counted(counts['ties'], 'tie')}, "
            f"{counted(counts['unpaired'], 'prompt')} of one image, {counts['unlabelled']} without "
            f"a thumb, {counts['skipped']} skipped); set "
            "objective.name=kto or nft, which take each image by itself"
        )
    if not counts["rows"]:
        return f"{name} has no rows; export it again with at least one labelled pair"
    return (
        f"{name}: no usable pair in {counted(counts['rows'], 'row')} "
        f"({counted(counts['ties'], 'tie')}, {counts['identical']} with identical images, "
        f"{counts['unpaired']} of one image, {counts['unlabelled']} unlabelled, "
        f"{counts['skipped']} skipped); add "
        "rows that prefer one image (label_0 0 or 1)"
    )


def _skipped(name: str, counts: Counter[str], bad: list[str]) -> str:
    """Write the warning after skipped rows: how many, why, and the first of them."""
    kinds = ("bad_labels", "empty_captions", "broken_images", "bad_paths", "bad_rows")
    reasons = left_out_words({kind: counts[kind] for kind in kinds})
    more = counts["skipped"] - len(bad)
    lines = [
        f"{name}: {counted(counts['skipped'], 'row was', 'rows were')} skipped, as unusable "
        f"({reasons}):",
        *bad,
    ]
    return "\n  ".join([*lines, f"... and {more} more"] if more else lines)


_MIXED = {
    "single": "single images and pairs are mixed; give each kind as data of its own",
    "masked": "rows with and without a mask are mixed; give each kind as data of its own",
    "edits": "rows with and without a source image are mixed; give each kind as data of its own",
}


def _pair(index: int, row: Row, decoded: list[Image.Image]) -> Pair:
    order = 1 if row.label == 1.0 else -1
    winner, loser = row.encoded[::order]
    first = row.preference if isinstance(row.preference, float) else float(row.label == 1.0)
    return Pair(
        row=index,
        caption=row.caption or "",
        winner=winner,
        loser=loser,
        scene_graph=row.scene_graph,
        where=row.where,
        preference=first if order == 1 or row.single else 1 - first,
        decoded=tuple(decoded[::order]) * (2 if row.single else 1),
        names=row.names[::order],
        single=row.single,
        source=row.source if isinstance(row.source, bytes) else None,
        mask=row.mask if isinstance(row.mask, bytes) else None,
        seeds=tuple(seed for seed in row.seeds[::order] if seed is not None),
    )
