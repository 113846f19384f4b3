"""Ask a vision-language model about one image or two, keep what it said, count what is unreadable.

The model is a server, ``evaluation.checkpoints.NAME=http://HOST/v1@MODEL`` or the one of
``evaluation.parser``, or a local checkpoint of transformers.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint
from inversion_dpo.evaluation.scorers.endpoint import Backend
from inversion_dpo.evaluation.scorers.preprocess import Pixels
from inversion_dpo.evaluation.scorers.scene_graph import backend_of
from inversion_dpo.evaluation.scorers.score_store import Store, kept, score_key
from inversion_dpo.run.fields import ParserConfig

logger = logging.getLogger(__name__)
READ = "read"  # in a result: whether the answer could be read
Images = Sequence[Pixels]


def backend_for(name: str, place: str | None, parser: ParserConfig) -> Any:
    """Return the model of a scorer: a server or a checkpoint; ScorerError if none is given.

    Args:
        name: of the scorer.
        place: its checkpoint, or a server as URL@MODEL.
        parser: settings of the server.
    """
    if place and place.startswith(("http://", "https://")):
        url, _, model = place.partition("@")
        parser, place = replace(parser, url=url, model=model or None), None
    return backend_of(replace(parser, url=None) if place else parser, place, name)


class Asking(ABC):
    """A scorer that asks a vision-language model, and keeps answers by model, images and words.

    place: its checkpoint, or a server as URL@MODEL. parser: settings of the server, which is asked
    several questions at once. store: the file that keeps answers, or None.
    """

    name: str
    version = 1  # of the question; another one asks anew

    def __init__(self, place: str | None, parser: ParserConfig, store: Path | None) -> None:
        self.backend: Backend = backend_for(self.name, place, parser)
        self.weights = getattr(self.backend, "checkpoint", None)
        self.parallel = 1 if isinstance(self.weights, Checkpoint) else parser.parallel
        self.store, self.faults, self.count = store, Counter[str](), 0

    @abstractmethod
    def ask(self, images: Images, text: str) -> dict[str, Any]:
        """Make a result, ready for JSON; a ``read`` that is not "" names its fault."""

    def each(self, jobs: Sequence[tuple[Images, str]]) -> list[dict[str, Any]]:
        """Return the result of each job, stored or new; faults are counted."""
        store = Store(self.store, "replies", "reply TEXT") if self.store else None
        keys = [self.key(images, text) for images, text in jobs]
        by_key = dict(zip(keys, jobs, strict=True))
        answers, _ = kept(store, by_key, lambda job: json.dumps(self.ask(*job)), self.parallel)
        results = [json.loads(answers[key]) for key in keys]
        self.count += len(results)
        self.faults.update(result[READ] for result in results if result[READ])
        return results

    def check(self, prompts: Sequence[str] = ()) -> None:
        """Look for a local model's weights; ScorerError without them."""
        if isinstance(self.weights, Checkpoint):
            self.weights.check()

    def key(self, images: Images, text: str) -> bytes:
        """Hash everything that an answer depends on."""
        key = score_key(f"{self.name} {self.version} {self.backend.identity}", images[0], text)
        return key if len(images) == 1 else score_key(key.hex(), images[1], text)

    def conclude(self) -> None:
        """Warn of the answers that could not be read, by fault."""
        if self.faults:
            named = ", ".join(f"{n} {fault}" for fault, n in sorted(self.faults.items()))
            logger.warning(
                "%s: %d of %d answers could not be read and have the lowest score (%s)",
                *(self.name, sum(self.faults.values()), self.count, named),
            )
