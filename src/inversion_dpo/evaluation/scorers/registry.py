"""Find scorers by the names in ``evaluation.scorer`` and call several of them as one."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from inversion_dpo.evaluation.prompt_sets import PromptSet, graph_of_prompt
from inversion_dpo.evaluation.scorers import unified_reward, vqa
from inversion_dpo.evaluation.scorers.asked import (
    COMPBENCH,
    GENEVAL,
    SPATIAL,
    geneval_row,
    per_prompt,
    phrases_of,
    relation_of,
)
from inversion_dpo.evaluation.scorers.checkpoint import TENSORS, Checkpoint, ScorerError, device
from inversion_dpo.evaluation.scorers.own import (
    Graphs,
    Scores,
    asked_safely,
    check_names,
    check_same,
    checked,
    imported,
    source_of,
    sources_of,
)
from inversion_dpo.evaluation.scorers.preprocess import Pixels
from inversion_dpo.evaluation.scorers.scene_graph import SCENE_GRAPH, SCORES, SceneGraphScorer
from inversion_dpo.evaluation.scorers.score_store import Store, score_key
from inversion_dpo.evaluation.scorers.unified_reward import PAIR, UNIFIED, UnifiedRewardScorer
from inversion_dpo.evaluation.scorers.vqa import VQA, VqaScorer
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.run.fields import ParserConfig

logger = logging.getLogger(__name__)
Scorer = Callable[..., Any]  # (images, prompts) -> scores [B], or scores [B] by name
_Row = tuple[Pixels, str, SceneGraph | None]
SCENES = "scenes"  # the exact checker of the embedded world
VERSION = 1  # of the scorers' code; part of every kept score's key

# name -> hub repository and revision, taken from the hub's pages; none of them was downloaded here
# (docs/reference/scorers.md names the ports and their authors).
CHECKPOINTS = {
    "clip": "openai/clip-vit-large-patch14",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "hpsv2": "adams-story/HPSv2-hf@refs/pr/2",
    "hpsv21": "RE-N-Y/hpsv21",
    "imagereward": "RE-N-Y/ImageReward",
    "mps": "RE-N-Y/mpsv1",
    "geneval": "facebook/mask2former-swin-small-coco-instance",
    "compbench": "Salesforce/blip-vqa-capfilt-large@refs/pr/7",
    "compbench-spatial": "google/owlv2-base-patch16-ensemble",
    "aesthetic": "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE",
}
# Their authors publish no folder that transformers reads; docs/reference/scorers.md says how to
# make one.
OWN_FOLDER = ("aesthetic25", "hpsv3")
SERVED = (SCENE_GRAPH, VQA, UNIFIED)  # a vision-language model answers, and may cost money
# what they read of a prompt or its row
PER_PROMPT: dict[str, Callable[..., Any]] = {
    GENEVAL: geneval_row,
    COMPBENCH: phrases_of,
    SPATIAL: relation_of,
}
KINDS = {  # file in this folder, and class
    **dict.fromkeys(("clip", "pickscore", "hpsv2", "hpsv21"), ("clip", "ClipScorer")),
    "imagereward": ("image_reward", "ImageRewardScorer"),
    "aesthetic": ("aesthetic", "AestheticScorer"),
    "aesthetic25": ("aesthetic", "Aesthetic25Scorer"),
    "hpsv3": ("hpsv3", "HPSv3Scorer"),
    "mps": ("mps", "MPSScorer"),
    GENEVAL: ("geneval", "GenEvalScorer"),
    COMPBENCH: ("compbench", "CompBenchScorer"),
    SPATIAL: ("compbench_spatial", "SpatialScorer"),
}
LPIPS = "lpips"
TOGETHER = (PAIR, LPIPS)  # which see several images at once, see ``pairwise``, ``diversity``
OFFERED = (*CHECKPOINTS, *OWN_FOLDER, SCENES, *SERVED, *TOGETHER)


@dataclass(frozen=True)
class Named:
    """A scorer of the registry or a user's own, loaded at its first call.

    spec: its name or ``module:function``. make: loads it, or raises ScorerError. checkpoint: its
    weights; None without any. reads: prompt -> text that its scores depend on, or a ScorerError.
    beside: further weights.
    """

    spec: str
    make: Callable[[], Scorer]
    checkpoint: Checkpoint | None = None
    reads: Callable[[str], str] = str
    beside: tuple[Checkpoint, ...] = ()

    @cached_property
    def call(self) -> Scorer:
        """The callable; ScorerError if it cannot be loaded."""
        return self.make()

    @cached_property
    def identity(self) -> str | None:
        """Everything that its scores depend on besides image and prompt; None: not kept."""
        if self.checkpoint is None:
            return None
        weights = " ".join(part.identity() for part in (self.checkpoint, *self.beside))
        return f"{VERSION} {self.spec} {weights}"

    def places(self) -> list[Path]:
        """List the local folders or files that its scores depend on."""
        if self.checkpoint is None:
            return sources_of(self.spec) if ":" in self.spec else []
        return [part.folder for part in (self.checkpoint, *self.beside) if part.folder]


class ScorerGroup:
    """Several scorers as one: (images, prompts) -> scores [B] by name.

    It scores images in batches, and not again what ``store`` has; every batch is stored at once.
    A score has its scorer's name, or the name that a function returns with it. ScorerError for a
    score that is missing, not finite or named twice.
    """

    def __init__(self, members: Sequence[Named], batch_size: int, store: Store | None) -> None:
        self.members, self.batch_size, self.store = tuple(members), batch_size, store
        self.given: dict[str, set[str]] = {}  # scorer -> the names of its scores

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> Scores:
        """Score every image for the prompt at its place."""
        return self.judge(images, prompts)[0]

    def judge(
        self,
        images: Sequence[Pixels],
        prompts: Sequence[str],
        graphs: Sequence[SceneGraph | None] | None = None,
    ) -> tuple[Scores, Graphs | None]:
        """Return the scores, and the graphs [B] if a scorer reads any.

        Args:
            images: uint8 [H, W, 3] each.
            prompts: one for each image.
            graphs: intended graph of each prompt; None parses its text. Only ``scenes`` uses it.
        """
        if len(images) != len(prompts) or not images:
            raise ScorerError(f"{len(images)} images and {len(prompts)} prompts: give one each")
        scores: Scores = {}
        read: Graphs = []
        rows = list(zip(images, prompts, graphs or [None] * len(images), strict=True))
        starts = range(0, len(rows), self.batch_size)
        for member in self.members:
            parts = [self._batch(member, rows[k : k + self.batch_size]) for k in starts]
            for part, _ in parts:
                check_same(member.spec, part, self.given.setdefault(member.spec, {*part}))
            new = {name: np.concatenate([p[name] for p, _ in parts]) for name in parts[0][0]}
            if double := sorted(set(new) & set(scores)):
                raise ScorerError(f"two scorers give a score called {double[0]!r}: drop one")
            scores |= new
            read = read or [graph for _, graphs in parts for graph in graphs]
        return scores, read or None

    def known(self) -> list[str] | None:
        """List the scores' names, with nothing loaded or tried; None where a function is one's own.

        Raises:
            ScorerError: there is no such function.
        """
        own = [member.spec for member in self.members if ":" in member.spec]
        if missing := [spec for spec in own if source_of(spec) is None]:
            raise ScorerError(
                f"evaluation.scorer={missing[0]}: there is no such module here; write "
                "module:function"
            )
        return None if own else [name for member in self.members for name in _of(member.spec)]

    def names(self, prompts: Sequence[str]) -> list[str]:
        """List the scores' names; ScorerError if these prompts or a scorer cannot be scored.

        Weights are looked for and not loaded. A user's own function is tried on a grey image.
        """
        grey, found = np.full((64, 64, 3), 127, np.uint8), list[str]()
        check_apart(self.members)
        for member in self.members:
            odd = [p for p in prompts if member.spec == SCENES and graph_of_prompt(p) is None]
            if odd:
                raise ScorerError(
                    f"evaluation.scorer={SCENES} reads captions of the embedded world alone, not "
                    f"{odd[0][:60]!r}: give another scorer (docs/reference/scorers.md), or null"
                )
            for prompt in prompts:
                member.reads(prompt)
            for part in filter(None, (member.checkpoint, *member.beside)):
                part.check()
            if member.spec in SERVED:
                served: Any = member.call
                served.check(prompts)
            if ":" not in member.spec:
                found += _of(member.spec)
            else:
                try:
                    found += _called(member, [(grey, [*prompts, "a picture"][0], None)])[0]
                except Exception as error:  # whatever a user's own function raises
                    raise ScorerError(
                        f"evaluation.scorer={member.spec} fails on a grey 64x64 image: "
                        f"{' '.join(str(error).split())[:400]}"
                    ) from error
        check_names(found)
        return found

    def conclude(self) -> None:
        """Let the scorers that were used log their summary, such as the cost."""
        for member in self.members:
            if "call" in member.__dict__ and hasattr(member.call, "conclude"):
                member.call.conclude()

    def _batch(self, member: Named, rows: list[_Row]) -> tuple[Scores, Graphs]:
        if self.store is None or member.identity is None:
            return _called(member, rows)
        keys = [score_key(member.identity, i, member.reads(p)) for i, p, _ in rows]
        stored = self.store.get(keys)
        if new := [k for k, key in enumerate(keys) if key not in stored]:
            (fresh,) = _called(member, [rows[k] for k in new])[0].values()
            stored |= {keys[k]: float(v) for k, v in zip(new, fresh, strict=True)}
            self.store.put([keys[k] for k in new], fresh.tolist())
        return {member.spec: np.array([stored[key] for key in keys])}, []


def check_apart(members: Sequence[Named]) -> None:
    """Refuse CLIP's weights under two names: in names and shapes of tensors these are the same.

    Raises:
        ScorerError: the place is another scorer's too, by the settings or by default.
    """
    clips = [name for name, part in TENSORS.items() if part == TENSORS["clip"]]
    taken = {CHECKPOINTS[name]: name for name in clips}
    for member in members:
        found = member.checkpoint
        if found is None or member.spec not in clips:
            continue
        place = str(found.folder.resolve() if found.folder else found.path)
        place += f"@{found.revision}" if found.revision else ""
        if (other := taken.setdefault(place, member.spec)) != member.spec:
            raise ScorerError(
                found.complaint(f"{other} has the same weights, which are not both's")
            )


def _of(spec: str) -> Sequence[str]:
    """List the names of a registered scorer's scores."""
    from inversion_dpo.world.checker import NAMES

    several: dict[str, Sequence[str]] = {SCENES: NAMES, SCENE_GRAPH: (*SCORES, "parsed")}
    several |= {VQA: vqa.SCORES, UNIFIED: unified_reward.SCORES}
    return several.get(spec, (spec,))


def _called(member: Named, rows: list[_Row]) -> tuple[Scores, Graphs]:
    images, prompts, graphs = map(list, zip(*rows, strict=True))
    if ":" in member.spec:
        answer = asked_safely(member.spec, lambda: member.call, images, prompts)
    else:
        more = {"graphs": graphs} if member.spec == SCENES else {}
        answer = member.call(images, prompts, **more)
    scores, read = checked(member.spec, answer, len(rows))
    for name, values in scores.items():
        for k in np.flatnonzero(~np.isfinite(values)).tolist():
            raise ScorerError(
                f"scorer {member.spec}: {name} is {values[k]} for the prompt {prompts[k]!r} (image "
                f"{k} of {len(rows)}). Nothing of this batch is kept: look at that image, give the "
                "scorer weights in float32, or leave it out of evaluation.scorer"
            )
    return scores, read


@cache
def tell_unused(unused: str, names: str) -> None:
    """Log once that a configuration names checkpoints of more scorers than a command asks."""
    logger.info("evaluation.checkpoints.%s is not used: evaluation.scorer is %s", unused, names)


def load_scorers(
    spec: str | Sequence[str],
    checkpoints: Mapping[str, str] | None = None,
    batch_size: int = 16,
    store: Path | None = None,
    parser: ParserConfig | None = None,
    prompt_set: Callable[[], PromptSet] | None = None,
) -> ScorerGroup:
    """Return the scorers that ``evaluation.scorer`` names, as one; nothing is loaded yet.

    Args:
        spec: names of ``OFFERED`` or ``module:function``, comma-separated or a list.
        checkpoints: name -> folder or ``OWNER/NAME``, with an optional ``@REVISION``.
        batch_size: images at once.
        store: a file that keeps scores and answers; None keeps none.
        parser: settings of scene-graph, ``evaluation.parser``.
        prompt_set: returns all prompts with their graphs; only scene-graph needs and calls it.

    Raises:
        ScorerError: no scorer, an unknown or repeated name, or a checkpoint for an unknown scorer.
    """
    names = [part.strip() for part in (spec.split(",") if isinstance(spec, str) else spec)]
    if not names or not all(names):
        raise ScorerError(f"evaluation.scorer={spec!r} names no scorer; {_offer()}")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ScorerError(f"evaluation.scorer names {repeated[0]} twice: give each scorer once")
    places = dict(checkpoints or {})
    if unknown := sorted(set(places) - {*CHECKPOINTS, *OWN_FOLDER, *SERVED, *TOGETHER}):
        raise ScorerError(f"evaluation.checkpoints.{unknown[0]}: no such scorer; {_offer()}")
    if unused := sorted({*places} - {*names, *(["clip"] if GENEVAL in names else [])}):
        tell_unused(", evaluation.checkpoints.".join(unused), ",".join(names))

    def named(name: str) -> Named:
        if name == SCENE_GRAPH:
            if prompt_set is None:
                raise ScorerError(f"{name} needs the prompts' graphs: give `prompt_set`")
            how = parser or ParserConfig()
            return Named(name, lambda: SceneGraphScorer(how, places.get(name), prompt_set(), store))
        if name in (VQA, UNIFIED):
            kind = VqaScorer if name == VQA else UnifiedRewardScorer
            return Named(name, lambda: kind(places.get(name), parser or ParserConfig(), store))
        if name == SCENES:
            from inversion_dpo.world.checker import judge  # exact, and takes intended graphs

            return Named(name, lambda: judge)
        if name in PER_PROMPT:
            return _with_rows(name, places, prompt_set)
        return _by_itself(name, places.get(name))

    members = [named(name) for name in names]
    return ScorerGroup(members, batch_size, Store(store) if store else None)


def _with_rows(
    name: str, places: Mapping[str, str], prompt_set: Callable[[], PromptSet] | None
) -> Named:
    """Find a scorer that reads more of a prompt set than the prompts."""
    if prompt_set is None:
        raise ScorerError(f"{name} needs the rows of the prompt set: give `prompt_set`")
    weights, clip = (Checkpoint.at(k, places.get(k, CHECKPOINTS[k])) for k in (name, "clip"))
    asked, beside = per_prompt(prompt_set, PER_PROMPT[name]), (clip,) if name == GENEVAL else ()
    make = partial(built, name, weights, *beside, asked)
    return Named(name, make, weights, lambda p: f"{p} {json.dumps(asked(p))}", beside)


def _by_itself(name: str, place: str | None) -> Named:
    """Find a scorer with weights of its own at ``place``, or a user's function."""
    if name in OWN_FOLDER and place is None:
        raise ScorerError(
            f"{name} has no published folder: make one (docs/reference/scorers.md) and give "
            f"evaluation.checkpoints.{name}=FOLDER"
        )
    if name in (*CHECKPOINTS, *OWN_FOLDER):
        weights = Checkpoint.at(name, place or CHECKPOINTS[name])
        return Named(name, partial(built, name, weights), weights)
    if ":" in name:
        return Named(name, partial(imported, name))
    near = difflib.get_close_matches(name, OFFERED, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ScorerError(f"evaluation.scorer={name!r}: {hint}{_offer()}")


def built(name: str, *parts: Any) -> Scorer:
    """Build a scorer of the registry from its parts, on the accelerator if there is one."""
    file, kind = KINDS[name]
    module = import_module(f"inversion_dpo.evaluation.scorers.{file}")
    scorer: Scorer = getattr(module, kind)(*parts, device())
    return scorer


def _offer() -> str:
    return f"one of {', '.join(OFFERED)}, or module:function"
