"""``inversion-dpo pairs``: check, build and import preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inversion_dpo.cli_options import DEFAULT, DryRun, Overrides, Preset, resolved
from inversion_dpo.config import ConfigError, load_config

pairs_app = typer.Typer(help="Check, build and import preference pairs.", no_args_is_help=True)


@pairs_app.command("check")
def pairs_check(
    data: Annotated[str, typer.Argument(help="File, folder or hf:OWNER/NAME; see docs/data.md.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="How to read it: data.KEY=VALUE, e.g. data.columns.caption=text"),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Pipeline folder: captions are measured in its tokens.")
    ] = None,
) -> None:
    """Count pairs, ties, duplicates and broken rows; exit code 1 if any row cannot be used."""
    from inversion_dpo.data.pairs import Reading, check_pairs, format_report, tokens_of

    d = load_config(None, overrides or []).data
    reading = Reading(d.format, d.split, d.revision, dict(d.columns), d.ranking)
    measure = tokens_of(tokenizer) if tokenizer else None
    found = check_pairs(data, reading, d.limit, measure)
    typer.echo(format_report(found))
    if not found.ok:
        raise typer.Exit(1)


@pairs_app.command("build")
def pairs_build(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; resumed if begun.")],
    overrides: Overrides = None,
    config: Preset = DEFAULT,
    prompts: Annotated[
        str, typer.Option(help="How many prompts of the scenes; or a prompt set, docs/evaluate.md.")
    ] = "3000",
    samples: Annotated[int, typer.Option(min=2, help="Samples per prompt.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the prompts and the samples.")] = 0,
    scorer: Annotated[
        str | None, typer.Option(help="Of a prompt set: who labels, comma-separated; they vote.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="The scores that vote, if the scorers give others too.")
    ] = None,
    least: Annotated[
        float, typer.Option(min=0.5, max=1.0, help="Least agreement on a pair's winner.")
    ] = 0.5,
    limit: Annotated[int | None, typer.Option(help="Most pairs per labelling.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Sample the reference, let scorers judge, and pair the best against the worst.

    With a number of prompts: the embedded world's, labelled by the exact checker; writes
    OUTPUT/taste.parquet and OUTPUT/composition.parquet. With a prompt set and --scorer: writes
    OUTPUT/pairs.parquet, with the scorers' agreement as preference_0. Sampling settings are the
    configuration's evaluation.*.
    """
    from inversion_dpo.evaluation.evaluate import load_policy_pipeline
    from inversion_dpo.evaluation.label import build_labelled
    from inversion_dpo.runs import occupied
    from inversion_dpo.scenes.build import build_pairs

    run = resolved(config, overrides, dry_run)
    e = run.evaluation
    voters = [name.strip() for name in by.split(",")] if by else []
    with occupied(output, run=False):
        if prompts.isdecimal():
            made = build_pairs(
                output, load_policy_pipeline(run, None), int(prompts), samples, seed,
                e.sample_steps, e.guidance_scale, limit,
            )  # fmt: skip
        else:
            made = build_labelled(run, output, prompts, samples, seed, scorer, voters, least, limit)
    for name, count in made.items():
        typer.echo(f"{count} pairs in {output / name}.parquet")


@pairs_app.command("import")
def pairs_import(
    choices: Annotated[Path, typer.Argument(help=".csv, .json or .jsonl, a choice a row.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.")],
    columns: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OURS=THEIRS]...", help="e.g. choice=vote image_0=path_a"),
    ] = None,
) -> None:
    """Turn people's choices from another tool into pairs that `train` reads; see docs/data.md."""
    from inversion_dpo.data.choices import import_choices

    for pair in columns or []:
        if "=" not in pair:
            raise ConfigError(f"{pair!r}: write OURS=THEIRS, e.g. choice=vote")
    counts = import_choices(choices, output, dict(p.split("=", 1) for p in columns or []))
    typer.echo(
        f"{counts['pairs']} pairs of {counts['rows']} choices in {output}; without a majority: "
        f"{counts['ties']}, neither image: {counts['neither']}"
    )
