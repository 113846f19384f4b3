"""The stages of a run, which several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from inversion_dpo.run.config import Config, ConfigError


def run_all(config: Config, output: Path, origin: Config | None = None) -> None:
    """Every stage of a run, each skipped or resumed where it was left.

    origin: of a later round, the settings with the model that its policy is measured against.
    """
    from inversion_dpo.evaluation.evaluate import evaluate
    from inversion_dpo.evaluation.report import report
    from inversion_dpo.evaluation.wording import headline
    from inversion_dpo.run.folder import occupied

    with occupied(output):
        train_run(config, output)
        models = (None, str(output)) if origin else None
        metrics = evaluate(output, origin or config, models)
        page = report(output)
    if "preference" in metrics:
        typer.echo(headline(metrics, config.evaluation.preference, "held-out prompts"))
    typer.echo(f"report:  {page}\nadapter: {output / 'adapter'}")


def train_run(config: Config, output: Path) -> None:
    """Claim the folder, invert and train as two timed stages."""
    from inversion_dpo.run.folder import claim_together, stage
    from inversion_dpo.training.step import train
    from inversion_dpo.training.trackers import tracker_of

    tracker_of(config.training.tracker)  # that it is missing is said before hours of inversion
    claim_together(output, config)
    with stage(output, "invert"):
        invert_run(config, output / "cache")
    with stage(output, "train"):
        train(config, output)


def invert_run(config: Config, cache: Path) -> Any:
    """Recover the trajectories of all pairs under the frozen reference."""
    from inversion_dpo.run.faults import memory_advice
    from inversion_dpo.training.recipe import load_model, make_accelerator, prepare_cache

    accelerator = make_accelerator(config)
    with memory_advice("inversion"):
        model = load_model(config, accelerator.device)
        return model, prepare_cache(config, accelerator, model, cache), accelerator.device


def config_of(run: Path) -> Path:
    """The configuration file of a run; ConfigError if the folder is not one."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is not a run: it has no config.yaml. Train one first")
    return run / "config.yaml"
