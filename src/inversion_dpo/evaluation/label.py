"""Pairs labelled by scorers, from a prompt set and the configuration's model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inversion_dpo.config import Config, ConfigError
from inversion_dpo.data.build import Pixels, build_scored_pairs
from inversion_dpo.evaluation.evaluate import load_policy_pipeline
from inversion_dpo.evaluation.prompts import read_prompts
from inversion_dpo.evaluation.scorers.registry import load_scorers
from inversion_dpo.sampling import sample


def build_labelled(
    config: Config, output: Path, prompts: str, samples: int, seed: int, scorer: str | None,
    voters: Sequence[str], least: float, limit: int | None, each: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Sample the prompts with the configuration's model and let the scorers choose.

    Returns the number of pairs by file. ConfigError without a scorer; what
    :func:`data.build.build_scored_pairs` raises.
    """
    e = config.evaluation
    if not (scorer or e.scorer):
        raise ConfigError("pairs build --prompts SET needs --scorer, which says who labels")
    score = load_scorers(scorer or e.scorer, e.checkpoints, e.batch_size, output / "scores.sqlite")
    loaded: list[Any] = []  # the pipeline, once a chunk is not on disk

    def draw(captions: Sequence[str], seeds: Sequence[int]) -> list[Pixels]:
        loaded[:] = loaded or [load_policy_pipeline(config, None)]
        return sample(
            loaded[0], captions, seeds, e.sample_steps, e.guidance_scale, e.batch_size, "samples",
            config.model.resolution,
        )  # fmt: skip

    asked = list(dict.fromkeys(read_prompts(prompts, None)))
    made = build_scored_pairs(
        output, draw, score, asked, samples, seed, voters, least, limit, each
    )  # fmt: skip
    return {"pairs": made}
