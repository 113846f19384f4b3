"""The blind comparison: people judge policy against reference on the run's own prompts."""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from pathlib import Path
from threading import Lock, RLock, Thread
from typing import Any

from inversion_dpo.evaluation.people import write_people
from inversion_dpo.labels.questions import Question, WebError
from inversion_dpo.labels.store import LabelStore
from inversion_dpo.labels.votes import outcome
from inversion_dpo.run.disk import sha256_of
from inversion_dpo.web.studio import How, Studio, state_of

AHEAD = 8  # pairs that are sampled before a person needs them


def question(
    prompt: str, seed: int, policy: bytes, reference: bytes, source: bytes | None
) -> Question:
    """Ask about two samples, and show what they edit.

    The seed keeps two questions with equal images apart.
    """
    named = hashlib.sha256(b"".join([f"{seed} {prompt}".encode(), policy, reference]))
    return Question(named.hexdigest()[:16], prompt, (policy, reference), None, source=source)


class Blind:
    """Pairs of policy (first) and reference (second) from the same noise, sampled as needed.

    The seeds are those of ``evaluate``, so people judge the images that its scorers judge. Each
    policy, set of prompts and way of sampling has a file of its own in ``RUN/blind``.
    """

    def __init__(self, studio: Studio, run: Path) -> None:
        self._studio, self._run, self._adapter = studio, run, run / "adapter"
        self._lock, self._sampling, self._fault = RLock(), Lock(), ""
        self.opened = dict[object, tuple[str, LabelStore]]()  # state of the adapter -> its two

    def current(self) -> tuple[str, LabelStore]:
        """Give the digest of the policy as it is now, and the file of its comparison.

        WebError if there is no policy yet.
        """
        from inversion_dpo.evaluation.people import policy_of

        with self._lock:
            if not self._adapter.is_dir():
                raise WebError(f"{self._run} has no policy yet: train first")
            if (state := state_of(self._adapter)) not in self.opened:
                policy = policy_of(self._studio.config, self._adapter)
                e = self._studio.config.evaluation
                how = f"{policy} {self._studio.prompts} {e.seed} {e.sample_steps} "
                how += f"{e.guidance_scale}"
                how += "".join(sha256_of(file) for file in self._studio.sources.values())
                name, folder = hashlib.sha256(how.encode()).hexdigest()[:16], self._run / "blind"
                folder.mkdir(exist_ok=True)
                self.opened[state] = policy, LabelStore(folder / f"{name}.sqlite")
            return self.opened[state]

    def ready(self, labeller: str) -> tuple[LabelStore, int]:
        """Sample ahead of this labeller; WebError with the reason if sampling failed."""
        with self._lock:
            store, total = self.current()[1], len(self._studio.prompts)
        if self._fault:
            fault, self._fault = self._fault, ""
            raise WebError(fault)
        if store.total() < min(total, store.done(labeller) + AHEAD):
            Thread(target=self._more, args=(store,), daemon=True).start()
        return store, total

    def image(self, sha256: str) -> bytes | None:
        """Find an image by its hash, once a comparison has begun."""
        found = (store.image(sha256) for _, store in [*self.opened.values()])
        return next((data for data in found if data is not None), None)

    def verdict(self) -> dict[str, Any]:
        """Write and return people's win rate, see :func:`write_people`."""
        policy, store = self.current()
        votes, scale = store.votes(), self._studio.config.evaluation.guidance_scale
        people = {name for by in votes.values() for name in by}
        outcomes = Counter(outcome(by.values()) for by in votes.values())
        about = {"policy": policy, "comparison": store.path.stem, "guidance_scale": scale}
        return write_people(self._run, about, outcomes, len(people))

    def _more(self, store: LabelStore) -> None:
        """Sample the next batch, unless another thread does."""
        if not self._sampling.acquire(blocking=False):
            return
        try:
            config, start = self._studio.config, store.total()
            e, part = (
                config.evaluation,
                self._studio.prompts[start:][: config.evaluation.batch_size],
            )
            seeds = [e.seed + start + k for k in range(len(part))]
            how = How(e.sample_steps, e.guidance_scale)
            sides = [self._studio.draw(f, part, seeds, how) for f in (self._adapter, None)]
            files = [self._studio.sources.get(prompt) for prompt in part]
            sources = [file.read_bytes() if file else None for file in files]
            if self.current()[1] is store:  # else the policy was trained further meanwhile
                store.add(map(question, part, seeds, *sides, sources))
        except (ValueError, OSError, RuntimeError, sqlite3.Error) as error:
            self._fault = str(error)[:500]
        finally:
            self._sampling.release()
