"""Align diffusion models to human preference on inverted trajectories."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inversion_dpo.api import align, evaluate, report, sample

if os.name == "nt":
    raise ImportError("inversion-dpo runs on Linux and macOS. On Windows run it inside WSL 2")

__all__ = ["align", "evaluate", "report", "sample"]


def __getattr__(name: str) -> Any:
    """Load the public functions when they are first used: importing the package costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'inversion_dpo' has no attribute {name!r}")
    from inversion_dpo import api

    return getattr(api, name)
