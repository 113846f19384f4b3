"""Pairs that people label: sampled, labelled on the page of ``web``, taken back as pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inversion_dpo.labels.export import export, summary
from inversion_dpo.labels.questions import WebError
from inversion_dpo.labels.store import LabelStore
from inversion_dpo.labels.unlabelled import write_unlabelled
from inversion_dpo.models.sampler import sample
from inversion_dpo.run.config import Config
from inversion_dpo.run.faults import Waiting

LEAST = 4  # pairs that a training takes


def sample_pairs(
    output: Path, config: Config, pipeline: Any, captions: Sequence[str], seed: int
) -> None:
    """Two samples of each caption, from seeds that follow each other, as unlabelled pairs."""
    e, twice = config.evaluation, [caption for caption in captions for _ in range(2)]
    images = sample(
        pipeline,
        twice,
        [seed + k for k in range(len(twice))],
        e.sample_steps,
        e.guidance_scale,
        e.batch_size,
        "pairs",
        config.model.resolution,
    )
    write_unlabelled(output, captions, images[::2], images[1::2])


def pairs_by_people(
    pairs: Path, config: Config, load: Callable[[], Any], captions: Sequence[str], seed: int
) -> None:
    """Write ``pairs`` by people's labels of two samples of each caption, from ``load``'s pipeline.

    The samples and their labels lie beside it, and are kept. Raises Waiting, with the command that
    opens the page, until each pair has a label of someone; WebError if too few of them prefer.
    """
    samples, labels = pairs.with_name("samples.parquet"), pairs.with_name("labels.sqlite")
    if not samples.exists():
        sample_pairs(samples, config, load(), captions, seed)
    done, total = 0, len(captions)
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
