"""Train a policy on cached trajectories: one step, and the loop.

A step on a trajectory is a policy forward and backward and nothing else: the state, its target
and the reference's prediction come from the cache.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from inversion_dpo.checkpoint import Progress, latest_checkpoint, load_checkpoint, save_checkpoint
from inversion_dpo.config import Config
from inversion_dpo.models.policy import trainable_copy
from inversion_dpo.objectives import (
    as_pair_errors,
    implicit_accuracy,
    residual_overlap,
    safeguarded,
    squared_error,
)
from inversion_dpo.points import SOURCES, live_reference, predict, to_device, without_prompts
from inversion_dpo.session import Session, set_up
from inversion_dpo.startup import (
    CHECKED_STEPS,
    StartupError,
    check_all_moved,
    check_gradient,
    check_is_reference,
)
from inversion_dpo.types import LossOutput, PairErrors, TrainingPoints

logger = logging.getLogger(__name__)
Row = dict[str, float]


# ---------------------------------------------------------------- one step


def pairs_of_step(pairs: list[int], batch: int, seed: int, step: int) -> list[tuple[int, int]]:
    """The global batch of a step as (pair, epoch): fresh permutations, laid end to end."""
    chosen: list[tuple[int, int]] = []
    position = step * batch
    while len(chosen) < batch:
        epoch, offset = divmod(position + len(chosen), len(pairs))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(pairs), generator=generator).tolist()
        chosen += [(pairs[i], epoch) for i in order[offset : offset + batch - len(chosen)]]
    return chosen


def losses(
    session: Session,
    batch: list[tuple[int, int]],
    generator: torch.Generator,
    drop: bool = False,
    compare: bool = False,
) -> tuple[LossOutput, PairErrors, int]:
    """Per-pair losses and errors of (pair, epoch)s, and the network evaluations per image.

    With ``drop``, some prompts are dropped; the cached predictions of the reference, which knew
    them, are then replaced. With ``compare``, the reference is evaluated whatever the objective.
    """
    recipe, device, pairs = session.recipe, session.accelerator.device, [p for p, _ in batch]
    objective = recipe.objective
    condition = session.cache.condition(pairs)
    if drop:
        without_prompts(session, batch, condition)
    condition = {k: v.to(device) for k, v in condition.items()}
    points = SOURCES[objective.source](session, pairs, condition, generator)
    if drop or (objective.source != "trajectory" and (objective.reference or compare)):
        points = live_reference(session, points, condition)
    points = to_device(points, device)
    found = predict(session, session.network, points.x_t, points.timesteps, condition)
    errors = pair_errors(session, points, found, pairs)
    if recipe.safeguard:
        errors = safeguarded(errors)
    return objective.loss(errors, recipe.settings), errors, points.spent + 3


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
    baseline = (reference - policy).detach().mean()
    if session.accelerator.num_processes > 1:
        baseline = session.accelerator.reduce(baseline, "mean")
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


def mean_rows(rows: list[Row]) -> Row:
    """Key-wise mean of measurements of equal-sized parts."""
    return {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}


def train_step(session: Session, step: int) -> Row:
    """One optimizer step on this process's share of the step's pairs."""
    accelerator, recipe = session.accelerator, session.recipe
    world, rank = accelerator.num_processes, accelerator.process_index
    batch = pairs_of_step(session.train_pairs, recipe.batch_size * world, recipe.seed, step)
    mine = batch[rank * recipe.batch_size : (rank + 1) * recipe.batch_size]
    generator = torch.Generator().manual_seed((recipe.seed * 1_000_003 + step) * 4096 + rank)
    size = recipe.batch_size // recipe.accumulation
    rows = []
    for part in range(recipe.accumulation):
        last = part == recipe.accumulation - 1
        with nullcontext() if last else accelerator.no_sync(session.network):
            here = mine[part * size : (part + 1) * size]
            here = [pair for pair in here for _ in range(recipe.states)]
            output, errors, spent = losses(session, here, generator, recipe.prompt_dropout > 0)
            accelerator.backward(output.loss.mean() / recipe.accumulation)
        rows.append(measurements(output, errors, recipe.objective.reference))
        rows[-1]["evaluations"] = 2 * spent * len(here) * recipe.accumulation
    return mean_rows(rows)


@torch.no_grad()
def heldout(session: Session, limit: int = 128, draws: int = 2) -> Row:
    """Measurements on pairs never trained on, at the same states every time."""
    pairs = session.heldout_pairs[:limit]
    size, rows, weights = session.recipe.batch_size, [], []
    for draw in range(draws):
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            generator = torch.Generator().manual_seed(7_000_003 + draw * 4096 + start)
            batch = [(pair, 0) for pair in part]
            output, errors, _ = losses(session, batch, generator, compare=True)
            rows.append(measurements(output, errors, True))
            weights.append(len(part))
    total = sum(weights)
    mean = {k: sum(w * r[k] for w, r in zip(weights, rows, strict=True)) / total for k in rows[0]}
    return {f"heldout_{k}": v for k, v in mean.items() if k != "loss"}


# ---------------------------------------------------------------- the loop


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Metrics rows of a run, a torn last line left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def resume(session: Session, folder: Path) -> Progress:
    """Load the newest intact checkpoint, drop later metric rows; or start from zero."""
    identity = session.cache.folder.name
    checkpoint = latest_checkpoint(folder / "checkpoints")
    progress = Progress(0, 0.0, identity)
    if checkpoint is not None:
        inner = getattr(session.optimizer, "optimizer", session.optimizer)
        progress = load_checkpoint(checkpoint, session.policy.trainable(), inner, identity)
    if session.accelerator.is_main_process:
        rows = [r for r in read_rows(folder / "metrics.jsonl") if r["step"] < progress.step]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return progress


def update(session: Session, step: int, learning_rate: float, warmup: int, clip: float) -> Row:
    """Backward, clip, optimizer step; returns what was measured, averaged over processes."""
    accelerator = session.accelerator
    for group in session.optimizer.param_groups:
        group["lr"] = learning_rate * min(1.0, (step + 1) / max(1, warmup))
    session.optimizer.zero_grad()
    row = train_step(session, step)
    norm = accelerator.clip_grad_norm_(list(session.policy.trainable().values()), clip)
    row["grad_norm"] = float(norm)
    if not math.isfinite(row["grad_norm"]):
        raise StartupError(f"gradient is {row['grad_norm']} at step {step}: lower "
                           "training.learning_rate or objective.beta, or use float32")  # fmt: skip
    session.optimizer.step()
    if accelerator.num_processes > 1:
        keys = sorted(row)
        values = torch.tensor([row[k] for k in keys], device=accelerator.device)
        row = dict(zip(keys, accelerator.reduce(values, "mean").tolist(), strict=True))
        row["evaluations"] *= accelerator.num_processes
    return row


def check_step(session: Session, step: int, row: Row, before: dict[str, Tensor] | None) -> None:
    """The start-up checks that belong after this step, if any; ``before`` is the start."""
    recipe, precision = session.recipe, session.accelerator.mixed_precision
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
    bar = tqdm(range(start, total), initial=start, total=total, desc="train", unit="step",
               disable=not enabled, mininterval=1.0)  # fmt: skip
    for step in bar:
        yield step, bar


def train(config: Config, folder: Path, cache_root: Path | None = None) -> Session:
    """Train to ``training.steps``, from the last checkpoint if there is one; save the policy.

    Leaves ``folder/adapter`` (LoRA weights or a pipeline folder), ``metrics.jsonl`` and
    ``checkpoints/``. Raises StartupError, DataError, ModelError, CacheError, CheckpointError.
    """
    t = config.training
    folder.mkdir(parents=True, exist_ok=True)
    session = set_up(config, cache_root or folder / "cache")
    main, policy = session.accelerator.is_main_process, session.policy
    progress = resume(session, folder)
    before = trainable_copy(policy) if progress.step == 0 else None
    start, seconds = time.time(), progress.seconds
    with (folder / "metrics.jsonl").open("a") as log:
        for step, bar in steps_with_bar(progress.step, t.steps, main):
            measured = heldout(session) if step % t.eval_every == 0 else {}
            row = update(session, step, t.learning_rate, t.warmup, t.max_grad_norm) | measured
            check_step(session, step, row, before)
            seconds = progress.seconds + time.time() - start
            if main:
                log.write(json.dumps({"step": step, **row, "seconds": round(seconds, 3)}) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{row['loss']:.3f}", acc=f"{row.get('accuracy', 0):.2f}")
            if main and ((step + 1) % t.checkpoint_every == 0 or step + 1 == t.steps):
                done = Progress(step + 1, seconds, session.cache.folder.name)
                save_session(session, folder, done, t.keep_checkpoints)
            if main and t.snapshot_every and (step + 1) % t.snapshot_every == 0:
                policy.save(folder / "snapshots" / f"step-{step + 1:06d}")
    if main:
        peak = round(peak_memory(session.accelerator.device))
        logger.info("peak memory: %d MB", peak)
        final = {"step": t.steps, **heldout(session), "seconds": round(seconds, 3)}
        final |= {"peak_memory_mb": peak, "pairs": session.cache.pairs}
        with (folder / "metrics.jsonl").open("a") as log:
            log.write(json.dumps(final) + "\n")
        policy.save(folder / "adapter")
        if config.policy.merge:
            policy.merge(folder / "merged")
    return session


def peak_memory(device: torch.device) -> float:
    """MB: the most that torch held on the device, or the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e6 if sys.platform == "darwin" else used / 1e3


def save_session(session: Session, folder: Path, progress: Progress, keep: int) -> None:
    """Checkpoint the policy and its optimizer."""
    inner = getattr(session.optimizer, "optimizer", session.optimizer)
    parameters = session.policy.trainable()
    save_checkpoint(folder / "checkpoints", parameters, inner, progress, keep)
