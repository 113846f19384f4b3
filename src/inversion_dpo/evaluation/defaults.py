"""Fill in what an evaluation takes from the pairs and from the scorer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from inversion_dpo.data.buckets import buckets, named, place, square
from inversion_dpo.data.images import DataError
from inversion_dpo.data.source import Pair, open_pairs
from inversion_dpo.data.transforms import Size
from inversion_dpo.evaluation.prompt_sets import read_prompts
from inversion_dpo.evaluation.samples import scorers_of
from inversion_dpo.evaluation.scorers.registry import SCENES
from inversion_dpo.evaluation.scorers.scene_graph import SCENE_GRAPH
from inversion_dpo.evaluation.sides import sizes_for, sources_for
from inversion_dpo.run.disk import atomic_text
from inversion_dpo.run.fields import Config, ConfigError
from inversion_dpo.run.processes import current_team
from inversion_dpo.training.split import split_pairs
from inversion_dpo.trajectories.method import chosen_method, takes_images

logger = logging.getLogger(__name__)
HELDOUT = "heldout"  # as evaluation.prompts: the captions of the held-out pairs
HELDOUT_FILE, MEASURING_FILE = "heldout-prompts.jsonl", "measuring-prompts.jsonl"  # made here
SOURCES = "heldout-sources"  # folder of the images that these edit
AUTO = "auto"  # as evaluation.preference: the only score


def settled(config: Config, folder: Path) -> Config:
    """Replace ``evaluation.prompts=heldout`` by a file in ``folder``, and the preference ``auto``.

    Raises:
        ConfigError: the held-out pairs have no caption of their own, or a scorer cannot be used.
        DataError: the pairs cannot be read.
    """
    config, file = with_prompts_of(config, folder), folder / HELDOUT_FILE
    e = config.evaluation
    if e.prompts == HELDOUT:
        if current_team().main:
            try:
                write_heldout(config, file)
            except DataError as error:
                if not file.exists():
                    raise
                logger.warning("%s. The held-out prompts of %s are taken", error, file)
        current_team().wait()
        e = replace(e, prompts=str(file))
    return replace(config, evaluation=replace(e, preference=preferred(config)))


def with_sources(config: Config, folder: Path) -> Config:
    """Let held-out prompts that edit images be read from a file, which is made if need be."""
    config, file = with_prompts_of(config, folder), folder / HELDOUT_FILE
    if config.evaluation.prompts != HELDOUT or not open_pairs(config.data).edits:
        return config
    write_heldout(config, file)
    return replace(config, evaluation=replace(config.evaluation, prompts=str(file)))


def write_heldout(config: Config, file: Path) -> None:
    """Write the held-out prompts with their sizes, and beside the file the sources of edits."""
    usual, held = square(config.model.resolution), heldout_prompts(config)
    rows = [
        {"prompt": p} | ({} if size == usual else {"size": named(size)})
        for p, (size, _) in held.items()
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    for row, source in zip(rows, _heldout_sources(config, held), strict=True):
        if source:
            row["source"] = f"{SOURCES}/{hashlib.sha256(source.tobytes()).hexdigest()[:16]}.png"
            (file.parent / SOURCES).mkdir(exist_ok=True)
            source.save(file.parent / row["source"])
    atomic_text("".join(f"{json.dumps(row)}\n" for row in rows), file)


def with_prompts_of(config: Config, folder: Path) -> Config:
    """Find prompts that were written into a run's folder, or its comparison's, where it lies now.

    The settings name the place where it lay then.
    """
    e = config.evaluation
    name = Path(e.prompts).name
    if name not in (HELDOUT_FILE, MEASURING_FILE):
        return config
    near = [place / name for place in (folder, *folder.absolute().parents[:2])]
    found = next((file for file in near if file.is_file()), e.prompts)
    return replace(config, evaluation=replace(e, prompts=str(found)))


def preferred(config: Config) -> str:
    """Return ``evaluation.preference``; for ``auto`` the only score's name, if there is one."""
    e = config.evaluation
    if e.preference != AUTO or not e.scorer:
        return e.preference
    first, *others = e.scorers
    if others:
        raise ConfigError(
            "evaluation.preference=auto needs one scorer; name the score by which the pairs "
            f"were labelled, e.g. evaluation.preference={first}"
        )
    return AUTO if first in (SCENES, SCENE_GRAPH) else first.rpartition(":")[2].strip()


def check_scores(config: Config, prompts: Sequence[str] | None = None) -> None:
    """Refuse scorers that cannot be used, and a preference that is none of their scores.

    With ``prompts``, a user's own functions are tried, and weights are looked for.
    """
    e, score = config.evaluation, scorers_of(config)
    if score is None:
        return
    known = score.known() if prompts is None else score.names(prompts)
    if preferred(config) not in (known or [preferred(config)]):
        raise ConfigError(
            f"evaluation.preference={e.preference!r} is not a score of {e.scorer}: choose one of "
            f"{', '.join(known or [])}"
        )


def evaluation_prompts(config: Config) -> list[str]:
    """Read the prompts of the evaluation; nothing is written."""
    e = config.evaluation
    if e.prompts == HELDOUT:
        return list(heldout_prompts(config))[: e.limit]
    return read_prompts(e.prompts, e.limit)


def evaluation_sizes(config: Config, prompts: Sequence[str]) -> list[Size]:
    """List the size of each prompt's images in the evaluation."""
    if config.evaluation.prompts != HELDOUT:
        return sizes_for(config, prompts)
    held, usual = heldout_prompts(config), square(config.model.resolution)
    return [held[prompt][0] if prompt in held else usual for prompt in prompts]


def has_sources(config: Config, prompts: Sequence[str]) -> list[object]:
    """Tell of each prompt of the evaluation whether it edits an image; None if not."""
    if config.evaluation.prompts != HELDOUT:
        return [*sources_for(config, prompts)]
    return [open_pairs(config.data).edits or None] * len(prompts)


def _heldout_sources(
    config: Config, held: Mapping[str, tuple[Size, int]]
) -> list[Image.Image | None]:
    """Read the sources of held-out prompts, which have the places of their pairs."""
    if not open_pairs(config.data).edits:
        return [None] * len(held)
    places = {place for _, place in held.values()}
    found = {k: p.source_image for k, (p, _) in enumerate(_fitting(config)) if k in places}
    return [found[place] for _, place in held.values()]


def _fitting(config: Config) -> Iterator[tuple[Pair, Size]]:
    """Give the pairs that have a size, the others are not trained on, with it."""
    sizes = buckets(config.model.resolution)
    for pair in open_pairs(config.data, alone=takes_images(config)).read():
        found = place(sizes, pair.sizes, config.data.fit)
        if found.fit:
            yield pair, found.size


def heldout_prompts(config: Config) -> dict[str, tuple[Size, int]]:
    """Map captions that only held-out pairs have to their pictures' size, and the pair's place.

    A caption with another source is another one; the first pair of each caption counts.
    """
    if config.inversion.max_error is not None:
        raise ConfigError(
            "evaluation.prompts=heldout does not know which pairs inversion.max_error leaves out: "
            "give a file of prompts"
        )
    pairs, sizes, marks = list[tuple[str, str]](), list[Size](), list[list[str]]()
    usable, liked = list[int](), chosen_method(config).loss == "sft"
    for number, (pair, size) in enumerate(_fitting(config)):
        pairs.append((pair.caption, hashlib.sha256(pair.source or b"").hexdigest()))
        sizes.append(size)
        marks.append(pair.marks)
        usable += [number] * (not (liked and pair.single) or pair.preference > 0.5)
    if not pairs:
        raise ConfigError("evaluation.prompts=heldout: no pair fits model.resolution and data.fit")
    trained, held = split_pairs(usable, config.data.holdout, marks)
    seen, found = {pairs[number] for number in trained}, dict[str, tuple[Size, int]]()
    own = dict.fromkeys(pairs[number] for number in held if pairs[number] not in seen)
    for number in held:
        if pairs[number] in own:
            found.setdefault(pairs[number][0], (sizes[number], number))
    if more := len(own) - len(found):
        logger.warning(
            "evaluation.prompts=heldout leaves out %d held-out edits, whose prompt occurs with "
            "another source: word the prompts differently to sample all",
            more,
        )
    if not found:
        raise ConfigError(
            f"evaluation.prompts=heldout: every caption of the {len(held)} held-out pairs is "
            "trained on too: give a file of other prompts"
        )
    return found
