"""How the columns of somebody's table are named, and what they make a pair of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
_BINARY = {"null", "binary", "large_binary", "binary_view"}
_TEXT = {"null", "string", "large_string", "string_view"}


@dataclass(frozen=True)
class Layout:
    """A kind of :data:`LAYOUTS`, and the table's own name of each of its columns."""

    kind: str
    names: Mapping[str, str]

    def translate(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A row under our names; what it lacks is None."""
        return {ours: values.get(theirs) for ours, theirs in self.names.items()}


def find_layout(where: str, columns: Iterable[str], mapping: Mapping[str, str]) -> Layout:
    """The layout that these columns have.

    Args:
        where: what an error calls the table.
        columns: its columns.
        mapping: ours to theirs, where they differ from what is known.

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
        ours: found[0]
        for ours, options in known.items()
        if (found := [name for name in options if name in there])
    }
    meant = [k for k, needed in LAYOUTS.items() if set(mapping) <= {*needed, *OPTIONAL}]
    for kind in meant:
        if set(LAYOUTS[kind]) <= set(names):
            keep = (*LAYOUTS[kind], *OPTIONAL)
            return Layout(kind, {ours: names[ours] for ours in keep if ours in names})
    raise DataError(_incomplete(where, there, names, meant or list(LAYOUTS)))


def _incomplete(where: str, there: list[str], names: dict[str, str], kinds: list[str]) -> str:
    nearest = max(kinds, key=lambda kind: sum(ours in names for ours in LAYOUTS[kind]))
    needed = LAYOUTS[nearest]
    missing = [ours for ours in needed if ours not in names]
    return (
        f"{where} lacks the columns {', '.join(missing)}; it has {', '.join(there)}; rename or add "
        f"columns until it has {', '.join(needed)}, or say which they are, e.g. "
        f"data.columns.{missing[0]}=THEIR_NAME"
    )


def check_once(where: str, names: list[str]) -> None:
    """DataError if a column's name is there twice: which one is meant cannot be known."""
    for name in names:
        if name and names.count(name) > 1:
            raise DataError(f"{where} has two columns named {name}; rename or drop one")


def check_types(where: str, schema: Any, layout: Layout) -> None:
    """Refuse an Arrow table whose columns cannot be what the layout takes them for.

    Raises:
        DataError: names the column, what it holds and what it should.
    """
    for ours, theirs in layout.names.items():
        kind = schema.field(theirs).type
        if not _type_fits(ours, kind):
            raise DataError(f"{where}: column {theirs} holds {kind}; store it as {_wanted(ours)}")


def _wanted(name: str) -> str:
    if name == "preference_0":
        return "numbers from 0 to 1"
    if name == "label_0":
        return "numbers (0, 0.5 or 1)"
    if name in ("caption", "scene_graph"):
        return "text"
    return "binary (encoded images) or a struct with a binary field 'bytes'"


def _type_fits(name: str, kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if name in ("caption", "scene_graph"):
        return str(kind) in _TEXT
    if name in ("label_0", "preference_0"):
        return str(kind) in _NUMBERS or pa.types.is_decimal(kind)
    if name not in ("jpg_0", "jpg_1", "winner", "loser"):
        return True  # of a ranking: looked at row by row
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _type_fits(name, kind.field(index).type)
    return str(kind) in _BINARY
