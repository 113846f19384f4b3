"""Train a policy on cached trajectories: one step, and the loop.

A step on a trajectory is a policy forward and backward and nothing else: the state, its target
and the reference's prediction come from the cache.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from inversion_dpo.maths.inversion import passes
from inversion_dpo.maths.losses import (
    as_pair_errors,
    implicit_accuracy,
    residual_overlap,
    safeguarded,
    squared_error,
)
from inversion_dpo.maths.records import LossOutput, PairErrors, TrainingPoints
from inversion_dpo.run.config import Config, TrainingConfig
from inversion_dpo.run.faults import Terminated, memory_advice, stop_requests
from inversion_dpo.run.processes import settle, share, total, whole
from inversion_dpo.training.checkpoint import Progress
from inversion_dpo.training.generators import Generators, generator_for
from inversion_dpo.training.health import Watch
from inversion_dpo.training.policy import trainable_copy
from inversion_dpo.training.recipe import Session, set_up
from inversion_dpo.training.run_files import (
    append_row,
    peak_memory,
    resume,
    save_policy,
    save_session,
)
from inversion_dpo.training.run_files import read_rows as read_rows
from inversion_dpo.training.skipping import asked_to_stop, is_finite, leave_out
from inversion_dpo.training.startup import (
    CHECKED_STEPS,
    check_all_moved,
    check_gradient,
    check_is_reference,
)
from inversion_dpo.training.states import SOURCES, live_reference, predict, to_device, with_dropout
from inversion_dpo.training.trackers import begin

logger = logging.getLogger(__name__)
Row = dict[str, float]


# ---------------------------------------------------------------- one step


def pairs_of_step(pairs: list[int], batch: int, seed: int, step: int) -> list[tuple[int, int]]:
    """The global batch of a step as (pair, epoch): fresh permutations, laid end to end."""
    chosen: list[tuple[int, int]] = []
    position = step * batch
    while len(chosen) < batch:
        epoch, offset = divmod(position + len(chosen), len(pairs))
        order = epoch_order(len(pairs), seed, epoch)[offset : offset + batch - len(chosen)]
        chosen += [(pairs[i], epoch) for i in order.tolist()]
    return chosen


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The permutation of an epoch; kept, for a million pairs take longer to shuffle than a step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def losses(
    session: Session,
    batch: list[tuple[int, int]],
    generators: Generators,
    drop: bool = False,
    compare: bool = False,
) -> tuple[LossOutput, PairErrors, int]:
    """Per-pair losses and errors of (pair, epoch)s, and the network evaluations per image.

    With ``drop``, some prompts or scene graphs are dropped; the cached predictions of the
    reference, which knew them, are then replaced. With ``compare``, the reference is evaluated
    whatever the objective.
    """
    recipe, device, pairs = session.recipe, session.accelerator.device, [p for p, _ in batch]
    objective = recipe.objective
    condition = session.cache.condition(pairs)
    if drop:
        with_dropout(session, batch, condition)
    condition = {k: v.to(device) for k, v in condition.items()}
    points = SOURCES[objective.source](session, pairs, condition, generators)
    if (objective.reference or compare) and (drop or objective.source != "trajectory"):
        points = live_reference(session, points, condition)
    points = to_device(points, device)
    found = predict(session, session.network, points.x_t, points.timesteps, condition)
    errors = pair_errors(session, points, found, pairs)
    if recipe.safeguard:
        errors = safeguarded(errors)
    spent = passes(recipe.guidance_scale) * (points.spent + 3)
    return objective.loss(errors, recipe.settings), errors, spent


def pair_errors(
    session: Session, points: TrainingPoints, found: Tensor, pairs: list[int]
) -> PairErrors:
    """Everything that an objective may ask of the policy's predictions ``found``."""
    recipe, count = session.recipe, len(pairs)
    policy, reference, moved = (
        points.scale * squared_error(a, b)
        for a, b in (
            (points.target, found),
            (points.target, points.reference),
            (points.reference, found),
        )
    )
    weight = recipe.weights.to(found.device)[points.i[:count]]
    preference = torch.ones_like(policy[:count])
    if recipe.soft_labels:
        preference = session.cache.preference(pairs).to(preference)
    gain = (reference - policy).detach()
    baseline = gain.mean()
    if session.accelerator.num_processes > 1:  # shares may be uneven: the mean of means is not it
        sums = torch.stack([gain.sum(), gain.new_tensor(len(gain))])
        summed = session.accelerator.reduce(sums, "sum")
        baseline = summed[0] / summed[1]
    overlap = points.scale[:count] * residual_overlap(points.target, found.detach())
    return as_pair_errors(policy, reference, moved, overlap, weight, preference, baseline)


def measurements(output: LossOutput, errors: PairErrors, compared: bool) -> Row:
    """What is always logged apart: winner and loser errors, accuracy, margin, drift."""
    row = {"loss": output.loss, "winner_error": errors.winner, "loser_error": errors.loser}
    if compared:
        row |= {
            "winner_error_ref": errors.winner_ref,
            "loser_error_ref": errors.loser_ref,
            "accuracy": implicit_accuracy(output.margin),
            "margin": output.margin,
            "drift": (errors.winner_moved + errors.loser_moved) / 2,
        }
    return {k: v.detach().float().mean().item() for k, v in row.items()}


def weighted_sum(rows: Sequence[tuple[float, Row]]) -> Row:
    """Key-wise sum of measurements, each times its weight."""
    return {k: sum(w * r[k] for w, r in rows) for k in rows[0][1]}


def train_step(session: Session, step: int) -> tuple[Row, list[int]]:
    """Backward on this process's share of the step's pairs.

    Returns this process's part of the batch's mean measurements, and its pairs whose loss is not
    finite. Any number of processes and parts has the same gradient, but for rounding: DDP and FSDP
    average over processes, and every pair weighs the same.
    """
    accelerator, recipe, team = session.accelerator, session.recipe, session.team
    count, parts = recipe.batch_size, recipe.accumulation
    batch = pairs_of_step(session.train_pairs, count, recipe.seed, step)
    mine = share(range(count), team.size, team.rank)
    rows, blamed = [], []
    for part in range(parts):
        with nullcontext() if part == parts - 1 else accelerator.no_sync(session.network):
            places = [(k, s) for k in share(mine, parts, part) for s in range(recipe.states)]
            here = [batch[k] for k, _ in places]
            generators = [generator_for(0, recipe.seed, step, *place) for place in places]
            output, errors, spent = losses(session, here, generators, recipe.drops)
            accelerator.backward(output.loss.sum() * (team.size / (count * recipe.states)))
        row = measurements(output, errors, recipe.objective.reference)
        row["evaluations"] = 2.0 * spent * count * recipe.states  # parts and processes add up
        rows.append((len(here) / (count * recipe.states), row))
        finite = output.loss.detach().isfinite().tolist()
        blamed += [pair for (pair, _), good in zip(here, finite, strict=True) if not good]
    return weighted_sum(rows), blamed


@torch.no_grad()
def heldout(session: Session, limit: int = 128, draws: int = 2) -> Row:
    """Measurements on pairs never trained on, at the same states every time, over all processes."""
    recipe, team, pairs = session.recipe, session.team, session.heldout_pairs[:limit]
    items = [(draw, place) for draw in range(draws) for place in range(len(pairs))]
    size = -(-recipe.batch_size // (team.size * recipe.accumulation))
    chunks = [items[k : k + size] for k in range(0, len(items), size)]
    rows = []
    for first in range(0, len(chunks), team.size):  # as many forwards on every process: FSDP waits
        number = first + team.rank
        chunk = chunks[number % len(chunks)]
        generators = [generator_for(1, *item) for item in chunk]
        batch = [(pairs[place], 0) for _, place in chunk]
        output, errors, _ = losses(session, batch, generators, compare=True)
        row = measurements(output, errors, True)
        rows.append((len(chunk) / len(items) if number < len(chunks) else 0.0, row))
    settle(session.network)
    mean = total(weighted_sum(rows), session.accelerator.device, team)
    return {f"heldout_{k}": v for k, v in mean.items() if k != "loss"}


# ---------------------------------------------------------------- the loop


def rate_at(step: int, t: TrainingConfig) -> float:
    """The learning rate of a step: linear warm-up, then ``training.lr_scheduler``'s decay.

    The factors are those of diffusers' ``get_scheduler``, but depend on the step alone, so that
    nothing of them need be stored; the first step of a warm-up is not 0.
    """
    warm = min(1.0, (step + 1) / max(1, t.warmup))
    done = max(0, step - t.warmup) / max(1, t.steps - t.warmup)
    left = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return t.learning_rate * warm * left[t.lr_scheduler]


def update(session: Session, step: int, learning_rate: float, clip: float, limit: int = 0) -> Row:
    """Backward, clip, optimizer step; returns what was measured, averaged over processes.

    A step whose loss or gradient is not finite is left out; the one after ``limit`` such is a
    NotFiniteError.
    """
    accelerator = session.accelerator
    for group in session.optimizer.param_groups:
        group["lr"] = learning_rate
    session.optimizer.zero_grad()
    mine, blamed = train_step(session, step)
    norm = accelerator.clip_grad_norm_(list(session.policy.trainable().values()), clip)
    row = total(mine, accelerator.device, session.team)
    row["grad_norm"] = float(whole(norm))
    if is_finite(row) or accelerator.scaler is not None:
        session.optimizer.step()  # a scaler of fp16 leaves the step out itself, and learns from it
    if not is_finite(row) and (accelerator.scaler is None or not math.isfinite(row["loss"])):
        recipe = session.recipe
        batch = pairs_of_step(session.train_pairs, recipe.batch_size, recipe.seed, step)
        leave_out(session, step, row, blamed, [pair for pair, _ in batch], limit)
    return row


def check_step(session: Session, step: int, row: Row, before: dict[str, Tensor] | None) -> None:
    """The start-up checks that belong after this step, if any; ``before`` is the start."""
    recipe, precision = session.recipe, session.accelerator.mixed_precision
    if not is_finite(row):
        return
    if step == 0 and recipe.objective.reference:
        exact = precision == "no" and session.model.pipeline.dtype == torch.float32
        check_is_reference(row, tolerance=1e-3 if exact else 5e-2)
    saddle = recipe.target == "reference" and recipe.objective.source == "trajectory"
    if step == 0:
        check_gradient(row["grad_norm"], saddle)
    if before is not None and step + 1 == CHECKED_STEPS and not saddle:
        check_all_moved(before, session.policy.trainable())


def steps_with_bar(start: int, total: int, enabled: bool) -> Iterator[tuple[int, Any]]:
    """Step numbers with a progress bar that shows the time left."""
    bar = tqdm(
        range(start, total),
        initial=start,
        total=total,
        desc="train",
        unit="step",
        disable=not enabled,
        mininterval=1.0,
    )
    for step in bar:
        yield step, bar


def train(config: Config, folder: Path, cache_root: Path | None = None) -> Session:
    """Train to ``training.steps``, from the last checkpoint if there is one; save the policy.

    Leaves ``folder/adapter`` (LoRA weights or a pipeline folder), ``metrics.jsonl`` and
    ``checkpoints/``. Raises StartupError, DataError, ModelError, CacheError, CheckpointError,
    NotFiniteError, OutOfMemoryError, DiskError; Terminated once SIGTERM came and all is saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with memory_advice("inversion"):
        session = set_up(config, cache_root or folder / "cache")
    progress = resume(session, folder)
    begin(session.accelerator, config.training.tracker, folder, progress.step)
    with memory_advice("training"), stop_requests() as stopping:
        looked, seconds = run_steps(session, config, folder, progress, stopping)
        looked = looked or heldout(session)
    if session.team.main:
        peak = round(peak_memory(session.accelerator.device))
        logger.info("peak memory: %d MB", peak)
        final = {"step": config.training.steps, **looked, "seconds": round(seconds, 3)}
        final |= {"peak_memory_mb": peak, "pairs": session.cache.pairs}
        append_row(folder, final)
    save_policy(session, folder / "adapter")
    if config.policy.merge and session.team.main:
        session.policy.merge(folder / "merged")
    for tracker in session.accelerator.trackers:  # end_training() would end the processes' group
        tracker.finish()
    session.team.wait()
    return session


def run_steps(
    session: Session, config: Config, folder: Path, start: Progress, stopping: Callable[[], bool]
) -> tuple[Row, float]:
    """The steps from where the run stands; held-out measurements of its end, seconds in all."""
    t, begun, seconds, looked = config.training, time.time(), start.seconds, Row()
    before = trainable_copy(session.policy) if start.step == 0 else None
    watch = Watch()
    for step, bar in steps_with_bar(start.step, t.steps, session.team.main):
        measured = (looked or heldout(session)) if step % t.eval_every == 0 else {}
        looked = {}
        row = update(session, step, rate_at(step, t), t.max_grad_norm, t.max_skipped)
        check_step(session, step, row, before)
        seconds = start.seconds + time.time() - begun
        if session.team.main:
            watch.see({"step": step, **row, **measured})
            append_row(folder, {"step": step, **row, **measured, "seconds": round(seconds, 3)})
        session.accelerator.log(row | measured, step=step)
        bar.set_postfix(loss=f"{row['loss']:.3f}", acc=f"{row.get('accuracy', 0):.2f}")
        stop = asked_to_stop(session, stopping)
        if (step + 1) % t.checkpoint_every == 0 or step + 1 == t.steps or stop:
            looked = heldout(session)
            save_session(session, folder, step + 1, seconds, looked, t.keep_checkpoints)
        if t.snapshot_every and (step + 1) % t.snapshot_every == 0:
            save_policy(session, folder / "snapshots" / f"step-{step + 1:06d}")
        if stop:
            raise Terminated(f"stopped by SIGTERM after step {step + 1} of {t.steps}, all saved")
    return looked, seconds
