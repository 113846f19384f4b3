"""Refuse what would stop a training later or teach nothing, before hours are spent on it."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch

from inversion_dpo.data.buckets import buckets, left_out_text, place, square
from inversion_dpo.data.images import DataError
from inversion_dpo.data.masks import mask_oddities, odd_masks_text, region
from inversion_dpo.data.source import Pair, PairSource, open_pairs
from inversion_dpo.maths.methods import ALONE, BETAS
from inversion_dpo.models.base import DiffusionModel, ModelError, frozen_parts, is_told_guidance
from inversion_dpo.models.loading import few_steps_text
from inversion_dpo.models.sampler import check_guidance
from inversion_dpo.models.schedules import grid_for
from inversion_dpo.run.disk import check_room
from inversion_dpo.run.fields import Config, ConfigError, TrainingConfig
from inversion_dpo.run.processes import current_team
from inversion_dpo.run.words import counted
from inversion_dpo.training.notices import (
    LEAST_NOISE,
    MOST_NOISE,
    guidances_text,
    noise_text,
    trained_guidance,
    unvisited_text,
)
from inversion_dpo.training.plan import Plan, make_plan
from inversion_dpo.training.policy import attach, make_optimizer
from inversion_dpo.trajectories.cache import TrajectoryCache
from inversion_dpo.trajectories.fill import noise_variance
from inversion_dpo.trajectories.key import spacing_of
from inversion_dpo.trajectories.known import check_known
from inversion_dpo.trajectories.method import chosen_method, takes_images
from inversion_dpo.trajectories.writing import is_cached

logger = logging.getLogger(__name__)
LEAST_PAIRS, FIRST_PAIRS = 4, 128  # needed, and looked at beforehand
RELEASED_GUIDANCE = 2.0
RATES = {"lora": (1e-4, 1e-6, 5e-3), "full": (1e-5, 1e-9, 5e-5)}  # usual, and far from it
MOMENTS = {"adamw": 2.0, "adamw8bit": 0.5, "adafactor": 0.0}  # numbers beside each weight


def check_data(config: Config, caches: Path) -> None:
    """Refuse pairs that a training would stumble over, before anybody looks for the model.

    Args:
        config: the run's settings.
        caches: the folder of caches; the masks of pairs that have one were looked at before.

    Raises:
        ConfigError, DataError: the first fault and what to do.
    """
    pairs = open_pairs(config.data, alone=takes_images(config))
    check_first(config, pairs)
    given = pairs.counts["masked"] and config.data.mask == "given"
    if given and pairs.quick and not is_cached(caches, pairs.fingerprint):
        check_masks(config, pairs)
    if chosen_method(config).path == "known":
        check_seeds(config, pairs)
    if pairs.counts["single"]:
        deque(pairs.read(), 0)  # counts all
    check_preferences(config, pairs.counts)
    if config.objective.soft_labels or config.objective.gap_weighted:
        check_soft_labels(pair.preference for pair in pairs.read())


def check_training(config: Config, model: DiffusionModel, folder: Path) -> None:
    """Refuse settings and disks that a training would stumble over, and pairs of another model.

    Args:
        config: the run's settings.
        model: from ``check_model``, without weights; the policy is put on it.
        folder: of the run, whose disk takes the checkpoints.

    Raises:
        ConfigError, ModelError, DataError, DiskError: the first fault and what to do.
    """
    t, steps = config.training, config.inversion.steps
    grid = grid_for(model.schedule, "inversion.steps", steps, spacing_of(config))
    plan = make_plan(config, lambda _: (model.schedule, grid), square(config.model.resolution))
    check_batch(plan, current_team().size)
    pairs = open_pairs(config.data, alone=takes_images(config))
    check_sources(model, pairs)
    check_scales(model, config)
    if text := unvisited_text(pairs.expected(), config):
        logger.warning(text)
    if text := few_steps_text(model, config.model):
        logger.warning(text)
    if config.policy.kind == "scene_graph":
        return
    if text := rate_text(config.policy.kind, t.learning_rate):
        logger.warning(text)
    for text in late_texts(t):
        logger.warning(text)
    make_optimizer(t, [torch.nn.Parameter(torch.zeros(1))])
    weights = sum(weight.numel() for weight in attach(model, config).trainable().values())
    kept = t.keep_checkpoints + 2  # the best, and the one that is being written
    size = 4 * weights * (1 + MOMENTS[t.optimizer]) * kept
    fewer = "lower training.keep_checkpoints, or set policy.kind=lora"
    check_room(folder / "checkpoints", size, "checkpoints", fewer)
    parts = frozen_parts(model.pipeline).values()
    numbers = sum(weight.numel() for part in parts for weight in part.parameters())
    whole = numbers * getattr(torch, config.model.dtype).itemsize
    copies = 2 + (t.steps // t.snapshot_every if t.snapshot_every else 0)  # the last, and the best
    size = copies * (whole if config.policy.kind == "full" else 4 * weights)
    fewer = "raise training.snapshot_every, or set policy.kind=lora"
    check_room(folder / "snapshots", size, "copies of the policy", fewer)
    if config.policy.merge:
        check_room(folder / "merged", whole, "merged weights", "set policy.merge=false")


def check_usable(config: Config, cache: TrajectoryCache, plan: Plan) -> None:
    """Refuse pairs that the method can learn nothing from, and batches that cannot be shared.

    Args:
        config: the run's settings.
        cache: of all pairs.
        plan: of the training.
    """
    loss = chosen_method(config).loss
    beta, usual = config.objective.beta, BETAS.get(loss)
    if isinstance(beta, float) and usual and not 1e-3 <= beta / usual <= 1e3:
        logger.warning(
            "objective.beta=%g is far from what the loss %s is used with, %g: set "
            "objective.beta=%g, or null for the usual value",
            beta,
            loss,
            usual,
            usual,
        )
    scales = {config.inversion.guidance_scale, config.objective.guidance_scale}
    if plan.path == "released" and scales != {RELEASED_GUIDANCE}:
        logger.warning(
            "objective.path=released: the authors' script inverts and predicts under guidance 2; "
            "set inversion.guidance_scale=2 objective.guidance_scale=2"
        )
    if plan.path in ("trajectory", "line"):
        variance, i = noise_variance(cache), config.inversion
        if not LEAST_NOISE < variance < MOST_NOISE:
            logger.warning(noise_text(variance, i.t_start, i.guidance_scale))
    check_preferences(config, cache.counts)
    if plan.soft_labels:
        check_soft_labels(cache.preference(range(cache.pairs)).tolist())
    if trained_guidance(config) != config.evaluation.guidance_scale:
        logger.info(guidances_text(config))
    check_batch(plan, current_team().size)


def rate_text(kind: str, rate: float) -> str | None:
    """Say that a learning rate is far from those that a LoRA, or all weights, are trained at."""
    usual, low, high = RATES[kind]
    if low <= rate <= high:
        return None
    return (
        f"training.learning_rate={rate:g} is far from what policy.kind={kind} is trained at: set "
        f"about {usual:g}, or expect {'nothing to change' if rate < low else 'broken pictures'}"
    )


def late_texts(t: TrainingConfig) -> list[str]:
    """Say which settings a training ends before."""
    ends = {
        "warmup": "training.learning_rate is never reached",
        "snapshot_every": "no copy of the policy is made",
    }
    return [
        f"training.{key}={value} exceeds training.steps={t.steps}: {what}"
        for key, what in ends.items()
        if (value := getattr(t, key) or 0) > t.steps
    ]


def check_batch(plan: Plan, processes: int) -> None:
    """Refuse a batch that has no pair for each part of each process."""
    if plan.batch_size < processes * plan.accumulation:
        raise ConfigError(
            f"training.batch_size={plan.batch_size} counts the pairs of a step over all "
            f"processes; {processes} processes in training.gradient_accumulation="
            f"{plan.accumulation} parts need at least {processes * plan.accumulation}"
        )


def check_first(config: Config, pairs: PairSource) -> None:
    """Refuse too few pairs, and regions of nothing; warn of shapes left out and of odd masks.

    The first ones tell.
    """
    sizes, seen, left, odd = buckets(config.model.resolution), 0, 0, Counter[str]()
    for pair in islice(pairs.read(LEAST_PAIRS), FIRST_PAIRS):
        seen += 1
        at = place(sizes, pair.sizes, config.data.fit)
        left += not at.fit
        mask = pair.mask_image if config.data.mask == "given" else None
        odd.update(mask_oddities(mask) if mask else ())
        if at.fit and (mask or (config.data.mask == "differ" and not pair.single)):
            region(pair.images, mask, at.size, at.fit, pair.where)
    if left:
        logger.warning("of the first pairs, %s", left_out_text(left, seen))
    for text in odd_masks_text(odd):
        logger.warning("of the masks of the first %d rows, %s", seen, text)
    check_count(config.data.pairs, seen if seen == FIRST_PAIRS else seen - left)


def check_masks(config: Config, pairs: PairSource) -> None:
    """Refuse the first mask in which nothing counts; beside the masks no image is decoded."""
    sizes = buckets(config.model.resolution)

    def look(pair: Pair) -> None:
        at = place(sizes, pair.sizes, config.data.fit)
        if at.fit and (mask := pair.mask_image):
            region((), mask, at.size, at.fit, pair.where)

    stream = pairs.read()
    with ThreadPoolExecutor() as pool:
        while some := list(islice(stream, FIRST_PAIRS)):
            deque(pool.map(look, some), 0)


def check_seeds(config: Config, pairs: PairSource) -> None:
    """Refuse the first pair whose noise cannot be drawn again; of very many look at the first."""
    sizes = buckets(config.model.resolution)
    for pair in islice(pairs.read(), None if pairs.quick else FIRST_PAIRS):
        at = place(sizes, pair.sizes, config.data.fit)
        if at.fit:
            check_known(pair, at.size, 2 - pair.single)


def check_count(source: str, count: int) -> None:
    """Refuse too few pairs."""
    if count < LEAST_PAIRS:
        raise DataError(
            f"{source}: only {counted(count, 'usable pair')}; give at least {LEAST_PAIRS}"
        )


def check_preferences(config: Config, counts: Mapping[str, int]) -> None:
    """Refuse single images where the method compares two, or needs a kind that is not there."""
    loss = chosen_method(config).loss
    single, disliked = counts.get("single", 0), counts.get("disliked", 0)
    if single and config.data.mask == "differ":
        raise ConfigError("data.mask=differ compares the images of pairs: leave it out")
    if single and config.objective.safeguard:
        raise ConfigError("objective.safeguard=true needs pairs, and these are single images")
    if single and single == disliked and loss == "sft":
        raise DataError(f"{config.data.pairs}: no image is liked: set objective.name=kto or nft")
    if single and not disliked and loss in ("kto", "nft"):
        raise DataError(
            f"{config.data.pairs}: no image is disliked, and {loss} needs both kinds: set "
            "objective.name=denoising or sft, or give images with a thumb down"
        )
    if single and loss not in ALONE:
        raise DataError(
            f"{config.data.pairs}: no preference among single annotated images: set "
            "objective.name=denoising, or give pairs"
        )


def check_sources(model: DiffusionModel, pairs: PairSource) -> None:
    """Refuse images to be edited where the model edits none, and a model without its source."""
    name, kind = pairs.config.pairs, type(model.pipeline).__name__
    if pairs.edits and model.edits == "never":
        raise DataError(
            f"{name}: its pairs edit a source image, and {kind} draws from text alone: take a "
            "model that edits images (docs/how-to/edits.md), or drop the column of the sources"
        )
    if not pairs.edits and model.edits in ("must", "reads"):
        raise DataError(
            f"{name}: {kind} edits a source image, and the pairs have none: name its column "
            "(data.columns.source=COLUMN), or put the images into a folder source/"
        )


def check_scales(model: DiffusionModel, config: Config) -> None:
    """Refuse guidance that the pipeline will not sample with; ModelError names the setting."""
    trained = config.objective.guidance_scale
    if trained != 1 and is_told_guidance(model):
        raise ModelError(
            f"objective.guidance_scale={trained:g} has no use with "
            f"{type(model.pipeline).__name__}. It means guidance by an empty prompt, without which "
            "this pipeline samples: its network takes guidance as an input. Set "
            "objective.guidance_scale=1, and model.guidance_embed to the guidance to train at"
        )
    check_guidance(model, trained, "objective.guidance_scale")
    check_guidance(model, config.evaluation.guidance_scale, "evaluation.guidance_scale")


def check_soft_labels(preferences: Iterable[float]) -> None:
    """Refuse soft labels where every pair is certain."""
    if all(preference == 1 for preference in preferences):
        raise DataError(
            "no pair has a preference_0 below 1, which objective.soft_labels and gap_weighted "
            "need: give that column (docs/reference/formats.md), or leave these settings out"
        )
