"""Score with scene graphs: a vision-language model reads them, :mod:`graphs` compares them."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inversion_dpo.evaluation.prompt_sets import PromptSet, intended_graphs
from inversion_dpo.evaluation.scorers.answers import (
    FAULTS,
    PROMPT_VERSION,
    SYSTEM,
    AnswerError,
    Vocabulary,
    offered,
    read_answer,
    read_vocabulary,
    words_of,
)
from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError, device
from inversion_dpo.evaluation.scorers.endpoint import Backend, Turn
from inversion_dpo.evaluation.scorers.preprocess import Pixels
from inversion_dpo.evaluation.scorers.score_store import Store, kept, score_key
from inversion_dpo.graphs.graph import SceneGraph, agreement
from inversion_dpo.graphs.matching import plain
from inversion_dpo.run.fields import ParserConfig
from inversion_dpo.run.words import counted

SCENE_GRAPH = "scene-graph"
SCORES = ("sg_iou", "entity_iou", "relation_iou", "exact")
COSTS = ("requests", "prompt_tokens", "completion_tokens")
MOST_REPEATED = 4000  # characters of a refused answer that the model sees again

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """The result for one image: the graph as JSON, or the name of the fault; and the cost."""

    graph: str | None
    fault: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


class SceneGraphScorer:
    """(images, prompts) -> sg_iou, entity_iou, relation_iou, exact and parsed, each [B], and graph.

    After an answer that cannot be read the model is asked once more, with the reason. If that
    answer cannot be read either, the image scores 0, ``parsed`` is 0 and the fault is counted by
    name. Answers are kept, faults too, and never asked for again.

    Args:
        parser: server or generation, words and prices: ``evaluation.parser``.
        checkpoint: a local model's folder, if there is no server.
        prompt_set: all prompts with their graphs; the words of all serve as distractors.
        store: keeps the answers; None keeps none.

    Raises:
        ScorerError: neither server nor folder; a prompt without a graph; an error of the model.
    """

    def __init__(
        self,
        parser: ParserConfig,
        checkpoint: str | None,
        prompt_set: PromptSet,
        store: Path | None,
    ) -> None:
        if importlib.util.find_spec("jsonschema") is None:
            raise ScorerError(f"{SCENE_GRAPH} needs jsonschema: pip install 'inversion-dpo[vlm]'")
        self.parser, self.backend = parser, backend_of(parser, checkpoint)
        self.intended = intended_graphs(prompt_set)
        self.words = vocabularies(parser, self.intended)
        self.parallel = parser.parallel if parser.url else 1  # images at once
        self.store = Store.of_answers(store) if store else None
        self.new: list[Answer] = []  # by this object
        self.stored = 0  # answers kept by earlier runs

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> dict[str, Any]:
        """Score uint8 images [H, W, 3]."""
        graphs = [self._graph_of(prompt) for prompt in prompts]
        offers = [self.words(graph) for graph in graphs]
        intended = [plain(g, o.synonyms) for g, o in zip(graphs, offers, strict=True)]
        answers = [a.graph for a in self._answers(images, offers)]
        read = [SceneGraph.from_json(text) if text is not None else None for text in answers]
        fits = [agreement(w, f) if f else None for w, f in zip(intended, read, strict=True)]
        scores: dict[str, Any] = {
            name: np.array([getattr(fit, name) if fit else 0.0 for fit in fits]) for name in SCORES
        }
        return scores | {"parsed": np.array([float(f is not None) for f in read]), "graph": read}

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse a prompt without a graph by a ScorerError."""
        for prompt in prompts:
            self.words(self._graph_of(prompt))

    def _graph_of(self, prompt: str) -> SceneGraph:
        graph = self.intended.get(prompt)
        if graph is None:
            raise ScorerError(
                f"{SCENE_GRAPH}: the prompt {prompt!r} has no scene graph; give the "
                'prompts as .jsonl with "prompt" and "scene_graph" (docs/reference/scorers.md)'
            )
        return graph

    def _answers(self, images: Sequence[Pixels], offers: Sequence[Vocabulary]) -> list[Answer]:
        """Return the answer for each image, stored or new; several are asked for at once."""
        both = list(zip(images, offers, strict=True))
        keys = [self.key(image, offer) for image, offer in both]
        jobs = dict(zip(keys, both, strict=True))
        answers, stored = kept(self.store, jobs, self._ask, self.parallel)
        self.stored += stored
        return [Answer(**json.loads(answers[key])) for key in keys]

    def key(self, image: Pixels, offer: Vocabulary) -> bytes:
        """Hash everything that an answer depends on: image, model, question version, words."""
        question = f"{SCENE_GRAPH} {PROMPT_VERSION} {self.backend.identity} {offer.digest()}"
        return score_key(question, image, "")

    def _ask(self, job: tuple[Pixels, Vocabulary]) -> str:
        answer = ask(self.backend, *job)
        self.new.append(answer)
        return json.dumps(asdict(answer))

    def conclude(self) -> None:
        """Log the number of answers, their cost and the faults."""
        if self.new or self.stored:
            total = spent_text(spent(self.new, self.parser))
            stored = counted(self.stored, "answer was", "answers were")
            logger.info("%s: %s stored; %s", SCENE_GRAPH, stored, total)


def ask(backend: Backend, image: Pixels, offer: Vocabulary) -> Answer:
    """Ask for one image's graph; after an unusable answer, ask once more with the reason."""
    turns, replies, fault = [Turn("user", offer.question())], [], ""
    graph: SceneGraph | None = None
    for _ in range(2):
        reply = backend.answer(image, SYSTEM, turns, offer.schema())
        replies.append(reply)
        try:
            if reply.fault:
                raise AnswerError(reply.fault, FAULTS[reply.fault])
            graph, fault = read_answer(reply.text, offer), ""
            break
        except AnswerError as error:
            fault = error.fault
            again = f"Your answer cannot be used: {error}. Answer again with the JSON object only."
            turns += [Turn("assistant", reply.text[:MOST_REPEATED]), Turn("user", again)]
    costs = (sum(getattr(r, name) for r in replies) for name in COSTS)
    return Answer(graph.to_json() if graph is not None else None, fault, *costs)


def stored_answers(path: Path) -> list[Answer]:
    """Read all answers of a file; none without such a file."""
    texts = Store.of_answers(path).values() if path.is_file() else []
    return [Answer(**json.loads(text)) for text in texts]


def spent(answers: Sequence[Answer], parser: ParserConfig) -> dict[str, Any]:
    """Sum up answers, ready for JSON; ``cost`` is None without both prices of tokens."""
    sums = {name: sum(getattr(a, name) for a in answers) for name in COSTS}
    a, b = parser.prompt_price, parser.completion_price  # of a million tokens
    priced = a is not None and b is not None
    cost = (sums["prompt_tokens"] * a + sums["completion_tokens"] * b) / 1e6 if priced else None
    faults = Counter(a.fault for a in answers if a.fault)
    return {"answers": len(answers), **sums, "cost": cost, "faults": dict(sorted(faults.items()))}


def spent_text(total: Mapping[str, Any]) -> str:
    """Write :func:`spent` in one line."""
    cost = "" if total["cost"] is None else f", cost {total['cost']:.4f}"
    faults = ", ".join(f"{n} {name} ({FAULTS[name]})" for name, n in total["faults"].items())
    unread = f"; could not be read and scored 0: {faults}" if faults else "; all could be read"
    return (
        f"{total['answers']} new from {total['requests']} requests, {total['prompt_tokens']} + "
        f"{total['completion_tokens']} tokens{cost}{unread}"
    )


def backend_of(parser: ParserConfig, checkpoint: str | None, name: str = SCENE_GRAPH) -> Any:
    """Return the server, or else the model of ``evaluation.checkpoints.NAME``."""
    if bool(parser.url) == bool(checkpoint) or bool(parser.url) != bool(parser.model):
        raise ScorerError(
            f"{name} needs evaluation.parser.url and evaluation.parser.model, or a folder: "
            f"evaluation.checkpoints.{name} (docs/reference/scorers.md)"
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
    from inversion_dpo.evaluation.scorers.local_vlm import LocalModel

    return LocalModel(Checkpoint.at(name, str(checkpoint)), parser.max_tokens, device())


def vocabularies(
    parser: ParserConfig, graphs: Mapping[str, SceneGraph]
) -> Callable[[SceneGraph], Vocabulary]:
    """Return the function intended graph -> offered words: a file's, or its own and distractors."""
    if parser.vocabulary is None:
        every = words_of(plain(graph) for graph in graphs.values())
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
