"""Read what some scorers need of a prompt or its row: objects, noun phrases, a relation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from inversion_dpo.evaluation.prompt_sets import PromptSet
from inversion_dpo.evaluation.scorers.checkpoint import ScorerError
from inversion_dpo.evaluation.scorers.compbench_rule import Asked, read_relation
from inversion_dpo.evaluation.scorers.geneval_rule import fault_of

GENEVAL, COMPBENCH, SPATIAL = "geneval", "compbench", "compbench-spatial"
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


def relation_of(prompt: str, row: Row) -> Asked:
    """Return a prompt's two objects and their relation; its row is not needed."""
    if (asked := read_relation(prompt)) is None:
        raise ScorerError(
            f"evaluation.scorer={SPATIAL}: the prompt {prompt[:60]!r} is not of the form 'a dog on "
            "the left of a car'. Give evaluation.prompts=t2i-compbench-spatial, or such prompts"
        )
    return asked
