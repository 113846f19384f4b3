"""How the columns of somebody's table are named, and what they make a pair of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from inversion_dpo.data.images import DataError

# What a row can state a preference by, the last one excepted; the first layout whose columns are
# all there is taken.
LAYOUTS = {
    "labelled": ("jpg_0", "jpg_1", "label_0", "caption"),
    "chosen": ("winner", "loser", "caption"),
    "ranking": ("images", "ranks", "caption"),
    "choice": ("images", "preferences", "caption"),
    "unlabelled": ("jpg_0", "jpg_1", "caption"),  # to be labelled; no preference yet
}
RANKED = ("ranking", "choice")
# The columns of pairs that we write ourselves: Pick-a-Pic's.
WRITTEN = (
    ("jpg_0", pa.binary()),
    ("jpg_1", pa.binary()),
    ("label_0", pa.float64()),
    ("caption", pa.string()),
)
OPTIONAL = ("scene_graph", "group", "preference_0")
# Names that are understood without data.columns: Pick-a-Pic's, Hugging Face's image folders',
# and those of HPDv2 (https://huggingface.co/datasets/ymhao/HPDv2) and ImageRewardDB
# (https://huggingface.co/datasets/THUDM/ImageRewardDB).
KNOWN = {
    "jpg_0": ("jpg_0", "image_0", "file_name_0"),
    "jpg_1": ("jpg_1", "image_1", "file_name_1"),
    "label_0": ("label_0",),
    "winner": ("winner", "file_name_winner"),
    "loser": ("loser", "file_name_loser"),
    "images": ("images", "image_path", "file_path", "image"),
    "ranks": ("ranks", "rank"),
    "preferences": ("human_preference",),
    "caption": ("caption", "prompt"),
    "scene_graph": ("scene_graph",),
    "preference_0": ("preference_0",),
    "group": ("prompt_id",),
}
_NUMBERS = {"null", "bool", "halffloat", "float", "double"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_TEXT = {"null", "string", "large_string", "string_view"}
_IMAGE = (
    {"null", "binary", "large_binary", "binary_view"},
    "binary (encoded images) or a struct with a binary field 'bytes'",
)
# Arrow's types that a column may have, and what an error calls them; rankings are looked at by row.
_TYPES = {
    **dict.fromkeys(("jpg_0", "jpg_1", "winner", "loser"), _IMAGE),
    "label_0": (_NUMBERS, "numbers (0, 0.5 or 1)"),
    "preference_0": (_NUMBERS, "numbers from 0 to 1"),
    "caption": (_TEXT, "text"),
    "scene_graph": (_TEXT, "text"),
}


@dataclass(frozen=True)
class Table:
    """What rows come from.

    kind: one of :data:`LAYOUTS`. names: the table's own names by ours. folder: the image files that
    rows name lie in here; None if paths are not followed. stem: the file's name without its suffix,
    if the table holds rankings.
    """

    kind: str
    names: Mapping[str, str]
    folder: Path | None = None
    stem: str = ""


def find_table(
    where: str, columns: Iterable[str], mapping: Mapping[str, str], file: Path | None = None
) -> Table:
    """Find the layout that these columns have.

    Args:
        where: what an error calls the table.
        columns: its columns.
        mapping: ours to theirs, where they differ from what is known.
        file: the table, if its rows may name image files beside it.

    Raises:
        DataError: the mapping names a column that is not there, or no layout is complete.
    """
    there = list(columns)
    for ours, theirs in mapping.items():
        if theirs not in there:
            raise DataError(
                f"{where}: data.columns.{ours}={theirs} names no column; it has {', '.join(there)}"
            )
    known = {ours: (mapping[ours],) if ours in mapping else KNOWN[ours] for ours in KNOWN}
    names = {
        ours: next(name for name in options if name in there)
        for ours, options in known.items()
        if not set(options).isdisjoint(there)
    }
    meant = [k for k, needed in LAYOUTS.items() if set(mapping) <= {*needed, *OPTIONAL}]
    for kind in meant:
        if set(LAYOUTS[kind]) <= set(names):
            keep = {n: names[n] for n in (*LAYOUTS[kind], *OPTIONAL) if n in names}
            stem = file.stem if file and kind in RANKED else ""
            return Table(kind, keep, file.parent if file else None, stem)
    nearest = max(meant or LAYOUTS, key=lambda kind: len(set(LAYOUTS[kind]) & set(names)))
    missing = [ours for ours in LAYOUTS[nearest] if ours not in names]
    raise DataError(
        f"{where} lacks the columns {', '.join(missing)}; it has {', '.join(there)}; rename or add "
        f"columns until it has {', '.join(LAYOUTS[nearest])}, or say which they are, e.g. "
        f"data.columns.{missing[0]}=THEIR_NAME"
    )


def check_types(where: str, schema: Any, table: Table) -> None:
    """Raise DataError if a column of an Arrow table cannot be what it is taken for."""
    for ours, theirs in table.names.items():
        if schema.get_field_index(theirs) < 0:  # what Arrow says of a name that is there twice
            raise DataError(f"{where} has two columns named {theirs}; rename or drop one")
        if ours not in _TYPES:
            continue
        kind, (allowed, wanted) = schema.field(theirs).type, _TYPES[ours]
        if allowed is _IMAGE[0] and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if str(kind) in allowed or (allowed is _NUMBERS and pa.types.is_decimal(kind)):
            continue
        stored = schema.field(theirs).type
        raise DataError(f"{where}: column {theirs} holds {stored}; store it as {wanted}")
