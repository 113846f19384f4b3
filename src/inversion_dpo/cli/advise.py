"""``advise``: what a run's measurements say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def advise(
    run: Annotated[Path, typer.Argument(help="The folder of a run, which may still train.")],
) -> None:
    """Say in plain words how a training goes or went, and what to change.

    Reads RUN/metrics.jsonl, and RUN/metrics.json once the run is evaluated; loads no model.

    Example: inversion-dpo advise runs/mine
    """
    from inversion_dpo.training import advice

    typer.echo(advice.text(advice.advise(run)))
