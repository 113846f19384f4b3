"""From a table's row to the one form in which every format is checked: two images and a label."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from inversion_dpo.data.columns import Layout
from inversion_dpo.data.images import DataError, decode_image
from inversion_dpo.data.rankings import order

MAX_IMAGE_BYTES = 2**28  # a larger file is not read: no image of 2**26 pixels needs it


@dataclass(frozen=True)
class Fault:
    """Why something cannot be used: what it is counted as, and the reason with its remedy."""

    kind: str
    text: str


Encoded = bytes | Fault | None


@dataclass(frozen=True)
class Table:
    """Where raw rows come from.

    names: the table's own names by ours. folder: the image files that rows name lie in here; None
    if paths are not followed. stem: the table's file name without its suffix.
    """

    layout: Layout
    folder: Path | None = None
    stem: str = ""


@dataclass(frozen=True)
class Raw:
    """One row as its file has it, under our names, or the fault that made it unreadable."""

    where: str  # "train.parquet, row 7"
    table: Table
    values: Mapping[str, Any]
    fault: Fault | None = None


@dataclass(frozen=True)
class Row:
    """Two images of one caption. label: 1 if the first is preferred, 0 the second, 0.5 a tie.

    preference: probability that the first is the better one, if the data say.

    names: what the images are called in errors. labelled: whether the label was in the data,
    rather than in the order of the images. single: one image, given twice. fault: why the row as
    a whole cannot be used.
    """

    where: str
    caption: str | None
    images: tuple[Encoded, Encoded] = (None, None)
    names: tuple[str, str] = ("jpg_0", "jpg_1")
    label: float | str | None = 1.0
    preference: float | str | None = None
    scene_graph: str | None = None
    labelled: bool = False
    single: bool = False
    fault: Fault | None = None

    @property
    def left_out(self) -> str | None:
        """Why a sound row is no preference; None if it is one (or is not sound)."""
        if self.fault:
            return "unpaired" if self.fault.kind == "unpaired" else None
        if self.label == 0.5:
            return "ties"
        sound = self.label in (0.0, 1.0)
        same = self.images[0] == self.images[1] and isinstance(self.images[0], bytes)
        return "identical" if sound and same and self.images[0] and not self.single else None


def inspect(row: Row, decode: bool = True) -> tuple[list[Fault], list[Image.Image]]:
    """What is wrong with a row, with its place, and its sound images.

    Without ``decode`` images are taken for sound, and there are none.
    """
    if row.fault:
        return [Fault(row.fault.kind, f"{row.where}: {row.fault.text}")], []
    faults: list[Fault] = []
    images: list[Image.Image] = []
    if row.label not in (0.0, 1.0):
        text = f"{row.where}: label_0 is {_shown(row.label)}"
        remedy = "write 1 (image 0 preferred), 0 (image 1) or 0.5 (tie), or drop the row"
        if row.label is None:
            remedy += "; to label pairs by hand: inversion-dpo web DATA"
        faults.append(Fault("bad_labels", f"{text}; {remedy}"))
    if not _probability(row.preference):
        text = f"{row.where}: preference_0 is {_shown(row.preference)}"
        remedy = "write the probability that image 0 is better, 0 to 1, or leave it empty"
        faults.append(Fault("bad_labels", f"{text}; {remedy}"))
    if not (row.caption or "").strip():
        text = f"{row.where}: caption is empty or no text"
        remedy = "write the prompt that both images were made for, or drop the row"
        faults.append(Fault("empty_captions", f"{text}; {remedy}"))
    for name, data in zip(row.names, row.images, strict=True):
        place = f"{row.where}, {name}"
        if isinstance(data, Fault):
            faults.append(Fault(data.kind, f"{place}: {data.text}"))
            continue
        if not data:
            text = f"{place}: no image; embed the file's bytes, name the file, or drop the row"
            faults.append(Fault("broken_images", text))
            continue
        if not decode:
            continue
        try:
            images.append(decode_image(data, place))
        except DataError as error:
            faults.append(Fault("broken_images", str(error)))
    return faults, images


def rows_of(raws: Iterable[Raw], scheme: str) -> Iterator[Row]:
    """The rows to be checked: one for each labelled row, and for rankings one for each pair.

    Args:
        raws: rows of any layout.
        scheme: which pairs a ranking gives, see :func:`rankings.order`.
    """
    group = _Group()
    for raw in raws:
        if raw.fault:
            yield from group.close(scheme)
            yield Row(raw.where, None, fault=raw.fault)
        elif raw.table.layout.kind in ("ranking", "choice"):
            yield from group.add(raw, scheme)
        else:
            yield _row(raw)
    yield from group.close(scheme)


def image_paths(raw: Raw) -> Iterator[Path]:
    """The files that a row names and that may be read."""
    for ours in ("jpg_0", "jpg_1", "winner", "loser", "images"):
        value = raw.values.get(ours)
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and raw.table.folder:
                path = find_inside(raw.table, name)
                if isinstance(path, Path):
                    yield path


def find_inside(table: Table, name: str) -> Path | Fault:
    """The image file that a row names, which must lie in the table's folder.

    Of a ranking also looked for under FOLDER/STEM (where the images of HPDv2's train.json are
    unpacked), then by its last part beside the table (ImageRewardDB).
    """
    folder, parts = table.folder or Path(), PurePosixPath(name)
    outside = parts.is_absolute() or PureWindowsPath(name).anchor or ".." in name.split("/")
    if outside or "\0" in name or "\\" in name:
        remedy = "move the image there and write its path from there"
        return Fault("bad_paths", f"{_shown(name)} leads out of {folder}; {remedy}")
    # macOS spells an accented letter as two characters, others as one
    spellings = (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
    places = [folder / spelling for spelling in dict.fromkeys(spellings)]
    if table.layout.kind in ("ranking", "choice"):
        places += [folder / table.stem / name, folder / parts.name]
    try:
        found = next((path for path in places if path.is_file()), None)
    except OSError:  # such as a name that is too long
        found = None
    if found is None:
        return Fault("broken_images", f"there is no file {_shown(name)} in {folder}; put it there")
    if not found.resolve().is_relative_to(folder.resolve()):
        return Fault("bad_paths", f"{_shown(name)} is a link out of {folder}; copy the image there")
    return found


def _probability(value: float | str | None) -> bool:
    return value is None or (isinstance(value, float) and 0 <= value <= 1)


def _row(raw: Raw) -> Row:
    values, names = raw.values, raw.table.layout.names
    labelled = raw.table.layout.kind in ("labelled", "unlabelled")
    first, second = ("jpg_0", "jpg_1") if labelled else ("winner", "loser")
    label = number(values.get("label_0")) if labelled else 1.0
    load = label != 0.5
    return Row(
        where=raw.where,
        caption=_text(values["caption"]),
        images=(
            encoded_image(values[first], raw.table) if load else None,
            encoded_image(values[second], raw.table) if load else None,
        ),
        names=(names[first], names[second]),
        label=label,
        preference=number(values.get("preference_0")),
        scene_graph=_graph(values.get("scene_graph")),
        labelled=labelled,
        single=raw.table.layout.kind == "single",
    )


class _Group:
    """Collects consecutive rows of one prompt, then gives the pairs of their ranking."""

    def __init__(self) -> None:
        self.raws: list[Raw] = []
        self.key: object = None
        self.seen: set[object] = set()

    def add(self, raw: Raw, scheme: str) -> Iterator[Row]:
        """Take a row; first give the pairs of the group before it, if this begins another."""
        key = raw.values.get("group")
        if isinstance(raw.values["images"], list):  # the row is a whole ranking
            yield from self.close(scheme)
            yield from _ranked(raw.where, [raw], scheme)
            return
        if self.raws and key != self.key:
            yield from self.close(scheme)
        remedy = None
        if not isinstance(key, str | int):
            remedy = (
                f"prompt_id is {_shown(key)}; write a text or a whole number that says which rows "
                "belong together (data.columns.group)"
            )
        elif key in self.seen:
            remedy = f"prompt_id {key} was seen before other rows; sort the rows by it"
        if remedy:
            yield Row(raw.where, None, fault=Fault("bad_rows", remedy))
            return
        self.key = key
        self.raws.append(raw)

    def close(self, scheme: str) -> Iterator[Row]:
        """Give the pairs of the rows collected, and begin anew."""
        raws, self.raws = self.raws, []
        if not raws:
            return
        self.seen.add(self.key)
        last = raws[-1].where.rpartition("row ")[2]
        where = raws[0].where + (f" to {last}" if len(raws) > 1 else "")
        yield from _ranked(where, raws, scheme)


def _ranked(where: str, raws: list[Raw], scheme: str) -> Iterator[Row]:
    """The pairs of one ranking: rows of one image each, or one row of all images."""
    table, first = raws[0].table, raws[0].values
    by = "ranks" if table.layout.kind == "ranking" else "preferences"
    whole = isinstance(first["images"], list)
    images = first["images"] if whole else [raw.values["images"] for raw in raws]
    ranks = first[by] if whole else [raw.values[by] for raw in raws]
    fault = _ranking_fault(images, ranks, {_shown(raw.values["caption"]) for raw in raws})
    if fault:
        yield Row(where, None, fault=fault)
        return
    sign = 1 if by == "ranks" else -1
    values = [sign * float(rank) for rank in ranks]
    loaded: dict[int, Encoded] = {}
    for w, l in order(values, scheme):
        tie = values[w] == values[l]
        for k in () if tie else (w, l):
            loaded[k] = loaded[k] if k in loaded else encoded_image(images[k], table)
        yield Row(
            where=f"{where}, images {w} and {l}",
            caption=_text(first["caption"]),
            images=(loaded.get(w), loaded.get(l)),
            names=(f"image {w}", f"image {l}"),
            label=0.5 if tie else 1.0,
            scene_graph=_graph(first.get("scene_graph")),
        )


def _ranking_fault(images: Any, ranks: Any, captions: set[Any]) -> Fault | None:
    if not isinstance(ranks, list) or len(ranks) != len(images):
        count = len(ranks) if isinstance(ranks, list) else "no"
        return Fault("bad_rows", f"{len(images)} images and {count} ranks; give one each")
    numbers = [number(rank) for rank in ranks]
    if not all(isinstance(n, float) and math.isfinite(n) for n in numbers):
        return Fault("bad_rows", f"ranks are {_shown(ranks)}; write a number for each image")
    if len(captions) > 1:
        return Fault("bad_rows", "rows of one prompt_id differ in caption; give each its own")
    if len(images) < 2:
        return Fault("unpaired", "one image alone is no pair; add another or drop the row")
    return None


def encoded_image(value: Any, table: Table) -> Encoded:
    """Encoded image of a cell; of a {bytes, path} struct the bytes only: no path is followed."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None or value == "" or isinstance(value, bytes | Fault):
        return value or None
    if not isinstance(value, str) or table.folder is None:
        return Fault("broken_images", f"holds {_shown(value)}, not an image; embed its bytes")
    path = find_inside(table, value)
    if isinstance(path, Fault):
        return path
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            return Fault("broken_images", f"{path} is over {MAX_IMAGE_BYTES} bytes; shrink it")
        return path.read_bytes()
    except OSError as error:
        return Fault("broken_images", f"{path} cannot be read ({error.strerror}); see who may")


def number(value: Any) -> float | str | None:
    """A label or rank as a number; what is none is left for the error to show."""
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)


def _text(value: Any) -> str | None:
    """Text that UTF-8 can hold (JSON can spell half of a surrogate pair), else None."""
    whole = isinstance(value, str) and value == value.encode(errors="ignore").decode()
    return value if whole else None


def _graph(value: Any) -> str | None:
    if isinstance(value, dict):
        return json.dumps(value)
    return value or None if isinstance(value, str) else None


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else repr(value)[:60]
