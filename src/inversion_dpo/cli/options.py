"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from inversion_dpo.run.config import Config, preset_names, to_yaml
from inversion_dpo.run.settings import every_setting


def complete_preset(incomplete: str) -> list[str]:
    """Names of presets that begin so, for the shell."""
    return [name for name in preset_names() if name.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[tuple[str, str]]:
    """Settings that begin so, each with its sentence, or the choices of one; for the shell."""
    key, equals, value = incomplete.partition("=")
    if not equals:
        return [(f"{k}=", s.text) for k, s in every_setting().items() if k.startswith(key)]
    choices = every_setting()[key].choices if key in every_setting() else ()
    return [(f"{key}={c}", "") for c in choices if c.startswith(value)]


def setting(key: str) -> Any:
    """An option that stands for one setting."""
    return typer.Option(help=f"{every_setting()[key].text} The setting {key}.")


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Change any setting, e.g. training.steps=200 objective.beta=1000. "
        "`inversion-dpo config` prints them all.",
        autocompletion=complete_setting,
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        "--config",
        "-c",
        help=f"YAML file or preset: {', '.join(preset_names())}.",
        autocompletion=complete_preset,
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
    from inversion_dpo.training.effects import load_checked

    config = load_checked(preset, overrides or [])
    if dry_run:
        typer.echo(to_yaml(config), nl=False)
        raise typer.Exit
    return config


def say(text: str) -> None:
    """Print a result; of several processes the first one does."""
    from inversion_dpo.run.processes import current_team

    if current_team().main:
        typer.echo(text)
