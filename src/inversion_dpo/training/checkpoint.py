"""Exact checkpoints in safetensors: trainable weights, optimizer moments, position, identity.

All randomness of a step is drawn from the seed, the step and the pair's place in the batch, so
there is no generator state to save, on any process: a run that was killed and resumed ends in the
same bits as one that was not. Tensors are stored whole, so that a run may go on with another number
of processes; sums over processes then round otherwise.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inversion_dpo.maths.losses import LOSSES
from inversion_dpo.run.disk import CHECKSUM, atomic_folder, checksum_of, sha256_of
from inversion_dpo.run.fields import Config
from inversion_dpo.run.folder import FREE, flat, steps_in
from inversion_dpo.run.processes import Team
from inversion_dpo.run.settings import written
from inversion_dpo.run.sharded import cut_like, whole_tensors
from inversion_dpo.trajectories.method import chosen_method

logger = logging.getLogger(__name__)
SHAPING = re.compile(r"(objective|policy|training)\.|data\.(holdout|label_noise|\w+_dropout)$")
STEPS = "training.steps"  # which may be raised, but shapes a rate that falls
PARTS = "training.gradient_accumulation"  # which may change, but shapes KTO's baseline


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or belongs to another reference; names the remedy."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    identity: of the cache, and so of reference, pairs and inversion; reference: hash of the
    reference's weights. skipped: steps left out. score: held-out, higher is better.
    coefficients: whatever adapts as it goes: the loss scaler of fp16, and beta where it is auto.
    settings: those that shape the steps, see :func:`shaping`.
    """

    step: int
    seconds: float
    identity: str
    reference: str = ""
    skipped: int = 0
    score: float | None = None
    coefficients: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def shaping(config: Config) -> dict[str, Any]:
    """Map settings that shape a run's steps, and that its cache does not depend on, to values."""
    free = {*FREE} - {STEPS, PARTS}
    return {k: v for k, v in flat(config).items() if SHAPING.match(k) and k not in free}


def refuse_other_settings(folder: Path, config: Config) -> None:
    """Refuse to go on with other settings than the newest checkpoint's.

    Other steps, and other parts of a batch, are warned of where they change the policy.

    That of a run's ``config.yaml`` is refused already, unless somebody has edited that file.

    Args:
        folder: that holds all checkpoints.
        config: the run's settings now.

    Raises:
        CheckpointError: names checkpoint and setting.
    """
    newest = next(reversed(_written(folder)), folder)
    now = json.loads(json.dumps(shaping(config)))
    before = (_read_state(newest) or {}).get("settings", {})
    falling = config.training.lr_scheduler != "constant"
    if falling and (steps := before.get(STEPS, now[STEPS])) != now[STEPS]:
        logger.warning(
            "%s is of a training to step %d, whose rate fell towards 0 there "
            "(training.lr_scheduler=%s). To step %d the rate is another from here on: the policy "
            "will not be that of one training of so many steps. For that one, choose another "
            "--output",
            newest,
            steps,
            config.training.lr_scheduler,
            now[STEPS],
        )
    parts = before.get(PARTS, now[PARTS])
    if parts != now[PARTS] and LOSSES[chosen_method(config).loss].baseline:
        logger.warning(
            "%s was trained with %s=%s. With %s the baseline of this loss is a mean over other "
            "images from here on, so that later steps differ by more than rounding",
            newest,
            PARTS,
            parts,
            now[PARTS],
        )
    for key, value in before.items():
        if key in now and key not in FREE and now[key] != value:
            raise CheckpointError(
                f"{newest} was trained with {key}={written(value)}, and it is {written(now[key])} "
                f"now: put it back, also in {folder.parent / 'config.yaml'}, or choose another "
                f"--output. To train anew with the inverted pairs, delete {folder}"
            )


def save_checkpoint(
    folder: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    keep: int,
    team: Team,
) -> Path:
    """Write ``folder/step-NNNNNN`` whole or not at all; keep the newest ``keep`` and the best.

    Every process must call it; the first one writes. DiskError if the disk refuses.

    Args:
        folder: that holds all checkpoints.
        parameters: the trainable ones, by name.
        optimizer: theirs, whose moments are saved.
        progress: step, score and whatever adapts.
        keep: how many of the newest stay.
        team: the processes; each calls this.
    """
    target = folder / step_name(progress.step)
    weights = whole_tensors(parameters)
    moments = whole_tensors(
        {
            f"{key}:{name}": torch.as_tensor(value)
            for name, parameter in parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
    )

    def fill(partial: Path) -> None:
        partial.mkdir()
        save_file(weights, partial / "policy.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        files = {p.name: sha256_of(p) for p in sorted(partial.glob("*.safetensors"))}
        state = asdict(progress) | {"files": files}
        state[CHECKSUM] = checksum_of(state)
        (partial / "state.json").write_text(json.dumps(state))

    if team.main:
        atomic_folder(target, fill)
        found = _written(folder)
        kept = {*found[-keep:], best_checkpoint(folder)}
        for old in [p for p in found if p not in kept] + sorted(folder.glob("*.partial")):
            shutil.rmtree(old)  # also what a kill left behind
    return target


def step_name(step: int) -> str:
    """Name the folder of what is kept of a step."""
    return f"step-{step:06d}"


def best_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint of the highest held-out score, the earliest of equal ones."""
    scores = _scores(folder)
    return max(scores, key=lambda p: scores[p], default=None)


def better_checkpoint(folder: Path, step: int) -> Path | None:
    """Find the best checkpoint if its held-out score is above that of a step."""
    scores, best = _scores(folder), best_checkpoint(folder)
    last = scores.get(folder / step_name(step), -math.inf)
    return best if best is not None and scores[best] > last else None


def _scores(folder: Path) -> dict[Path, float]:
    """Read the held-out scores of the checkpoints that have one, oldest first."""
    states = {p: _read_state(p) for p in _written(folder)}
    return {p: s["score"] for p, s in states.items() if s and s.get("score") is not None}


def _read_state(folder: Path) -> dict[str, Any] | None:
    """Read a checkpoint's state; None if it is missing or its own checksum differs."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        claimed = state.pop(CHECKSUM)
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return state if checksum_of(state) == claimed else None


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint whose checksums hold; damaged ones are named and passed over."""
    for candidate in reversed(_written(folder)):
        if is_intact(candidate):
            return candidate
        logger.warning("%s is damaged (checksum differs): the one before it is used", candidate)
    return None


def is_intact(checkpoint: Path) -> bool:
    """Say whether a checkpoint's files have their checksums."""
    state = _read_state(checkpoint)
    files = {} if state is None else {checkpoint / n: d for n, d in state["files"].items()}
    same = all(f.exists() and sha256_of(f) == digest for f, digest in files.items())
    return bool(files) and same


def _written(folder: Path) -> list[Path]:
    """List checkpoints, oldest first, without what a kill left half written."""
    return [*steps_in(folder).values()]


def load_checkpoint(
    folder: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    identity: str,
    reference: str = "",
) -> Progress:
    """Restore weights and moments in place, of a sharded parameter this process's part.

    Args:
        folder: of the checkpoint.
        parameters: by name, to be filled.
        optimizer: theirs, whose moments are filled.
        identity: of this run's cache.
        reference: hash of this run's reference; nothing: it is not compared.

    Raises:
        CheckpointError: it is damaged, or of another reference, other data or another policy.
    """
    state = _read_state(folder)
    if state is None:
        raise CheckpointError(f"{folder} is damaged: delete it, and the one before it is used")
    state.pop("files")
    try:
        progress = Progress(**state)
    except TypeError as error:
        raise CheckpointError(
            f"{folder} is of another version of inversion-dpo ({error}): go on with that version, "
            "or choose another --output"
        ) from error
    if reference and progress.reference != reference:
        raise CheckpointError(
            f"{folder} was trained against a reference whose weights hash to {progress.reference}, "
            f"this model's to {reference}: resume with the same model, or choose another --output"
        )
    if progress.identity != identity:
        raise CheckpointError(
            f"{folder} was trained against reference/pairs/inversion {progress.identity}, this run "
            f"has {identity}: resume with the same model and data, or choose another --output"
        )
    weights = load_file(folder / "policy.safetensors")
    if set(weights) != set(parameters):
        raise CheckpointError(
            f"{folder} holds other tensors than this policy: choose another --output, or the "
            "policy.* settings and objective.reference_every that it was trained with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(cut_like(weights[name], parameter))
    fused = bool(optimizer.param_groups[0].get("fused"))
    for full_name, value in load_file(folder / "optimizer.safetensors").items():
        key, name = full_name.split(":", 1)
        parameter = parameters[name]
        if value.shape == parameter.shape:
            value = cut_like(value, parameter)
        elif key != "step" or fused:  # plain AdamW counts its steps on the CPU
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value
    return progress
