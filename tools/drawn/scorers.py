"""The judges and the labellers as scorers: ``evaluation.scorer=tools.drawn.scorers:judge``.

Each function takes images and prompts. It returns ``twemoji`` (probability of that hand; the rest
is Noto's), ``recognised`` (1 if the name is among the first five) and ``legible`` (the name's
probability).
``DRAWN_MODEL`` names another folder than the one that ships.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.drawn.judges import Judges

Scores = dict[str, NDArray[np.float64]]


def folder() -> Path:
    """Return the folder that holds ``pipeline``, ``judges``, ``labellers`` and the prompts."""
    return Path(os.environ.get("DRAWN_MODEL", Path(__file__).parent / "model"))


def use(model: Path) -> None:
    """Take judges and labellers from this folder, in processes that this one starts as well."""
    os.environ["DRAWN_MODEL"] = str(model)


def judge(images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> Scores:
    """Score images by the judges, which label nothing."""
    return loaded(folder() / "judges").scores(images, prompts)


def labeller(images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> Scores:
    """Score images by the labellers, which evaluate nothing."""
    return loaded(folder() / "labellers").scores(images, prompts)


@cache
def loaded(place: Path) -> Judges:
    """Load judges once."""
    if not place.is_dir():
        raise FileNotFoundError(
            f"{place}: no judges; run python -m tools.drawn.pretrain and set DRAWN_MODEL to its "
            "model/"
        )
    return Judges(place)
