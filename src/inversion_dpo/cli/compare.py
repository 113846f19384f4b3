"""``demo`` and ``compare``: commands that train, evaluate and report in one go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inversion_dpo.cli.options import (
    DEFAULT,
    DryRun,
    Output,
    Overrides,
    People,
    Preset,
    Rounding,
    checked,
    resolved,
)

if TYPE_CHECKING:
    from inversion_dpo.run.fields import Config


Vary = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=V1,V2", help="An ablation: each method with every value. Repeatable."
    ),
]
DEMOS = {"composition": "demo", "taste": "taste"}  # labelling -> preset


def demo(
    output: Output,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option(help="Stands for training.seed.")] = None,
    pairs: Annotated[
        str, typer.Option(help="What the pairs prefer: composition or taste.")
    ] = "composition",
    rounds: Rounding = 1,
    people: People = 0,
    dry_run: DryRun = False,
) -> None:
    """Align the embedded model on this machine's CPU: invert, train, evaluate, report.

    Later rounds lie in OUTPUT/round-2 and so on, each with a report against the first model.

    Example: inversion-dpo demo -o runs/demo
    """
    from inversion_dpo.compare.rounds import Rounds, check_rounds, later_rounds
    from inversion_dpo.run.fields import ConfigError

    if pairs not in DEMOS:
        raise ConfigError(f"--pairs {pairs!r}: the shipped labellings are {' and '.join(DEMOS)}")
    given = [*(overrides or []), *([f"training.seed={seed}"] if seed is not None else [])]
    config, asked = resolved("demo", DEMOS[pairs], given), Rounds(rounds, people=people)
    check_rounds(asked, config)
    checked(config, output, dry_run)
    run_all(config, output)
    for settings, folder in later_rounds(config, output, asked):
        run_all(settings, folder, config)


def run_all(config: Config, output: Path, origin: Config | None = None) -> None:
    """Train, evaluate and report a run, each stage skipped or resumed where it was left.

    Args:
        config: the run's settings.
        output: the run's folder.
        origin: in a later round, the settings of the model that its policy is measured against.
    """
    from inversion_dpo.evaluation.evaluate import check, evaluate
    from inversion_dpo.evaluation.repairs import repairs_text
    from inversion_dpo.evaluation.report import report
    from inversion_dpo.evaluation.wording import headline
    from inversion_dpo.run.folder import claim, occupied
    from inversion_dpo.training.recipe import train

    with occupied(output):
        claim(output, config)
        check(origin or config, output)
        train(config, output)
        models = (None, str(output)) if origin else None
        metrics = evaluate(output, origin or config, models)
        page = report(output)
    if "preference" in metrics:
        typer.echo(headline(metrics, config.evaluation.preference, "held-out prompts"))
        typer.echo(repairs_text(metrics))
    typer.echo(f"report:  {page}\nadapter: {output / 'adapter'}")


def compare(
    output: Output,
    overrides: Overrides = None,
    config: Preset = DEFAULT,
    methods: Annotated[
        str, typer.Option(help="Methods with commas between them (docs/how-to/compare.md).")
    ] = "x0,diffusion_dpo,sft",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Training seeds of each method.")] = 5,
    vary: Vary = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="First find each method's rate and beta: equal trials.")
    ] = False,
    curve_prompts: Annotated[
        int, typer.Option(min=0, help="Prompts scored at six points of each run; 0: no curves.")
    ] = 200,
    rounds: Rounding = 1,
    round_prompts: Annotated[
        str,
        typer.Option(
            help="Prompts of later rounds: a number of the embedded model's, or a prompt set."
        ),
    ] = "1000",
    round_samples: Annotated[
        int,
        typer.Option(
            min=2, help="Samples of each prompt in later rounds: the best is paired with the worst."
        ),
    ] = 4,
    people: People = 0,
    dry_run: DryRun = False,
) -> None:
    """Train every method on the same pairs with several seeds; writes OUTPUT/report.html.

    The same model, pairs, steps, prompts and noise for all; scores, win rates between methods,
    score against compute, diversity, and the reference's best of n. Resumed if begun; methods,
    seeds, varied values and rounds can be added later. Settings found by tuning ship for taste and
    composition; for your own data, use --tune.

    Example: inversion-dpo compare -c mine.yaml --methods x0,diffusion_dpo,sft --seeds 3 -o runs/cmp
    """
    from inversion_dpo.compare.beforehand import Plan, check_plan, foretold, parse_extra
    from inversion_dpo.compare.experiment import compare as run_comparison
    from inversion_dpo.compare.methods import parse_methods
    from inversion_dpo.compare.rounds import Rounds

    plan = Plan(
        config,
        tuple(parse_methods(methods)),
        seeds,
        parse_extra(overrides),
        tuple(vary or ()),
        tune,
        curve_prompts,
        Rounds(rounds, round_prompts, round_samples, people),
    )
    if dry_run:
        typer.echo(foretold(output, plan, check_plan(output, plan)))
        return
    typer.echo(f"report: {run_comparison(output, plan)}")
