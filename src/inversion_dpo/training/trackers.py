"""Send a run's metrics to TensorBoard, W&B or trackio, which accelerate calls."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from inversion_dpo.run.fields import ConfigError
from inversion_dpo.run.processes import current_team


def tracker_of(name: str) -> str | None:
    """Choose the tracker, None for none; ConfigError if it is not installed."""
    installed = {str(t) for t in get_available_trackers()}
    if name == "none" or (name == "auto" and "tensorboard" not in installed):
        return None
    wanted = "tensorboard" if name == "auto" else name
    if wanted not in installed:
        raise ConfigError(
            f"training.tracker={wanted} needs `pip install {wanted}`; or set it to none"
        )
    return wanted


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not installed, and W&B where it cannot log in."""
    if tracker_of(name) != "wandb" or not current_team().main:
        return
    import wandb

    try:
        wandb.login()
    except Exception as error:
        raise _failed("wandb", error) from error


def begin_tracker(accelerator: Accelerator, name: str, folder: Path, step: int) -> None:
    """Start the tracker, if any, for a run that stands at ``step``.

    TensorBoard's files go into ``folder/tensorboard``; what was logged of later steps is dropped.

    Args:
        accelerator: that logs.
        name: ``training.tracker``.
        folder: of the run.
        step: at which the run goes on.

    Raises:
        ConfigError: the tracker is not installed, or does not start.
    """
    tracker = tracker_of(name)
    if tracker is None:
        return
    accelerator.log_with = [tracker]
    accelerator.project_configuration.set_directories(str(folder))
    settings: dict[str, Any] = {"name": Path(os.path.abspath(folder)).name}
    if tracker == "tensorboard":
        settings = {"purge_step": step}
        found = find_spec("tensorboard") if tracker not in sys.modules else None
        if found is not None and found.origin is None:
            # a folder of logs where `python -m` was typed: torch would take it for the package
            sys.modules["tensorboard"] = None  # type: ignore[assignment]
    project = tracker if tracker == "tensorboard" else "inversion-dpo"
    try:
        accelerator.init_trackers(project, init_kwargs={tracker: settings})
    except Exception as error:
        raise _failed(tracker, error) from error


def _failed(tracker: str, error: Exception) -> ConfigError:
    said = (str(error) or type(error).__name__).splitlines()[0]
    other = "log in by `wandb login`, or set WANDB_MODE=offline, or " if tracker == "wandb" else ""
    return ConfigError(
        f"training.tracker={tracker} does not start ({said}): {other}set training.tracker=none"
    )
