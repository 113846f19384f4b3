"""Import a user's own scoring function, and check what any scorer returns."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.machinery import PathFinder
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.evaluation.metrics import RESERVED
from inversion_dpo.evaluation.scorers.checkpoint import ScorerError
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.run.words import counted

Scores = dict[str, NDArray[np.float64]]
Graphs = list[SceneGraph | None]  # read from images; None for an unreadable one
INSTALLED = {"site-packages", "dist-packages"}  # folders of packages that are not the user's
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


class _Finder(ModuleFinder):
    """Finds imports also in folders without ``__init__.py``, at which Python's own one breaks."""

    def import_module(self, partname: str, fqname: str, parent: Any) -> Any:
        places = parent.__path__ if parent else self.path
        spec = PathFinder.find_spec(partname, places) if places else None
        if spec is None or spec.origin or spec.submodule_search_locations is None:
            return super().import_module(partname, fqname, parent)
        package: Any = self.add_module(fqname)
        package.__path__ = [*spec.submodule_search_locations]
        return package


def sources_of(name: str) -> list[Path]:
    """List the file of ``module:function`` and what it imports beside it; nothing is run.

    Where the module is installed or cannot be read, its own file alone; empty without a file.
    """
    own = source_of(name)
    if own is None or own.suffix != ".py" or not INSTALLED.isdisjoint(own.parts):
        return [own] if own else []
    module = name.partition(":")[0]
    depth = module.count(".") + (own.name == "__init__.py")
    finder = _Finder(path=[str(own.parents[depth])])
    try:
        finder.import_hook(module)
    except (ImportError, SyntaxError, ValueError):  # as soon as it is imported, that is said
        return [own]
    files = (getattr(found, "__file__", None) for found in finder.modules.values())
    return sorted({own, *(Path(file) for file in files if file)})


def imported(name: str) -> Any:
    """Import ``module:function``; ScorerError if that fails."""
    module, _, function = name.partition(":")
    source_of(name)  # searches the working folder from now on
    try:
        scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ScorerError(f"evaluation.scorer={name!r}: {error}; write module:function") from error
    return scorer


def asked_safely(
    spec: str, load: Callable[[], Any], images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]
) -> Any:
    """Call a user's own function; whatever it raises becomes one line with its place.

    It gets copies, so that it can write into them: the images are kept, and others score them too.
    """
    try:
        return load()([image.copy() for image in images], list(prompts))
    except (Exception, SystemExit) as error:
        if isinstance(error, ScorerError):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ScorerError(
            f"evaluation.scorer={spec} fails in {at.filename}, line {at.lineno}, on "
            f"{counted(len(images), 'image')}, the first for {prompts[0][:60]!r}: "
            f"{' '.join(repr(error).split())[:300]}. Nothing of this batch is kept: mend it, and "
            "run the same command again"
        ) from error


def check_names(names: Sequence[str]) -> None:
    """Refuse, by a ScorerError, names that the results use themselves, and two scores of one."""
    for name in names:
        if name in RESERVED or names.count(name) > 1:
            fault = "two scorers give" if names.count(name) > 1 else "a scorer may not give"
            raise ScorerError(f"evaluation.scorer: {fault} a score called {name!r}: rename it")


def check_same(spec: str, names: Collection[str], before: Collection[str]) -> None:
    """Refuse, by a ScorerError, scores that have other names than those of earlier images."""
    if differing := sorted({*names} ^ {*before}):
        raise ScorerError(
            f"evaluation.scorer={spec} gives {', '.join(differing)} for some images only: return "
            "the same names each time"
        )


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
    if odd := [name for name in scores if not (isinstance(name, str) and name.strip())]:
        raise ScorerError(f"scorer {spec}: a score is called {odd[0]!r}: give it a name in letters")
    out = {name: _numbers(spec, name, values, count) for name, values in scores.items()}
    if not out:
        raise ScorerError(f"scorer {spec} returned no score; return one number for each image")
    return out, graphs


def _numbers(spec: str, name: str, values: Any, count: int) -> NDArray[np.float64]:
    try:
        plain = values.detach().cpu() if hasattr(values, "detach") else values
        if str(getattr(plain, "dtype", "")) == "torch.bfloat16":  # which NumPy does not have
            plain = plain.float()
        array = np.asarray(plain)
        if np.iscomplexobj(array):
            raise TypeError("they are complex")
        array = array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ScorerError(f"scorer {spec}: {name} is no list of numbers ({error})") from error
    if array.shape != (count,):
        raise ScorerError(
            f"scorer {spec}: {name} has shape {list(array.shape)} for {count} images; return "
            "one number for each image"
        )
    return array
