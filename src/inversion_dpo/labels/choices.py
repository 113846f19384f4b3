"""Human choices from other tools as pairs: ``inversion-dpo pairs import``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from inversion_dpo.data.columns import KNOWN as OF_PAIRS
from inversion_dpo.data.columns import (
    WRITTEN,
    Table,
    cells,
    check_one_caption,
    find_name,
    our_names,
)
from inversion_dpo.data.images import DataError
from inversion_dpo.data.rows import Fault, Raw, Row, inspect, row_of
from inversion_dpo.data.source import content
from inversion_dpo.data.tables import TEXTS, Placed, read_objects
from inversion_dpo.data.vocabulary import choice_of
from inversion_dpo.making_pairs.candidates import write_rows
from inversion_dpo.run.disk import MARK
from inversion_dpo.run.words import counted, typed

KNOWN = {  # ours -> the names that are understood by themselves
    "image_0": OF_PAIRS["jpg_0"],
    "image_1": OF_PAIRS["jpg_1"],
    "caption": (*OF_PAIRS["caption"], "text"),
    "choice": OF_PAIRS["choice"],
    "labeller": ("labeller", "annotator", "rater", "user", "worker", "annotator_id"),
} | {k: OF_PAIRS[k] for k in ("source", "mask", "scene_graph", "group", "seed_0", "seed_1")}
NEEDED = ("image_0", "image_1", "caption", "choice")
SCHEMA = (
    *WRITTEN,
    ("preference_0", pa.float64()),
    *((name, pa.int64()) for name in ("labellers", "seed_0", "seed_1")),
    *((name, pa.binary()) for name in ("source_image", "mask")),
    *((name, pa.string()) for name in ("scene_graph", "prompt_id")),
)


@dataclass
class Votes:
    """What each labeller said of the images of a row: 1 for the first, a half for a tie."""

    about: Row
    said: dict[object, list[float]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of labellers who prefer the first; whoever said several things, their mean."""
        return fmean(map(fmean, self.said.values()))

    def row(self) -> dict[str, Any]:
        """Give the pair as it is written."""
        share, row = self.share, self.about
        found = {
            "jpg_0": row.images[0],
            "jpg_1": row.images[1],
            "label_0": 0.5 if share == 0.5 else float(share > 0.5),
            "caption": row.caption,
            "preference_0": share,
            "labellers": len(self.said),
            "seed_0": row.seeds[0],
            "seed_1": row.seeds[1],
            "source_image": row.source,
            "mask": row.mask,
            "scene_graph": row.scene_graph,
            "prompt_id": row.group,
        }
        return {name: value for name, value in found.items() if value is not None}


def import_choices(
    file: Path, output: Path, columns: Mapping[str, str] | None = None
) -> Counter[str]:
    """Write the pairs that a table of choices names, and return what was counted.

    Rows about one pair are put together, whichever image stood left: ``preference_0`` is the share
    of labellers who prefer image 0, ``label_0`` the majority (0.5 where there is none),
    ``labellers`` how many there were; a row that names nobody is a labeller of its own.

    Args:
        file: .csv, .tsv, .json or .jsonl, with image files in its folder; or Parquet with images.
        output: the Parquet file to write.
        columns: ours (image_0, image_1, caption, choice, labeller, source, ...) to theirs.

    Raises:
        DataError: names the file, the row and the remedy.
    """
    counts: Counter[str] = Counter()
    found: dict[bytes, Votes] = {}
    for where, row, choice, voice in _rows(file, dict(columns or {})):
        counts["rows"] += 1
        faults, _ = inspect(row)
        if faults:
            raise DataError(faults[0].text)
        if row.images[0] == row.images[1]:
            raise DataError(f"{where}: both images are the same file; correct or drop the row")
        if choice is None:
            counts["neither"] += 1
            continue
        alike = replace(row, caption=" ".join((row.caption or "").split()))
        votes = found.setdefault(content(alike), Votes(row))
        if votes.about.mask != row.mask:
            raise DataError(
                f"{where}: the mask is another than in {votes.about.where}, and a pair has one: "
                "give them the same, or drop the column"
            )
        choice = choice if votes.about.images == row.images else 1 - choice
        votes.said.setdefault(len(votes.said) if voice is None else voice, []).append(choice)
    if not found:
        raise DataError(
            f"{file} names no choice in {counted(counts['rows'], 'row')}; nothing was written"
        )
    rows = [votes.row() for votes in found.values()]
    there = {"seed_0", "seed_1"}.union(*rows)
    written = [column for column in SCHEMA if column[0] in there]
    write_rows(output, rows, pa.schema(written, {MARK: "pairs import"}))
    split = sum(votes.share == 0.5 for votes in found.values())
    return counts + Counter(pairs=len(found), ties=split)


def _rows(
    file: Path, columns: dict[str, str]
) -> Iterator[tuple[str, Row, float | None, str | None]]:
    """(where, row, 1 / 0 / 0.5 or None for neither, labeller) of every row of the table."""
    names: dict[str, str] | None = None
    for index, (line, raw) in enumerate(_objects(file)):
        where = f"{line}{file.name}, row {index}"
        if isinstance(raw, Fault):
            raise DataError(f"{where}: {raw.text}")
        names = names or _names(file, raw, columns)
        ours = {re.sub(r"^image_(?=[01]$)", "jpg_", k): v for k, v in names.items()}
        table = Table("labelled", ours, file.parent if file.suffix.lower() in TEXTS else None)
        values = cells(raw, table)
        row, voice = row_of(Raw(where, table, values | {"label_0": 1.0})), values.get("labeller")
        try:
            choice = choice_of(values["choice"], table, [values["jpg_0"], values["jpg_1"]])
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        yield where, row, choice, str(voice) if voice not in (None, "") else None


def _objects(file: Path) -> Iterator[Placed]:
    """Read the rows of a table; those of Parquet hold their images."""
    if file.suffix.lower() != ".parquet":
        yield from read_objects(file)
        return
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=64):
                yield from (("", row) for row in batch.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet ({error}); export it again") from error


def _names(file: Path, raw: Mapping[str, Any], columns: dict[str, str]) -> dict[str, str]:
    columns, there = our_names(columns, KNOWN, ""), list(raw)
    names = {
        ours: find_name(str(file), (columns[ours],) if ours in columns else known, there)
        for ours, known in KNOWN.items()
    }
    if absent := [f"{k}={v}" for k, v in columns.items() if not names[k]]:
        raise DataError(f"{file}: {absent[0]} names no column; it has {', '.join(raw)}")
    check_one_caption(str(file), columns, there)
    for ours in ("image_0", "image_1", "choice"):
        found = [f for name in KNOWN[ours] if (f := find_name(str(file), (name,), there))]
        if ours not in columns and len(found) > 1:
            raise DataError(
                f"{file} has the columns {' and '.join(found)}; say which one counts: "
                + " or ".join(f"{ours}={name}" for name in found)
            )
    names = {ours: theirs for ours, theirs in names.items() if theirs}
    missing = [k for k in KNOWN if k not in names and k in NEEDED]
    if missing and all(find_name(str(file), OF_PAIRS[k], there) for k in ("winner", "loser")):
        raise DataError(
            f"{file} says by its columns which image is the better one: it needs no import. Give "
            f"it to `inversion-dpo pairs check {typed(file)}`, then to train as data.pairs={file}"
        )
    if missing:
        raise DataError(
            f"{file} has no column for {', '.join(missing)}; it has {', '.join(raw)}; say which it "
            f"is: {missing[0]}=THEIR_NAME"
        )
    return names
