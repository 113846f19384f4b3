"""Pairs labelled by scorers, from a prompt set and the configuration's model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inversion_dpo.config import Config, ConfigError
from inversion_dpo.data.build import Pixels, build_scored_pairs
from inversion_dpo.evaluation.evaluate import load_policy_pipeline
from inversion_dpo.evaluation.judges import intended_graphs, scorers_of
from inversion_dpo.evaluation.prompts import read_prompt_set
from inversion_dpo.sampling import sample


def build_labelled(
    config: Config, output: Path, prompts: str, samples: int, seed: int, scorer: str | None,
    voters: Sequence[str], least: float, limit: int | None,
) -> dict[str, int]:  # fmt: skip
    """Sample the prompts with the configuration's model and let the scorers choose.

    Returns the number of pairs by file. ConfigError without a scorer; what
    :func:`data.build.build_scored_pairs` raises.
    """
    e = config.evaluation
    if not (scorer or e.scorer):
        raise ConfigError("pairs build --prompts SET needs --scorer, which says who labels")
    score = scorers_of(config, scorer or e.scorer, output / "scores.sqlite", prompts, None)
    loaded: list[Any] = []  # the pipeline, once a chunk is not on disk

    def draw(captions: Sequence[str], seeds: Sequence[int]) -> list[Pixels]:
        loaded[:] = loaded or [load_policy_pipeline(config, None)]
        return sample(
            loaded[0], captions, seeds, e.sample_steps, e.guidance_scale, e.batch_size, "samples",
            config.model.resolution,
        )  # fmt: skip

    given = read_prompt_set(prompts, None)
    graphs = {prompt: graph.to_json() for prompt, graph in intended_graphs(given).items()}
    made = build_scored_pairs(
        output, draw, score, list(dict.fromkeys(given.prompts)), samples, seed, voters, least,
        limit, graphs,
    )  # fmt: skip
    score.conclude()
    return {"pairs": made}
