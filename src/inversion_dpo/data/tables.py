"""Parquet, CSV, JSON and Hugging Face datasets, row by row.

Every reader is a generator of :class:`rows.Raw` that holds a few rows at a time. What is wrong
with a whole file raises DataError; what is wrong with a row travels on as a fault.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from inversion_dpo.data.columns import Layout, check_once, check_types, find_layout
from inversion_dpo.data.images import DataError
from inversion_dpo.data.rows import Fault, Raw, Table

_READ_ROWS = 64  # rows decoded from Parquet or Arrow at a time
Columns = Mapping[str, str]


def read_parquet(file: Path, columns: Columns) -> Iterator[Raw]:
    """Rows of a Parquet file; only the columns that matter are read.

    Raises:
        DataError: not Parquet, damaged, a column missing or of the wrong type.
    """
    yield from _parquet(file, columns, lambda layout: list(layout.names))


def read_labels(file: Path, columns: Columns) -> Iterator[Raw]:
    """Rows of a Parquet file with nothing but their labels: no image is read.

    Raises:
        DataError: as :func:`read_parquet`.
    """
    yield from _parquet(file, columns, lambda layout: [n for n in layout.names if n == "label_0"])


def _parquet(file: Path, columns: Columns, part: Callable[[Layout], list[str]]) -> Iterator[Raw]:
    """Rows with the columns that ``part`` chooses of a layout, under our names."""
    read = 0
    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            check_once(str(file), schema.names)
            layout = find_layout(str(file), schema.names, columns)
            check_types(str(file), schema, layout)
            ranked = layout.kind in ("ranking", "choice")  # these may name files
            table = Table(layout, file.parent if ranked else None, file.stem)
            ours = part(layout)
            wanted = [layout.names[name] for name in ours]
            for batch in parquet.iter_batches(batch_size=_READ_ROWS, columns=wanted):
                for index, values in enumerate(batch.to_pylist(), start=read):
                    named = {name: values[layout.names[name]] for name in ours}
                    yield Raw(f"{file.name}, row {index}", table, named)
                read += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        what = "cannot be read as Parquet" if not read else f"is damaged after row {read - 1}"
        reason = " ".join(str(error).split())
        raise DataError(
            f"{file} {what} ({reason}); copy or download it again, or export it as Parquet"
        ) from error


def read_text(file: Path, columns: Columns) -> Iterator[Raw]:
    """Rows of a CSV, JSON (a list of objects) or JSON Lines file that names image files.

    Images are looked for in the table's own folder and nowhere else.

    Raises:
        DataError: not such a file, not UTF-8, or a column missing.
    """
    yield from records(file, read_objects(file), columns, file.parent)


def read_objects(file: Path) -> Iterator[dict[str, Any] | Fault]:
    """The rows of a CSV, JSON or JSON Lines file under their own names.

    Raises:
        DataError: not such a file, not there, or not UTF-8.
    """
    readers = {".csv": _csv, ".json": _json, ".jsonl": _json_lines}
    suffix = file.suffix.lower()
    if suffix not in readers:
        raise DataError(f"{file} is none of {', '.join(readers)}; rename or export it as one")
    if not file.is_file():
        raise DataError(f"there is no file {file}")
    try:
        yield from readers[suffix](file)
    except DataError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        remedy = f"export it again as UTF-8 {suffix[1:].upper()}"
        raise DataError(f"{file} cannot be read ({error}); {remedy}") from error


def read_dataset(dataset: Any, name: str, columns: Columns) -> Iterator[Raw]:
    """Rows of a ``datasets`` Dataset or IterableDataset.

    They are taken as Arrow tables: so images come as the bytes that are stored, not decoded, and
    no path among them is followed.

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
            raise DataError(f"{name} breaks off after {read} rows ({reason}); try again") from error
        if batch is None:
            return
        if table is None:
            layout = find_layout(name, batch.schema.names, columns)
            check_types(name, batch.schema, layout)
            table = Table(layout)
        batch = batch.select(list(table.layout.names.values()))
        for values in batch.to_pylist():
            yield Raw(f"{name}, row {read}", table, table.layout.translate(values))
            read += 1


def records(
    file: Path,
    rows: Iterable[dict[str, Any] | Fault],
    columns: Columns,
    folder: Path | None = None,
) -> Iterator[Raw]:
    """Dictionaries of one file as raw rows; the first sound one says which columns there are.

    Raises:
        DataError: a column missing.
    """
    table = None
    for index, row in enumerate(rows):
        where = f"{file.name}, row {index}"
        if isinstance(row, Fault):
            yield Raw(where, table or Table(Layout("labelled", {}), folder), {}, row)
            continue
        if table is None:
            table = Table(find_layout(str(file), row, columns), folder, file.stem)
        yield Raw(where, table, table.layout.translate(row))


def _csv(file: Path) -> Iterator[dict[str, Any] | Fault]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = filter(None, csv.reader(stream, strict=True, skipinitialspace=True))
        header: list[str] = []
        count = -1  # rows count from 0, after the header
        try:
            for count, cells in enumerate(rows, start=-1):
                if count < 0:
                    header = _header(file, cells)
                elif len(cells) == len(header):
                    yield dict(zip(header, cells, strict=True))
                else:
                    text = f"{len(cells)} cells under {len(header)} columns; quote text with commas"
                    yield Fault("bad_rows", text)
        except csv.Error as error:
            raise DataError(
                f"{file}, row {count + 1} cannot be read ({error}); look at its "
                "quotation marks: each must be closed, and doubled inside a text"
            ) from error


def _header(file: Path, cells: list[str]) -> list[str]:
    """The names of a CSV's columns, without spaces around them."""
    names = [cell.strip() for cell in cells]
    if len(names) == 1 and (other := next((c for c in ";\t|" if c in names[0]), None)):
        raise DataError(f"{file}: cells are separated by {other!r}; export it with commas")
    check_once(str(file), names)
    return names


def _json(file: Path) -> Iterator[dict[str, Any] | Fault]:
    rows = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise DataError(f"{file} is not a list of objects; write [{{...}}, ...] or JSON Lines")
    for row in rows:
        yield row if isinstance(row, dict) else Fault("bad_rows", "not an object; write {...}")


def _json_lines(file: Path) -> Iterator[dict[str, Any] | Fault]:
    with file.open(encoding="utf-8-sig") as stream:
        for line in filter(str.strip, stream):
            yield parse_object(line)


def parse_object(text: str | bytes) -> dict[str, Any] | Fault:
    """A JSON object, or the fault that it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Fault("bad_rows", f"not JSON ({error}); write one object {{...}} a line")
    return value if isinstance(value, dict) else Fault("bad_rows", "not an object; write {...}")
