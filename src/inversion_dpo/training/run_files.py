"""What a run keeps in its folder: metrics, checkpoints, the policy."""

from __future__ import annotations

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from inversion_dpo.run.disk import atomic_folder, atomic_text
from inversion_dpo.run.processes import is_cut, whole_tensors
from inversion_dpo.training.checkpoint import (
    Progress,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from inversion_dpo.training.recipe import Session


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Metrics rows of a run, a torn last line left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Add a line to the run's metrics."""
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps(row) + "\n")


def resume(session: Session, folder: Path) -> Progress:
    """Load the newest intact checkpoint, drop later metric rows; or start from zero."""
    identity, reference = session.cache.folder.name, session.cache.reference
    checkpoint = latest_checkpoint(folder / "checkpoints")
    progress = Progress(0, 0.0, identity, reference)
    if checkpoint is not None:
        inner = getattr(session.optimizer, "optimizer", session.optimizer)
        parameters = session.policy.trainable()
        progress = load_checkpoint(checkpoint, parameters, inner, identity, reference)
    session.skipped, session.coefficients = progress.skipped, dict(progress.coefficients)
    scale = {k[7:]: v for k, v in session.coefficients.items() if k.startswith("scaler.")}
    if scale and session.accelerator.scaler is not None:
        session.accelerator.scaler.load_state_dict(scale)
    if session.team.main:
        rows = [r for r in read_rows(folder / "metrics.jsonl") if r["step"] < progress.step]
        atomic_text("".join(json.dumps(r) + "\n" for r in rows), folder / "metrics.jsonl")
    return progress


def scaler_state(scaler: Any) -> dict[str, float]:
    """What the loss scaler of fp16 has adapted to, under names of its own; without one nothing."""
    return {} if scaler is None else {f"scaler.{k}": v for k, v in scaler.state_dict().items()}


def save_policy(session: Session, target: Path) -> None:
    """The policy as users load it, whole or not at all; every process must call it."""
    parameters = session.policy.trainable()
    tensors = whole_tensors(parameters) if is_cut(parameters) else None
    if session.team.main:
        atomic_folder(target, lambda partial: session.policy.save(partial, tensors))


def peak_memory(device: torch.device) -> float:
    """MB: the most that torch held on the device, or the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e6 if sys.platform == "darwin" else used / 1e3


def score_of(looked: dict[str, float], preference: bool) -> float | None:
    """What the best checkpoint is chosen by: held-out accuracy, or the winners' error, negated."""
    score = looked["heldout_accuracy"] if preference else -looked["heldout_winner_error"]
    return score if math.isfinite(score) else None


def save_session(
    session: Session, folder: Path, step: int, seconds: float, looked: dict[str, float], keep: int
) -> None:
    """Checkpoint the policy, its optimizer and whatever adapts; every process must call it."""
    score = score_of(looked, session.recipe.objective.reference)
    progress = Progress(
        step,
        seconds,
        session.cache.folder.name,
        session.cache.reference,
        session.skipped,
        score,
        session.coefficients | scaler_state(session.accelerator.scaler),
    )
    inner = getattr(session.optimizer, "optimizer", session.optimizer)
    parameters = session.policy.trainable()
    save_checkpoint(folder / "checkpoints", parameters, inner, progress, keep, session.team)
