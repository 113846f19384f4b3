"""What a configuration may hold: everything that can be refused before anything is loaded."""

from __future__ import annotations

import difflib
import math
from typing import Any

from inversion_dpo.data.formats import FORMATS
from inversion_dpo.data.rankings import SCHEMES
from inversion_dpo.data.source import ON_BAD_ROW
from inversion_dpo.data.transforms import FITS
from inversion_dpo.maths.losses import LINKS, OBJECTIVES, TARGETS, WEIGHTS
from inversion_dpo.maths.schedule import SPACINGS
from inversion_dpo.run.config import Config, ConfigError, DataConfig, ParserConfig, PolicyConfig
from inversion_dpo.run.config_build import check_build

TRACKERS = ("auto", "tensorboard", "wandb", "trackio", "none")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor")
LR_SCHEDULERS = ("constant", "linear", "cosine")


def validate(config: Config) -> None:
    """Refuse what cannot work before anything is loaded; ConfigError names key and remedy."""
    objective, training = config.objective, config.training
    _one_of("objective.name", objective.name, list(OBJECTIVES))
    _one_of("objective.target", objective.target, list(TARGETS))
    _one_of("objective.link", objective.link, list(LINKS))
    _one_of("objective.weighting", objective.weighting, list(WEIGHTS))
    _one_of("policy.kind", config.policy.kind, ["lora", "full", "scene_graph"])
    _one_of("model.dtype", config.model.dtype, ["float32", "bfloat16", "float16"])
    _one_of("data.format", config.data.format, list(FORMATS))
    _one_of("data.ranking", config.data.ranking, list(SCHEMES))
    _one_of("data.on_bad_row", config.data.on_bad_row, list(ON_BAD_ROW))
    _one_of("data.fit", config.data.fit, list(FITS))
    _one_of("inversion.spacing", config.inversion.spacing, list(SPACINGS))
    _one_of("training.optimizer", training.optimizer, list(OPTIMIZERS))
    _one_of("training.lr_scheduler", training.lr_scheduler, list(LR_SCHEDULERS))
    _check_scorer(config.evaluation.scorer)
    _check_parser(config.evaluation.parser)
    _one_of("training.tracker", training.tracker, list(TRACKERS))
    _one_of("training.mixed_precision", training.mixed_precision, ["no", "bf16", "fp16"])
    _check_combinations(config)
    check_build(config.build)
    _check_shares(config.data)
    _check_positive(config)
    if training.max_skipped < 0:
        raise ConfigError("training.max_skipped must be 0 (stop at the first) or more")
    if training.batch_size % training.gradient_accumulation:
        raise ConfigError(
            f"training.batch_size={training.batch_size} must be a multiple of "
            f"training.gradient_accumulation={training.gradient_accumulation}"
        )


def _check_shares(data: DataConfig) -> None:
    if not 0 < data.holdout < 1:
        raise ConfigError("data.holdout must lie between 0 and 1: held-out pairs are always kept")
    for name in ("label_noise", "prompt_dropout", "graph_dropout", "caption_dropout"):
        if not 0 <= getattr(data, name) <= 1:
            raise ConfigError(f"data.{name} must lie between 0 and 1: a share of the pairs")


def _check_positive(config: Config) -> None:
    training = config.training
    positive = {
        "model.prompt_chunks": config.model.prompt_chunks,
        "training.steps": training.steps,
        "training.batch_size": training.batch_size,
        "training.gradient_accumulation": training.gradient_accumulation,
        "training.learning_rate": training.learning_rate,
        "objective.beta": config.objective.beta,
        "objective.states": config.objective.states,
        "inversion.steps": config.inversion.steps,
        "policy.rank": config.policy.rank,
        "inversion.batch_size": config.inversion.batch_size,
        "inversion.keep": 1 if config.inversion.keep is None else config.inversion.keep,
        "evaluation.batch_size": config.evaluation.batch_size,
        "evaluation.sample_steps": config.evaluation.sample_steps,
        "evaluation.seeds": config.evaluation.seeds,
        "training.eval_every": training.eval_every,
        "training.checkpoint_every": training.checkpoint_every,
        "training.keep_checkpoints": training.keep_checkpoints,
    }
    if training.snapshot_every is not None:
        positive["training.snapshot_every"] = training.snapshot_every
    for key, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{key} must be positive, got {value}")


def _check_combinations(config: Config) -> None:
    """Settings that exclude each other."""
    objective = config.objective
    _check_graph_policy(config.policy)
    if objective.target == "transition" and config.inversion.fixed_point_iterations:
        raise ConfigError(
            "objective.target=transition vanishes under exact inversion: its signal is the "
            "inversion's own error. Set inversion.fixed_point_iterations=0 or objective.target=x0"
        )
    if objective.target == "transition" and config.inversion.keep is not None:
        raise ConfigError(
            "objective.target=transition needs the neighbour of every state: set "
            "inversion.keep=null, or objective.target=x0"
        )
    if config.inversion.max_error is not None and not config.inversion.reconstruct:
        raise ConfigError("inversion.max_error needs inversion.reconstruct=true, which measures it")
    if objective.name == "inversion_dpo_released" and objective.target != "reference":
        raise ConfigError(
            "objective.name=inversion_dpo_released reproduces the released script's sign and is "
            "defined for objective.target=reference only"
        )
    if not 0 <= objective.label_smoothing < 0.5:
        raise ConfigError("objective.label_smoothing must be at least 0 and below 0.5")
    plain = (objective.link, objective.label_smoothing) == ("sigmoid", 0.0)
    if not plain and not OBJECTIVES[objective.name].linked:
        raise ConfigError(
            f"objective.link and objective.label_smoothing have no part in {objective.name}: leave "
            f"them out, or choose one of {', '.join(n for n, o in OBJECTIVES.items() if o.linked)}"
        )
    for name in ("objective", "inversion"):
        if not 0 < (scale := getattr(config, name).guidance_scale) < math.inf:
            raise ConfigError(f"{name}.guidance_scale={scale} must be positive; 1 is no guidance")
    if not 0 <= objective.t_min < objective.t_max <= 1:
        raise ConfigError("need 0 <= objective.t_min < objective.t_max <= 1")
    start, steps = config.inversion.t_start, config.inversion.steps
    if not 0 <= start <= 0.5 or (start and not config.inversion.start):
        raise ConfigError(
            f"inversion.t_start={start} must be 0, to invert from the clean image, or between "
            f"{1 / steps:g} (one of inversion.steps={steps}) and 0.5"
        )


def _check_graph_policy(policy: PolicyConfig) -> None:
    for name in ("graph_tokens", "graph_width", "graph_layers"):
        if getattr(policy, name) < 1:
            raise ConfigError(f"policy.{name} must be positive, got {getattr(policy, name)}")
    if policy.kind == "scene_graph" and policy.merge:
        raise ConfigError("policy.merge=true is for a LoRA: policy.kind=scene_graph has none")


def _check_scorer(scorer: Any) -> None:
    parts = scorer if isinstance(scorer, list) else [scorer]
    if not parts or not all(isinstance(part, str) for part in parts) and scorer is not None:
        raise ConfigError(
            f"evaluation.scorer={scorer!r}: write names, comma-separated or a list "
            "(docs/reference/scorers.md)"
        )


def _check_parser(parser: ParserConfig) -> None:
    least = {
        "distractors": 0,
        "retries": 0,
        "parallel": 1,
        "max_tokens": 1,
        "timeout": 1,
        "prompt_price": 0,
        "completion_price": 0,
    }
    for name, low in least.items():
        if (value := getattr(parser, name)) is not None and not low <= value < math.inf:
            raise ConfigError(f"evaluation.parser.{name}={value} must be {low} or more")


def _one_of(key: str, value: str, allowed: list[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key}={value!r} is not one of {', '.join(allowed)}{hint}")
