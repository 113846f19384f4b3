"""Prompt sets: a text file, JSON lines with categories as GenEval's, or a column on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from inversion_dpo.config import ConfigError, resolve
from inversion_dpo.graphs import SceneGraph

HUB = "hf:"


@dataclass(frozen=True)
class PromptSet:
    """Prompts, the category of each where the set has any, and the scene graph that it asks for.

    Without categories all are empty, without graphs all are None; one for each prompt.
    """

    prompts: list[str]
    categories: list[str]
    graphs: list[SceneGraph | None]

    @property
    def by_category(self) -> dict[str, list[int]]:
        """Category -> places of its prompts, in the set's order; empty without categories."""
        found: dict[str, list[int]] = {}
        for place, category in enumerate(self.categories):
            if category:
                found.setdefault(category, []).append(place)
        return found


def read_prompt_set(source: str, limit: int | None) -> PromptSet:
    """The first ``limit`` prompts of a set; ConfigError if there is none.

    Args:
        source: a text file with a prompt a line; a .jsonl file with ``prompt`` and, if it has any,
            ``category`` or ``tag`` (GenEval's evaluation_metadata.jsonl) and ``scene_graph`` in
            LAION-SG's layout; or a dataset's column on the hub, ``hf:OWNER/NAME:COLUMN`` or
            ``hf:OWNER/NAME:COLUMN:SPLIT`` (split train).
        limit: None: all.
    """
    rows = list(islice(_rows(source), limit))
    if not rows:
        raise ConfigError(f"evaluation.prompts: {source} holds no prompts; write one a line")
    return PromptSet(*(list(column) for column in zip(*rows, strict=True)))


def read_prompts(source: str, limit: int | None) -> list[str]:
    """Only the prompts of :func:`read_prompt_set`."""
    return read_prompt_set(source, limit).prompts


_Row = tuple[str, str, SceneGraph | None]  # prompt, category, graph


def _rows(source: str) -> Iterator[_Row]:
    if source.startswith(HUB):
        yield from _hub_rows(source)
        return
    file = Path(resolve(source))
    if not file.is_file():
        raise ConfigError(
            f"evaluation.prompts: no file {file}; give a text file, a prompt a line, or "
            "hf:OWNER/NAME:COLUMN"
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"evaluation.prompts: {file} is not UTF-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file}, line {number}"
            yield _json_row(line, where) if file.suffix == ".jsonl" else (line.strip(), "", None)


def _json_row(line: str, where: str) -> _Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"evaluation.prompts: {where} is not JSON ({error})") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(f'evaluation.prompts: {where} has no text under "prompt"')
    graph = _graph(row.get("scene_graph"), where)
    return prompt.strip(), str(row.get("category", row.get("tag", ""))), graph


def _graph(given: Any, where: str) -> SceneGraph | None:
    """LAION-SG's layout, as an object or as its text."""
    if given is None or given == "":
        return None
    try:
        return SceneGraph.from_dict(json.loads(given) if isinstance(given, str) else given)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f'evaluation.prompts: {where}, "scene_graph": {error}') from error


def _hub_rows(source: str) -> Iterator[_Row]:
    name, column, split, *more = [*source.removeprefix(HUB).split(":"), "", ""][:4]
    if not name or not column or any(more):
        raise ConfigError(f"evaluation.prompts={source}: write hf:OWNER/NAME:COLUMN[:SPLIT]")
    import datasets

    try:
        rows: Any = datasets.load_dataset(name, split=split or "train", streaming=True)
        for row in rows:
            if column not in row:
                raise KeyError(f"no column {column}; it has {', '.join(row)}")
            if str(row[column] or "").strip():
                yield str(row[column]).strip(), "", _graph(row.get("scene_graph"), name)
    except Exception as error:  # unknown names and splits, and the network, each have their own
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"evaluation.prompts={source} cannot be read ({reason}); check name, column and split"
        ) from error
