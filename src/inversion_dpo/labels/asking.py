"""Pairs that people label: sampled, labelled on the page of ``web``, taken back as pairs."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from inversion_dpo.data.columns import WRITTEN
from inversion_dpo.data.images import DataError, decode_image, one_colour, one_colour_text
from inversion_dpo.evaluation.prompt_sets import PromptSet, prompts_with_graphs
from inversion_dpo.evaluation.samples import model_digest, write_samples
from inversion_dpo.evaluation.sides import opened, sampler_of, sizes_in
from inversion_dpo.labels.export import export, summary
from inversion_dpo.labels.questions import WebError
from inversion_dpo.labels.store import LabelStore
from inversion_dpo.making_pairs.labelling import claim
from inversion_dpo.run.config import Config
from inversion_dpo.run.disk import MARK, atomic_tables, mark_of, read_table, sha256_of
from inversion_dpo.run.faults import Waiting, memory_advice
from inversion_dpo.run.words import typed

logger = logging.getLogger(__name__)
T = TypeVar("T")
LEAST = 4  # pairs that a training takes
WRITE_ROWS = 64  # pairs or images in memory at a time
SAMPLED = (*WRITTEN, ("seed_0", pa.int64()), ("seed_1", pa.int64()))


def sample_pairs(output: Path, config: Config, asked: PromptSet, seed: int) -> int:
    """Write two samples of each prompt, from consecutive seeds, as unlabelled pairs.

    Samples have the prompt's own size, and edit its source, which is written too. A pair with an
    image of one colour is left out and named. Every batch is kept in NAME.samples beside the file
    until that is whole, so that a command that was killed goes on where it was. A whole file is
    kept, and no other is replaced.

    Args:
        output: the Parquet file NAME.parquet.
        config: its ``model`` and ``evaluation`` say how to sample.
        asked: the prompts.
        seed: of the first image.

    Returns:
        The number of pairs.

    Raises:
        DataError: the file or NAME.samples is of other settings, prompts or seeds, or holds others.
        WebError: no pair is left.
    """
    folder, captions = samples_beside(output), asked.prompts
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "build.json").exists():
        raise DataError(f"{folder} holds files of other origin: choose another --output")
    settings = _sampled_by(config, asked, seed)
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    if output.exists():
        return _kept(output, digest)
    claim(folder, settings)
    files = _batches(folder, config, asked, seed)
    pictures = (decode_image(image, f"image {k}") for k, image in enumerate(_images(files)))
    blank = [k for k, picture in enumerate(pictures) if one_colour(picture)]
    if blank:
        named = [f"{captions[k // 2][:60]!r}, seed {seed + k}" for k in blank]
        text = one_colour_text(named, 2 * len(captions))
        logger.warning("%s; their pairs are left out", text)
    dropped = {k // 2 for k in blank}
    if len(dropped) == len(captions):
        shutil.rmtree(folder)
        raise WebError(f"{output}: every pair has an image of one colour; nothing was written")
    rows = (row for k, row in enumerate(_rows(files, asked, seed)) if k not in dropped)
    edits = any(asked.source_of)
    schema = pa.schema([*SAMPLED, *[("source_image", pa.binary())] * edits], {MARK: digest})
    parts = iter(lambda: list(islice(rows, WRITE_ROWS)), [])
    tables = (pa.Table.from_pylist(part, schema) for part in parts)
    atomic_tables(tables, schema, output, compression="zstd")
    shutil.rmtree(folder)
    return len(captions) - len(dropped)


def _kept(output: Path, digest: str) -> int:
    """Count the pairs of a file that these settings made; DataError for any other."""
    if mark_of(output) == digest:
        return int(pq.read_metadata(output).num_rows)
    raise DataError(
        f"{output} is there, and was not made with these settings, prompts and seed: choose "
        "another --output, or delete it. Labels of its pictures would not fit new ones"
    )


def samples_beside(output: Path) -> Path:
    """Name the folder that keeps samples until the file of pairs is whole."""
    return output.with_suffix(".samples")


def _batches(folder: Path, config: Config, asked: PromptSet, seed: int) -> list[Path]:
    """Sample batch by batch into files of the folder; intact ones are kept."""
    edited, e, sampler = asked.source_of, config.evaluation, None
    for file in {*edited.values()}:
        opened(file)  # one that cannot be read is named before anything is sampled
    captions, prompts = _twice(asked.prompts), _twice(prompts_with_graphs(asked))
    sizes = _twice(sizes_in(asked, asked.prompts, config.model.resolution))
    starts = range(0, len(captions), e.batch_size)
    files = [folder / f"{start:08d}-{e.batch_size}.parquet" for start in starts]
    with (
        tqdm(total=len(captions), desc="pairs", unit="image", mininterval=1.0) as bar,
        memory_advice("sampling"),
    ):
        for start, file in zip(starts, files, strict=True):
            batch = slice(start, start + e.batch_size)
            texts = captions[batch]
            if read_table(file) is None:
                if sampler is None:
                    sampler = sampler_of(config, None)
                    sampler.warn_of_cut(asked.prompts)
                seeds = [seed + start + k for k in range(len(texts))]
                sources = [opened(edited.get(text)) for text in texts]
                images = sampler.draw(prompts[batch], seeds, sizes=sizes[batch], sources=sources)
                write_samples(file, texts, seeds, images, {})
            bar.update(len(texts))
    return files


def _rows(files: Sequence[Path], asked: PromptSet, seed: int) -> Iterator[dict[str, Any]]:
    """Give the pairs as rows, one after another."""
    edited, images = asked.source_of, _images(files)
    for k, (first, second) in enumerate(zip(images, images, strict=True)):
        caption = asked.prompts[k]
        row: dict[str, Any] = {"jpg_0": first, "jpg_1": second, "caption": caption}
        row |= {"seed_0": seed + 2 * k, "seed_1": seed + 2 * k + 1}
        yield row | ({"source_image": edited[caption].read_bytes()} if caption in edited else {})


def _images(files: Sequence[Path]) -> Iterator[bytes]:
    """Read the encoded images, with few in memory at a time."""
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(WRITE_ROWS, columns=["image"]):
            yield from (image.as_py() for image in batch["image"])


def _sampled_by(config: Config, asked: PromptSet, seed: int) -> dict[str, object]:
    """Say what samples depend on."""
    text = f"{asked.prompts} {asked.size_of} {[g and g.to_json() for g in asked.graphs]}"
    text += f"{[(prompt, sha256_of(file)) for prompt, file in asked.source_of.items()]}"
    return {
        "prompts": hashlib.sha256(text.encode()).hexdigest(),
        "model": model_digest(config, None),
        "steps": config.evaluation.sample_steps,
        "guidance": config.evaluation.guidance_scale,
        "seed": seed,
    }


def _twice(rows: Sequence[T]) -> list[T]:
    return [row for row in rows for _ in range(2)]


def pairs_by_people(pairs: Path, config: Config, asked: PromptSet, seed: int) -> None:
    """Write ``pairs`` by people's labels of two samples of each prompt, see :func:`sample_pairs`.

    The samples and their labels lie beside it, and are kept. Raises Waiting, with the command that
    opens the page, until each pair has a label of someone; WebError if too few of them prefer.
    """
    samples, labels = pairs.with_name("samples.parquet"), pairs.with_name("labels.sqlite")
    if not samples.exists():
        sample_pairs(samples, config, asked, seed)
    done, total = 0, len(asked.prompts)
    if labels.exists():
        store = LabelStore(labels)
        done, total = len(store.votes()), store.total() or total  # the page may have died at once
    if done < total:
        raise Waiting(
            "label the policy's samples by\n"
            f"  inversion-dpo web {typed(samples)} --labels {typed(labels)}\n"
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
