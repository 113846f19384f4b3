"""``inversion-dpo config`` and ``--version``."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from inversion_dpo.cli.options import DEFAULT, Overrides, complete_preset, resolved


def print_version(wanted: bool) -> None:
    """Print the version and stop, if it is wanted."""
    if wanted:
        typer.echo(version("inversion-dpo"))
        raise typer.Exit


def config(
    preset: Annotated[
        str,
        typer.Argument(
            metavar="[PRESET]", help="Preset or YAML file.", autocompletion=complete_preset
        ),
    ] = DEFAULT,
    overrides: Overrides = None,
) -> None:
    """Print a preset as commented YAML to start from: every setting, what it is, its range.

    Settings that have no effect with the preset's method are commented out. Write it to a file
    with `> mine.yaml`, change it, and give it as `--config mine.yaml`.

    Example: inversion-dpo config sdxl
    """
    from inversion_dpo.run.settings import commented
    from inversion_dpo.training.effects import without_effect

    if "=" in preset:
        preset, overrides = DEFAULT, [preset, *(overrides or [])]
    settings = resolved("config", preset, overrides)
    typer.echo(commented(settings, without_effect(settings)), nl=False)
