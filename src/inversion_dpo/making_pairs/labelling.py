"""From prompts to preference pairs: sample each a few times, score, mine, keep what is new.

Samples are made in chunks that are kept on disk, the processes in turn; everything after them is
computed from the chunks, the same in every process, so that a build that was killed goes on where
it was and gives the same pairs. What the scores think of a pair is kept: ``preference_0`` is the
probability, between 0 and 1, that image 0 is preferred.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from inversion_dpo.data.images import DataError, decode_image, one_colour, one_colour_text
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.making_pairs.candidates import Candidate, Labelled, encode_image
from inversion_dpo.making_pairs.duplicates import Duplicates
from inversion_dpo.making_pairs.mining import MINERS, disjoint
from inversion_dpo.run.disk import atomic_table, atomic_text, read_json, read_table
from inversion_dpo.run.faults import memory_advice
from inversion_dpo.run.processes import current_team

logger = logging.getLogger(__name__)
CHUNK = 16  # prompts sampled and scored between two saves
WEIGHTS = "weights of the models"  # in build.json: a hash of their files
READ = "parsed"  # the score that says whether an image could be read at all

Pixels = NDArray[np.uint8]
Draw = Callable[[Sequence[SceneGraph], Sequence[int], str], list[Pixels]]
Verdict = tuple[Mapping[str, NDArray[np.float64]], Sequence[SceneGraph | None] | None]
Judge = Callable[[Sequence[Pixels], Sequence[SceneGraph]], Verdict]


@dataclass(frozen=True)
class Sampling:
    """How images come about.

    draw: (graphs with captions, seeds, source) -> uint8 images [H, W, 3]. judge: (images, graphs)
    -> scores [B] by name, higher is better, and the graph found in each image, if the judge finds
    any. sources: models and guidances in words, taken in turn by a prompt's ``samples``. quality:
    of the JPEGs.
    """

    draw: Draw
    judge: Judge
    samples: int
    sources: tuple[str, ...] = ("",)
    quality: int = 95


@dataclass(frozen=True)
class Labelling:
    """How pairs are chosen: the scores to go by (all, if none is named) and one of MINERS.

    least: see the miner. once: each image in one pair at most.
    """

    by: tuple[str, ...] = ()
    mining: str = "majority"
    least: float = 0.0
    once: bool = False


@dataclass(frozen=True)
class Cell:
    """A stretch of prompts with its own chunks and its own goal.

    graphs: of each the caption is sampled; one without items is a caption alone. quota: the most
    pairs of any labelling; None: what all graphs give. first_seed: of the samples.
    """

    name: str
    graphs: Iterable[SceneGraph]
    quota: int | None = None
    first_seed: int = 0


def fill(
    cell: Cell,
    folder: Path,
    sampling: Sampling,
    labellings: Mapping[str, Labelling],
    duplicates: Duplicates,
) -> dict[str, list[Labelled]]:
    """Sample a cell's prompts until its quota is reached or they end; its pairs by labelling.

    Images of one colour are left out and named. Of several processes all must call it. DataError if
    a labelling goes by a score that is absent.

    Args:
        cell: prompts and their quota.
        folder: that keeps candidates.
        sampling: how images are made.
        labellings: by name.
        duplicates: of all images so far.
    """
    found: dict[str, list[Labelled]] = {name: [] for name in labellings}
    blank, total = list[str](), 0
    for group in groups(cell, folder, sampling):
        hidden = {
            c.seed: f"{c.caption[:60]!r}, seed {c.seed}"
            for c in group
            if one_colour(decode_image(c.jpg, f"seed {c.seed}"))
        }
        blank, total = [*blank, *hidden.values()], total + len(group)
        fresh = duplicates.fresh([c for c in group if c.seed not in hidden])
        for name, how in labellings.items():
            found[name] += pairs_of(fresh, how)
        if cell.quota is not None and all(len(pairs) >= cell.quota for pairs in found.values()):
            break
    if blank and current_team().main:
        logger.warning("%s; they are in no pair", one_colour_text(blank, total))
    return {name: pairs[: cell.quota] for name, pairs in found.items()}


def pairs_of(group: Sequence[Candidate], how: Labelling) -> list[Labelled]:
    """Give the pairs of one prompt's samples; one that a scorer could not read is in none."""
    read = [c for c in group if c.scores.get(READ, 1.0)]
    scores = [{name: s for name, s in c.scores.items() if name != READ} for c in read]
    mined = MINERS[how.mining](scores, how.by, how.least)
    chosen = disjoint(mined) if how.once else mined
    return [Labelled(read[p.winner], read[p.loser], p.preference) for p in chosen]


def groups(cell: Cell, folder: Path, sampling: Sampling) -> Iterator[list[Candidate]]:
    """Each prompt's samples, in the prompts' order; the processes make a chunk each in turn."""
    team, graphs = current_team(), iter(cell.graphs)
    folder.mkdir(parents=True, exist_ok=True)
    for first in count(0, team.size):
        parts = [list(islice(graphs, CHUNK)) for _ in range(team.size)]
        paths = [folder / f"{cell.name}-{first + k:06d}.parquet" for k in range(team.size)]
        if ours := parts[team.rank]:
            seed = cell.first_seed + (first + team.rank) * CHUNK * sampling.samples
            make_chunk(paths[team.rank], ours, seed, sampling)
        team.wait()
        for part, path in zip(parts, paths, strict=True):
            rows = pq.read_table(path).to_pylist() if part else []
            chunk = [Candidate(**row | {"scores": json.loads(row["scores"])}) for row in rows]
            k = sampling.samples
            yield from (chunk[i : i + k] for i in range(0, len(chunk), k))
        if len(parts[-1]) < CHUNK:
            return


def make_chunk(
    path: Path, graphs: Sequence[SceneGraph], first_seed: int, sampling: Sampling
) -> None:
    """Sample and score graphs, unless the chunk is on disk and intact."""
    if path.exists() and read_table(path) is None:
        logger.warning("%s is damaged: made again", path)
        path.unlink()
    if not path.exists():
        with memory_advice("sampling"):
            made = scored_samples(graphs, first_seed, sampling)
            rows = [asdict(c) | {"scores": json.dumps(c.scores)} for c in made]
            atomic_table(pa.Table.from_pylist(rows), path)


def scored_samples(
    graphs: Sequence[SceneGraph], first_seed: int, sampling: Sampling
) -> list[Candidate]:
    """Give the samples of each graph, seeds counted on from the first, prompt by prompt.

    Scores are of the JPEG that is stored, so that a label fits what training sees.
    """
    asked = [graph for graph in graphs for _ in range(sampling.samples)]
    seeds = [first_seed + k for k in range(len(asked))]
    sources = [
        sampling.sources[k % sampling.samples % len(sampling.sources)] for k in range(len(asked))
    ]
    jpgs: list[bytes] = [b""] * len(asked)
    for source in dict.fromkeys(sources):
        ours = [k for k, name in enumerate(sources) if name == source]
        images = sampling.draw([asked[k] for k in ours], [seeds[k] for k in ours], source)
        for k, image in zip(ours, images, strict=True):
            jpgs[k] = encode_image(image, sampling.quality)
    stored = [np.asarray(decode_image(j, f"seed {s}")) for j, s in zip(jpgs, seeds, strict=True)]
    scores, detected = sampling.judge(stored, asked)
    found = [g.to_json() if g else "" for g in detected or [None] * len(asked)]
    return [
        Candidate(
            graph.caption,
            graph.to_json() if graph.items else "",
            seeds[k],
            jpgs[k],
            {name: float(values[k]) for name, values in scores.items()},
            found[k],
            sources[k],
        )
        for k, graph in enumerate(asked)
    ]


def claim(output: Path, settings: Mapping[str, object]) -> None:
    """Make the folder these samples' own; DataError names the settings by which others were made.

    Args:
        output: the folder.
        settings: what the samples depend on.
    """
    output.mkdir(parents=True, exist_ok=True)
    owner, text = output / "build.json", json.dumps(settings, sort_keys=True)
    ours = json.loads(text)
    theirs = dict(read_json(owner)) if owner.exists() else ours
    theirs = {k: ours[k] for k in (WEIGHTS,) if k in ours} | theirs  # of an earlier version
    if changed := sorted(k for k in {*ours, *theirs} if theirs.get(k) != ours.get(k)):
        named = dict.fromkeys("prompts" if k == "asked" else k for k in changed)
        raise DataError(
            f"{output} holds samples made with other settings ({', '.join(named)}): repeat those, "
            "choose another --output, or delete the folder"
        )
    atomic_text(text, owner)
