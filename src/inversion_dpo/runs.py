"""The folder of one run: who owns it, and how long its stages took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from inversion_dpo.cache import atomic_text
from inversion_dpo.config import Config, ConfigError, load_config, to_yaml

# What may differ when a run is continued: it changes how far or how it is looked at, not what
# the steps done so far would have been.
_FREE = (
    "training.steps", "training.checkpoint_every", "training.keep_checkpoints",
    "training.snapshot_every",
)  # fmt: skip


def flat(config: Config) -> dict[str, Any]:
    """Dotted key -> value."""
    tree: Any = OmegaConf.to_container(OmegaConf.structured(config))
    return {f"{group}.{key}": v for group, part in tree.items() for key, v in part.items()}


def claim(folder: Path, config: Config) -> None:
    """Make ``folder`` this run's; ConfigError if it holds another run or other files.

    A folder in which nothing was trained yet may change hands: its cache is kept by content.
    """
    owner = folder / "config.yaml"
    if folder.is_file():
        raise ConfigError(f"--output {folder} is a file: give a folder")
    if owner.exists():
        theirs, ours = flat(read_config(folder)), flat(config)
        changed = [
            k for k in ours
            if ours[k] != theirs[k] and k not in _FREE and not k.startswith("evaluation.")
        ]  # fmt: skip
        if changed and (folder / "checkpoints").exists():
            k = changed[0]
            raise ConfigError(
                f"{folder} holds another run: {k} is {theirs[k]!r} there and {ours[k]!r} here"
                f"{f' (and {len(changed) - 1} more keys differ)' if len(changed) > 1 else ''}. "
                "Choose another --output, or repeat that run's settings to resume it"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} is not empty and holds no run of ours (no config.yaml): choose another "
            "--output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    atomic_text(to_yaml(config), owner)


def read_config(folder: Path) -> Config:
    """The configuration of a run's folder; ConfigError if it is none."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not a run: it has no config.yaml. Train one with "
                          f"`inversion-dpo train --output {folder}`")  # fmt: skip
    return load_config(str(folder / "config.yaml"), [])


def read_seconds(folder: Path) -> dict[str, float]:
    """Stage -> wall-clock seconds, summed over interruptions."""
    path = folder / "seconds.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


@contextmanager
def stage(folder: Path, name: str) -> Iterator[None]:
    """Add the time spent inside to the run's ``seconds.json``."""
    start = time.time()
    yield
    seconds = read_seconds(folder)
    seconds[name] = round(seconds.get(name, 0.0) + time.time() - start, 2)
    atomic_text(json.dumps(seconds), folder / "seconds.json")
