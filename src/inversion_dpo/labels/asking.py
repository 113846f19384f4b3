"""Pairs that people label: sampled, labelled on the page of ``web``, taken back as pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from inversion_dpo.data.images import one_colour, one_colour_text, png
from inversion_dpo.labels.export import export, summary
from inversion_dpo.labels.questions import WebError
from inversion_dpo.labels.store import LabelStore
from inversion_dpo.models.sampler import Prompt, Sampler
from inversion_dpo.run.disk import atomic_table
from inversion_dpo.run.faults import Waiting

logger = logging.getLogger(__name__)
LEAST = 4  # pairs that a training takes


def sample_pairs(output: Path, sampler: Sampler, prompts: Sequence[Prompt], seed: int) -> int:
    """Write two samples of each prompt, from consecutive seeds, as unlabelled pairs.

    A pair with an image of one colour is left out and named. Returns the number of pairs; WebError
    says that there is none.
    """
    twice = [prompt for prompt in prompts for _ in range(2)]
    images = sampler.draw(twice, [seed + k for k in range(len(twice))], desc="pairs")
    captions = [p if isinstance(p, str) else p.caption for p in prompts]
    blank = [k for k, image in enumerate(images) if one_colour(image)]
    if blank:
        named = [f"{captions[k // 2][:60]!r}, seed {seed + k}" for k in blank]
        logger.warning("%s; their pairs are left out", one_colour_text(named, len(images)))
    kept = [k for k in range(len(prompts)) if not {2 * k, 2 * k + 1} & set(blank)]
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
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_table(pa.table(rows), output, compression="zstd")
    return len(kept)


def pairs_by_people(
    pairs: Path, load: Callable[[], Sampler], prompts: Sequence[Prompt], seed: int
) -> None:
    """Write ``pairs`` by people's labels of two samples of each prompt, from ``load``'s sampler.

    The samples and their labels lie beside it, and are kept. Raises Waiting, with the command that
    opens the page, until each pair has a label of someone; WebError if too few of them prefer.
    """
    samples, labels = pairs.with_name("samples.parquet"), pairs.with_name("labels.sqlite")
    if not samples.exists():
        sample_pairs(samples, load(), prompts, seed)
    done, total = 0, len(prompts)
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
