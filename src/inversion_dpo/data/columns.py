"""How the columns of somebody's table are named, and what they make a pair of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.types import is_struct

from inversion_dpo.data.images import DataError

# What a row can state a preference by, the last one excepted; the first layout whose columns are
# all there is taken.
LAYOUTS = {
    "labelled": ("jpg_0", "jpg_1", "label_0", "caption"),
    "shares": ("jpg_0", "jpg_1", "share_0", "caption"),
    "chosen": ("winner", "loser", "caption"),
    "worded": ("jpg_0", "jpg_1", "choice", "caption"),
    "ranking": ("images", "ranks", "caption"),
    "choice": ("images", "preferences", "caption"),
    "scored": ("images", "scores", "caption"),
    "thumbs": ("images", "thumbs", "caption"),
    "unlabelled": ("jpg_0", "jpg_1", "caption"),  # to be labelled; no preference yet
    "unrated": ("images", "caption"),  # the same, of single images
}
RANKED = ("ranking", "choice", "scored", "thumbs", "unrated")
# The columns of pairs that we write ourselves: Pick-a-Pic's.
WRITTEN = (
    ("jpg_0", pa.binary()),
    ("jpg_1", pa.binary()),
    ("label_0", pa.float64()),
    ("caption", pa.string()),
)
OPTIONAL = (
    *("scene_graph", "group", "preference_0", "votes", "label_1", "has_label", "share_1"),
    *("source", "mask"),  # the image that both edit, and the region that counts
    *("seed_0", "seed_1"),
)
_ONLY_IN = {  # optional columns that other layouts than these do not read
    "share_1": ("shares",),
    **dict.fromkeys(("label_1", "has_label"), ("labelled", "unlabelled")),
}
# Names that are understood without data.columns, in any case, with spaces, dots or dashes for _:
# Pick-a-Pic's, Hugging Face's image folders', spreadsheets', and those of HPDv2
# (https://huggingface.co/datasets/ymhao/HPDv2), ImageRewardDB
# (https://huggingface.co/datasets/THUDM/ImageRewardDB) and Rapidata
# (https://huggingface.co/datasets/Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3).
KNOWN = {
    "jpg_0": (
        *("jpg_0", "image_0", "file_name_0", "image_0_file_name", "image1"),
        *("image_a", "left", "left_image"),
    ),
    "jpg_1": (
        *("jpg_1", "image_1", "file_name_1", "image_1_file_name", "image2"),
        *("image_b", "right", "right_image"),
    ),
    "label_0": ("label_0",),
    "label_1": ("label_1",),
    "has_label": ("has_label",),
    "share_0": ("share_0", "votes_0", "votes_image1", "weighted_results_image1_preference"),
    "share_1": ("share_1", "votes_1", "votes_image2", "weighted_results_image2_preference"),
    "winner": (
        *("winner", "file_name_winner", "winner_file_name", "winner_image", "images_winner"),
        *(
            "chosen",
            "chosen_file_name",
            "chosen_image",
            "images_chosen",
            "good",
            "better",
            "best",
            "preferred",
            "win_image",
        ),
    ),
    "loser": (
        *("loser", "file_name_loser", "loser_file_name", "loser_image", "images_loser"),
        *("rejected", "rejected_file_name", "rejected_image", "images_rejected"),
        *("bad", "worse", "worst", "dispreferred", "lose_image"),
    ),
    "images": ("images", "image_path", "file_path", "image", "file_name"),
    "ranks": ("ranks", "rank"),
    "scores": ("scores",),
    "thumbs": ("thumbs", "thumb", "liked"),
    "preferences": ("human_preference",),
    "caption": ("caption", "prompt"),
    "source": (
        *("source_image", "input_image", "original_image"),
        *("file_name_source", "source_file_name"),
    ),
    "mask": ("mask", "mask_image", "file_name_mask", "mask_file_name"),
    "scene_graph": ("scene_graph",),
    "preference_0": ("preference_0",),
    "seed_0": ("seed_0",),
    "seed_1": ("seed_1",),
    "votes": ("choice_dist",),  # for each of two images, in one list: HPDv3's
    "group": ("prompt_id",),
    # last, since data.columns.chosen=NAME and the like name images
    "choice": ("choice", "chosen", "preference", "preferred", "pairwise", "winner", "answer"),
}
_NUMBERS = {"null", "bool", "halffloat", "float", "double"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_OTHER = {"winner": "loser", "loser": "winner"} | {  # of two columns that are never the same
    f"{name}_{k}": f"{name}_{1 - k}" for name in ("jpg", "label", "share", "seed") for k in (0, 1)
}
_ONE = ("caption", "jpg_0", "jpg_1", "winner", "loser")  # also as a list of one
_STORED = (".bytes", ".path")  # what a column of images holds inside
_RATING = re.compile("rating|score|stars?$|mos$|grade|likert", re.IGNORECASE)
_CHOICES = (
    ". If it holds words such as left or A: data.columns.choice={} data.columns.image_0=THEIR_NAME "
    "data.columns.image_1=THEIR_NAME"
)
_TEXT = {"null", "string", "large_string", "string_view"}
_IMAGE = (
    {"null", "binary", "large_binary", "binary_view"},
    "binary (encoded images) or a struct with a binary field 'bytes'",
)
# Arrow's types that a column may have, and what an error calls them; rankings are looked at by row.
_TYPES = {
    **dict.fromkeys(("jpg_0", "jpg_1", "winner", "loser", "source", "mask"), _IMAGE),
    "label_0": (_NUMBERS | _TEXT, "numbers (0, 0.5 or 1)"),
    "choice": (
        _TEXT,
        "words such as left, b or tie; of numbers say whether they are data.columns.label_0 (1 for "
        "image 0) or share_0",
    ),
    "preference_0": (_NUMBERS, "numbers from 0 to 1"),
    "caption": (_TEXT, "text"),
    "scene_graph": (_TEXT, "text"),
}


@dataclass(frozen=True)
class Table:
    """What rows come from.

    kind: one of :data:`LAYOUTS`. names: the table's own names by ours. folder: the image files that
    rows name lie in here; None if paths are not followed. stem: the file's name without its suffix,
    if the table holds rankings. root: the folder that paths may lead to, ``folder`` by default.
    idle: columns, or folders, that nothing is read from.
    """

    kind: str
    names: Mapping[str, str]
    folder: Path | None = None
    stem: str = ""
    root: Path | None = None
    idle: tuple[str, ...] = ()


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
    names = {ours: find_name(where, KNOWN[ours], there) for ours in KNOWN} | {
        ours: find_name(where, (theirs,), there) for ours, theirs in mapping.items()
    }
    _check_mapping(where, mapping, names, there)
    check_one_caption(where, mapping, there, "data.columns.")
    names = {ours: theirs for ours, theirs in names.items() if theirs}
    rated = next((name for name in there if _RATING.search(name)), "")
    meant = [k for k, needed in LAYOUTS.items() if set(mapping) <= {*needed, *OPTIONAL}]
    for kind in meant:
        if set(LAYOUTS[kind]) <= set(names) and not (kind == "unrated" and rated):
            idle_here = [n for n, kinds in _ONLY_IN.items() if kind not in kinds]
            wanted = [n for n in (*LAYOUTS[kind], *OPTIONAL) if n not in idle_here]
            keep = {n: names[n] for n in wanted if n in names}
            stem = file.stem if file and kind in RANKED else ""
            idle = _unread(there, keep.values())
            return Table(kind, keep, file.parent if file else None, stem, idle=idle)
    nearest = max(
        [kind for kind in meant or LAYOUTS if kind != "unrated"] or LAYOUTS,
        key=lambda kind: (len(set(LAYOUTS[kind]) & set(names)), bool(rated) and kind == "scored"),
    )
    missing = [ours for ours in LAYOUTS[nearest] if ours not in names]
    if {"path1", "path2"} <= set(there):
        raise DataError(f"{where} has the columns of HPDv3: set data.format=hpdv3")
    if not (rated or names.keys() - OPTIONAL - {"caption"}):
        raise DataError(
            f"{where} has columns of other names than we know: {', '.join(there)}. Say which "
            "is which: data.columns.winner=NAME data.columns.loser=NAME data.columns.caption=NAME; "
            "for a choice in words image_0, image_1, choice, caption; for ratings images, scores, "
            "caption; for thumbs images, thumbs, caption"
        )
    raise DataError(
        f"{where} lacks the columns {', '.join(missing)}; it has {', '.join(there)}; rename or add "
        f"columns until it has {', '.join(LAYOUTS[nearest])}, or say which they are, e.g. "
        + " ".join(
            f"data.columns.{m}={(rated if m == 'scores' else '') or 'THEIR_NAME'}" for m in missing
        )
        + (" (higher is better)" if "scores" in missing else "")
        + (_CHOICES.format(names["winner"]) if missing == ["loser"] else "")
    )


def _unread(there: list[str], read: Iterable[str]) -> tuple[str, ...]:
    """List the columns that nothing is read from, neither from them nor from within them."""
    outer = [c for c in there if c.partition(".")[0] in (c, "") or c.partition(".")[0] not in there]
    tops = {top(name, outer) for name in read}
    return tuple(c for c in outer if c and c not in tops)


def check_one_caption(
    where: str, mapping: Mapping[str, str], there: list[str], key: str = ""
) -> None:
    """Refuse a table with both caption and prompt, unless the mapping says which one counts.

    Args:
        where: what an error calls the table.
        mapping: ours to theirs.
        there: the table's columns.
        key: begins the remedy.
    """
    texts = [found for name in KNOWN["caption"] if (found := find_name(where, (name,), there))]
    if "caption" not in mapping and len(texts) > 1:
        choices = " or ".join(f"{key}caption={text}" for text in texts)
        raise DataError(
            f"{where} has the columns {' and '.join(texts)}; say which one has the prompts that "
            f"the images were made for: {choices}"
        )


def _check_mapping(
    where: str, mapping: Mapping[str, str], names: dict[str, str], there: list[str]
) -> None:
    """Refuse a mapping that names no column, or one twice; what was mapped has no second use."""
    for ours, theirs in mapping.items():
        if not names[ours]:
            raise DataError(
                f"{where}: data.columns.{ours}={theirs} names no column; it has {', '.join(there)}"
            )
        other = _OTHER.get(ours, "")
        if names.get(other) == names[ours] and other in mapping:
            raise DataError(
                f"{where}: data.columns.{ours} and {other} both name {theirs}; correct one"
            )
        names |= {other: ""} if names.get(other) == names[ours] else {}
    if _RATING.search(mapping.get("ranks", "")):
        raise DataError(
            f"{where}: data.columns.ranks={mapping['ranks']} would take 1 for the best; write "
            f"data.columns.scores={mapping['ranks']} if higher is better, or rename the column"
        )


def our_names(
    mapping: Mapping[str, str],
    known: Mapping[str, Sequence[str]] = KNOWN,
    key: str = "data.columns: ",
) -> dict[str, str]:
    """Write a mapping of columns with our names, which may also be known ones: prompt, image.

    Args:
        mapping: as it was given, to theirs.
        known: ours to the names that are understood.
        key: begins an error.

    Raises:
        DataError: a name is no known one, or two of them mean the same.
    """
    found: dict[str, str] = {}
    for given, theirs in mapping.items():
        ours = [given] if given in known else [k for k, v in known.items() if plain(given) in v]
        ours = ours or ["scores"] * ("scores" in known and bool(_RATING.match(given)))
        if not ours:
            raise DataError(f"{key}{given!r} is not one of {', '.join(known)}")
        if ours[0] in found:
            raise DataError(f"{key}{given} names {ours[0]} a second time; give one of them")
        found[ours[0]] = theirs
    return found


def find_name(where: str, options: Iterable[str], there: list[str]) -> str:
    """Find the first of these names among columns, or in one, as ``chosen.image``; "" if none."""
    for name in options:
        same = [c for c in there if c == name] or [c for c in there if plain(c) == plain(name)]
        if len(same) > 1 and same[0] != name:
            raise DataError(
                f"{where} has two columns named {plain(name)} ({' and '.join(same)}); rename or "
                "drop one"
            )
        if same or (name.partition(".")[0] in there and "." in name):
            return same[0] if same else name
    return ""


def inner_names(row: Mapping[str, Any] | pa.Schema) -> list[str]:
    """List a table's columns, those in a column as well: ``images.chosen``."""
    if isinstance(row, pa.Schema):
        row = {
            f.name: dict.fromkeys(c.name for c in f.type) if is_struct(f.type) else f for f in row
        }
    inner = [f"{k}.{c}" for k, v in row.items() if isinstance(v, Mapping) for c in v]
    return [*row, *(name for name in inner if name not in row and not name.endswith(_STORED))]


def plain(name: str) -> str:
    """Spell a name without capitals, with _ for spaces, dots and dashes."""
    return re.sub(r"[\s._-]+", "_", name.strip("\ufeff \t")).lower()


def top(name: str, there: Sequence[str]) -> str:
    """Give the column that a name such as ``chosen.image`` lies in: the whole name if it is one."""
    return name if name in there else name.partition(".")[0]


def cells(row: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """Name a row's cells as we do: the image of ``{"image": ...}``, the entry of a list of one."""
    found: dict[str, Any] = {}
    for ours, theirs in table.names.items():
        value: Any = row
        for part in [theirs] if theirs in row else theirs.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and "image" in value and ours != "scene_graph":
            value = value["image"]
        single = ours in _ONE and isinstance(value, list) and len(value) == 1
        value = value[0] if single else value
        several = isinstance(value, list) and ours == "images"
        found[ours] = [_named(v, table) for v in value] if several else _named(value, table)
    return found


def _named(value: Any, table: Table) -> Any:
    """Take the path of ``{"path": ...}`` without bytes, where a table names files."""
    named = table.folder is not None and isinstance(value, Mapping) and not value.get("bytes")
    return value["path"] if named and "path" in value else value


def check_types(where: str, schema: Any, table: Table) -> None:
    """Raise DataError if a column of an Arrow table cannot be what it is taken for."""
    for ours, theirs in table.names.items():
        dotted = theirs not in schema.names
        if schema.get_field_index(top(theirs, schema.names)) < 0:  # as for a name that is twice
            raise DataError(f"{where} has two columns named {theirs}; rename or drop one")
        if dotted or ours not in _TYPES:  # within a column: looked at by row
            continue
        kind, (allowed, wanted) = schema.field(theirs).type, _TYPES[ours]
        for part in ("image", "bytes") if allowed is _IMAGE[0] else ():
            if is_struct(kind) and kind.get_field_index(part) >= 0:
                kind = kind.field(part).type
        if ours == "caption" and pa.types.is_list(kind):
            kind = kind.value_type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if str(kind) in allowed or (allowed is _NUMBERS and pa.types.is_decimal(kind)):
            continue
        stored = schema.field(theirs).type
        raise DataError(f"{where}: column {theirs} holds {stored}; store it as {wanted}")
