"""Compare policy and reference by number of objects, by relation and by kind of error.

This needs scorers that read a scene graph from an image, and prompts whose graph is known.
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
from inversion_dpo.evaluation.scorers.scene_graph import SCENE_GRAPH, spent, stored_answers
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
    """Compute both sides' means and the paired gain with its 95% interval, part by part.

    Args:
        intended: scene graph of each prompt, [n]; None where it is unknown.
        reference: graphs read from the reference's images, [n seeds], one prompt's in a row; None
            for an image that the scorer could not read.
        policy: the same for the policy, from the same noise.
        seeds: images per prompt.

    Returns:
        Plain numbers, ready for JSON; :func:`metrics.gain_row` makes each row. ``all``: rows of
        sg_iou, exact and the mean errors per image (ERRORS, see :class:`matching.Departures`), and
        n_prompts. ``objects``: the same by number of intended objects. ``relations``: n_prompts and
        the row ``held`` (:func:`matching.relations_held`) of each relation. ``left_out``: number of
        prompts with an unknown graph or an unreadable image. Empty if no prompt can be compared.

    Raises:
        ValueError: the lists have lengths that do not fit.
    """
    if not len(intended) * seeds == len(reference) == len(policy):
        raise ValueError(
            f"{len(intended)} prompts with {seeds} images each need as many graphs, got "
            f"{len(reference)} for the reference and {len(policy)} for the policy"
        )
    r, p = (
        [side[k : k + seeds] for k in range(0, len(side), seeds)] for side in (reference, policy)
    )
    whole = [k for k, graph in enumerate(intended) if graph and all(r[k]) and all(p[k])]
    if not whole:
        return {}
    graphs = [intended[k] for k in whole]
    r, p = ([side[k] for k in whole] for side in (r, p))
    sides = measured(graphs, r), measured(graphs, p)
    by_objects = sorted(_by_objects(graphs).items())
    return {
        "all": _part(*sides, list(range(len(graphs)))),
        "objects": {name: _part(*sides, rows) for name, rows in by_objects},
        "relations": _by_relation(graphs, r, p),
        "left_out": len(intended) - len(whole),
    }


def measured(intended: Sequence[Any], read: Sequence[Sequence[Any]]) -> _Values:
    """Measure every image, by name, [n, s], from intended graphs [n] and read ones [n][s]."""
    rows = [[_measures(i, f) for f in images] for i, images in zip(intended, read, strict=True)]
    return {
        name: np.array([[image[name] for image in images] for images in rows])
        for name in rows[0][0]
    }


def _measures(intended: SceneGraph, read: SceneGraph) -> dict[str, float]:
    fit, wrong = agreement(intended, read), departures(intended, read)
    counts = (wrong.entities, wrong.attributes, wrong.relations)
    return {"sg_iou": fit.sg_iou, "exact": fit.exact, **dict(zip(ERRORS, counts, strict=True))}


def _part(reference: _Values, policy: _Values, rows: list[int]) -> dict[str, Any]:
    gains = {k: gain_row(k, reference[k][rows], policy[k][rows]) for k in reference}
    return {"n_prompts": len(rows), **gains}


def _by_objects(intended: Sequence[Any]) -> dict[str, list[int]]:
    """Group the prompts: number of intended objects, as text -> places of the prompts."""
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
    """List the rows of the table: (part, prompts, measure, row)."""
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


def structure(prompt_set: PromptSet, files: list[Path], config: Config) -> dict[str, Any]:
    """Return {"structure": breakdown of reference and policy}; empty if no graph is known.

    Words are normalised as the scorer normalises them.

    Args:
        prompt_set: prompts with their graphs.
        files: samples of reference and policy.
        config: the run's settings.
    """
    e = config.evaluation
    reference, policy = map(read_graphs, files)
    if not reference or not policy:
        return {}
    synonyms = read_vocabulary(e.parser.vocabulary).synonyms if e.parser.vocabulary else {}
    graphs = intended_graphs(prompt_set)
    intended = [plain(graphs[p], synonyms) if p in graphs else None for p in prompt_set.prompts]
    r, p = ([g and plain(g) for g in side] for side in (reference, policy))
    parts = breakdown(intended, r, p, e.seeds)
    return {"structure": parts} if parts else {}


def read_graphs(path: Path) -> Graphs | None:
    """Read the graphs in a samples file; None if its scorers read none."""
    if "graph" not in pq.read_schema(path).names:
        return None
    texts = pq.read_table(path, columns=["graph"])["graph"].to_pylist()
    return [None if text is None else SceneGraph.from_json(text) for text in texts]


def scoring(memo: Path, config: Config) -> dict[str, Any]:
    """Return {"scoring": cost of the answers stored beside the samples}; empty without any."""
    answers = stored_answers(memo / "scores.sqlite")
    return {"scoring": {SCENE_GRAPH: spent(answers, config.evaluation.parser)}} if answers else {}
