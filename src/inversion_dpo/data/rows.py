"""From a table's row to the one form in which every format is checked: two images and a label."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby, pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from inversion_dpo.data.columns import RANKED, Table
from inversion_dpo.data.images import DataError, decode_image

MAX_IMAGE_BYTES = 2**28  # a larger file is not read: no image of 2**26 pixels needs it
# Which pairs (better, worse) a ranking gives, from its places, the best first: one pair; each image
# with the next one down; every two. Images of equal rank keep their order; their pairs are ties.
SCHEMES: dict[str, Callable[[Sequence[int]], Iterable[tuple[int, int]]]] = {
    "best_worst": lambda places: [(places[0], places[-1])],
    "adjacent": pairwise,
    "all": lambda places: combinations(places, 2),
}


@dataclass(frozen=True)
class Fault:
    """Why something cannot be used: what it is counted as, and the reason with its remedy."""

    kind: str
    text: str


Encoded = bytes | Fault | None


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

    preference: probability that the first is the better one, if the data say. names: what the
    images are called in errors. labelled: whether the label was in the data, rather than in the
    order of the images. single: one image, given twice. fault: why no part of the row is usable.
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

    @property
    def encoded(self) -> tuple[bytes, bytes]:
        """The images of a row without faults."""
        first, second = (image if isinstance(image, bytes) else b"" for image in self.images)
        return first, second


def inspect(row: Row, decode: bool = True) -> tuple[list[Fault], list[Image.Image]]:
    """List what is wrong with a row, with its place, and give its sound images.

    Without ``decode`` images are taken for sound, and there are none.
    """
    if row.fault:
        return [Fault(row.fault.kind, f"{row.where}: {row.fault.text}")], []
    faults: list[Fault] = []
    images: list[Image.Image] = []
    if row.label not in (0.0, 1.0):
        remedy = "write 1 (image 0 preferred), 0 (image 1) or 0.5 (tie), or drop the row"
        if row.label is None:
            remedy += "; to label pairs by hand: inversion-dpo web DATA"
        text = f"{row.where}: label_0 is {_shown(row.label)}; {remedy}"
        faults.append(Fault("bad_labels", text))
    p = row.preference
    if p is not None and not (isinstance(p, float) and 0 <= p <= 1):
        remedy = "write the probability that image 0 is better, 0 to 1, or leave it empty"
        text = f"{row.where}: preference_0 is {_shown(p)}; {remedy}"
        faults.append(Fault("bad_labels", text))
    if not (row.caption or "").strip():
        remedy = "write the prompt that both images were made for, or drop the row"
        text = f"{row.where}: caption is empty or no text; {remedy}"
        faults.append(Fault("empty_captions", text))
    for name, data in zip(row.names, row.images, strict=True):
        place = f"{row.where}, {name}"
        if isinstance(data, Fault):
            faults.append(Fault(data.kind, f"{place}: {data.text}"))
        elif not data:
            text = f"{place}: no image; embed the file's bytes, name the file, or drop the row"
            faults.append(Fault("broken_images", text))
        elif decode:
            try:
                images.append(decode_image(data, place))
            except DataError as error:
                faults.append(Fault("broken_images", str(error)))
    return faults, images


def rows_of(raws: Iterable[Raw], scheme: str) -> Iterator[Row]:
    """Give the rows to be checked: for rankings one for each pair of a scheme of SCHEMES."""
    seen: set[object] = set()
    for ranked, part in groupby(raws, lambda raw: raw.table.kind in RANKED and not raw.fault):
        yield from map(_row, _unranked(part, scheme, seen) if ranked else part)  # noqa: B031


def _row(raw: Raw) -> Row:
    if raw.fault:
        return Row(raw.where, None, fault=raw.fault)
    table, values = raw.table, raw.values
    labelled = table.kind in ("labelled", "unlabelled")
    first, second = ("jpg_0", "jpg_1") if labelled else ("winner", "loser")
    label = number(values.get("label_0")) if labelled else values.get("tie", 1.0)
    shown = ("", "") if label == 0.5 else (values[first], values[second])
    caption, graph = values["caption"], values.get("scene_graph")
    # JSON can spell half of a surrogate pair, which UTF-8 cannot hold
    whole = isinstance(caption, str) and caption == caption.encode(errors="ignore").decode()
    graph = json.dumps(graph) if isinstance(graph, dict) else graph
    return Row(
        where=raw.where,
        caption=caption if whole else None,
        images=(encoded_image(shown[0], table), encoded_image(shown[1], table)),
        names=(table.names[first], table.names[second]),
        label=label,
        preference=number(values.get("preference_0")),
        scene_graph=graph if isinstance(graph, str) and graph else None,
        labelled=labelled,
        single=table.kind == "single",
    )


def _unranked(raws: Iterable[Raw], scheme: str, seen: set[object]) -> Iterator[Raw]:
    """Rows of two images from rankings: rows of all images, or a row for each image of a prompt.

    ``seen`` collects the prompts' ids, whose rows must stand together.
    """

    def group(raw: Raw) -> object:
        key = raw.values.get("group")
        whole = isinstance(raw.values["images"], list)
        return raw.where if whole or not isinstance(key, str | int) else (key,)

    for key, part in groupby(raws, group):
        rows = list(part)
        remedy = None
        if isinstance(key, tuple):
            if key in seen:
                remedy = f"prompt_id {key[0]} was seen before other rows; sort the rows by it"
            seen.add(key)
        elif not isinstance(rows[0].values["images"], list):
            remedy = (
                f"prompt_id is {_shown(rows[0].values.get('group'))}; write a text or a whole "
                "number that says which rows belong together (data.columns.group)"
            )
        if remedy:
            yield from (replace(raw, fault=Fault("bad_rows", remedy)) for raw in rows)
        else:
            yield from _pairs_of(rows, scheme)


def _pairs_of(rows: list[Raw], scheme: str) -> Iterator[Raw]:
    """The pairs of one ranking: rows of one image each, or one row of all images."""
    table, first = rows[0].table, rows[0].values
    last = rows[-1].where.rpartition("row ")[2]
    where = rows[0].where + (f" to {last}" if len(rows) > 1 else "")
    by = "ranks" if table.kind == "ranking" else "preferences"
    whole = isinstance(first["images"], list)
    images = first["images"] if whole else [raw.values["images"] for raw in rows]
    ranks = first[by] if whole else [raw.values[by] for raw in rows]
    fault = _ranking_fault(images, ranks, {_shown(raw.values["caption"]) for raw in rows})
    if fault:
        yield Raw(where, table, {}, fault)
        return
    values = [float(rank) if by == "ranks" else -float(rank) for rank in ranks]
    loaded: dict[int, Encoded] = {}
    for w, l in SCHEMES[scheme](sorted(range(len(values)), key=values.__getitem__)):
        tie = values[w] == values[l]
        for k in () if tie else (w, l):
            loaded[k] = loaded[k] if k in loaded else encoded_image(images[k], table)
        said = {"caption": first["caption"], "scene_graph": first.get("scene_graph")}
        pair = {"winner": loaded.get(w), "loser": loaded.get(l), "tie": 0.5 if tie else 1.0}
        named = Table("chosen", {"winner": f"image {w}", "loser": f"image {l}"})
        yield Raw(f"{where}, images {w} and {l}", named, said | pair)


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


def image_paths(raw: Raw) -> Iterator[Path]:
    """Find the files that a row names and that may be read."""
    for ours in ("jpg_0", "jpg_1", "winner", "loser", "images"):
        value = raw.values.get(ours)
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and raw.table.folder:
                path = find_inside(raw.table.folder, name, raw.table.stem)
                if isinstance(path, Path):
                    yield path


def find_inside(folder: Path, name: str, stem: str = "") -> Path | Fault:
    """Find the image file that a row names, which must lie in the table's folder.

    With the ``stem`` of a table of rankings it is also looked for under FOLDER/STEM (where the
    images of HPDv2's train.json are unpacked), then by its last part beside the table
    (ImageRewardDB).
    """
    parts = PurePosixPath(name)
    outside = parts.is_absolute() or PureWindowsPath(name).anchor or ".." in name.split("/")
    if outside or "\0" in name or "\\" in name:
        remedy = "move the image there and write its path from there"
        return Fault("bad_paths", f"{_shown(name)} leads out of {folder}; {remedy}")
    # macOS spells an accented letter as two characters, others as one
    spellings = (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
    places = [folder / spelling for spelling in dict.fromkeys(spellings)]
    if stem:
        places += [folder / stem / name, folder / parts.name]
    try:
        found = next((path for path in places if path.is_file()), None)
    except OSError:  # such as a name that is too long
        found = None
    if found is None:
        return Fault("broken_images", f"there is no file {_shown(name)} in {folder}; put it there")
    if not found.resolve().is_relative_to(folder.resolve()):
        return Fault("bad_paths", f"{_shown(name)} is a link out of {folder}; copy the image there")
    return found


def encoded_image(value: Any, table: Table) -> Encoded:
    """Take the encoded image of a cell; of a {bytes, path} struct the bytes only, never a path."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None or value == "" or isinstance(value, bytes | Fault):
        return value or None
    if not isinstance(value, str) or table.folder is None:
        return Fault("broken_images", f"holds {_shown(value)}, not an image; embed its bytes")
    path = find_inside(table.folder, value, table.stem)
    if isinstance(path, Fault):
        return path
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            return Fault("broken_images", f"{path} is over {MAX_IMAGE_BYTES} bytes; shrink it")
        return path.read_bytes()
    except OSError as error:
        return Fault("broken_images", f"{path} cannot be read ({error.strerror}); see who may")


def number(value: Any) -> float | str | None:
    """Read a label or rank as a number; what is none is left for the error to show."""
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else repr(value)[:60]
