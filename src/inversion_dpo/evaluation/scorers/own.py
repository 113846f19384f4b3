"""Import a user's own scoring function, and check what any scorer returns."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.evaluation.scorers.checkpoint import ScorerError
from inversion_dpo.graphs.graph import SceneGraph

Scores = dict[str, NDArray[np.float64]]
Graphs = list[SceneGraph | None]  # read from images; None for an unreadable one
GRAPH = "graph"  # not a score: the graphs that a scorer read


def source_of(name: str) -> Path | None:
    """Find the file of ``module:function``, also in the working folder; None if there is none."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # which the installed command does not search by itself
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def imported(name: str) -> Any:
    """Import ``module:function``; ScorerError if that fails."""
    module, _, function = name.partition(":")
    source_of(name)  # searches the working folder from now on
    try:
        scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ScorerError(f"evaluation.scorer={name!r}: {error}; write module:function") from error
    return scorer


def checked(spec: str, result: Any, count: int) -> tuple[Scores, Graphs]:
    """Check a scorer's result and return float64 [count] by name, and its graphs.

    Under ``graph`` stand no scores: SceneGraphs, or None for an unreadable image. ScorerError for
    any other result.
    """
    own = spec.rpartition(":")[2]
    scores = dict(result) if isinstance(result, Mapping) else {own: result}
    graphs = list(scores.pop(GRAPH, ())) if isinstance(result, Mapping) else []
    if graphs and not (
        len(graphs) == count and all(isinstance(g, SceneGraph | None) for g in graphs)
    ):
        raise ScorerError(f"scorer {spec}: {GRAPH} must be a SceneGraph or None for each image")
    out = {name: _numbers(spec, name, values, count) for name, values in scores.items()}
    if not out:
        raise ScorerError(f"scorer {spec} returned no score; return one number for each image")
    return out, graphs


def _numbers(spec: str, name: str, values: Any, count: int) -> NDArray[np.float64]:
    try:
        plain = values.detach().cpu() if hasattr(values, "detach") else values
        array = np.asarray(plain, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ScorerError(f"scorer {spec}: {name} is no list of numbers ({error})") from error
    if array.shape != (count,):
        raise ScorerError(
            f"scorer {spec}: {name} has shape {list(array.shape)} for {count} images; return "
            "one number for each image"
        )
    return array
