"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inversion_dpo.run.config import PRESETS, Config, load_config, to_yaml

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Change any setting, e.g. training.steps=200 objective.beta=1000. "
        "--dry-run prints them all.",
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        "--config",
        "-c",
        help="YAML file or preset: " + ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml"))),
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The run's folder; resumed if begun.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and stop.")]
Rounding = Annotated[
    int,
    typer.Option("--rounds", min=1, help="Later ones: sample the policy, label, train on from it."),
]
People = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="PROMPTS",
        help="Later rounds wait for people, who label two samples of each of so many prompts.",
    ),
]
DEFAULT = "taste"


def resolved(preset: str, overrides: list[str] | None, dry_run: bool) -> Config:
    """Load the configuration; on a dry run print it and stop."""
    config = load_config(preset, overrides or [])
    if dry_run:
        typer.echo(to_yaml(config), nl=False)
        raise typer.Exit
    return config


def say(text: str) -> None:
    """Print a result; of several processes the first one does."""
    from inversion_dpo.run.processes import current_team

    if current_team().main:
        typer.echo(text)
