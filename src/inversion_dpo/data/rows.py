"""From a table's row to the one form in which every format is checked: two images and a label."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote

from PIL import Image

from inversion_dpo.data.columns import Table
from inversion_dpo.data.images import DataError, decode_image, is_picture
from inversion_dpo.data.masks import decode_mask
from inversion_dpo.data.vocabulary import choice_of
from inversion_dpo.run.words import seen

MAX_IMAGE_BYTES = 2**28  # a larger file is not read: no image of 2**26 pixels needs it
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".avif")  # suffixes of image files
# Those of images that people have besides: each is tried, and named if it cannot be read.
PICTURES = (*IMAGES, ".jfif", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".jxl")
EMPTY = ("", "nan", "none", "null", "<na>", "#n/a", "n/a", "na")  # what tables write for no text
UNLABELLED = "unlabelled"  # the label of a row that says itself that it has none
NO_ROWS = ("hidden", "strays")  # files beside the data, of the system or of the user
LEFT_OUT = ("unpaired", *NO_ROWS, UNLABELLED)  # kinds of faults that are no faults of the data


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
    images are called in errors. called: the same, in a sentence about the pair. labelled: whether
    the label was in the data, rather than in the order of the images. single: one image, given
    twice; label 1 if it is liked, else 0. source: the image that they edit, if the data are of
    edits. mask: where errors count, if the data say. seeds: of the noise that the images were
    sampled from. group: of the prompt, if it has an id. fault: why no part of the row is usable.
    """

    where: str
    caption: str | None
    images: tuple[Encoded, Encoded] = (None, None)
    names: tuple[str, str] = ("jpg_0", "jpg_1")
    label: float | str | None = 1.0
    preference: float | str | None = None
    scene_graph: str | None = None
    called: tuple[str, str] = ("image 0", "image 1")
    labelled: bool = False
    single: bool = False
    source: Encoded = None
    mask: Encoded = None
    seeds: tuple[int | None, ...] = ()
    group: str | None = None
    fault: Fault | None = None

    @property
    def left_out(self) -> str | None:
        """Why a sound row is no preference; None if it is one (or is not sound)."""
        if self.fault:
            return self.fault.kind if self.fault.kind in LEFT_OUT else None
        if self.label == 0.5:
            return "ties"
        if self.label == UNLABELLED:
            return UNLABELLED
        first, second = self.encoded
        same = first == second and self.label in (0.0, 1.0) and not self.single
        return "identical" if same and is_picture(first) else None

    @property
    def pictures(self) -> list[tuple[str, Encoded]]:
        """Each image that the row needs, and what an error calls it; any source and mask last."""
        both = list(zip(self.names, self.images, strict=True))[: 1 if self.single else 2]
        more = [("source", self.source), ("mask", self.mask)]
        return both + [(name, image) for name, image in more if image is not None]

    @property
    def encoded(self) -> tuple[bytes, bytes]:
        """The images of a row without faults."""
        first, second = (image if isinstance(image, bytes) else b"" for image in self.images)
        return first, second


def inspect(row: Row, decode: bool = True) -> tuple[list[Fault], list[Image.Image]]:
    """List what is wrong with a row, with its place, and give its sound images, any source last.

    Without ``decode`` images are taken for sound, and there are none.
    """
    if row.fault:
        return [Fault(row.fault.kind, f"{row.where}: {row.fault.text}")], []
    faults: list[Fault] = []
    images: list[Image.Image] = []
    if row.label not in (0.0, 1.0):
        remedy = "write 1 (image 0 preferred), 0 (image 1) or 0.5 (tie), or drop the row"
        if row.label is None:
            remedy += "; if another column says it: data.columns.label_0=ITS_NAME"
            remedy += "; to label pairs by hand: inversion-dpo web DATA"
        elif isinstance(row.label, float) and 0 < row.label < 1:
            remedy += "; if it is a share of the votes: data.columns.share_0=label_0"
        elif isinstance(row.label, str):
            remedy += "; for words such as left, A or tie: data.columns.choice=ITS_NAME"
        text = f"{row.where}: label_0 is {shown(row.label)}; {remedy}"
        faults.append(Fault("bad_labels", text))
    p = row.preference
    if p is not None and not (isinstance(p, float) and 0 <= p <= 1):
        remedy = "write the probability that image 0 is better, 0 to 1, or leave it empty"
        text = f"{row.where}: preference_0 is {shown(p)}; {remedy}"
        faults.append(Fault("bad_labels", text))
    elif (
        isinstance(p, float) and isinstance(row.label, float) and (p - 0.5) * (row.label - 0.5) < 0
    ):
        better, share = row.called[row.label == 0.0], p if row.label else 1 - p
        text = (
            f"{row.where}: {better} is the better one by its label, and has {share:.2g} of the "
            "votes; correct label or votes, or drop the row"
        )
        faults.append(Fault("bad_labels", text))
    caption = seen(row.caption or "")
    if caption.lower() in EMPTY:
        remedy = "write the prompt that both images were made for, or drop the row"
        what = f"is {row.caption!r}, an empty cell" if caption else "is empty or no text"
        text = f"{row.where}: caption {what}; {remedy}"
        faults.append(Fault("empty_captions", text))
    for name, data in row.pictures:
        place = f"{row.where}, {name}"
        if isinstance(data, Fault):
            faults.append(Fault(data.kind, f"{place}: {data.text}"))
        elif not data:
            text = f"{place}: no image; embed the file's bytes, name the file, or drop the row"
            faults.append(Fault("broken_images", text))
        elif decode:
            try:
                masks = name == "mask" and not faults
                side = row.label == 0.0 and not row.single
                size = images[side].size[::-1] if masks else None
                images.append(decode_mask(data, size, place) if size else decode_image(data, place))
            except DataError as error:
                faults.append(Fault("broken_images", str(error)))
    return faults, images


def row_of(raw: Raw) -> Row:
    """Take a raw row of two images for what its table says that it is."""
    if raw.fault:
        return Row(raw.where, None, fault=raw.fault)
    table, values = raw.table, raw.values
    labelled = "jpg_0" in table.names
    first, second = ("jpg_0", "jpg_1") if labelled else ("winner", "loser")
    label, preference = values.get("tie", 1.0), number(values.get("preference_0"))
    if (votes := values.get("votes")) not in (None, ""):
        if isinstance(votes, str) and re.fullmatch(r"\[\d+, ?\d+\]", votes):  # in a CSV
            votes = json.loads(votes)
        two = isinstance(votes, list) and len(votes) == 2
        said = _of_shares(*map(number, votes)) if two else _NO_VOTES
        if isinstance(said, Fault):
            return Row(raw.where, None, fault=said)
        preference = said[1]
        if not labelled and said[0] in (0.5, UNLABELLED):  # else the order or a label says it
            label = said[0]
    if table.kind == "shares":
        said = _of_shares(number(values["share_0"]), number(values.get("share_1")))
        if isinstance(said, Fault):
            return Row(raw.where, None, fault=said)
        label, preference = said
    elif table.kind == "worded":
        try:
            chosen = choice_of(values.get("choice"), table, [values[first], values[second]])
        except DataError as error:
            return Row(raw.where, None, fault=Fault("bad_labels", str(error)))
        label = UNLABELLED if chosen is None else chosen
    elif labelled:
        label = _label(values)
        if isinstance(label, Fault):
            return Row(raw.where, None, fault=label)
    cells = ("", "") if label in (0.5, UNLABELLED) else (values[first], values[second])
    names = (table.names[first], table.names[second])
    called = [v if isinstance(v, str) and v else n for v, n in zip(cells, names, strict=True)]
    caption, graph = values["caption"], values.get("scene_graph")
    # JSON can spell half of a surrogate pair, which UTF-8 cannot hold
    whole = isinstance(caption, str) and caption == caption.encode(errors="ignore").decode()
    graph = json.dumps(graph) if isinstance(graph, dict) else graph
    image, single = encoded_image(cells[0], table), table.kind == "single"
    return Row(
        where=raw.where,
        caption=caption if whole else None,
        images=(image, image if single else encoded_image(cells[1], table)),
        names=names,
        called=values.get("called", (called[0], called[1])),
        label=label,
        preference=preference,
        scene_graph=graph if isinstance(graph, str) and graph else None,
        labelled=labelled,
        single=single,
        source=_needed("source", "no image to be edited; embed or name it", values, table),
        mask=_needed("mask", "no mask; give a white one if the whole image counts", values, table),
        seeds=(seed_of(values.get("seed_0")), seed_of(values.get("seed_1"))),
        group=group_of(values.get("group")),
    )


def _needed(name: str, missing: str, values: Mapping[str, Any], table: Table) -> Encoded:
    """Take an image that every row must have, if it has a column; None if it has none."""
    if name not in table.names:
        return None
    text = f"{missing}, or drop the row"
    return encoded_image(values.get(name), table) or Fault("broken_images", text)


_NO_VOTES = Fault("bad_labels", "the votes are no list of two counts, such as [7, 3]; write one")


def _label(values: Mapping[str, Any]) -> float | str | Fault | None:
    """Read label_0 as 1, 0, -1 or 0.5; UNLABELLED where has_label or both labels say so."""
    first, second = number(values.get("label_0")), number(values.get("label_1"))
    has = str(values.get("has_label")).strip().lower()
    if has in ("false", "0", "0.0", "no") or first == second == 0:
        return UNLABELLED
    if second is None or (first, second) in ((1, 0), (0, 1), (0.5, 0.5), (1, -1), (-1, 1)):
        return first
    text = f"label_0 is {shown(first)} and label_1 is {shown(second)}"
    remedy = "write 1 for the preferred image and 0 for the other, twice 0.5 for a tie"
    return Fault("bad_labels", f"{text}; {remedy}, or drop the row")


def _of_shares(
    first: float | str | None, second: float | str | None
) -> tuple[float | str, float] | Fault:
    """Label and preference of the first image from counts or shares of votes for each."""
    known = [x for x in (first, second) if isinstance(x, float) and 0 <= x < math.inf]
    if len(known) == 1 and second is None and known[0] <= 1:
        known.append(1 - known[0])
    if len(known) < 2:
        remedy = (
            "write counts, per cent or shares of the votes for each image (data.columns.share_1)"
        )
        text = f"the votes are {shown(first)} and {shown(second)}; {remedy}"
        return Fault("bad_labels", text)
    if not sum(known):
        return UNLABELLED, 0.5
    share = known[0] / sum(known)
    return 0.5 if share == 0.5 else float(share > 0.5), share


def image_paths(raw: Raw) -> Iterator[Path]:
    """Find the files that a row names and that may be read."""
    for ours in ("jpg_0", "jpg_1", "winner", "loser", "images", "source", "mask"):
        value = raw.values.get(ours)
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and raw.table.folder:
                path = find_inside(raw.table.folder, name, raw.table.stem, raw.table.root)
                if isinstance(path, Path):
                    yield path


def is_hidden(name: str) -> bool:
    """Tell whether macOS or Windows put a file there, such as ``._x.png`` or Thumbs.db."""
    marked = name.startswith((".", "__MACOSX")) and name not in (".", "..")
    return marked or name.lower() in ("thumbs.db", "desktop.ini")


def find_inside(folder: Path, name: str, stem: str = "", root: Path | None = None) -> Path | Fault:
    """Find the image file that a row names, in the table's folder and nowhere outside of ``root``.

    With the ``stem`` of a table of rankings it is also looked for under FOLDER/STEM (where the
    images of HPDv2's train.json are unpacked), then by its last part beside the table
    (ImageRewardDB). root: the folder itself by default; paths may start from it, too.

    Args:
        folder: of the table.
        name: as the row has it.
        stem: of a table of rankings, else empty.
        root: the folder that paths may lead to.
    """
    inside = root or folder
    edge, bases = os.path.abspath(inside), dict.fromkeys([folder, inside])
    whole = (base / spelling for base in bases for spelling in _spellings(name))
    places = (path for path in whole if Path(os.path.abspath(path)).is_relative_to(edge))
    first = next(places, None)
    if PureWindowsPath(name).drive or "\0" in name or first is None:
        remedy = "move the image there and write its path from there, or set data.root=FOLDER"
        return Fault("bad_paths", f"{shown(name)} leads out of {inside}; {remedy}")
    named = [folder / stem / name, folder / PurePosixPath(name).name] if stem else []
    try:
        found = next((path for path in chain([first], places, named) if path.is_file()), None)
    except OSError:  # such as a name that is too long
        found = None
    if found is None:
        remedy = "put it there"
        if re.match("https?://", name):
            remedy = "download it and name the file"
        elif re.match("data:|/9j/|iVBORw0|UklGR", name):  # JPEG, PNG and WebP as base64
            remedy = "this is an image as text; write it to a file, or as bytes to Parquet"
        return Fault("broken_images", f"there is no file {shown(name)} in {inside}; {remedy}")
    if not found.resolve().is_relative_to(inside.resolve()):
        return Fault("bad_paths", f"{shown(name)} is a link out of {inside}; copy the image there")
    return found


def _spellings(name: str) -> Iterator[str]:
    """Spell a file's name as given, then as other systems do.

    A spreadsheet of Windows has backslashes, and 1.PNG for 1.png; macOS spells an accented letter
    as two characters; tools for labelling write a%20b.png or file:///a.png.
    """
    plain = unquote(name.strip().removeprefix("file://"))
    for given in dict.fromkeys([name, plain]):
        for form in dict.fromkeys([given, given.replace("\\", "/")]):
            yield form
            yield from (unicodedata.normalize(way, form) for way in ("NFC", "NFD"))
    if suffix := PurePosixPath(plain.replace("\\", "/")).suffix:
        stem = plain.replace("\\", "/").removesuffix(suffix)
        yield from (stem + suffix.lower(), stem + suffix.upper())


def encoded_image(value: Any, table: Table) -> Encoded:
    """Take the encoded image of a cell; of a {bytes, path} struct the bytes only, never a path."""
    if isinstance(value, dict) and not value.keys().isdisjoint(("bytes", "path")):
        value = value.get("bytes")
    if value is None or value == "" or isinstance(value, bytes | Fault):
        return value or None
    if not isinstance(value, str) or table.folder is None:
        return Fault("broken_images", f"holds {shown(value)}, not an image; embed its bytes")
    path = find_inside(table.folder, value, table.stem, table.root)
    if isinstance(path, Fault):
        return path
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            return Fault("broken_images", f"{path} is over {MAX_IMAGE_BYTES} bytes; shrink it")
        return path.read_bytes() or Fault("broken_images", f"{path} is empty; write it again")
    except OSError as error:
        return Fault("broken_images", f"{path} cannot be read ({error.strerror}); see who may")


def number(value: Any) -> float | str | None:
    """Read a label, rank or score as a number; what is none is left for the error to show.

    Text may be true or false, end in %, or have a decimal comma. What may be a thousand as well,
    such as 1,234, is none.
    """
    if value is None or value == "":
        return None
    try:
        if not isinstance(value, str):
            return float(value)
        text = value.strip().lower()
        if re.fullmatch(r"-?[1-9]\d{0,2}([,.]\d{3})*,\d{3}([,.]\d*)?", text):
            return f"{value} (write a thousand without a comma, a fraction with a point)"
        text = text.replace(",", ".")
        text = {"true": "1", "false": "0"}.get(text, text)
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except (TypeError, ValueError, OverflowError):
        return str(value)


def seed_of(value: Any) -> int | None:
    """Read a seed, every digit of it; None if it is no whole number from 0 to 2^63 - 1."""
    text = str(value).strip().removesuffix(".0")
    return int(text) if text.isascii() and text.isdigit() and int(text) < 2**63 else None


def group_of(value: Any) -> str | None:
    """Read the id of a prompt; None if it is no text and no whole number."""
    whole = isinstance(value, float) and value.is_integer()
    known = whole or (isinstance(value, str | int) and value != "")
    return (f"{value:.0f}" if whole else str(value)) if known else None


def shown(value: Any) -> str:
    """Write a cell for an error, in short."""
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else repr(value)[:60]
