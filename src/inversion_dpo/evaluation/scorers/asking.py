"""Ask a vision-language model about one image or two, keep what it said, count what is unreadable.

The model is a server, ``evaluation.checkpoints.NAME=http://HOST/v1@MODEL`` or the one of
``evaluation.parser``, or a local checkpoint of transformers.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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


@dataclass
class Asked:
    """Questions of one scorer, answered by a backend and kept by model, images and words.

    name: the scorer's. version: of its question. parallel: requests at once. store: a file, or
    None.
    """

    name: str
    version: int
    backend: Backend
    parallel: int
    store: Path | None
    faults: Counter[str] = field(default_factory=Counter)
    count: int = 0

    def each(
        self, jobs: Sequence[tuple[Images, str]], ask: Callable[[Images, str], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return the result of each job, stored or new; ``ask`` makes it, ready for JSON.

        A result whose ``read`` is not "" names a fault, which is counted.
        """
        store = Store(self.store, "replies", "reply TEXT") if self.store else None
        keys = [self.key(images, text) for images, text in jobs]
        by_key = dict(zip(keys, jobs, strict=True))
        answers, _ = kept(store, by_key, lambda job: json.dumps(ask(*job)), self.parallel)
        results = [json.loads(answers[key]) for key in keys]
        self.count += len(results)
        self.faults.update(result[READ] for result in results if result[READ])
        return results

    def check(self) -> None:
        """Look for a local model's weights; ScorerError without them."""
        weights = getattr(self.backend, "checkpoint", None)
        if isinstance(weights, Checkpoint):
            weights.check()

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


def asked(
    name: str, version: int, place: str | None, parser: ParserConfig, store: Path | None
) -> Asked:
    """Make the questions of a scorer; a server is asked several at once.

    Args:
        name: of the scorer.
        version: of its question; another one asks anew.
        place: its checkpoint, or a server as URL@MODEL.
        parser: settings of the server.
        store: the file that keeps answers.
    """
    backend = backend_for(name, place, parser)
    served = not isinstance(getattr(backend, "checkpoint", None), Checkpoint)
    return Asked(name, version, backend, parser.parallel if served else 1, store)
