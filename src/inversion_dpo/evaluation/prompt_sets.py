"""Read prompt sets: text, JSON lines with GenEval's categories, Parquet, or a column on the hub.

The embedded world is a prompt set too; only this module and the registry of scorers import it.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from inversion_dpo.data.annotations import read_annotations
from inversion_dpo.data.buckets import read_size
from inversion_dpo.data.images import decode_image
from inversion_dpo.data.rows import Fault, find_inside
from inversion_dpo.data.tables import SPREADSHEETS, TEXTS, encoding_of
from inversion_dpo.data.transforms import Size
from inversion_dpo.evaluation.named_sets import named_sets
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.run.config import ConfigError, resolve
from inversion_dpo.run.words import counted, seen, typed

T = TypeVar("T")
HEADER = re.compile(r"(prompt|caption)s?([,;\t]\w*)*|text", re.IGNORECASE)  # no prompt is one
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSet:
    """Prompts, each with its category, scene graph, size of its images and source to be edited.

    A prompt without a category has "", one without the others has None. rows: the rows of a
    .jsonl file or a named set as they are, for scorers that read more.
    """

    prompts: list[str]
    categories: list[str]
    graphs: list[SceneGraph | None]
    sizes: list[Size | None] = field(default_factory=list)
    sources: list[Path | None] = field(default_factory=list)
    rows: list[dict[str, Any] | None] = field(default_factory=list)

    @property
    def row_of(self) -> dict[str, dict[str, Any]]:
        """Prompt -> its whole row; ConfigError if there are two."""
        return self._one("rows", self.rows)

    @property
    def size_of(self) -> dict[str, Size]:
        """Prompt -> size of its images, where the set gives one; ConfigError if it gives two."""
        return self._one("sizes", self.sizes)

    @property
    def source_of(self) -> dict[str, Path]:
        """Prompt -> image that it edits, where the set gives one; ConfigError if it gives two."""
        return self._one("sources", self.sources)

    def _one(self, what: str, given: Sequence[T | None]) -> dict[str, T]:
        found: dict[str, T] = {}
        for prompt, value in zip(self.prompts, given, strict=False):
            if value is not None and found.setdefault(prompt, value) != value:
                raise ConfigError(
                    f"evaluation.prompts: {prompt[:60]!r} occurs with two {what}; word the two "
                    "prompts differently"
                )
        return found

    @property
    def by_category(self) -> dict[str, list[int]]:
        """Category -> places of its prompts, in the set's order; empty without categories."""
        places: dict[str, list[int]] = {}
        for place, category in enumerate(self.categories):
            if category:
                places.setdefault(category, []).append(place)
        return places


def read_prompt_set(
    source: str, limit: int | None, seed: int = 0, option: str = "evaluation.prompts"
) -> PromptSet:
    """Read the first ``limit`` prompts of a set.

    Args:
        source: a set's name, see :mod:`named_sets`; a number of training captions of the embedded
            world; a text file with one prompt a line; a .jsonl file with ``prompt`` and,
            optionally, ``category`` or ``tag`` (GenEval's evaluation_metadata.jsonl) and
            ``scene_graph`` in LAION-SG's layout, ``size``, WIDTHxHEIGHT of its images in
            pixels, and ``source``, an image file below the set's folder; a .parquet file with the
            same columns; or a dataset's column on the hub,
            ``hf:OWNER/NAME[@REVISION]:COLUMN[:SPLIT]`` (split train).
        limit: None for all.
        seed: of the embedded world's captions.
        option: the setting or option that named the source, for errors.

    Raises:
        ConfigError: the source cannot be read or holds no prompts.
    """
    try:
        rows = list(islice(_rows(source, seed), limit))
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from error
    if not rows:
        raise ConfigError(f"{option}: {source} holds no prompts: write one a line")
    return PromptSet(*(list(column) for column in zip(*rows, strict=True)))


def read_prompts(
    source: str, limit: int | None, seed: int = 0, option: str = "evaluation.prompts"
) -> list[str]:
    """Read only the prompts of :func:`read_prompt_set`."""
    return read_prompt_set(source, limit, seed, option).prompts


def graph_of_prompt(prompt: str) -> SceneGraph | None:
    """Parse a caption of the embedded world into its scene graph; None for any other text."""
    from inversion_dpo.world.captions import parse_caption

    try:
        return parse_caption(prompt)
    except ValueError:
        return None


def scenes(split: str, kind: str, seed: int) -> Iterator[SceneGraph]:
    """Yield the embedded world's graphs without end, with the relations that they entail.

    Args:
        split: train, validation or test.
        kind: OBJECTS/RELATIONS, such as 3/2: the number of objects and the least of relations.
        seed: of the stream.

    Raises:
        ConfigError: an unknown split, or a kind of another form.
    """
    from inversion_dpo.world.scene_prompts import SPLITS, graphs_of, parse_kind

    if split not in SPLITS:
        known = ", ".join(SPLITS)
        raise ConfigError(f"build.splits.{split} is unknown: the embedded world has {known}")
    try:
        parse_kind(kind)
    except ValueError as error:
        raise ConfigError(f"build.mix: {error}") from error
    return graphs_of(split, kind, seed)


def intended_graphs(
    prompt_set: PromptSet, parse: Callable[[str], SceneGraph | None] = graph_of_prompt
) -> dict[str, SceneGraph]:
    """Map each prompt to the graph that it asks for: the set's own, or else its text's.

    Args:
        prompt_set: the prompts, and their graphs where the set gives any.
        parse: text -> graph, or None if the text has none.

    Raises:
        ConfigError: a prompt occurs with two graphs.
    """
    graphs: dict[str, SceneGraph] = {}
    for prompt, own in zip(prompt_set.prompts, prompt_set.graphs, strict=True):
        graph = own or parse(prompt)
        if graph is not None and graphs.setdefault(prompt, graph) != graph:
            raise ConfigError(
                f"the prompt {prompt[:60]!r} occurs with two scene graphs; "
                "word the two prompts differently"
            )
    return graphs


def prompts_with_graphs(prompt_set: PromptSet) -> list[str | SceneGraph]:
    """Return each prompt for a sampler: its scene graph where the set gives one, else its text."""
    both = zip(prompt_set.prompts, prompt_set.graphs, strict=True)
    return [replace(graph, caption=prompt) if graph else prompt for prompt, graph in both]


class _Row(NamedTuple):
    prompt: str
    category: str = ""
    graph: SceneGraph | None = None
    size: Size | None = None
    source: Path | None = None
    row: dict[str, Any] | None = None


def _rows(source: str, seed: int) -> Iterator[_Row]:
    if source.isdecimal():
        from inversion_dpo.world.scene_prompts import prompts

        yield from (_Row(graph.caption) for graph in prompts("train", int(source), seed))
        return
    if source.startswith("hf:"):
        yield from _hub_rows(source)
        return
    if source in named_sets():
        for row in named_sets()[source].rows():
            yield _Row(row["prompt"], row["category"], row=row)
        return
    file = Path(resolve(source))
    if not file.is_file():
        raise ConfigError(
            f"no file {file}; give a text file with one prompt a line, "
            f"hf:OWNER/NAME:COLUMN, or one of {', '.join(named_sets())}"
        )
    if file.suffix.lower() == ".parquet":
        yield from _parquet_rows(file)
        return
    if file.suffix.lower() in (*TEXTS, *SPREADSHEETS) and file.suffix.lower() != ".jsonl":
        raise ConfigError(
            f"{file} is a table: give a text file with one prompt a line, or a .jsonl or .parquet "
            'file with "prompt"'
        )
    try:
        lines = file.read_text(encoding=encoding_of(file)).split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text ({error}); save it as that") from error
    if HEADER.fullmatch(lines[0].strip()) and len(lines) > 1:
        logger.warning(
            "%s: its first line, %r, looks like the name of a column and is used as a prompt: if "
            "it is a name, delete the line",
            file,
            lines[0].strip(),
        )
    for number, line in enumerate(lines, start=1):
        if has_text(line):
            is_json, where = file.suffix.lower() == ".jsonl", f"{file}, line {number}"
            if not is_json and is_object(line):
                raise ConfigError(f"{where} is a JSON object: give the file a name in .jsonl")
            yield _row(line, where, file.parent) if is_json else _Row(line.strip())


def has_text(line: str) -> bool:
    """Tell whether anything of a text can be seen, and UTF-8 can hold all of it."""
    return is_whole(line) and bool(seen(line))


def is_whole(text: str) -> bool:
    """Tell whether UTF-8 can hold a text: JSON can spell half of a pair, a shell send any byte."""
    return text == text.encode(errors="ignore").decode()


def is_object(line: str) -> bool:
    """Tell whether a line is an object of JSON, which no prompt is."""
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parquet_rows(file: Path) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ("prompt", "category", "tag", "scene_graph", "size", "source", "phrases")
    try:
        names = pq.read_schema(file).names
        rows = pq.read_table(file, columns=[n for n in columns if n in names]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{file} cannot be read ({reason})") from error
    yield from (_row(row, f"{file}, row {k}", file.parent) for k, row in enumerate(rows))


def _row(row: Any, where: str, folder: Path) -> _Row:
    """Read a row, given as an object or as its JSON."""
    try:
        row = json.loads(row) if isinstance(row, str) else row
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error})") from error
    row = row if isinstance(row, dict) else {}
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not has_text(prompt):
        raise ConfigError(f'{where} has no text under "prompt"')
    graph, size = _graph(row.get("scene_graph"), where), row.get("size")
    said = [row[k] for k in ("category", "tag") if row.get(k) not in (None, "")]
    if said and not isinstance(said[0], str | int | float):
        raise ConfigError(f'{where}, "category" or "tag": write one text or a number, no list')
    category = str(said[0]).strip() if said else ""
    if size is not None and (size := read_size(size)) is None:
        raise ConfigError(f'evaluation.prompts: {where}, "size": write it as "832x1216"')
    source = row.get("source")
    if source is not None and isinstance(source := find_inside(folder, str(source)), Fault):
        raise ConfigError(f'evaluation.prompts: {where}, "source": {source.text}')
    return _Row(prompt.strip(), category, graph, size, source, row)


def _graph(value: Any, where: str) -> SceneGraph | None:
    """Parse LAION-SG's layout, given as an object or as its text."""
    if value is None or value == "":
        return None
    try:
        return SceneGraph.from_dict(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f'{where}, "scene_graph": {error}') from error


def _hub_rows(source: str) -> Iterator[_Row]:
    name, column, split, *more = [*source.removeprefix("hf:").split(":"), "", ""][:4]
    if not name or not column or any(more):
        raise ConfigError(
            f"{source}: write hf:OWNER/NAME[@REVISION]:COLUMN[:SPLIT]; "
            "hf:OWNER/NAME:COLUMN reads the split train"
        )
    import datasets

    name, _, revision = name.partition("@")
    at = {"revision": revision} if revision else {}

    try:
        rows: Any = datasets.load_dataset(name, split=split or "train", streaming=True, **at)
        for row in rows:
            if column not in row:
                raise KeyError(f"no column {column}; it has {', '.join(row)}")
            if str(row[column] or "").strip():
                graph = _graph(row.get("scene_graph"), name)
                yield _Row(str(row[column]).strip(), graph=graph)
    except Exception as error:  # unknown names and splits, and the network, each have their own
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{source} cannot be read ({reason}); check name, column and split"
        ) from error


def sources_to_sample(files: Sequence[Path], prompts: int) -> list[Image.Image]:
    """Read the images that the prompts of `inversion-dpo sample` edit: one for all, or one each.

    ConfigError names the file that cannot be used.
    """
    if len(files) not in (0, 1, prompts):
        raise ConfigError(
            f"{counted(prompts, 'prompt')} and {counted(len(files), 'image')} to edit: give "
            "--source once for all, or once for each prompt"
        )
    try:
        found = [decode_image(file.read_bytes(), str(file)) for file in files]
    except OSError as error:
        raise ConfigError(f"--source {error.filename} cannot be read: {error.strerror}") from error
    return found * prompts if len(found) == 1 else found


def prompts_to_sample(prompts: list[str], file: Path | None) -> list[str | SceneGraph]:
    """Return the prompts of `inversion-dpo sample`: texts, scene graphs of a file, or both.

    Without texts the graphs' captions are taken. ConfigError names the file's row that cannot be
    used.
    """
    if file is None:
        if not prompts:
            raise ConfigError("give at least one prompt, or --scene-graph FILE")
        if odd := [prompt for prompt in prompts if not is_whole(prompt)]:
            raise ConfigError(
                f"the prompt {ascii(odd[0][:60])} has bytes that are not UTF-8: type it again, or "
                "set your terminal to UTF-8"
            )
        if files := [*filter(os.path.isfile, prompts)]:
            raise ConfigError(
                f"{files[0]} is a file: give the prompts themselves, each in quotes. To draw those "
                f"of a file, two images each: `inversion-dpo pairs sample "
                f"--prompts {typed(files[0])}`"
            )
        return list(prompts)
    graphs, problems = read_annotations(file)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"--scene-graph {file.parent}: {problems[0]}{more}; correct the file")
    if prompts and len(prompts) != len(graphs):
        raise ConfigError(
            f"{counted(len(prompts), 'prompt')} and {counted(len(graphs), 'scene graph')} in "
            f"{file}: give a prompt for each graph, or none"
        )
    bare = [k for k, graph in enumerate(graphs) if not graph.caption.strip()]
    if bare and not prompts:
        raise ConfigError(
            f"{file}, row {bare[0]} has no caption_ori: write one, or give a prompt for each graph"
        )
    captions = prompts or [graph.caption for graph in graphs]
    return [replace(graph, caption=c) for graph, c in zip(graphs, captions, strict=True)]
