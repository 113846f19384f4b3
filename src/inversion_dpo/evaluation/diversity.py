"""Measure how different the images of one prompt are, for reference and policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inversion_dpo.evaluation.metrics import gain_row, gain_text, outcome
from inversion_dpo.evaluation.samples import pictures
from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, device
from inversion_dpo.evaluation.scorers.registry import LPIPS
from inversion_dpo.run.config import Config, ConfigError
from inversion_dpo.run.processes import current_team

if TYPE_CHECKING:
    from inversion_dpo.evaluation.scorers.lpips import Lpips

DIVERSITY = "diversity"  # in metrics.json


def measure_of(config: Config) -> Lpips | None:
    """Return LPIPS if ``evaluation.scorer`` names it; ConfigError, ScorerError if it cannot be."""
    from inversion_dpo.evaluation.scorers.lpips import Lpips

    if LPIPS not in config.evaluation.scorers:
        return None
    if config.evaluation.seeds < 2:
        raise ConfigError(
            f"evaluation.scorer={LPIPS} compares the images of one prompt: set evaluation.seeds=4"
        )
    if not (place := config.evaluation.checkpoints.get(LPIPS)):
        raise ConfigError(
            f"evaluation.scorer={LPIPS} needs evaluation.checkpoints.{LPIPS}=FOLDER "
            "(docs/reference/scorers.md says how to make one)"
        )
    found = Lpips(Checkpoint.at(LPIPS, place), device())
    assert found.weights
    return found


def diversity(files: Sequence[Path], config: Config) -> dict[str, Any]:
    """Return {"diversity": gain row} of the mean LPIPS over pairs of a prompt's images.

    files: samples of reference and policy. Empty without ``lpips`` in ``evaluation.scorer``.
    """
    measure = measure_of(config)
    if measure is None or not current_team().main:
        return {}
    sides = []
    for file in files:
        images, found = map(np.asarray, pictures(file)), []
        while group := list(islice(images, config.evaluation.seeds)):
            found.append(measure.spread(group))
        sides.append(np.array(found))
    return {DIVERSITY: gain_row(LPIPS, *sides)}


def diversity_text(metrics: Mapping[str, Any]) -> tuple[str, str] | None:
    """Say (verdict, sentence) how the policy's diversity differs; None if not measured."""
    if not (row := metrics.get(DIVERSITY)):
        return None
    kind = outcome(row, metrics["n_prompts"])
    words = {"gain": "more", "loss": "less", "none": "no measurable change of"}[kind]
    text = f"Images of one prompt are {row['reference']:.3f} apart for the reference and "
    text += f"{row['policy']:.3f} for the policy, by LPIPS: {gain_text(row)}, {words} diversity."
    return kind, text
