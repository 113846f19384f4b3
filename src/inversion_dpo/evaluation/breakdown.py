"""Policy against reference by number of objects, by relation and by kind of error.

For scorers that find a scene graph in an image, where the graph that its prompt asks for is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from inversion_dpo.evaluation.metrics import gain_row
from inversion_dpo.evaluation.prompt_sets import PromptSet, intended_graphs
from inversion_dpo.evaluation.scorers.answers import read_vocabulary
from inversion_dpo.evaluation.scorers.scene_graph import (
    SCENE_GRAPH,
    spent,
    stored_answers,
)
from inversion_dpo.graphs.graph import SceneGraph, agreement
from inversion_dpo.graphs.matching import departures, plain, relations_held
from inversion_dpo.run.config import Config

Graphs = Sequence[SceneGraph | None]
MANY = 5  # objects and more are one group
ERRORS = {  # lower is better
    "entity_errors": "objects missing or extra",
    "attribute_errors": "objects of wrong attributes",
    "relation_errors": "wrong relations",
}
_Values = dict[str, NDArray[np.float64]]


def breakdown(
    intended: Graphs, reference: Graphs, policy: Graphs, seeds: int = 1
) -> dict[str, Any]:
    """Mean of both sides and the paired gain with its 95% interval, part by part.

    Args:
        intended: of every prompt, [n]; None where it is not known.
        reference: found in the reference's images, [n seeds], those of a prompt in a row; None
            where an image could not be read.
        policy: the same of the policy, from the same noise.
        seeds: images of a prompt.

    Returns:
        plain numbers, ready for JSON; every row is :func:`metrics.gain_row`'s. ``all``: rows of
        sg_iou, exact and the mean number of errors an image (ERRORS, see
        :class:`structure.Departures`), and n_prompts; ``objects``: the same by the number of
        intended objects; ``relations``: of every relation n_prompts and the row ``held``
        (:func:`structure.relations_held`); ``left_out``: prompts of unknown graph or of an image
        that could not be read. Empty without a single prompt to compare.

    Raises:
        ValueError: the lists do not fit each other.
    """
    if not len(intended) * seeds == len(reference) == len(policy):
        raise ValueError(
            f"{len(intended)} prompts, {seeds} images of each, but {len(reference)} graphs of the "
            f"reference and {len(policy)} of the policy"
        )
    known = [
        k
        for k, graph in enumerate(intended)
        if graph
        and all(reference[k * seeds : (k + 1) * seeds])
        and all(policy[k * seeds : (k + 1) * seeds])
    ]
    if not known:
        return {}
    asked = [intended[k] for k in known]
    r, p = (
        [[side[k * seeds + j] for j in range(seeds)] for k in known] for side in (reference, policy)
    )
    sides = measured(asked, r), measured(asked, p)
    return {
        "all": _part(*sides, list(range(len(asked)))),
        "objects": {name: _part(*sides, rows) for name, rows in sorted(_by_objects(asked).items())},
        "relations": _by_relation(asked, r, p),
        "left_out": len(intended) - len(known),
    }


def measured(intended: Sequence[Any], found: Sequence[Sequence[Any]]) -> _Values:
    """Measures of every image by name, [n, s], of intended graphs [n] and found ones [n][s]."""
    rows = [[_measures(i, f) for f in images] for i, images in zip(intended, found, strict=True)]
    return {
        name: np.array([[image[name] for image in images] for images in rows])
        for name in rows[0][0]
    }


def _measures(intended: SceneGraph, found: SceneGraph) -> dict[str, float]:
    fit, wrong = agreement(intended, found), departures(intended, found)
    return {
        "sg_iou": fit.sg_iou,
        "exact": fit.exact,
        "entity_errors": float(wrong.entities),
        "attribute_errors": float(wrong.attributes),
        "relation_errors": float(wrong.relations),
    }


def _part(reference: _Values, policy: _Values, rows: list[int]) -> dict[str, Any]:
    found = {k: gain_row(k, reference[k][rows], policy[k][rows]) for k in reference}
    return {"n_prompts": len(rows), **found}


def _by_objects(intended: Sequence[Any]) -> dict[str, list[int]]:
    """Number of intended objects, as text -> places of the prompts."""
    groups: dict[str, list[int]] = {}
    for k, graph in enumerate(intended):
        count = len(graph.items)
        groups.setdefault(f"{MANY} or more" if count >= MANY else str(count), []).append(k)
    return groups


def _by_relation(
    intended: Sequence[Any], reference: Sequence[Any], policy: Sequence[Any]
) -> dict[str, Any]:
    words = sorted({r.relation for graph in intended for r in graph.relations})
    parts = {}
    for word in words:
        rows = [k for k, g in enumerate(intended) if any(r.relation == word for r in g.relations)]
        r, p = (
            np.array([[relations_held(intended[k], f)[word] for f in side[k]] for k in rows])
            for side in (reference, policy)
        )
        parts[word] = {"n_prompts": len(rows), "held": gain_row(word, r, p)}
    return parts


def table_rows(structure: Mapping[str, Any]) -> list[tuple[str, int, str, Mapping[str, float]]]:
    """What one table shows: (part, prompts, measure, row) by objects, relations and errors."""
    if not structure:
        return []
    rows = [
        (f"{name} object{'s' if name != '1' else ''}", part["n_prompts"], "sg_iou", part["sg_iou"])
        for name, part in structure["objects"].items()
    ]
    rows += [
        (word, part["n_prompts"], "relation holds", part["held"])
        for word, part in structure["relations"].items()
    ]
    whole = structure["all"]
    return rows + [(ERRORS[k], whole["n_prompts"], "errors an image", whole[k]) for k in ERRORS]


def read_graphs(path: Path) -> Graphs | None:
    """The graphs found in a samples file's images; None if its scorers find none."""
    if "graph" not in pq.read_schema(path).names:
        return None
    texts = pq.read_table(path, columns=["graph"])["graph"].to_pylist()
    return [None if text is None else SceneGraph.from_json(text) for text in texts]


def structure(asked: PromptSet, files: list[Path], config: Config) -> dict[str, Any]:
    """Under ``structure`` the breakdown of reference and policy, where graphs are known.

    Words are levelled as the scorer levels them.
    """
    e, found = config.evaluation, {}
    synonyms = read_vocabulary(e.parser.vocabulary).synonyms if e.parser.vocabulary else {}
    reference, policy = (read_graphs(file) for file in files)
    if reference and policy:
        known = intended_graphs(asked)
        intended = [plain(known[p], synonyms) if p in known else None for p in asked.prompts]
        r, p = ([g and plain(g) for g in side] for side in (reference, policy))
        found = breakdown(intended, r, p, e.seeds)
    return {"structure": found} if found else {}


def scoring(memo: Path, config: Config) -> dict[str, Any]:
    """Under ``scoring`` what the answers that are kept beside the samples have cost."""
    answers = stored_answers(memo / "scores.sqlite")
    return {"scoring": {SCENE_GRAPH: spent(answers, config.evaluation.parser)}} if answers else {}
