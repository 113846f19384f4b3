"""Metrics sent to TensorBoard, Weights & Biases or trackio by accelerate, beside metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from inversion_dpo.run.config import ConfigError

PROJECT = "inversion-dpo"


def tracker_of(name: str) -> str | None:
    """The tracker to use: ``auto`` is TensorBoard if it is installed; None is none.

    Raises:
        ConfigError: it is not installed.
    """
    installed = {str(t) for t in get_available_trackers()}
    if name == "none" or (name == "auto" and "tensorboard" not in installed):
        return None
    wanted = "tensorboard" if name == "auto" else name
    if wanted not in installed:
        raise ConfigError(
            f"training.tracker={wanted} needs `pip install {wanted}`; or set it to auto or none"
        )
    return wanted


def begin(accelerator: Accelerator, name: str, folder: Path, step: int) -> None:
    """Start the tracker, if any, for a run that stands at ``step``; TensorBoard's files go into
    ``folder/tensorboard``, and what was logged of later steps is dropped.
    """  # noqa: D205
    tracker = tracker_of(name)
    if tracker is None:
        return
    accelerator.log_with = [tracker]
    accelerator.project_configuration.set_directories(str(folder))
    settings: dict[str, Any] = {"name": folder.name}
    if tracker == "tensorboard":
        settings = {"purge_step": step}
    project = tracker if tracker == "tensorboard" else PROJECT
    accelerator.init_trackers(project, init_kwargs={tracker: settings})
