"""Pairs that people label: sampled, labelled on the page of ``web``, taken back as pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from inversion_dpo.data.images import one_colour, one_colour_text, png
from inversion_dpo.evaluation.prompt_sets import PromptSet, prompts_with_graphs
from inversion_dpo.evaluation.sides import opened, sizes_in
from inversion_dpo.labels.export import export, summary
from inversion_dpo.labels.questions import WebError
from inversion_dpo.labels.store import LabelStore
from inversion_dpo.models.sampler import Sampler
from inversion_dpo.run.disk import atomic_table
from inversion_dpo.run.faults import Waiting

logger = logging.getLogger(__name__)
T = TypeVar("T")
LEAST = 4  # pairs that a training takes


def sample_pairs(output: Path, sampler: Sampler, asked: PromptSet, seed: int) -> int:
    """Write two samples of each prompt, from consecutive seeds, as unlabelled pairs.

    Samples have the prompt's own size, and edit its source, which is written too. A pair with an
    image of one colour is left out and named. Returns the number of pairs; WebError says that there
    is none.
    """
    captions, files = asked.prompts, [asked.source_of.get(p) for p in asked.prompts]
    sources = [opened(file) for file in files]
    sizes = sizes_in(asked, captions, sampler.config.model.resolution)
    images = sampler.draw(
        _twice(prompts_with_graphs(asked)),
        [seed + k for k in range(2 * len(captions))],
        sizes=_twice(sizes),
        sources=_twice(sources),
        desc="pairs",
    )
    blank = [k for k, image in enumerate(images) if one_colour(image)]
    if blank:
        named = [f"{captions[k // 2][:60]!r}, seed {seed + k}" for k in blank]
        logger.warning("%s; their pairs are left out", one_colour_text(named, len(images)))
    kept = [k for k in range(len(captions)) if not {2 * k, 2 * k + 1} & set(blank)]
    if not kept:
        raise WebError(f"{output}: every pair has an image of one colour; nothing was written")
    rows = {
        "jpg_0": [png(images[2 * k]) for k in kept],
        "jpg_1": [png(images[2 * k + 1]) for k in kept],
        "label_0": pa.nulls(len(kept), pa.float64()),
        "caption": [captions[k] for k in kept],
        "seed_0": [seed + 2 * k for k in kept],
        "seed_1": [seed + 2 * k + 1 for k in kept],
    }
    if any(files):
        rows["source_image"] = [file.read_bytes() if (file := files[k]) else None for k in kept]
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_table(pa.table(rows), output, compression="zstd")
    return len(kept)


def _twice(rows: Sequence[T]) -> list[T]:
    return [row for row in rows for _ in range(2)]


def pairs_by_people(pairs: Path, load: Callable[[], Sampler], asked: PromptSet, seed: int) -> None:
    """Write ``pairs`` by people's labels of two samples of each prompt, from ``load``'s sampler.

    The samples and their labels lie beside it, and are kept. Raises Waiting, with the command that
    opens the page, until each pair has a label of someone; WebError if too few of them prefer.
    """
    samples, labels = pairs.with_name("samples.parquet"), pairs.with_name("labels.sqlite")
    if not samples.exists():
        sample_pairs(samples, load(), asked, seed)
    done, total = 0, len(asked.prompts)
    if labels.exists():
        store = LabelStore(labels)
        done, total = len(store.votes()), store.total() or total  # the page may have died at once
    if done < total:
        raise Waiting(
            f"label the policy's samples by\n  inversion-dpo web {samples} --labels {labels}\n"
            f"({done} of {total} pairs are labelled)"
        )
    counts = export(store, pairs)
    if counts["first"] + counts["second"] < LEAST:
        pairs.unlink()
        raise WebError(
            f"{labels}: fewer than {LEAST} pairs in which one image is preferred "
            f"({summary(counts)}): take labels back on the page, or delete {pairs.parent} and ask "
            "about more prompts"
        )
