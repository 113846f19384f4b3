"""What a run keeps in its folder: metrics, checkpoints, the policy."""

from __future__ import annotations

import json
import logging
import math
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from inversion_dpo.maths.losses import LOSSES
from inversion_dpo.run.disk import atomic_folder, atomic_text
from inversion_dpo.run.fields import Config
from inversion_dpo.run.folder import read_rows, read_seconds, steps_in
from inversion_dpo.run.sharded import is_cut, whole_tensors
from inversion_dpo.run.words import typed
from inversion_dpo.training.checkpoint import (
    Progress,
    best_checkpoint,
    better_checkpoint,
    is_intact,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from inversion_dpo.training.health import FEW_PAIRS, accuracy_text, heldout_units
from inversion_dpo.training.session import Session
from inversion_dpo.trajectories.method import chosen_method

logger = logging.getLogger(__name__)


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Add a line to the run's metrics."""
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps(row) + "\n")


def resume(session: Session, folder: Path) -> Progress:
    """Load the newest intact checkpoint, drop later metric rows and snapshots; or start from zero.

    Such snapshots are made again, or are of an earlier training.
    """
    identity, reference = session.cache.folder.name, session.cache.reference
    checkpoint = latest_checkpoint(folder / "checkpoints")
    progress = Progress(0, 0.0, identity, reference)
    parameters = session.policy.trainable()
    session.initial = {name: p.detach().clone() for name, p in parameters.items()}
    if session.plan.reference_every:
        session.moved = {name: p.clone() for name, p in session.initial.items()}
    if checkpoint is not None:
        inner = getattr(session.optimizer, "optimizer", session.optimizer)
        held = held_tensors(session)
        progress = load_checkpoint(checkpoint, held, inner, identity, reference)
    session.skipped, session.coefficients = progress.skipped, dict(progress.coefficients)
    if session.accelerator.scaler is None:  # which leaves out steps that are not counted
        session.updates = progress.step - progress.skipped
    scale = {k[7:]: v for k, v in session.coefficients.items() if k.startswith("scaler.")}
    if scale and session.accelerator.scaler is not None:
        session.accelerator.scaler.load_state_dict(scale)
    if session.team.main:
        rows = [r for r in read_rows(folder / "metrics.jsonl") if r["step"] < progress.step]
        atomic_text("".join(json.dumps(r) + "\n" for r in rows), folder / "metrics.jsonl")
        for step, place in steps_in(folder / "snapshots").items():
            if step > progress.step:
                logger.info("%s is removed: it is of a later step than %d", place, progress.step)
                shutil.rmtree(place)
        if checkpoint is None and (folder / "merged").is_dir():
            logger.warning("%s is of an earlier training, and stays as it is", folder / "merged")
    return progress


def summary(folder: Path, config: Config) -> str:
    """Say how a finished training went, where its policy is and what to do next."""
    row, seconds = read_rows(folder / "metrics.jsonl")[-1], read_seconds(folder)
    run = typed(folder)
    learned, spent = accuracy_text(row), [seconds.get(k, 0.0) for k in ("invert", "train")]
    if not LOSSES[chosen_method(config).loss].reference:
        errors = row["heldout_winner_error"], row["heldout_winner_error_ref"]
        learned = f"held-out error on winners {errors[0]:.4g}, the reference's {errors[1]:.4g}"
    elif row["heldout_pairs"] < FEW_PAIRS:
        units = heldout_units(row)
        learned += f": few {units}; more of them, or a larger data.holdout, make it surer"
    return (
        f"{learned}\n"
        f"drift from the reference: {row['heldout_drift']:.3g} (mean squared, of predictions)\n"
        f"time: {spent[0]:.0f} s before and {spent[1]:.0f} s in training; "
        f"peak memory: {row['peak_memory_mb']:.0f} MB\n"
        f"policy: {folder / 'adapter'}{best_text(folder)}\n"
        f"next: inversion-dpo advise {run}   what to change in the training, if anything\n"
        f"      inversion-dpo evaluate {run}"
    )


def save_policy(session: Session, target: Path) -> None:
    """Write the policy as users load it, whole or not at all; every process must call it."""
    parameters = session.policy.trainable()
    tensors = whole_tensors(parameters) if is_cut(parameters) else None
    if session.team.main:
        atomic_folder(target, lambda partial: session.policy.save(partial, tensors))


def save_best(session: Session, folder: Path, steps: int) -> None:
    """Write the policy of the best checkpoint as ``folder/best``, if the last one scores less.

    Args:
        session: everything that is alive; its policy stays as it is.
        folder: of the run.
        steps: that were taken.
    """
    if not session.team.main:
        return
    best, target = better_checkpoint(folder / "checkpoints", steps), folder / "best"
    if best is None:
        shutil.rmtree(target, ignore_errors=True)  # of a shorter run, which went on
        return
    if not is_intact(best):
        logger.warning("%s, the best checkpoint, is damaged: %s is not written", best, target)
        return
    held = load_file(best / "policy.safetensors")
    tensors = {name: held[name] for name in session.policy.trainable()}
    atomic_folder(target, lambda partial: session.policy.save(partial, tensors))


def best_text(folder: Path) -> str:
    """Say which earlier policy did better on held-out pairs; "" if none did."""
    best = best_checkpoint(folder / "checkpoints")
    if best is None or not (folder / "best").is_dir():
        return ""
    step, policy = int(best.name[5:]), folder / "best"
    return (
        f"\nbest held-out score: at step {step}, above the last one's; that policy is {policy}: "
        f"judge it by `inversion-dpo evaluate {typed(folder)} --policy {typed(policy)}`"
    )


def peak_memory(device: torch.device) -> float:
    """Measure the most MB that torch held on the device, or the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e6 if sys.platform == "darwin" else used / 1e3


def save_session(
    session: Session, folder: Path, *, step: int, seconds: float, looked: dict[str, float]
) -> None:
    """Checkpoint the policy, its optimizer and whatever adapts; every process must call it.

    The score, by which the best checkpoint is kept, is the held-out accuracy, or the winners'
    held-out error, negated, where the loss has no margin.

    Args:
        session: everything that is alive.
        folder: of the run.
        step: how many steps are done.
        seconds: that they took.
        looked: measurements of the held-out pairs.
    """
    compared, scaler = session.plan.loss.reference, session.accelerator.scaler
    score = looked["heldout_accuracy"] if compared else -looked["heldout_winner_error"]
    scales = {} if scaler is None else {f"scaler.{k}": v for k, v in scaler.state_dict().items()}
    progress = Progress(
        step=step,
        seconds=seconds,
        identity=session.cache.folder.name,
        reference=session.cache.reference,
        skipped=session.skipped,
        score=score if math.isfinite(score) else None,
        coefficients=session.coefficients | scales,
        settings=session.settings,
    )
    inner = getattr(session.optimizer, "optimizer", session.optimizer)
    held, keep = held_tensors(session), session.keep_checkpoints
    save_checkpoint(folder / "checkpoints", held, inner, progress, keep, session.team)


def held_tensors(session: Session) -> dict[str, Tensor]:
    """Name what a checkpoint holds: what is trained, and a reference that moved."""
    moved = {f"reference.{name}": tensor for name, tensor in session.moved.items()}
    return {**session.policy.trainable(), **moved}
