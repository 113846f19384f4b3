"""The settings of ``pairs build``, in the form of ``fields.py``."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, Strict

from inversion_dpo.run.limits import (
    Count,
    Effect,
    GuidanceOr0,
    NotNegative,
    Positive,
    Seed,
    Switch,
    settings,
)

_MINED = Effect(r"build.prompts!=\d+")


@settings
class BuildConfig:
    """How `pairs build` makes pairs (docs/how-to/compositional.md); sampling is evaluation.*."""

    prompts: str = "3000"
    """A number of embedded captions, scenes, a file or folder of scene graphs, or a prompt set."""
    mix: Annotated[dict[str, Positive], Effect("build.prompts=scenes")] = field(
        default_factory=dict
    )
    """Share of each kind of scene, OBJECTS/RELATIONS: `build.mix={2/1: 0.5, 3/2: 0.5}`."""
    splits: dict[str, Count] = field(default_factory=dict)
    """Pairs of each split: `build.splits={train: 900, test: 100}`; {} writes one file."""
    samples: Annotated[int, Strict(), Field(ge=2, le=10_000)] = 4
    """Samples of each prompt, from which pairs are chosen."""
    guidance_scales: list[GuidanceOr0] = field(default_factory=list)
    """Guidance of the samples, in turn; [] takes evaluation.guidance_scale."""
    models: list[str] = field(default_factory=list)
    """Models that sample beside the reference: runs, LoRAs or pipelines."""
    by: Annotated[list[str], _MINED] = field(default_factory=list)
    """Scores that decide; [] takes all of the scorer."""
    mining: Annotated[Literal["best_worst", "margin", "pareto", "majority", "all"], _MINED] = (
        "majority"
    )
    """Which images of a prompt become pairs; majority suits several scorers without a scale."""
    least: Annotated[NotNegative, Effect("build.mining!=all")] = 0.0
    """Least difference of a pair's scores; under majority, least share of the votes."""
    once: Annotated[Switch, _MINED] = False
    """Use each image in one pair at most."""
    near: Annotated[int, Strict(), Field(ge=-1, le=64)] = -1
    """Bits of 64 by which near duplicates may differ; -1 drops only identical images."""
    limit: Annotated[Count | None, Effect(r"build.splits=\{\}")] = None
    """Most pairs; null takes all."""
    quality: Annotated[int, Strict(), Field(ge=1, le=100)] = 95
    """Quality of the JPEG files."""
    seed: Seed = 0
    """Seed of prompts and samples."""
    name: Annotated[str, Effect(r"build.splits!=\{\}")] = "pairs"
    """Name of the dataset in its card."""
    licence: Annotated[str, Effect(r"build.splits!=\{\}")] = "other"
    """Licence of the dataset in its card: an SPDX id in lower case."""
