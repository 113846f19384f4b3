"""Compare reference and policy image by image with a model that sees both at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq

from inversion_dpo.evaluation.metrics import share_text, wins
from inversion_dpo.evaluation.samples import Images, pictures
from inversion_dpo.evaluation.scorers.asking import READ
from inversion_dpo.evaluation.scorers.unified_reward import PAIR, PairJudge
from inversion_dpo.run.config import Config
from inversion_dpo.run.processes import current_team

PAIRWISE = "pairwise"  # in metrics.json


def judge_of(config: Config, store: Path | None = None) -> PairJudge | None:
    """Return the judge that ``evaluation.scorer`` names; ScorerError if no model is given."""
    e = config.evaluation
    return PairJudge(e.checkpoints.get(PAIR), e.parser, store) if PAIR in e.scorers else None


def in_pairs(files: Sequence[Path], config: Config, memo: Path) -> dict[str, Any]:
    """Return {"pairwise": the policy's win rate over images in pairs}; empty without a judge.

    An image wins if its share of the mean over the axes is above one half. Both orders are asked;
    pairs that could not be read are left out and counted as ``unread``. Processes ask for batches
    in turn; the first one, whose result counts, then finds every answer kept.

    Args:
        files: samples of reference and policy.
        config: the run's settings, which name the judge.
        memo: the folder that keeps answers.
    """
    e, team, place = config.evaluation, current_team(), memo / "scores.sqlite"
    judge = judge_of(config, place)
    if judge is None:
        return {}
    if team.size > 1:
        for number, batch in enumerate(batches(files, e.batch_size)):
            if number % team.size == team.rank:
                judge(*batch)
        team.wait()
        judge = cast(PairJudge, judge_of(config, place))
    if not team.main:
        return {}
    parts = [judge(*batch) for batch in batches(files, e.batch_size)]
    judge.conclude()
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    read = found.pop(READ)
    total: dict[str, Any] = {"n": int(read.sum()), "unread": int((~read).sum())}
    if total["n"]:
        half = np.full(total["n"], 0.5)
        total |= wins(half, found[PAIR][read])
        total["shares"] = {name: float(values[read].mean()) for name, values in found.items()}
    return {PAIRWISE: total}


def batches(files: Sequence[Path], size: int) -> Iterator[tuple[Images, Images, list[str]]]:
    """Yield the images of both files, reference first, with their prompts, ``size`` at a time."""
    prompts = pq.read_table(files[1], columns=["prompt"])["prompt"].to_pylist()
    rows = zip(*map(pictures, files), prompts, strict=True)
    while batch := list(islice(rows, size)):
        before, after, texts = zip(*batch, strict=True)
        yield [*map(np.asarray, before)], [*map(np.asarray, after)], [*texts]


def pairwise_text(metrics: Mapping[str, Any]) -> str:
    """Write the result in a sentence; empty without one."""
    found = metrics.get(PAIRWISE) or {}
    if "win_rate" not in found:
        return f"{PAIR}: no answer could be read." if found else ""
    text = f"{PAIR} prefers the policy's image in {share_text(found)} of {found['n']} pairs, seen "
    text += "in both orders"
    return text + (f"; {found['unread']} could not be read." if found["unread"] else ".")
