"""Preference pairs labelled by scorers: sample each prompt a few times, let them vote.

For people without human labels. What a pair's scorers think of it is kept: ``preference_0`` is the
probability, between 0 and 1, that image 0 is preferred.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.data.candidates import (
    Candidate,
    encode_image,
    load_chunk,
    save_chunk,
    write_pairs,
)
from inversion_dpo.data.images import DataError, decode_image

Pixels = NDArray[np.uint8]
Draw = Callable[[Sequence[str], Sequence[int]], list[Pixels]]
Score = Callable[[Sequence[Pixels], Sequence[str]], Mapping[str, NDArray[np.float64]]]
READ = "parsed"  # the score that says whether a sample could be read at all
CHUNK = 16  # prompts sampled and scored between two saves

# Scores that were trained as log-odds: sigmoid(slope x difference) is the scorer's own probability.
# PickScore: softmax of its scores. ImageReward: Bradley-Terry on the reward before it is divided by
# 1.0333. HPSv2: softmax of 100 x cosine. Others only say which is higher.
SLOPES = {"pickscore": 1.0, "imagereward": 1.0333394966054072, "hpsv2": 100.0, "hpsv21": 100.0}


@dataclass(frozen=True)
class Labelled:
    """A pair and the probability, above one half, that its winner is preferred."""

    winner: Candidate
    loser: Candidate
    preference: float


def build_scored_pairs(
    output: Path, draw: Draw, score: Score, prompts: Sequence[str], samples: int, seed: int,
    voters: Sequence[str] = (), least: float = 0.5, limit: int | None = None,
    graphs: Mapping[str, str] | None = None,
) -> int:  # fmt: skip
    """Write ``OUTPUT/pairs.parquet``, one pair a prompt; returns how many. Resumed if begun.

    Args:
        output: a folder; samples and scores lie in ``OUTPUT/candidates``.
        draw: (prompts, seeds) -> uint8 images [H, W, 3].
        score: (images, prompts) -> scores [B] by name, higher is better.
        prompts: distinct; each is sampled ``samples`` times.
        samples: of each prompt, at least 2.
        seed: of the samples, and of which image stands first.
        voters: names of the scores that vote; all, if none is named.
        least: the least probability of a pair's winner, at least one half.
        limit: the most pairs.
        graphs: prompt -> its scene graph as JSON, which the pairs carry.

    Samples that a scorer could not read (``parsed`` is 0) are in no pair.

    Raises:
        DataError: another build lies in the folder, no such score, or no pair came out.
    """
    claim(output, {"prompts": list(prompts), "samples": samples, "seed": seed})
    pairs: list[Labelled] = []
    for group in candidates(output / "candidates", draw, score, prompts, samples, seed):
        names = voters or tuple(n for n in group[0].scores if n != READ)
        read = [c for c in group if c.scores.get(READ, 1.0)]
        found = elect(read, names) if len(read) > 1 else None
        if found and found.preference > max(least, 0.5) - 1e-12 and found.preference > 0.5:
            pairs.append(found)
        if len(pairs) == limit:
            break
    if not pairs:
        raise DataError(f"{output}: no prompt gave a pair; take more samples, or lower --least")
    said = graphs or {}
    write_pairs(
        output / "pairs.parquet",
        [
            (replace(p.winner, scene_graph=g), replace(p.loser, scene_graph=g))
            for p in pairs for g in [said.get(p.winner.caption, "")]
        ],
        seed, [p.preference for p in pairs],
    )  # fmt: skip
    return len(pairs)


def claim(output: Path, settings: Mapping[str, object]) -> None:
    """Make the folder this build's; DataError if its samples are of other prompts or seeds."""
    output.mkdir(parents=True, exist_ok=True)
    owner, text = output / "build.json", json.dumps(settings, sort_keys=True)
    if owner.exists() and owner.read_text(encoding="utf-8") != text:
        raise DataError(
            f"{output} holds samples of other prompts or seeds: choose another --output"
        )
    owner.write_text(text, encoding="utf-8")


def candidates(
    folder: Path, draw: Draw, score: Score, prompts: Sequence[str], samples: int, seed: int
) -> Iterator[list[Candidate]]:
    """Each prompt's samples with their scores, in the prompts' order; chunks on disk are kept.

    Scores are of the JPEG that is stored, so that a label fits what training sees.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(prompts), CHUNK):
        path = folder / f"candidates-{start:06d}.parquet"
        if not path.exists():
            captions = [p for p in prompts[start : start + CHUNK] for _ in range(samples)]
            first = seed * 10_000_000 + start * samples
            save_chunk(path, scored_samples(draw, score, captions, first))
        chunk = load_chunk(path)
        yield from (chunk[k : k + samples] for k in range(0, len(chunk), samples))


def scored_samples(
    draw: Draw, score: Score, captions: list[str], first_seed: int
) -> list[Candidate]:
    """One sample a caption, seeds counted on from the first."""
    seeds = [first_seed + k for k in range(len(captions))]
    encoded = [encode_image(image, quality=95) for image in draw(captions, seeds)]
    stored = [
        np.asarray(decode_image(jpg, f"seed {s}")) for jpg, s in zip(encoded, seeds, strict=True)
    ]
    columns = score(stored, captions)
    rows = [{name: float(v[k]) for name, v in columns.items()} for k in range(len(captions))]
    return [
        Candidate(c, "", s, jpg, row)
        for c, s, jpg, row in zip(captions, seeds, encoded, rows, strict=True)
    ]


def preference(first: Candidate, second: Candidate, voters: Sequence[str]) -> float:
    """The mean over the voters of the probability that the first is preferred, in [0, 1].

    Without a slope in SLOPES a voter says 1, 0, or one half at equal scores: then it is the share
    of votes. DataError if a voter gave no score.
    """
    votes = []
    for name in voters:
        if name not in first.scores:
            raise DataError(f"no score {name!r} to vote by; there are {', '.join(first.scores)}")
        gap = first.scores[name] - second.scores[name]
        slope = SLOPES.get(name)
        votes.append(float(np.sign(gap) + 1) / 2 if slope is None else _sigmoid(slope * gap))
    return sum(votes) / len(votes)


def elect(group: Sequence[Candidate], voters: Sequence[str]) -> Labelled | None:
    """The candidate preferred most over all others, against the one preferred least; None at a tie.

    With one voter these are the highest and the lowest score. Equal candidates are decided by the
    lower seed.
    """
    strength = [
        sum(preference(a, b, voters) for b in group if b is not a) / max(1, len(group) - 1)
        for a in group
    ]
    order = sorted(range(len(group)), key=lambda k: (-strength[k], group[k].seed))
    winner, loser = group[order[0]], group[order[-1]]
    found = preference(winner, loser, voters)
    return Labelled(winner, loser, found) if winner is not loser and found > 0.5 else None


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))
