"""Parquet, CSV, JSON and Hugging Face datasets, row by row.

Every reader is a generator of :class:`rows.Raw` that holds a few rows at a time. What is wrong
with a whole file raises DataError; what is wrong with a row travels on as a fault.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from inversion_dpo.data.columns import (
    RANKED,
    Table,
    cells,
    check_types,
    find_table,
    inner_names,
    top,
)
from inversion_dpo.data.images import DataError
from inversion_dpo.data.rows import Fault, Raw
from inversion_dpo.run.words import counted

_READ_ROWS = 64  # rows decoded from Parquet or Arrow at a time
_FIRST = 20  # rows that may lack columns before one has all
TEXTS = (".csv", ".tsv", ".json", ".jsonl")
SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
Columns = Mapping[str, str]
Placed = tuple[str, dict[str, Any] | Fault]  # "line 3 of " or "", and what stands there


def read_parquet(
    file: Path, columns: Columns, only: Collection[str] | None = None
) -> Iterator[Raw]:
    """Read the rows of a Parquet file, and no columns but those that matter.

    Args:
        file: the table.
        columns: ours to theirs.
        only: read nothing but these of our columns.

    Raises:
        DataError: not Parquet, damaged, a column missing or of the wrong type.
    """
    read = 0
    try:
        with pq.ParquetFile(file) as parquet:
            table = find_table(str(file), inner_names(parquet.schema_arrow), columns, file)
            check_types(str(file), parquet.schema_arrow, table)
            if table.kind not in RANKED:  # only rankings name files
                table = replace(table, folder=None)
            names = {n: t for n, t in table.names.items() if only is None or n in only}
            table, wanted = replace(table, names=names), list(names.values())
            for batch in parquet.iter_batches(batch_size=_READ_ROWS, columns=wanted):
                for index, values in enumerate(batch.to_pylist(), start=read):
                    yield Raw(f"{file.name}, row {index}", table, cells(values, table))
                read += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        what = "cannot be read as Parquet" if not read else f"is damaged after row {read - 1}"
        reason = " ".join(str(error).split())
        raise DataError(
            f"{file} {what} ({reason}); copy or download it again, or export it as Parquet"
        ) from error


def read_text(file: Path, columns: Columns) -> Iterator[Raw]:
    """Read a CSV, TSV, JSON or JSON Lines file whose rows name image files."""
    return records(file, read_objects(file), columns, file)


def read_objects(file: Path) -> Iterator[Placed]:
    """Read the rows of a CSV, TSV, JSON or JSON Lines file, each with its line."""
    suffix = file.suffix.lower()
    if suffix not in TEXTS:
        raise DataError(f"{file} is none of {', '.join(TEXTS)}; rename or export it as one")
    if not file.is_file():
        raise DataError(f"there is no file {file}")
    try:
        with file.open(encoding=encoding_of(file), newline="") as stream:
            if suffix in (".csv", ".tsv"):
                yield from _csv(file, stream)
            elif _is_lines(stream, suffix):
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield f"line {number} of ", parse_object(line)
            else:
                yield from (
                    ("", _object(row))
                    for row in _listed(file, json.load(stream, object_pairs_hook=_once))
                )
    except DataError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        remedy = f"export it again as UTF-8 {suffix[1:].upper()}"
        raise DataError(f"{file} cannot be read ({error}); {remedy}") from error


def encoding_of(file: Path) -> str:
    """Tell UTF-16, a spreadsheet's "Unicode text" with or without its mark, from UTF-8."""
    with file.open("rb") as raw:
        return _encoding(raw.read(2))


def text_of(caption: bytes) -> str:
    """Decode a file that is one caption: in UTF-8, or UTF-16 as tables may be."""
    return caption.decode(_encoding(caption[:2])).strip()


def _encoding(start: bytes) -> str:
    if start in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if start[1:] == b"\0":
        return "utf-16-le"
    return "utf-16-be" if start[:1] == b"\0" else "utf-8-sig"


def read_dataset(dataset: Any, name: str, columns: Columns) -> Iterator[Raw]:
    """Read a ``datasets`` Dataset or IterableDataset by Arrow tables.

    So images come as the bytes that are stored, not decoded, and no path among them is followed.

    Args:
        dataset: one split.
        name: what errors call it.
        columns: ours to theirs.

    Raises:
        DataError: a column missing or of the wrong type, or the source breaks off.
    """
    table, read = None, 0
    batches = iter(dataset.with_format("arrow").iter(batch_size=_READ_ROWS))
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # whatever the network, the disk or a decoder gives
            reason = " ".join(str(error).split())
            raise DataError(
                f"{name} breaks off after {counted(read, 'row')} ({reason}); try again"
            ) from error
        if batch is None:
            return
        if table is None:
            table = find_table(name, inner_names(batch.schema), columns)
            check_types(name, batch.schema, table)
        wanted = {top(theirs, batch.schema.names): None for theirs in table.names.values()}
        for values in batch.select(list(wanted)).to_pylist():
            yield Raw(f"{name}, row {read}", table, cells(values, table))
            read += 1


def records(
    file: Path, rows: Iterable[Placed], columns: Columns, beside: Path | None = None
) -> Iterator[Raw]:
    """Make raw rows of one file's dictionaries; each may bring columns that none before had.

    Args:
        file: what errors call the table.
        rows: their places, and themselves under their own names.
        columns: ours to theirs.
        beside: the file whose folder holds the images that rows name; None if they hold them.

    Raises:
        DataError: a column is in none of the first rows.
    """
    table, seen, names = None, set[str](), dict[str, None]()
    waiting: list[tuple[str, dict[str, Any]]] = []
    for index, (line, row) in enumerate(rows):
        where = f"{line}{file.name}, row {index}"
        if isinstance(row, Fault):
            unknown = Table("labelled", {}, beside.parent if beside else None)
            yield Raw(where, table or unknown, {}, row)
            continue
        if table is None or not row.keys() <= seen:
            seen |= row.keys()
            names |= dict.fromkeys(inner_names(row))
            try:
                table = find_table(str(file), names, columns, beside)
            except DataError:
                if table or len(waiting) == _FIRST:
                    raise
                waiting.append((where, row))
                continue
        for place, early in (*waiting, (where, row)):
            yield Raw(place, table, cells(early, table))
        waiting = []
    if waiting:
        find_table(str(file), names, columns, beside)


def parse_object(text: str | bytes) -> dict[str, Any] | Fault:
    """Parse a JSON object, or give the fault that it is none."""
    try:
        return _object(json.loads(text, object_pairs_hook=_once))
    except (ValueError, RecursionError) as error:
        return Fault("bad_rows", f"not JSON ({error}); write one object {{...}} a line")


def _is_lines(stream: TextIO, suffix: str) -> bool:
    """Tell JSON Lines from a list by how the file begins; the stream stays where it was."""
    lines = (line for line in iter(stream.readline, "") if line.strip())
    first, second = next(lines, ""), next(lines, "")
    stream.seek(0)
    if suffix == ".jsonl":
        return not first.lstrip().startswith("[")
    return bool(second) and not isinstance(parse_object(first), Fault)


def _listed(file: Path, data: Any) -> list[Any]:
    """Give the list that a JSON file is, or the only list of objects in its object."""
    lists = [data] if isinstance(data, list) else []
    if isinstance(data, dict):
        lists = [v for v in data.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
    if len(lists) != 1:
        remedy = 'write [{...}, ...], {"data": [{...}, ...]} or JSON Lines'
        raise DataError(f"{file} is not a list of objects; {remedy}")
    return lists[0]


def _once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON; ValueError if a name is there twice, of which one would be lost."""
    made = dict(entries)
    if len(made) < len(entries):
        twice = next(name for name in made if [n for n, _ in entries].count(name) > 1)
        raise ValueError(f"two entries are named {twice!r}")
    return made


def _object(value: Any) -> dict[str, Any] | Fault:
    return value if isinstance(value, dict) else Fault("bad_rows", "not an object; write {...}")


def _csv(file: Path, stream: TextIO) -> Iterator[Placed]:
    """Give the rows of a table, whose cells are parted by what parts its header."""
    header: list[str] = []
    comma = _separator(stream)
    rows = csv.reader(stream, strict=True, skipinitialspace=True, delimiter=comma)
    count = -1  # rows count from 0, after the header
    try:
        for line, cells in enumerate(rows, start=1):  # as a spreadsheet numbers them
            if not any(cell.strip() for cell in cells) or (count < 0 and cells[0][:4] == "sep="):
                continue  # an empty row, or Excel's own first line
            if count < 0:
                header = _header(file, cells)
            elif len(cells) < len(header) or any(c.strip() for c in cells[len(header) :]):
                yield f"line {line} of ", _uneven(len(cells), len(header), comma)
            else:  # a spreadsheet may end rows with empty cells
                yield f"line {line} of ", dict(zip(header, cells, strict=False))
            count += 1
    except csv.Error as error:
        raise DataError(
            f"{file}, row {max(count, 0)} cannot be read ({error}); look at its "
            "quotation marks: each must be closed, and doubled inside a text"
        ) from error


def _uneven(cells: int, columns: int, comma: str) -> Fault:
    """Say how many cells a row has that has too many or too few, and what to look at."""
    remedy = f"quote text with {comma!r}"
    if cells < columns:
        remedy = f"complete the row; cells are parted by {comma!r}, as in the first row"
    if columns == 1:
        remedy = "the first row must name the columns, with no title above it"
    return Fault(
        "bad_rows", f"{counted(cells, 'cell')} under {counted(columns, 'column')}; {remedy}"
    )


def _separator(stream: TextIO) -> str:
    """Find what parts the most names in the header; the stream stays where it was."""
    start = stream.tell()
    header = next((line for line in iter(stream.readline, "") if line.strip()), "")
    stream.seek(start)
    return max(",;\t|", key=lambda c: len(next(csv.reader([header], delimiter=c), [])))


def _header(file: Path, cells: list[str]) -> list[str]:
    """Give the names of a CSV's columns, without spaces around them."""
    names = [cell.strip() for cell in cells]
    for name in names:
        if name and names.count(name) > 1:
            raise DataError(f"{file} has two columns named {name}; rename or drop one")
    return names
