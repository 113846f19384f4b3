"""The stages of a run, which several commands share."""

from __future__ import annotations

from pathlib import Path

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
    """Claim the folder, invert and train."""
    from inversion_dpo.run.folder import claim_together
    from inversion_dpo.training.recipe import train

    claim_together(output, config)
    train(config, output)


def config_of(run: Path) -> Path:
    """The configuration file of a run; ConfigError if the folder is not one."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is not a run: it has no config.yaml. Train one first")
    return run / "config.yaml"
