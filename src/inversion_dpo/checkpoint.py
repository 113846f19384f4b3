"""Exact checkpoints in safetensors: trainable weights, optimizer moments, position, identity.

All randomness of a step is drawn from (seed, step, process), so there is no generator state to
save: a run that was killed and resumed ends in the same bits as one that was not.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from inversion_dpo.cache import atomic_save, atomic_text, sha256_of


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or belongs to another reference; names the remedy."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands. ``identity`` names reference, pairs and inversion (the cache's key)."""

    step: int
    seconds: float
    identity: str


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as named tensors."""
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}:{name}"] = torch.as_tensor(value).detach()
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
) -> None:
    """Inverse of :func:`optimizer_tensors`."""
    for full_name, value in tensors.items():
        key, name = full_name.split(":", 1)
        parameter = parameters[name]
        if key != "step":
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value


def save_checkpoint(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    keep: int,
) -> Path:
    """Write ``folder/step-NNNNNN``, its ``state.json`` last; keep the newest ``keep``."""
    target = folder / f"step-{progress.step:06d}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    weights = {n: p.detach().cpu() for n, p in parameters.items()}
    moments = {n: t.cpu() for n, t in optimizer_tensors(optimizer, parameters).items()}
    atomic_save(weights, target / "policy.safetensors")
    atomic_save(moments, target / "optimizer.safetensors")
    files = {p.name: sha256_of(p) for p in sorted(target.glob("*.safetensors"))}
    atomic_text(json.dumps({**asdict(progress), "files": files}), target / "state.json")
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


def _intact(folder: Path) -> bool:
    state = folder / "state.json"
    if not state.exists():
        return False
    files = json.loads(state.read_text())["files"]
    return all((folder / n).exists() and sha256_of(folder / n) == d for n, d in files.items())


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose checksums hold; damaged ones are passed over."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        if _intact(candidate):
            return candidate
    return None


def load_checkpoint(
    folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: str,
) -> Progress:
    """Restore weights and moments in place; CheckpointError if the reference is another."""
    state = json.loads((folder / "state.json").read_text())
    state.pop("files")
    progress = Progress(**state)
    if progress.identity != identity:
        raise CheckpointError(
            f"{folder} was trained against reference/pairs/inversion {progress.identity}, this run "
            f"has {identity}: resume with the same model and data, or choose another --output"
        )
    weights = load_file(folder / "policy.safetensors")
    if set(weights) != set(parameters):
        raise CheckpointError(f"{folder} holds other tensors than this policy: choose another "
                              "--output, or the policy.* settings it was trained with")  # fmt: skip
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    restore_optimizer(optimizer, parameters, load_file(folder / "optimizer.safetensors"))
    return progress
