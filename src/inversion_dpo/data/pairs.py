"""Preference pairs in Parquet: read, check, decode.

The columns are Pick-a-Pic's (Kirstain et al., 2023, https://arxiv.org/abs/2305.01569):
``jpg_0``, ``jpg_1`` (encoded images), ``label_0`` (1: image 0 is preferred, 0: image 1, 0.5: tie)
and ``caption``; optional ``scene_graph`` (LAION-SG JSON). Other columns are not read. A row is
kept whole or left out whole, so winners and losers cannot come apart. Rows count from 0.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from inversion_dpo.data.images import DataError as DataError
from inversion_dpo.data.images import decode_image as decode_image
from inversion_dpo.data.images import to_pixels as to_pixels

NEEDED = ("jpg_0", "jpg_1", "label_0", "caption")
MAX_CAPTION_WORDS = 77  # CLIP reads 77 tokens: more words than that are certainly cut
MAX_LISTED = 50  # problems a report spells out
_NUMBERS = {"null", "bool", "halffloat", "float", "double"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_BINARY = {"null", "binary", "large_binary", "binary_view"}
_TEXT = {"null", "string", "large_string", "string_view"}
_READ_ROWS = 64  # rows decoded from Parquet at a time


@dataclass(frozen=True)
class Pair:
    """One preference: ``winner`` and ``loser`` are encoded images (JPEG, PNG or WebP).

    row: place among all rows read, from 0; in a folder the count runs on from file to file.
    scene_graph: LAION-SG JSON, if the file has it.
    """

    row: int
    caption: str
    winner: bytes
    loser: bytes
    scene_graph: str | None

    @property
    def digest(self) -> str:
        """SHA-256 of caption, winner and loser."""
        parts = (self.caption.encode(), self.winner, self.loser)
        return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


@dataclass(frozen=True)
class PairFile:
    """The usable pairs of a file or folder, and how many of its rows were left out and why.

    rows: rows read; ties: label 0.5; identical: both images are the same bytes.
    fingerprint: SHA-256 of the file, or of the digests of a folder's files in order.
    """

    path: Path
    pairs: tuple[Pair, ...]
    rows: int
    ties: int
    identical: int
    fingerprint: str


@dataclass(frozen=True)
class PairReport:
    """What :func:`check_pairs` found.

    Counts of rows: ties, identical (same bytes twice), empty_captions, bad_labels; of images:
    broken_images. What follows speaks of the usable ``pairs``: duplicates (caption and images
    seen before, in either order), image_sizes {(width, height): images}, caption_words
    (least, median, most), long_captions (over 77 words), first_preferred (share with
    label_0 = 1). ``problems`` spells out the first 50 of ``problems_total``.
    """

    path: Path
    rows: int
    pairs: int
    ties: int
    identical: int
    duplicates: int
    broken_images: int
    empty_captions: int
    bad_labels: int
    image_sizes: Counter[tuple[int, int]]
    caption_words: tuple[int, float, int] | None
    long_captions: int
    first_preferred: float | None
    problems: tuple[str, ...]
    problems_total: int

    @property
    def ok(self) -> bool:
        """Whether :func:`read_pairs` takes this file."""
        return self.problems_total == 0


@dataclass(frozen=True)
class _Row:
    where: str  # "train.parquet, row 7"
    caption: str | None
    images: tuple[bytes | None, bytes | None]
    label: float | None
    scene_graph: str | None

    @property
    def left_out(self) -> str | None:
        """Why a sound row is no preference; None if it is one (or is not sound)."""
        if self.label == 0.5:
            return "ties"
        sound = self.label in (0.0, 1.0)
        return "identical" if sound and self.images[0] and len(set(self.images)) == 1 else None


def read_pairs(path: Path, limit: int | None = None) -> PairFile:
    """Read preference pairs from a Parquet file, or from a folder's ``*.parquet`` in name order.

    Every image of a kept pair is decoded once, so that a broken one is found here.

    Args:
        path: the file or folder.
        limit: stop after this many pairs; the counts then speak of the part that was read.

    Raises:
        DataError: no such file, not Parquet, a column missing or of the wrong type, a label
            outside {0, 0.5, 1}, an empty caption, an image that cannot be read, or no usable
            pair at all.
        ValueError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    path = Path(path)
    files = _files(path)
    pairs: list[Pair] = []
    counts: Counter[str] = Counter()
    for index, row in enumerate(_rows(files)):
        counts["rows"] += 1
        if reason := row.left_out:
            counts[reason] += 1
            continue
        pairs.append(_pair(index, row))
        if len(pairs) == limit:
            break
    if not pairs:
        raise DataError(_no_pairs(path, counts))
    return PairFile(
        path=path,
        pairs=tuple(pairs),
        rows=counts["rows"],
        ties=counts["ties"],
        identical=counts["identical"],
        fingerprint=_fingerprint(path, files),
    )


def check_pairs(path: Path) -> PairReport:
    """Look at every row and list what is wrong with it, without raising for a row.

    Raises:
        DataError: what is wrong with a whole file: missing, not Parquet, damaged, a column
            missing or of the wrong type.
    """
    path = Path(path)
    counts: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    words: list[int] = []
    problems: list[str] = []
    seen: set[bytes] = set()
    for row in _rows(_files(path)):
        counts["rows"] += 1
        if reason := row.left_out:
            counts[reason] += 1
            continue
        found, row_sizes = _inspect(row)
        counts.update(kind for kind, _ in found)
        problems += [text for _, text in found][: MAX_LISTED - len(problems)]
        if found:
            continue
        key = _content(row)
        counts.update(pairs=1, first=int(row.label == 1.0), duplicates=int(key in seen))
        seen.add(key)
        sizes.update(row_sizes)
        words.append(len((row.caption or "").split()))
    return _report(path, counts, sizes, words, problems)


def format_report(report: PairReport) -> str:
    """The report as lines of text, problems last."""
    lines = [
        f"{report.path}: {report.pairs} usable pairs in {report.rows} rows",
        f"  left out: {report.ties} ties, {report.identical} with identical images",
        f"  duplicate pairs: {report.duplicates}",
    ]
    if report.image_sizes:
        common = report.image_sizes.most_common(5)
        more = f" and {n} other sizes" if (n := len(report.image_sizes) - len(common)) else ""
        sizes = ", ".join(f"{w}x{h} ({count})" for (w, h), count in common)
        lines.append(f"  image sizes (images): {sizes}{more}")
    if report.caption_words is not None:
        least, median, most = report.caption_words
        lines.append(
            f"  caption words: {least} to {most}, median {median:g}; "
            f"{report.long_captions} captions over {MAX_CAPTION_WORDS} words"
        )
    if report.first_preferred is not None:
        lines.append(f"  image 0 preferred: {report.first_preferred:.1%} (near 50% is unbiased)")
    if report.ok:
        return "\n".join([*lines, "  no problems"])
    lines.append(
        f"  problems: {report.problems_total} ({report.bad_labels} labels, "
        f"{report.empty_captions} captions, {report.broken_images} images); rows count from 0"
    )
    lines += [f"    {text}" for text in report.problems]
    if (rest := report.problems_total - len(report.problems)) > 0:
        lines.append(f"    ... and {rest} more")
    return "\n".join(lines)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} does not exist; give a Parquet file or a folder of them")
    files = sorted(f for f in path.glob("*.parquet") if not f.name.startswith("."))
    if not files:
        raise DataError(f"{path} holds no *.parquet files; give the folder that does")
    return files


def _rows(files: list[Path]) -> Iterator[_Row]:
    for file in files:
        index = 0
        for batch in _batches(file):
            for values in batch.to_pylist():
                yield _row(f"{file.name}, row {index}", values)
                index += 1


def _batches(file: Path) -> Iterator[Any]:
    """Record batches of the columns that matter; DataError if pyarrow cannot read them."""
    read = 0
    try:
        with pq.ParquetFile(file) as parquet:
            _check_columns(file, parquet.schema_arrow)
            columns = [c for c in (*NEEDED, "scene_graph") if c in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(batch_size=_READ_ROWS, columns=columns):
                yield batch
                read += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        what = "cannot be read as Parquet" if not read else f"is damaged after row {read - 1}"
        reason = " ".join(str(error).split())
        raise DataError(
            f"{file} {what} ({reason}); copy or download it again, or export it as Parquet"
        ) from error


def _check_columns(file: Path, schema: Any) -> None:
    missing = [name for name in NEEDED if name not in schema.names]
    if missing:
        raise DataError(
            f"{file} lacks the columns {', '.join(missing)}; it has {', '.join(schema.names)}; "
            f"rename or add columns until it has {', '.join(NEEDED)}"
        )
    for name in (*NEEDED, "scene_graph"):
        if name in schema.names and not _type_fits(name, schema.field(name).type):
            raise DataError(
                f"{file}: column {name} holds {schema.field(name).type}; store it as "
                f"{_wanted(name)}"
            )


def _wanted(name: str) -> str:
    if name.startswith("jpg"):
        return "binary (encoded images) or a struct with a binary field 'bytes'"
    return "numbers (0, 0.5 or 1)" if name == "label_0" else "text"


def _type_fits(name: str, kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if name.startswith("jpg") and pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _type_fits(name, kind.field(index).type)
    if name == "label_0":
        return str(kind) in _NUMBERS or pa.types.is_decimal(kind)
    return str(kind) in (_BINARY if name.startswith("jpg") else _TEXT)


def _row(where: str, values: dict[str, Any]) -> _Row:
    label = values["label_0"]
    return _Row(
        where=where,
        caption=values["caption"],
        images=(_bytes(values["jpg_0"]), _bytes(values["jpg_1"])),
        label=None if label is None else float(label),
        scene_graph=values.get("scene_graph"),
    )


def _bytes(value: Any) -> bytes | None:
    """Encoded image of a cell; of a {bytes, path} struct the bytes only: no path is followed."""
    return value.get("bytes") if isinstance(value, dict) else value


def _inspect(row: _Row) -> tuple[list[tuple[str, str]], list[tuple[int, int]]]:
    """Problems of a row as (what is counted, message), and the sizes of its sound images."""
    problems: list[tuple[str, str]] = []
    sizes: list[tuple[int, int]] = []
    if row.label not in (0.0, 1.0):
        text = f"{row.where}: label_0 is {'null' if row.label is None else f'{row.label:g}'}"
        remedy = "write 1 (image 0 preferred), 0 (image 1) or 0.5 (tie), or drop the row"
        problems.append(("bad_labels", f"{text}; {remedy}"))
    if not (row.caption or "").strip():
        remedy = "write the prompt that both images were made for, or drop the row"
        problems.append(("empty_captions", f"{row.where}: caption is empty; {remedy}"))
    for name, data in zip(("jpg_0", "jpg_1"), row.images, strict=True):
        if not data:
            text = f"{row.where}, {name}: no image; embed the file's bytes or drop the row"
            problems.append(("broken_images", text))
            continue
        try:
            sizes.append(decode_image(data, f"{row.where}, {name}").size)
        except DataError as error:
            problems.append(("broken_images", str(error)))
    return problems, sizes


def _pair(index: int, row: _Row) -> Pair:
    problems, _ = _inspect(row)
    if problems:
        raise DataError(problems[0][1])
    winner, loser = row.images if row.label == 1.0 else row.images[::-1]
    return Pair(index, row.caption or "", winner or b"", loser or b"", row.scene_graph)


def _content(row: _Row) -> bytes:
    """Digest of caption and images, the same for either order of the images."""
    parts = [hashlib.sha256(image or b"").digest() for image in row.images]
    return hashlib.sha256(b"".join([*sorted(parts), (row.caption or "").encode()])).digest()


def _fingerprint(path: Path, files: list[Path]) -> str:
    digests = [_sha256(file) for file in files]
    return digests[0] if path.is_file() else hashlib.sha256("".join(digests).encode()).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _no_pairs(path: Path, counts: Counter[str]) -> str:
    if not counts["rows"]:
        return f"{path} has no rows; export it again with at least one labelled pair"
    return (
        f"{path}: no usable pair in {counts['rows']} rows ({counts['ties']} ties, "
        f"{counts['identical']} with identical images); add rows whose label_0 is 0 or 1"
    )


def _report(
    path: Path,
    counts: Counter[str],
    sizes: Counter[tuple[int, int]],
    words: list[int],
    problems: list[str],
) -> PairReport:
    total = counts["bad_labels"] + counts["empty_captions"] + counts["broken_images"]
    pairs = counts["pairs"]
    if not pairs and not total:
        problems, total = [_no_pairs(path, counts)], 1
    return PairReport(
        path=path,
        rows=counts["rows"],
        pairs=pairs,
        ties=counts["ties"],
        identical=counts["identical"],
        duplicates=counts["duplicates"],
        broken_images=counts["broken_images"],
        empty_captions=counts["empty_captions"],
        bad_labels=counts["bad_labels"],
        image_sizes=sizes,
        caption_words=(min(words), statistics.median(words), max(words)) if words else None,
        long_captions=sum(n > MAX_CAPTION_WORDS for n in words),
        first_preferred=counts["first"] / pairs if pairs else None,
        problems=tuple(problems),
        problems_total=total,
    )
