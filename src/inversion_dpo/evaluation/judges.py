"""The configuration's scorers, with the scene graphs that the prompts ask for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from inversion_dpo.evaluation.breakdown import breakdown
from inversion_dpo.evaluation.prompt_sets import PromptSet, read_prompt_set
from inversion_dpo.evaluation.scorers.answers import (
    Vocabulary,
    offered,
    read_vocabulary,
    words_of,
)
from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError
from inversion_dpo.evaluation.scorers.registry import SCENE_GRAPH, Graphs, ScorerGroup, load_scorers
from inversion_dpo.evaluation.scorers.scene_graph import (
    Backend,
    Prices,
    SceneGraphScorer,
    spent,
    stored_answers,
)
from inversion_dpo.evaluation.scorers.score_store import AnswerStore
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.graphs.matching import plain
from inversion_dpo.run.config import Config, ConfigError, ParserConfig
from inversion_dpo.world.captions import parse_caption


def scorers_of(
    config: Config, spec: Any, store: Path, prompts: str, limit: int | None
) -> ScorerGroup:
    """The scorers that ``spec`` names, for the prompts of a set; nothing is loaded yet.

    Args:
        config: of it ``evaluation``.
        spec: as :func:`load_scorers` takes it.
        store: a file that keeps scores and answers.
        prompts: the set, read only if a scorer needs the graphs (:func:`read_prompt_set`).
        limit: its first prompts only.
    """
    e = config.evaluation

    def scene_graphs() -> SceneGraphScorer:
        place = e.checkpoints.get(SCENE_GRAPH)
        return scene_graph_scorer(e.parser, place, read_prompt_set(prompts, limit), store)

    return load_scorers(spec, e.checkpoints, e.batch_size, store, {SCENE_GRAPH: scene_graphs})


def scene_graph_scorer(
    parser: ParserConfig, checkpoint: str | None, asked: PromptSet, store: Path | None
) -> SceneGraphScorer:
    """The scorer ``scene-graph`` for a prompt set; ScorerError if it cannot be made."""
    if importlib.util.find_spec("jsonschema") is None:
        raise ScorerError(f"{SCENE_GRAPH} needs jsonschema: pip install 'inversion-dpo[vlm]'")
    known = intended_graphs(asked)
    return SceneGraphScorer(
        backend_of(parser, checkpoint),
        known.get,
        vocabularies(parser, known),
        parser.parallel if parser.url else 1,
        AnswerStore(store) if store else None,
        prices_of(parser),
    )


def backend_of(parser: ParserConfig, checkpoint: str | None) -> Backend:
    """The server, or else the model of ``evaluation.checkpoints.scene-graph``."""
    if bool(parser.url) == bool(checkpoint) or bool(parser.url) != bool(parser.model):
        raise ScorerError(
            f"{SCENE_GRAPH} needs evaluation.parser.url and evaluation.parser.model, or a folder: "
            f"evaluation.checkpoints.{SCENE_GRAPH} (docs/reference/scorers.md)"
        )
    if parser.url and parser.model:
        from inversion_dpo.evaluation.scorers.endpoint import Endpoint, key_of_environment

        return Endpoint(
            parser.url,
            parser.model,
            key_of_environment(),
            parser.timeout,
            parser.retries,
            parser.max_tokens,
        )
    import torch

    from inversion_dpo.evaluation.scorers.local_vlm import LocalModel

    path, _, revision = str(checkpoint).partition("@")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LocalModel(Checkpoint(SCENE_GRAPH, path, revision or None), parser.max_tokens, device)


def vocabularies(
    parser: ParserConfig, known: Mapping[str, SceneGraph]
) -> Callable[[SceneGraph], Vocabulary]:
    """An intended graph -> the words that are offered: a file's, or its own and distractors."""
    if parser.vocabulary is None:
        every = words_of(plain(graph) for graph in known.values())
        return lambda graph: offered(plain(graph), every, parser.distractors)
    fixed = read_vocabulary(parser.vocabulary)

    def of_file(graph: SceneGraph) -> Vocabulary:
        for kind, words in words_of([plain(graph, fixed.synonyms)]).items():
            if absent := sorted({*words} - {*getattr(fixed, kind)}):
                raise ScorerError(
                    f"evaluation.parser.vocabulary={parser.vocabulary}: {kind} has no "
                    f"{absent[0]!r}, which the prompt {graph.caption!r} asks for"
                )
        return fixed

    return of_file


def intended_graphs(asked: PromptSet) -> dict[str, SceneGraph]:
    """Prompt -> the graph that it asks for: the set's own, or what a caption of `scenes` says.

    ConfigError if a prompt occurs with two graphs.
    """
    known: dict[str, SceneGraph] = {}
    for prompt, given in zip(asked.prompts, asked.graphs, strict=True):
        graph = given or _said(prompt)
        if graph is not None and known.setdefault(prompt, graph) != graph:
            raise ConfigError(f"evaluation.prompts: {prompt!r} occurs with two scene graphs")
    return known


def _said(prompt: str) -> SceneGraph | None:
    try:
        return parse_caption(prompt)
    except ValueError:
        return None


def prices_of(parser: ParserConfig) -> Prices:
    """Of a million tokens."""
    return Prices(parser.prompt_price, parser.completion_price)


def read_graphs(path: Path) -> Graphs | None:
    """The graphs found in a samples file's images; None if its scorers find none."""
    if "graph" not in pq.read_schema(path).names:
        return None
    texts = pq.read_table(path, columns=["graph"])["graph"].to_pylist()
    return [None if text is None else SceneGraph.from_json(text) for text in texts]


def structure(asked: PromptSet, files: list[Path], config: Config) -> dict[str, Any]:
    """Under ``structure`` the breakdown of reference and policy, where graphs are known.

    Words are levelled as the scorer levels them (:func:`structure.plain`). Under ``scoring`` what
    the answers that are kept beside the samples have cost.
    """
    e, parts = config.evaluation, {}
    synonyms = read_vocabulary(e.parser.vocabulary).synonyms if e.parser.vocabulary else {}
    reference, policy = (read_graphs(file) for file in files)
    if reference and policy:
        known = intended_graphs(asked)
        intended = [plain(known[p], synonyms) if p in known else None for p in asked.prompts]
        r, p = ([g and plain(g) for g in side] for side in (reference, policy))
        parts["structure"] = breakdown(intended, r, p, e.seeds)
    if answers := stored_answers(files[0].parent / "scores.sqlite"):
        parts["scoring"] = {SCENE_GRAPH: spent(answers, prices_of(e.parser))}
    return {name: part for name, part in parts.items() if part}
