"""Read what some scorers need of a prompt's row: GenEval's objects, T2I-CompBench's phrases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from inversion_dpo.evaluation.prompt_sets import PromptSet
from inversion_dpo.evaluation.scorers.checkpoint import ScorerError
from inversion_dpo.evaluation.scorers.geneval_rule import fault_of

GENEVAL, COMPBENCH = "geneval", "compbench"
Row = Mapping[str, Any]


def per_prompt(prompt_set: Callable[[], PromptSet], read: Callable[[str, Row], Any]) -> Any:
    """Return the function prompt -> what a scorer needs of its row; the set is read once.

    read: prompt and row, empty if there is none, to what is needed, or a ScorerError.
    """
    rows = cache(lambda: prompt_set().row_of)
    return lambda prompt: read(prompt, rows().get(prompt, {}))


def geneval_row(prompt: str, row: Row) -> Row:
    """Return what GenEval's rule reads: task, ``include`` and ``exclude``."""
    if fault := fault_of(row):
        raise ScorerError(
            f"evaluation.scorer={GENEVAL}: the prompt {prompt[:60]!r}: {fault}. Give "
            "evaluation.prompts=geneval, or a .jsonl with GenEval's columns tag, include, exclude"
        )
    return {name: row[name] for name in ("tag", "include", "exclude") if name in row}


def phrases_of(prompt: str, row: Row) -> list[str]:
    """Return a prompt's noun phrases."""
    phrases = row.get("phrases")
    if not isinstance(phrases, list) or not all(isinstance(p, str) for p in phrases):
        raise ScorerError(
            f"evaluation.scorer={COMPBENCH}: the prompt {prompt[:60]!r} has no noun phrases. Give "
            'evaluation.prompts=t2i-compbench, or a .jsonl with "phrases", a list of texts'
        )
    return phrases
