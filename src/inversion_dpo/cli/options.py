"""Options and arguments that several commands share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from inversion_dpo.run.fields import Config


def complete_preset(incomplete: str) -> list[str]:
    """List the presets that begin so, for the shell."""
    from inversion_dpo.run.config import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[tuple[str, str]]:
    """List the settings that begin so, or the choices of one, for the shell."""
    from inversion_dpo.run.settings import every_setting

    key, equals, value = incomplete.partition("=")
    if not equals:
        return [(f"{k}=", s.text) for k, s in every_setting().items() if k.startswith(key)]
    choices = every_setting()[key].choices if key in every_setting() else ()
    return [(f"{key}={c}", "") for c in choices if c.startswith(value)]


def new_output(output: Path) -> Path:
    """Refuse a setting where the name of what will be written belongs; typer asks.

    A shell leaves ``~`` as it is in ``--output=~/NAME``.
    """
    from inversion_dpo.run.config import ConfigError
    from inversion_dpo.run.settings import every_setting

    key, equals, _ = str(output).partition("=")
    if equals and key in every_setting() and not output.exists():
        raise ConfigError(f"--output {output} is a setting: write --output NAME {output}")
    return Path(expanduser(output))


def written_to(text: str) -> Any:
    """Make the option ``--output``, with its sentence of help."""
    return typer.Option("--output", "-o", help=text, callback=new_output)


DRAWS = "model.*, and evaluation.sample_steps, guidance_scale and batch_size"


def settings_of(groups: str, example: str) -> Any:
    """Make the argument of settings, with its sentence of help."""
    return typer.Argument(
        metavar="[KEY=VALUE]...",
        help=f"Settings of {groups}, e.g. {example}. `inversion-dpo config` prints them all.",
        autocompletion=complete_setting,
    )


Overrides = Annotated[
    list[str] | None, settings_of("the run", "training.steps=200 objective.beta=1000")
]
Preset = Annotated[
    str,
    typer.Option(
        "--config",
        "-c",
        help="YAML file or preset, e.g. taste, sd15, sdxl, flux, z-image.",
        autocompletion=complete_preset,
    ),
]
Output = Annotated[Path, written_to("The run's folder; resumed if begun.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check data and model, print what would be done, stop.")
]
FirstSeed = Annotated[
    int,
    typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the first image; the next adds 1."),
]
Rounding = Annotated[
    int,
    typer.Option(
        "--rounds",
        min=1,
        max=100,
        help="Rounds. From the second on, it samples the policy, labels and trains again.",
    ),
]
People = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="PROMPTS",
        help="Prompts that people label between rounds, two samples each; 0: a scorer labels.",
    ),
]
DEFAULT = "taste"


def resolved(command: str, preset: str | None, overrides: Sequence[str] | None) -> Config:
    """Load the configuration of a command, which refuses settings that it does not read."""
    from inversion_dpo.training.effects import load_checked

    return load_checked(preset, overrides or [], command)


def say(text: str) -> None:
    """Print a result; of several processes the first one does."""
    from inversion_dpo.run.processes import current_team

    if current_team().main:
        typer.echo(text)


def split_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell texts from KEY=VALUE, where the key is one word without a space."""
    settings = [word for word in words if re.match(r"[\w.-]+=", word)]
    return [word for word in words if word not in settings], settings


def checked(config: Config, output: Path, dry_run: bool) -> Config:
    """Check what a run needs before any work; on a dry run print its settings and stop."""
    from inversion_dpo.api import check_run
    from inversion_dpo.models.loading import check_model
    from inversion_dpo.run.config import to_yaml
    from inversion_dpo.training.cost import estimate

    check_run(config, output)
    if dry_run:
        typer.echo(to_yaml(config), nl=False)
        for line in estimate(config, check_model(config.model)):
            typer.echo(f"# {line}")
        raise typer.Exit
    return config
