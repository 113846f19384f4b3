"""The recipe: from a configuration to a trained policy, read from top to bottom.

``invert`` is :func:`prepare` and nothing else. Everything is loaded, hashed and decoded once.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tqdm import tqdm

from inversion_dpo.data.buckets import left_out_text, named
from inversion_dpo.data.giveaways import refuse_giveaways
from inversion_dpo.data.images import DataError
from inversion_dpo.data.source import open_pairs
from inversion_dpo.models.base import DiffusionModel, frozen_parts, sketch_of
from inversion_dpo.models.blocks import compile_blocks, compile_model, one_length, seconds_compiling
from inversion_dpo.models.loading import load_model
from inversion_dpo.models.prompts import overlong_text
from inversion_dpo.run.disk import atomic_folder, atomic_json, atomic_text
from inversion_dpo.run.faults import Terminated, memory_advice, stop_requests
from inversion_dpo.run.fields import Config, ConfigError, TrainingConfig
from inversion_dpo.run.folder import REFERENCE, stage, steps_in
from inversion_dpo.run.processes import current_team
from inversion_dpo.run.together import check_together
from inversion_dpo.run.words import counted
from inversion_dpo.training.beforehand import (
    LEAST_PAIRS,
    check_count,
    check_sources,
    check_usable,
)
from inversion_dpo.training.checkpoint import (
    Progress,
    refuse_other_settings,
    shaping,
    step_name,
)
from inversion_dpo.training.checks import asked_to_stop, check_step
from inversion_dpo.training.health import Watch
from inversion_dpo.training.notices import (
    counts_text,
    guidance_text,
    known_prompts_text,
    leak_text,
    rare_text,
)
from inversion_dpo.training.plan import balanced, make_plan, with_gap
from inversion_dpo.training.policy import FullPolicy, attach, make_optimizer
from inversion_dpo.training.run_files import (
    append_row,
    peak_memory,
    resume,
    save_best,
    save_policy,
    save_session,
)
from inversion_dpo.training.session import Session, split_by
from inversion_dpo.training.split import split_pairs
from inversion_dpo.training.step import Row, heldout, step
from inversion_dpo.training.trackers import begin_tracker, tracker_of
from inversion_dpo.trajectories.cache import TrajectoryCache
from inversion_dpo.trajectories.fill import fill
from inversion_dpo.trajectories.key import key_of
from inversion_dpo.trajectories.method import chosen_method, takes_images
from inversion_dpo.trajectories.sampling_back import round_trip_error, sampled_back

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """The frozen model, the trajectories of all pairs under it, and their way back if asked for."""

    accelerator: Accelerator
    model: DiffusionModel
    cache: TrajectoryCache
    back: TrajectoryCache | None = None


def train(config: Config, folder: Path, cache_root: Path | None = None) -> Session:
    """Train to ``training.steps``, from the last checkpoint if there is one; save the policy.

    Leaves ``folder/adapter`` (LoRA weights or a pipeline folder), ``folder/best`` if an earlier
    checkpoint had a better held-out score, ``metrics.jsonl`` and ``checkpoints/``.

    Args:
        config: the run's settings.
        folder: the run's folder, which is made if need be.
        cache_root: the folder of caches, ``inversion.cache`` by default. In one that is given here
            nothing is taken over from another cache, so that its inversion can be timed.

    Raises:
        StartupError, DataError, ModelError, CheckpointError, NotFiniteError, OutOfMemoryError,
            DiskError: each says what to do.
        Terminated: SIGTERM came, and all is saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tracker_of(config.training.tracker)  # that it is missing is said before hours of inversion
    refuse_other_settings(folder / "checkpoints", config)
    log, begun = folder / "metrics.jsonl", bool(steps_in(folder / "checkpoints"))
    if current_team().main and log.is_file() and not begun:
        atomic_text("", log)  # of an earlier training: from now on the settings are not its own
    with stage(folder, "invert"), memory_advice("inversion"):
        root = cache_root or config.inversion.folder(folder)
        prepared = prepare(config, root, reuse=cache_root is None)
    with stage(folder, "train"), memory_advice("training"), stop_requests() as stopping:
        weights = sketch_of(prepared.model.pipeline)
        session = set_up(config, prepared)
        progress = resume(session, folder)
        if current_team().main:  # after it: a checkpoint of another model is refused
            atomic_json({"weights": weights}, folder / REFERENCE)
        if progress.step < config.training.steps:
            begin_tracker(session.accelerator, config.training.tracker, folder, progress.step)
        last = run_steps(session, config.training, folder, progress, stopping)
        finish(session, config, folder, last)
    return session


def prepare(config: Config, cache_root: Path, *, reuse: bool = False) -> Prepared:
    """Load the model, read the pairs, invert what is not inverted yet.

    Args:
        config: the run's settings.
        cache_root: the folder of caches.
        reuse: whether shards that another of them has are taken over.
    """
    accelerator, team = make_accelerator(config), current_team()
    pairs = open_pairs(config.data, alone=takes_images(config))
    refuse_giveaways(pairs, cache_root / f"giveaways-{pairs.fingerprint[:16]}.json")
    model = load_model(config, accelerator.device)
    if config.training.compile != "no":
        compile_model(model, config.training.compile, accelerator.device, team.size)
    check_sources(model, pairs)
    key = key_of(config, pairs, model)
    files = {"data.pairs": key.pairs, "the model's weights": key.model, "the cache": key.name()}
    check_together(cache_root, files)
    with accelerator.autocast():
        cache = fill(cache_root, model, pairs, key, team=team, reuse=reuse)
        back = (
            sampled_back(model, cache, config.inversion, team, pairs.read())
            if config.inversion.reconstruct
            else None
        )
        if key.guidance_scale > 1 and team.main:
            errors = [round_trip_error(model, cache, s) for s in (1.0, key.guidance_scale)]
            logger.warning(guidance_text(key.guidance_scale, *errors))
    logger.info(counts_text(cache))
    sizes = Counter(map(cache.size, range(cache.pairs)))
    if len(sizes) > 1:
        listed = ", ".join(f"{named(size)} ({count})" for size, count in sizes.most_common())
        logger.info("%s by size: %s", "images" if cache.single else "pairs", listed)
    if left := len(cache.left_out):
        logger.warning(left_out_text(left, left + cache.pairs))
    captions = counted(cache.pairs, "caption")
    if text := overlong_text(cache.overlong, model, key.prompt_chunks, captions):
        logger.warning(text)
    check_count(pairs.config.pairs, cache.pairs)
    return Prepared(accelerator, model, cache, back)


def set_up(config: Config, prepared: Prepared) -> Session:
    """Attach the policy to the model, choose its pairs, make its optimizer and its plan."""
    accelerator, model, cache = prepared.accelerator, prepared.model, prepared.cache
    t, team = config.training, current_team()
    plan = make_plan(
        config, lambda size: (model.schedule_at(size), cache.grid_at(size)), cache.sizes[0]
    )
    check_usable(config, cache, plan)
    only_network_stays(model)
    policy = attach(model, config)
    if t.compile != "no" and isinstance(policy, FullPolicy):  # whose copy is not compiled yet
        compile_blocks(policy.frozen, t.compile, one_length(cache.empty, cache.condition([0])))
    if t.gradient_checkpointing:
        policy.network.enable_gradient_checkpointing()  # type: ignore[operator]
        policy.network.train()
    optimizer = make_optimizer(t, list(policy.trainable().values()))
    network, optimizer = accelerator.prepare(policy.network, optimizer)
    usable, loss = reproducible(prepared, config.inversion.max_error), chosen_method(config).loss
    if cache.single and loss == "sft":  # there is nothing to avoid
        usable = [pair for pair in usable if bool(cache.liked([pair]))]
    train_pairs, heldout_pairs = split_pairs(usable, config.data.holdout, cache.images)
    if leak := leak_text(cache.images, train_pairs, heldout_pairs, single=cache.single):
        logger.warning(leak)
    split = train_pairs, heldout_pairs
    if known := known_prompts_text(cache.texts, *split, single=cache.single):
        logger.info(known)
    if config.data.label_noise:
        cache.swap(train_pairs, config.data.label_noise, t.seed)
    if plan.gap:
        plan = with_gap(plan, cache, train_pairs)
    if loss == "kto":
        plan = balanced(plan, config.objective.liked_share, cache, train_pairs)
    buckets = split_by(train_pairs, cache.size)
    if rare := rare_text(Counter(map(cache.size, train_pairs)), t):
        logger.warning(rare)
    cache.device = accelerator.device
    return Session(
        accelerator=accelerator,
        model=model,
        policy=policy,
        network=network,
        optimizer=optimizer,
        cache=cache,
        train_pairs=train_pairs,
        buckets=buckets,
        heldout_pairs=heldout_pairs,
        plan=plan,
        clip=t.max_grad_norm,
        max_skipped=t.max_skipped,
        keep_checkpoints=t.keep_checkpoints,
        team=team,
        settings=shaping(config),
    )


def run_steps(
    session: Session, t: TrainingConfig, folder: Path, start: Progress, stopping: Callable[[], bool]
) -> Row:
    """Take the steps from where the run stands; returns the last row of the metrics."""
    begun, seconds, looked, main = time.time(), start.seconds, Row(), session.team.main
    watch, numbers = Watch(), range(start.step, t.steps)
    bar = tqdm(
        numbers, "train", t.steps, initial=start.step, unit="step", mininterval=1, disable=not main
    )
    for number in bar:
        due = number and number % t.eval_every == 0  # at 0 the policy is the reference
        measured, looked = (looked or heldout(session)) if due else Row(), Row()
        row = step(session, number, rate_at(number, t))
        check_step(session, number, row)
        if number == 0:
            row.pop("accuracy", None)  # rounding noise
        seconds = start.seconds + time.time() - begun
        if main:
            watch.see({"step": number, **row, **measured})
            append_row(folder, {"step": number, **row, **measured, "seconds": round(seconds, 3)})
        session.accelerator.log(row | measured, step=number)
        bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "accuracy") if k in row})
        done, stop = number + 1, asked_to_stop(session, stopping)
        if t.snapshot_every and done % t.snapshot_every == 0:  # first: after a checkpoint a kill
            save_policy(session, folder / "snapshots" / step_name(done))  # would leave it out
        if done % t.checkpoint_every == 0 or done == t.steps or stop:
            looked = heldout(session)
            save_session(session, folder, step=done, seconds=seconds, looked=looked)
        if stop:
            raise Terminated(f"stopped by SIGTERM after step {done} of {t.steps}, all saved")
    return {"step": t.steps, **(looked or heldout(session)), "seconds": round(seconds, 3)}


def finish(session: Session, config: Config, folder: Path, last: Row) -> None:
    """Write the last measurements and the policy, merged if asked for."""
    logged = {key: value for key, value in last.items() if key not in ("step", "seconds")}
    session.accelerator.log(logged, step=config.training.steps)
    save_policy(session, folder / "adapter")
    save_best(session, folder, config.training.steps)
    if config.policy.merge and session.team.main:
        atomic_folder(folder / "merged", session.policy.merge)
    if session.team.main:  # last: this row says that the policy is there
        peak = round(peak_memory(session.accelerator.device))
        row = last | {"peak_memory_mb": peak, "pairs": session.cache.pairs}
        if config.training.compile != "no":
            row["compile_seconds"] = round(seconds_compiling(), 1)
        append_row(folder, row)
    for tracker in session.accelerator.trackers:  # end_training() would end the processes' group
        tracker.finish()
    session.team.wait()


# ---------------------------------------------------------------- the parts, in their order


def make_accelerator(config: Config) -> Accelerator:
    """Start accelerate; ConfigError for what FSDP, which cuts the network, cannot do.

    Gradients are accumulated by the step itself.
    """
    current_team()  # before accelerate chooses a device by itself
    precision, known = config.training.mixed_precision, AcceleratorState._shared_state
    if known and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # of an earlier training in this process
    accelerator = Accelerator(mixed_precision=precision)
    fsdp = accelerator.distributed_type == DistributedType.FSDP
    if config.model.offload and accelerator.num_processes > 1:
        raise ConfigError(
            "model.offload=true is for one process: start one, or set it to false and let FSDP "
            "divide the weights (docs/how-to/several-gpus.md)"
        )
    if config.model.quantize and fsdp:
        raise ConfigError(
            f"model.quantize={config.model.quantize} does not work under FSDP, which cuts weights "
            "of one precision: set it to null, or use `accelerate launch --multi_gpu`"
        )
    if config.policy.merge and fsdp:
        raise ConfigError(
            "policy.merge=true does not work under FSDP, where no process holds the whole network: "
            "train with policy.merge=false and merge OUTPUT/adapter afterwards "
            "(docs/how-to/several-gpus.md)"
        )
    return accelerator


def only_network_stays(model: DiffusionModel) -> None:
    """Move autoencoder and text encoders off the device: their outputs are cached."""
    for name, module in frozen_parts(model.pipeline).items():
        if name != model.component:
            module.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reproducible(prepared: Prepared, max_error: float | None) -> list[int]:
    """List the pairs whose reconstruction error is at most ``max_error``, if one is set."""
    if max_error is None or prepared.back is None:
        return list(range(prepared.cache.pairs))
    errors = prepared.back.errors
    kept = [k for k, error in enumerate(errors) if error <= max_error]
    left = len(errors) - len(kept)
    logger.info("inversion.max_error leaves out %d of %d pairs", left, len(errors))
    if len(kept) < LEAST_PAIRS:
        raise DataError(
            f"inversion.max_error={max_error} leaves only {counted(len(kept), 'pair')}: raise it"
        )
    return kept


def rate_at(number: int, t: TrainingConfig) -> float:
    """Compute a step's learning rate: linear warm-up, then ``training.lr_scheduler``'s decay.

    The factors are those of diffusers' ``get_scheduler``, but depend on the step alone, so that
    nothing of them need be stored; the first step of a warm-up is not 0.
    """
    warm = min(1.0, (number + 1) / max(1, t.warmup))
    done = max(0, number - t.warmup) / max(1, t.steps - t.warmup)
    left = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return t.learning_rate * warm * left[t.lr_scheduler]
