"""Build preference pairs from the reference's own samples: ``inversion-dpo pairs build``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inversion_dpo.data.candidates import Candidate, load_chunk, save_chunk, write_pairs
from inversion_dpo.sampling import sample
from inversion_dpo.scenes.graph import SceneGraph
from inversion_dpo.scenes.pairs import LABELLINGS, best_against_worst, candidate, soft_label
from inversion_dpo.scenes.prompts import prompts

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


def candidates(
    folder: Path, pipeline: Any, count: int, k: int, seed: int, steps: int, guidance: float
) -> Iterator[list[Candidate]]:
    """The k candidates of each of ``count`` training prompts; chunks on disk are not redone."""
    graphs = prompts("train", count, seed + 1)
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, count, CHUNK)):
        path = folder / f"candidates-{number:04d}.parquet"
        if not path.exists():
            part = graphs[start : start + CHUNK]
            first = seed * 10_000_000 + start * k
            save_chunk(path, sample_chunk(pipeline, part, k, first, steps, guidance))
        chunk = load_chunk(path)
        yield from (chunk[i : i + k] for i in range(0, len(chunk), k))


def build_pairs(
    output: Path, pipeline: Any, count: int, k: int, seed: int, steps: int, guidance: float,
    limit: int | None = None,
) -> dict[str, int]:  # fmt: skip
    """Sample, score, pair best against worst, and write one Parquet file per labelling.

    Returns the number of pairs by labelling.
    """
    groups = list(candidates(output / "candidates", pipeline, count, k, seed, steps, guidance))
    made = {}
    for name in LABELLINGS:
        found = (best_against_worst(g, name, MARGINS[name]) for g in groups)
        pairs = [p for p in found if p is not None][:limit]
        write_pairs(
            output / f"{name}.parquet", pairs, seed, [soft_label(w, l, name) for w, l in pairs]
        )
        made[name] = len(pairs)
    return made
