"""Build preference pairs from the reference's own samples: ``inversion-dpo pairs build``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inversion_dpo.data.candidates import Candidate, load_chunk, save_chunk, write_pairs
from inversion_dpo.disk import read_table
from inversion_dpo.faults import memory_advice
from inversion_dpo.graphs import SceneGraph
from inversion_dpo.processes import current_team
from inversion_dpo.sampling import sample
from inversion_dpo.scenes.pairs import LABELLINGS, best_against_worst, candidate, soft_label
from inversion_dpo.scenes.prompts import prompts

logger = logging.getLogger(__name__)
MARGINS = {"taste": 0.25, "composition": 0.2}  # least difference of winner and loser
CHUNK = 64  # prompts sampled between two saves


def sample_chunk(
    pipeline: Any, graphs: list[SceneGraph], k: int, first_seed: int, steps: int, guidance: float
) -> list[Candidate]:
    """k scored samples of each prompt, prompt by prompt."""
    repeated = [g for g in graphs for _ in range(k)]
    captions = [g.caption for g in repeated]
    seeds = [first_seed + i for i in range(len(captions))]
    images = sample(pipeline, captions, seeds, steps, guidance, batch_size=64, desc="candidates")
    return [candidate(g, s, i) for g, s, i in zip(repeated, seeds, images, strict=True)]


def chunk_path(folder: Path, number: int) -> Path:
    """Where the candidates of the ``number``-th CHUNK of prompts are kept."""
    return folder / f"candidates-{number:04d}.parquet"


def make_candidates(
    folder: Path, pipeline: Any, count: int, k: int, seed: int, steps: int, guidance: float
) -> None:
    """Sample k candidates of each of ``count`` training prompts, the processes in turn.

    Chunks that are on disk are not made again, unless they are damaged. All processes must call it.
    """
    team, graphs = current_team(), prompts("train", count, seed + 1)
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in list(enumerate(range(0, count, CHUNK)))[team.rank :: team.size]:
        path = chunk_path(folder, number)
        if path.exists() and read_table(path) is None:
            logger.warning("%s is damaged: made again", path)
            path.unlink()
        if not path.exists():
            part, first = graphs[start : start + CHUNK], seed * 10_000_000 + start * k
            save_chunk(path, sample_chunk(pipeline, part, k, first, steps, guidance))
    team.wait()


def candidates(folder: Path, count: int, k: int) -> Iterator[list[Candidate]]:
    """The k candidates of each prompt, from :func:`make_candidates`'s chunks."""
    for number in range(-(-count // CHUNK)):
        chunk = load_chunk(chunk_path(folder, number))
        yield from (chunk[i : i + k] for i in range(0, len(chunk), k))


def build_pairs(
    output: Path, pipeline: Any, count: int, k: int, seed: int, steps: int, guidance: float,
    limit: int | None = None,
) -> dict[str, int]:  # fmt: skip
    """Sample, score, pair best against worst, and write one Parquet file per labelling.

    Returns the number of pairs by labelling. Of several processes all must call it; the first
    one pairs and has the numbers.
    """
    folder = output / "candidates"
    with memory_advice("sampling"):
        make_candidates(folder, pipeline, count, k, seed, steps, guidance)
    made: dict[str, int] = {}
    if not current_team().main:
        return made
    groups = list(candidates(folder, count, k))
    for name in LABELLINGS:
        found = (best_against_worst(g, name, MARGINS[name]) for g in groups)
        pairs = [p for p in found if p is not None][:limit]
        write_pairs(
            output / f"{name}.parquet", pairs, seed, [soft_label(w, l, name) for w, l in pairs]
        )
        made[name] = len(pairs)
    return made
