"""Prompt sets: a text file, JSON lines with categories as GenEval's, or a column on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from inversion_dpo.config import ConfigError, resolve

HUB = "hf:"


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and the category of each where the set has any (else all are empty)."""

    prompts: list[str]
    categories: list[str]

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
            ``category`` or ``tag`` (GenEval's evaluation_metadata.jsonl); or a dataset's column on
            the hub, ``hf:OWNER/NAME:COLUMN`` or ``hf:OWNER/NAME:COLUMN:SPLIT`` (split train).
        limit: None: all.
    """
    rows = list(islice(_rows(source), limit))
    if not rows:
        raise ConfigError(f"evaluation.prompts: {source} holds no prompts; write one a line")
    return PromptSet([prompt for prompt, _ in rows], [category for _, category in rows])


def read_prompts(source: str, limit: int | None) -> list[str]:
    """Only the prompts of :func:`read_prompt_set`."""
    return read_prompt_set(source, limit).prompts


def _rows(source: str) -> Iterator[tuple[str, str]]:
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
            yield _json_row(line, where) if file.suffix == ".jsonl" else (line.strip(), "")


def _json_row(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"evaluation.prompts: {where} is not JSON ({error})") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(f'evaluation.prompts: {where} has no text under "prompt"')
    return prompt.strip(), str(row.get("category", row.get("tag", "")))


def _hub_rows(source: str) -> Iterator[tuple[str, str]]:
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
                yield str(row[column]).strip(), ""
    except Exception as error:  # unknown names and splits, and the network, each have their own
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"evaluation.prompts={source} cannot be read ({reason}); check name, column and split"
        ) from error
