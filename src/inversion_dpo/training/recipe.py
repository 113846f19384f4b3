"""Everything that is alive during training: model, trajectories, policy, optimizer."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from inversion_dpo.data.formats import Reading
from inversion_dpo.data.images import DataError
from inversion_dpo.data.source import PairSource, open_pairs
from inversion_dpo.maths.losses import OBJECTIVES, Objective, step_weights
from inversion_dpo.maths.records import Grid, LossSettings
from inversion_dpo.maths.schedule import Schedule
from inversion_dpo.models.base import DiffusionModel, frozen_parts, identity, network_of
from inversion_dpo.models.graph_encoder import SceneGraphEncoder, install, shape_for
from inversion_dpo.models.graph_model import load_encoder
from inversion_dpo.models.loading import adapt, base_name, load_pipeline
from inversion_dpo.models.prompts import T5_LIMITS, limits
from inversion_dpo.run.config import Config, ConfigError, InversionConfig, resolve
from inversion_dpo.run.processes import Team, current_team
from inversion_dpo.training.policy import FullPolicy, LoraPolicy, Policy, SceneGraphPolicy
from inversion_dpo.training.startup import StartupError, check_noise
from inversion_dpo.trajectories.cache import CacheKey, TrajectoryCache
from inversion_dpo.trajectories.fill import build_cache, noise_variance, round_trip_error

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """The plain values a step needs."""

    objective: Objective
    settings: LossSettings
    target: str
    low: int  # lowest and highest index on the grid that is trained on
    high: int
    timesteps: tuple[int, int]  # the same in the schedule, for fresh noise
    weights: Tensor  # k by index, on the grid or in the schedule; mean 1 over what is trained on
    states: int  # states per pair and step
    safeguard: bool
    soft_labels: bool
    batch_size: int
    accumulation: int
    seed: int
    prompt_dropout: float
    graph_dropout: float = 0.0
    caption_dropout: float = 0.0
    guidance_scale: float = 1.0  # of policy and reference alike

    @property
    def drops(self) -> bool:
        """Whether some pairs are shown without their prompt, their scene graph or caption."""
        return max(self.prompt_dropout, self.graph_dropout, self.caption_dropout) > 0


@dataclass
class Session:
    """Everything that is alive during training."""

    accelerator: Accelerator
    model: DiffusionModel
    policy: Policy
    network: nn.Module  # the prepared policy network: every forward goes through it
    optimizer: Any
    cache: TrajectoryCache
    train_pairs: list[int]
    heldout_pairs: list[int]
    recipe: Recipe
    team: Team = field(default_factory=Team)
    coefficients: dict[str, float] = field(default_factory=dict)  # that adapt: kept in checkpoints
    skipped: int = 0  # steps whose loss or gradient was not finite


def make_accelerator(config: Config) -> Accelerator:
    """One accelerate engine; gradients are accumulated by the step itself.

    ConfigError for a policy that could not be merged after hours of training.
    """
    accelerator = Accelerator(mixed_precision=config.training.mixed_precision)
    if config.policy.merge and accelerator.distributed_type == DistributedType.FSDP:
        raise ConfigError(
            "policy.merge=true does not work under FSDP, where no process holds the whole network: "
            "train with policy.merge=false and merge OUTPUT/adapter afterwards "
            "(docs/how-to/several-gpus.md)"
        )
    return accelerator


def load_model(config: Config, device: torch.device) -> DiffusionModel:
    """The frozen pipeline of the configuration, on the device; weights to be trained in float32."""
    m = config.model
    pipeline = load_pipeline(
        resolve(m.path), m.revision, m.variant, getattr(torch, m.dtype), m.vae, m.lora, m.t5
    )
    add_scene_graph(pipeline.to(device), config)
    model = adapt(pipeline, m.resolution, m.guidance_embed, m.prompt_chunks)
    if config.policy.kind == "full":
        network_of(model).float()
    return model


def add_scene_graph(pipeline: Any, config: Config) -> None:
    """Install the configured scene-graph encoder, or the new one that is to be trained."""
    m, p = config.model, config.policy
    if m.scene_graph:
        install(pipeline, load_encoder(m.scene_graph), m.prompt_chunks)
    elif p.kind == "scene_graph":
        shape = shape_for(pipeline, p.graph_tokens, p.graph_width, p.graph_layers)
        install(pipeline, SceneGraphEncoder(shape, config.training.seed), m.prompt_chunks)


def window(config: Config) -> tuple[int, int]:
    """Lowest and highest index on the inversion's grid that is trained on."""
    o, n = config.objective, config.inversion.steps
    low = max(1, math.ceil(o.t_min * n))
    return low, max(low, math.floor(o.t_max * n))


def needed_states(config: Config) -> tuple[int, int]:
    """Lowest and highest index that must be inverted: what is trained on, or sampled back from.

    (1, 0), none, where the objective looks at no trajectories.
    """
    low, high = window(config)
    if config.inversion.reconstruct:
        return low, config.inversion.steps
    return (low, high) if looks_at_trajectories(config) else (1, 0)


def looks_at_trajectories(config: Config) -> bool:
    """Whether training looks at the reference's inverted paths, and not at noise of its own."""
    return OBJECTIVES[config.objective.name].source == "trajectory"


def make_recipe(config: Config, schedule: Schedule, grid: Grid) -> Recipe:
    """The plain values of a configuration that a step needs."""
    o, t, (low, high) = config.objective, config.training, window(config)
    last, fresh = len(schedule) - 1, OBJECTIVES[o.name].source == "noise"
    if not fresh and grid.levels.sigma[low] <= grid.levels.sigma[0]:
        raise ConfigError(
            "this scheduler's first noisy state is as noisy as its clean end (timestep 0, "
            f"set_alpha_to_one false): set objective.t_min={1.5 / grid.steps:g}, or "
            "inversion.spacing=even"
        )
    timesteps = round(o.t_min * last), round(o.t_max * last)
    levels, (first, final) = (schedule.levels, timesteps) if fresh else (grid.levels, (low, high))
    weights = step_weights(levels, schedule.kind, o.weighting)
    weights = torch.cat([weights[:1], weights])  # the clean end, if drawn, counts as its neighbour
    weights = (weights / weights[first : final + 1].mean()).float()
    return Recipe(
        OBJECTIVES[o.name],
        LossSettings(o.beta, o.link, o.label_smoothing),
        o.target,
        low,
        high,
        timesteps,
        weights,
        o.states,
        o.safeguard,
        o.soft_labels,
        t.batch_size,
        t.gradient_accumulation,
        t.seed,
        config.data.prompt_dropout,
        config.data.graph_dropout,
        config.data.caption_dropout,
        o.guidance_scale,
    )


def source_of(config: Config, limit: int | None = None) -> PairSource:
    """The configured pairs, or the first ``limit`` of them."""
    d = config.data
    reading = Reading(d.format, d.split, d.revision, dict(d.columns), d.ranking)
    return open_pairs(resolve(d.pairs), reading, limit or d.limit, d.on_bad_row)


def cache_key(config: Config, pairs: PairSource, model: DiffusionModel) -> CacheKey:
    """What the run's trajectories depend on."""
    i, d, parts = config.inversion, config.data, frozen_parts(model.pipeline)
    looked_at, (first, last) = looks_at_trajectories(config), needed_states(config)
    if not last:  # how paths would be made makes no difference then
        i = InversionConfig(steps=i.steps, spacing=i.spacing, batch_size=i.batch_size)
    return CacheKey(
        pairs=pairs.fingerprint,
        fit=d.fit,
        flip_seed=config.training.seed if d.flip else None,
        model=identity(parts.values()),
        schedule=json.dumps(dict(model.pipeline.scheduler.config), sort_keys=True, default=str),
        resolution=config.model.resolution,
        guidance_embed=config.model.guidance_embed,
        steps=i.steps,
        spacing=i.spacing,
        guidance_scale=i.guidance_scale,
        fixed_point_iterations=i.fixed_point_iterations,
        t_start=i.t_start,
        first=first,
        last=None if last == i.steps else last,
        reference_guidance=config.objective.guidance_scale if looked_at else 1.0,
        batch_size=i.batch_size,
        keep=None if i.keep is None else (i.keep, *window(config)),
        reconstruct=i.reconstruct,
        precision=f"{config.model.dtype} {config.training.mixed_precision}",
        prompt_chunks=config.model.prompt_chunks,
        scene_graph=graph_identity(config, model),
    )


def graph_identity(config: Config, model: DiffusionModel) -> str | None:
    """What trajectories depend on beside the UNet: the encoder, or of a new one its tokens only."""
    encoder = getattr(model.pipeline, "scene_graph", None)
    if encoder is None:
        return None
    return identity([encoder]) if config.model.scene_graph else f"new {encoder.shape.tokens}"


def prepare_cache(
    config: Config, accelerator: Accelerator, model: DiffusionModel, root: Path
) -> TrajectoryCache:
    """Read the pairs, invert what is not inverted yet."""
    pairs = source_of(config)
    key = cache_key(config, pairs, model)
    with accelerator.autocast():
        cache = build_cache(root, model, pairs, key, accelerator.device, current_team())
        if key.guidance_scale > 1 and cache.pairs and current_team().main:
            scales = (1.0, key.guidance_scale)
            errors = [round_trip_error(model, cache, s, accelerator.device) for s in scales]
            logger.warning(guidance_text(key.guidance_scale, *errors))
    logger.info(counts_text(cache))
    if any(cache.overlong.values()):
        logger.warning(overlong_text(cache, model, key.prompt_chunks))
    if cache.pairs < 4:
        raise DataError(f"{pairs.name}: only {cache.pairs} usable pairs; give at least 4")
    return cache


def guidance_text(scale: float, plain: float, guided: float) -> str:
    """What inverting under guidance costs, beside no guidance."""
    return (
        f"inversion.guidance_scale={scale:g}: inverting and sampling back misses the first pairs "
        f"by {guided:.4f} of their norm, and by {plain:.4f} at guidance 1, where it is exact in the"
        " limit of many steps; prefer 1 unless you have measured that this is better"
    )


def trained_guidance(config: Config) -> float:
    """The guidance that the policy is trained at.

    A distilled network, FLUX's, is told its guidance: objective.guidance_scale is 1 there.
    """
    scale = config.objective.guidance_scale
    return config.model.guidance_embed if scale == 1 else scale


def guidances_text(config: Config) -> str:
    """What is trained and what will be sampled, where the two are not the same."""
    trained, sampled = trained_guidance(config), config.evaluation.guidance_scale
    return (
        f"training at guidance {trained:g}, sampling at evaluation.guidance_scale={sampled:g}: "
        "`inversion-dpo evaluate` compares the models at both"
    )


def counts_text(cache: TrajectoryCache) -> str:
    """How many rows became pairs, and what was left out."""
    rows, kept = cache.counts.get("rows", 0), ("rows", "pairs", "duplicates", "single", "skipped")
    left = [f"{n} {reason}" for reason, n in cache.counts.items() if n and reason not in kept]
    text = f"{cache.pairs} pairs of {rows} rows"
    return f"{text}; left out: {', '.join(left)}" if left else text


def overlong_text(cache: TrajectoryCache, model: DiffusionModel, chunks: int) -> str:
    """How many captions lose their end, and what to do about it."""
    read = limits(model.pipeline, chunks)
    cut = [f"{n} by {name} (reads {read[name]} tokens)" for name, n in cache.overlong.items() if n]
    text = f"of {cache.pairs} captions the end is cut: {', '.join(cut)}"
    if model.pipeline.__class__.__name__ in T5_LIMITS:
        return text
    return f"{text}; model.prompt_chunks={chunks + 1} reads {read['tokenizer'] // chunks} more"


def make_optimizer(name: str, parameters: list[nn.Parameter], rate: float, decay: float) -> Any:
    """AdamW, 8-bit AdamW or Adafactor at a fixed rate; StartupError if it is not installed."""
    if name == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise StartupError(
                "training.optimizer=adamw8bit needs `pip install bitsandbytes` and a GPU; or set "
                "training.optimizer=adafactor, which needs little memory too"
            ) from error
        return bitsandbytes.optim.AdamW8bit(parameters, lr=rate, weight_decay=decay)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters, lr=rate, weight_decay=decay, scale_parameter=False, relative_step=False
        )
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)


def only_network_stays(model: DiffusionModel) -> None:
    """Autoencoder and text encoders leave the device: their outputs are cached."""
    for name, module in frozen_parts(model.pipeline).items():
        if name != model.component:
            module.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_policy(config: Config, model: DiffusionModel) -> Policy:
    """LoRA or full; the network is switched to training as is."""
    p = config.policy
    if p.kind == "full":
        return FullPolicy(model)
    if p.kind == "scene_graph":
        return SceneGraphPolicy(model, base_name(config.model.path))
    return LoraPolicy(model, p.rank, p.alpha, p.target_modules, config.training.seed, p.dora)


def reproducible(cache: TrajectoryCache, max_error: float | None) -> list[int]:
    """Numbers of the pairs whose reconstruction error is at most ``max_error``, if one is set."""
    if max_error is None:
        return list(range(cache.pairs))
    kept = [k for k, error in enumerate(cache.errors) if error <= max_error]
    logger.info(
        "inversion.max_error leaves out %d of %d pairs", cache.pairs - len(kept), cache.pairs
    )
    if len(kept) < 4:
        raise DataError(f"inversion.max_error={max_error} leaves only {len(kept)} pairs: raise it")
    return kept


def split_pairs(numbers: list[int], holdout: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Shuffle pair numbers and set a share aside (at least one): training, held-out."""
    count = len(numbers)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator).tolist()
    aside = min(count - 1, max(1, round(count * holdout)))
    train, heldout = sorted(order[aside:]), sorted(order[:aside])
    return [numbers[k] for k in train], [numbers[k] for k in heldout]


def set_up(config: Config, cache_root: Path) -> Session:
    """Load the model, invert the pairs under it, then attach the policy to be trained."""
    accelerator = make_accelerator(config)
    model = load_model(config, accelerator.device)
    cache = prepare_cache(config, accelerator, model, cache_root)
    only_network_stays(model)
    policy = make_policy(config, model)
    t = config.training
    if t.gradient_checkpointing:
        policy.network.enable_gradient_checkpointing()  # type: ignore[operator]
        policy.network.train()
    if trained_guidance(config) != config.evaluation.guidance_scale:
        logger.info(guidances_text(config))
    parameters = list(policy.trainable().values())
    optimizer = make_optimizer(t.optimizer, parameters, t.learning_rate, t.weight_decay)
    network, optimizer = accelerator.prepare(policy.network, optimizer)
    if t.compile:
        network = torch.compile(network)
    recipe = make_recipe(config, model.schedule, cache.grid)
    if recipe.objective.source == "trajectory":
        check_noise(noise_variance(cache))
    if cache.counts.get("single") and config.objective.name not in ("sft", "denoising"):
        raise DataError(
            f"{config.data.pairs}: no preference among single annotated images: set "
            "objective.name=denoising, or give pairs"
        )
    if recipe.soft_labels and bool((cache.preference(range(cache.pairs)) == 1).all()):
        raise DataError(
            "objective.soft_labels=true, but no pair has a preference_0 (docs/reference/formats.md)"
        )
    usable = reproducible(cache, config.inversion.max_error)
    train, heldout = split_pairs(usable, config.data.holdout)
    cache.swap(train, config.data.label_noise, t.seed)
    team = current_team()
    _check_batch(recipe, team)
    return Session(
        accelerator, model, policy, network, optimizer, cache, train, heldout, recipe, team
    )


def _check_batch(recipe: Recipe, team: Team) -> None:
    """Every process needs a pair in every part of a batch."""
    if recipe.batch_size < team.size * recipe.accumulation:
        raise ConfigError(
            f"training.batch_size={recipe.batch_size} counts the pairs of a step over all "
            f"processes; {team.size} processes in training.gradient_accumulation="
            f"{recipe.accumulation} parts need at least {team.size * recipe.accumulation}"
        )
