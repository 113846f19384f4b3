"""Scene-graph annotations as LAION-SG has them: files of many graphs, alone or beside their images.

A file is JSON, a list of annotations or an object of them by ``img_id``, or JSON Lines; or it is
Visual Genome's or PSG's. Reading
gives what is sound and, apart from it, one line for each row that is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inversion_dpo.data.columns import KNOWN, find_name
from inversion_dpo.data.images import DataError, decode_image
from inversion_dpo.data.rows import IMAGES, Fault, find_inside
from inversion_dpo.data.tables import encoding_of, parse_object
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.graphs.layouts import from_psg, is_psg, is_visual_genome
from inversion_dpo.graphs.statistics import format_statistics, statistics_of

MAX_LISTED = 50  # problems a report spells out
NAMES = ("annotations.json", "annotations.jsonl")


@dataclass(frozen=True)
class AnnotatedImage:
    """An image file and what its annotation says of it. where: file and row, for messages."""

    path: Path
    caption: str
    graph: SceneGraph
    where: str


def read_annotations(path: str | Path) -> tuple[list[SceneGraph], list[str]]:
    """Read the scene graphs of a file, or of a folder with one, and a line for each wrong row.

    DataError says that there is no such file, or that it is neither JSON nor JSON Lines.
    """
    rows = list(_checked(annotation_file(path)))
    graphs = [graph for _, graph in rows if isinstance(graph, SceneGraph)]
    return graphs, [fault.text for _, fault in rows if isinstance(fault, Fault)]


def read_annotated(folder: str | Path) -> tuple[list[AnnotatedImage], list[str]]:
    """Find the images that an annotation file names, and give a line for each wrong row.

    An image is looked for under ``name``, or else under ``img_id`` with .jpg, .jpeg, .png or .webp,
    in the annotation file's folder and nowhere outside of it. Images are not decoded.
    """
    file = annotation_file(folder)
    images: list[AnnotatedImage] = []
    problems: list[str] = []
    for where, graph in _checked(file):
        found = graph if isinstance(graph, Fault) else _image_of(graph, file.parent, where)
        if isinstance(found, Fault):
            problems.append(found.text)
        else:
            images.append(found)
    return images, problems


def annotation_file(path: str | Path) -> Path:
    """Give the file itself, or the one of NAMES in the folder; DataError unless it is one."""
    path = Path(path)
    if path.is_file():
        return path
    found = [path / name for name in NAMES if (path / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{path} holds both {' and '.join(NAMES)}; give one as the path")
    if not found:
        raise DataError(f"{path} is no annotation file and holds no {' or '.join(NAMES)}")
    return found[0]


def is_annotated(data: str | Path) -> bool:
    """Whether this is an annotation file, or a folder with one of NAMES: any row has ``items``.

    Pairs may have such a column, too: a row that names a better image is none.
    """
    path = Path(data)
    if path.is_dir():
        return any((path / name).is_file() for name in NAMES)
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return False
    of_pairs = (*KNOWN["winner"], *KNOWN["jpg_0"])
    return any(
        ("items" in row or is_visual_genome(row)) and not find_name("", of_pairs, list(row))
        for row in _rows(path)
        if isinstance(row, dict)
    )


def _checked(file: Path) -> Iterator[tuple[str, SceneGraph | Fault]]:
    for number, row in enumerate(_rows(file)):
        where = f"{file.name}, row {number}"
        yield where, _graph(row, where)


def _graph(row: Any, where: str) -> SceneGraph | Fault:
    if isinstance(row, Fault):
        return Fault(row.kind, f"{where}: {row.text}")
    try:
        graph = SceneGraph.from_dict(row)
    except ValueError as error:
        return Fault("bad_rows", f"{where}: {error}")
    return graph if graph.items else Fault("bad_rows", f"{where}: items is empty; name an object")


def _rows(file: Path) -> Iterator[Any]:
    """Say what stands in each row, not yet looked at; a Fault for a line that is not JSON."""
    try:
        text = file.read_text(encoding=encoding_of(file))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}); export it as UTF-8 JSON") from error
    if file.suffix != ".jsonl":
        try:
            yield from _document(json.loads(text), file)
            return
        except (ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            first = parse_object(text.lstrip().partition("\n")[0])
            if isinstance(first, Fault):
                raise DataError(f"{file} is not JSON ({error}); export it again") from error
    yield from (parse_object(line) for line in text.split("\n") if line.strip())


def _document(data: Any, file: Path) -> Iterator[Any]:
    if isinstance(data, list):
        yield from data
    elif isinstance(data, dict) and "items" in data:
        yield data
    elif is_psg(data):
        for row in from_psg(data):
            yield Fault("bad_rows", str(row)) if isinstance(row, ValueError) else row
    elif isinstance(data, dict) and isinstance(data.get("data"), list):
        yield from data["data"]
    elif isinstance(data, dict):
        for key, row in data.items():
            yield {"img_id": key, **row} if isinstance(row, dict) else row
    else:
        raise DataError(f"{file} is no list of annotations and no object of them by img_id")


def _image_of(graph: SceneGraph, folder: Path, where: str) -> AnnotatedImage | Fault:
    names = [graph.name] if graph.name else [graph.img_id + s for s in IMAGES if graph.img_id]
    if not names:
        return Fault("bad_rows", f"{where}: neither name nor img_id says which image it is of")
    found = [find_inside(folder, name) for name in names]
    best = next((path for path in found if isinstance(path, Path)), found[0])
    if isinstance(best, Fault):
        return replace(best, text=f"{where}: {best.text}")
    return AnnotatedImage(best, graph.caption, graph, where)


def check_annotations(data: str | Path) -> tuple[list[str], bool]:
    """Report on an annotation file, of a folder also on its images; say whether all is well."""
    if Path(data).is_dir():
        images, problems = read_annotated(data)
        graphs, what = [image.graph for image in images], "images with their scene graphs"
        problems += filter(None, map(_broken, images))
    else:
        (graphs, problems), what = read_annotations(data), "scene graphs"
    lines = [f"{data}: {len(graphs)} {what}", *format_statistics(statistics_of(graphs))]
    if not graphs and not problems:
        problems = [f"{data} holds no annotations"]
    head = f"  problems: {len(problems)}; rows count from 0"
    return [*lines, *listed(head, problems, len(problems))], not problems


def listed(head: str, problems: Sequence[str], total: int) -> list[str]:
    """List the first of all problems under a headline, for a report.

    Args:
        head: the headline.
        problems: the first ones, one line each.
        total: of all problems.
    """
    if not total:
        return ["  no problems"]
    shown = [f"    {text}" for text in problems[:MAX_LISTED]]
    more = total - len(shown)
    return [head, *shown, *([f"    ... and {more} more"] if more else [])]


def _broken(image: AnnotatedImage) -> str | None:
    try:
        decode_image(image.path.read_bytes(), image.where)
    except DataError as error:
        return str(error)
    return None
