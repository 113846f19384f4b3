"""The settings of sampling and scoring, in the form of ``fields.py``."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import Field, Strict

from inversion_dpo.run.limits import (
    Count,
    Effect,
    Few,
    Group,
    GuidanceOr0,
    Natural,
    NotNegative,
    Seed,
    settings,
)

_GRAPH = Effect(r"evaluation.scorer=.*scene-graph.*")
_PARSED = Effect(r"evaluation.scorer=.*(scene-graph|vqa|unifiedreward).*")
_NAMED = r"evaluation.scorer=.*(scene-graph|vqa|unifiedreward).* and evaluation.parser.url!=null"
_SERVED = Effect(_NAMED + " or evaluation.checkpoints=.*http.*")


@settings
class ParserConfig:
    """The vision-language model of scene-graph, vqa, unifiedreward (docs/reference/scorers.md)."""

    url: Annotated[str | None, _PARSED] = None
    """Address of an OpenAI-compatible server, up to /v1; null takes a local model."""
    model: Annotated[str | None, Effect(_NAMED)] = None
    """The server's name of the model."""
    vocabulary: Annotated[str | None, _GRAPH] = None
    """JSON file of the words that are offered; null offers the words of the prompts' graphs."""
    distractors: Annotated[Natural, _GRAPH] = 30
    """Words of other prompts, of each kind, that are offered beside a prompt's own."""
    max_tokens: Annotated[Count, _PARSED] = 1500
    """Longest answer in tokens."""
    timeout: Annotated[float, Strict(), Field(ge=1, le=86_400), _SERVED] = 120.0
    """Seconds without an answer from the server after which a request counts as failed."""
    retries: Annotated[Natural, _SERVED] = 5
    """Times that a failed request is repeated."""
    parallel: Annotated[Count, _SERVED] = 4
    """Requests at the same time."""
    prompt_price: Annotated[NotNegative | None, _SERVED] = None
    """Price of a million tokens that are sent; set it to see what a run costs."""
    completion_price: Annotated[NotNegative | None, _SERVED] = None
    """Price of a million tokens that are received."""


@settings
class EvaluationConfig:
    """Sampling and scoring (docs/how-to/evaluate.md); both models start from the same noise."""

    prompts: str = "asset:prompts-test.txt"
    """Held-out prompts: a file, a set's name, hf:OWNER/NAME:COLUMN, or heldout, from the pairs."""
    limit: Count | None = 500
    """Use only so many prompts from the start; null uses all."""
    seeds: Count = 1
    """Images of each prompt."""
    scorer: str | Annotated[list[str], Field(min_length=1)] | None = "scenes"
    """Scorers: names, comma-separated or a list, or MODULE:FUNCTION; null scores nothing."""
    checkpoints: dict[str, str] = field(default_factory=dict)
    """Weights of scorers: `evaluation.checkpoints.NAME=PATH@REVISION`."""
    parser: Group[ParserConfig] = field(default_factory=ParserConfig)
    preference: Annotated[str, Effect("evaluation.scorer!=null")] = "auto"
    """The score that decides the win rate and comes first in reports; auto is the only one."""
    sample_steps: Few = 20
    """Sampling steps of an image."""
    guidance_scale: GuidanceOr0 = 4.0
    """Classifier-free guidance of sampling; set what you will sample with."""
    batch_size: Count = 50
    """Images sampled at once; lower it if memory runs out."""
    seed: Seed = 1000
    """Seed of the first image's noise."""

    @property
    def scorers(self) -> list[str]:
        """The names in ``scorer``."""
        names = self.scorer.split(",") if isinstance(self.scorer, str) else self.scorer or []
        return [name.strip() for name in names]
