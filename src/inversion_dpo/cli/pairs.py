"""``inversion-dpo pairs``: check, build and import preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inversion_dpo.cli.options import DEFAULT, DryRun, Preset, resolved, settings_of, written_to
from inversion_dpo.run.words import counted, harmless

pairs_app = typer.Typer(
    help="Check, import, sample, build and export preference pairs.", no_args_is_help=True
)


@pairs_app.command("check")
def pairs_check(
    data: Annotated[
        str, typer.Argument(help="A file, folder or hf:OWNER/NAME (docs/reference/formats.md).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="How to read it: data.KEY=VALUE, e.g. data.columns.caption=text"),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Pipeline folder: captions are measured in its tokens.")
    ] = None,
    resolution: Annotated[
        str, typer.Option(help="The training's model.resolution, e.g. 512 for sd15.")
    ] = "1024",
) -> None:
    """Count pairs, ties, duplicates and broken rows; exit code 1 if any row cannot be used.

    Also takes scene-graph annotations (LAION-SG's JSON), alone or in a folder with their images.

    Example: inversion-dpo pairs check my_pairs.csv data.columns.caption=text
    """
    from inversion_dpo.data.annotations import check_annotations, is_annotated
    from inversion_dpo.data.check import check_pairs, format_report, tokens_of

    if is_annotated(data):
        lines, sound = check_annotations(data)
        typer.echo(harmless("\n".join(lines)))
        raise typer.Exit(0 if sound else 1)
    config = resolved("pairs check", None, [*(overrides or []), f"data.pairs={data}"])
    size = resolved("sample", None, [f"model.resolution={resolution}"]).model.resolution
    found = check_pairs(config.data, tokens_of(tokenizer) if tokenizer else None, size)
    typer.echo(harmless(format_report(found)))
    if not found.ok:
        raise typer.Exit(1)


def pairs_build(
    output: Annotated[Path, written_to("Folder; resumed if begun.")],
    overrides: Annotated[
        list[str] | None,
        settings_of("model.*, evaluation.* and build.*", "build.samples=8"),
    ] = None,
    config: Preset = DEFAULT,
    prompts: Annotated[str | None, typer.Option(help="The same as build.prompts.")] = None,
    samples: Annotated[int | None, typer.Option(help="The same as build.samples.")] = None,
    seed: Annotated[int | None, typer.Option(help="Stands for build.seed.")] = None,
    scorer: Annotated[str | None, typer.Option(help="Stands for evaluation.scorer.")] = None,
    by: Annotated[str | None, typer.Option(help="Stands for build.by.")] = None,
    least: Annotated[float | None, typer.Option(help="Stands for build.least.")] = None,
    limit: Annotated[int | None, typer.Option(help="Stands for build.limit.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Sample prompts, let scorers judge, and make pairs of the better and the worse.

    The settings build.* say how, and evaluation.* how images are sampled. The options below stand
    for some of them. A prompt set or scene graphs give OUTPUT/pairs.parquet. A number of prompts
    takes captions of the embedded model, and gives taste.parquet and composition.parquet.
    With build.splits it writes a dataset with its card, in OUTPUT/dataset. build.models samples
    from runs, LoRAs and pipelines beside the model; model.lora or model.network from that alone.

    Example: inversion-dpo pairs build -c sd15 -o built --prompts my_prompts.txt --scorer pickscore
    """
    from inversion_dpo.making_pairs.build import build, check_build
    from inversion_dpo.run.config import to_yaml

    given = {
        "build.prompts": prompts,
        "build.samples": samples,
        "build.seed": seed,
        "evaluation.scorer": scorer,
        "build.by": f"[{by}]" if by else None,
        "build.least": least,
        "build.limit": limit,
    }
    options = [f"{key}={value}" for key, value in given.items() if value is not None]
    run = resolved("pairs build", config, [*(overrides or []), *options])
    if dry_run:
        check_build(run, output)
        typer.echo(to_yaml(run), nl=False)
        raise typer.Exit
    for name, count in build(run, output).items():
        typer.echo(f"{counted(count, 'pair')} in {output / name}.parquet")


@pairs_app.command("import")
def pairs_import(
    choices: Annotated[
        Path, typer.Argument(help=".csv, .json, .jsonl or .parquet, a choice a row.")
    ],
    output: Annotated[Path, written_to("Parquet file; replaced if this command wrote it.")],
    columns: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OURS=THEIRS]...",
            help="Column names, ours to yours, e.g. choice=vote image_0=path_a.",
        ),
    ] = None,
) -> None:
    """Turn choices from another tool into pairs for `train` (docs/how-to/own-pairs.md).

    `train` reads such a table as it is, each row as a pair. Import it where several people judged
    the same images: their choices are put together.

    Example: inversion-dpo pairs import votes.csv choice=vote -o labelled.parquet
    """
    from inversion_dpo.labels.choices import import_choices
    from inversion_dpo.run.fields import ConfigError
    from inversion_dpo.run.folder import sole_writer

    for pair in columns or []:
        if "=" not in pair:
            raise ConfigError(f"{pair!r}: write OURS=THEIRS, e.g. choice=vote")
    with sole_writer(output, "pairs import"):
        counts = import_choices(choices, output, dict(p.split("=", 1) for p in columns or []))
    typer.echo(
        f"{counted(counts['pairs'], 'pair')} of {counted(counts['rows'], 'choice')} in "
        f"{output}; without a majority: {counts['ties']}, neither image: {counts['neither']}"
    )
