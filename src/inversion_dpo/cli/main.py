"""The ``inversion-dpo`` command: sub-commands and nothing else."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from inversion_dpo.cli import evaluate, label, pairs
from inversion_dpo.cli.compare import compare, demo
from inversion_dpo.cli.options import (
    DEFAULT,
    DRAWS,
    DryRun,
    FirstSeed,
    Output,
    Overrides,
    Preset,
    checked,
    resolved,
    split_settings,
    written_to,
)
from inversion_dpo.cli.settings import config, print_version
from inversion_dpo.run.words import counted, harmless

PEER_LEFT = re.compile("Connection (closed|reset) by peer|Broken pipe")  # as gloo says it


class Commands(TyperGroup):
    """The sub-commands; Ctrl-C in one of them says how to go on."""

    def invoke(self, ctx: Any) -> Any:
        """Run the sub-command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            end_bars()
            text = "interrupted; run the same command again, finished parts are kept"
            print(text, file=sys.stderr)
            raise SystemExit(130) from None


class Heavy(TyperCommand):
    """A command that loads networks; importing their libraries takes seconds."""

    def invoke(self, ctx: Any) -> Any:
        """Quieten the libraries, then run the command."""
        from inversion_dpo.run.quiet import quieten_libraries

        quieten_libraries()
        return super().invoke(ctx)


app = typer.Typer(
    help="Align a diffusion model to preference pairs by Inversion-DPO.",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Align a diffusion model to preference pairs by Inversion-DPO."""


def invert(
    output: Output, overrides: Overrides = None, config: Preset = DEFAULT, dry_run: DryRun = False
) -> None:
    """Recover every pair's noise trajectories and keep them in OUTPUT/cache or inversion.cache.

    `train` does this itself; use it to prepare a cache ahead, to see what guidance costs, or,
    with inversion.reconstruct=true, which pairs the reference cannot reproduce.

    Example: inversion-dpo invert -c sd15 -o runs/mine data.pairs=my_pairs.parquet
    """
    from inversion_dpo.data.source import open_pairs
    from inversion_dpo.evaluation.reconstruction import write_reconstruction
    from inversion_dpo.run.faults import memory_advice
    from inversion_dpo.run.folder import claim, occupied, stage
    from inversion_dpo.run.processes import current_team
    from inversion_dpo.training.effects import method_text
    from inversion_dpo.training.notices import noise_text, round_trip_text
    from inversion_dpo.training.recipe import prepare
    from inversion_dpo.trajectories.fill import noise_variance
    from inversion_dpo.trajectories.method import takes_images
    from inversion_dpo.trajectories.sampling_back import round_trip_error

    run = checked(resolved("invert", config, overrides), output, dry_run)
    with occupied(output):
        claim(output, run)
        with stage(output, "invert"), memory_advice("inversion"):
            prepared = prepare(run, run.inversion.folder(output), reuse=True)
        if not current_team().main:
            return
        model, cache, i = prepared.model, prepared.cache, run.inversion
        typer.echo(f"{counted(cache.pairs, 'image' if cache.single else 'pair')} in {cache.folder}")
        if not cache.inverted:
            typer.echo(f"encoded, not inverted: {method_text(run)} looks at no trajectories")
        for scale in sorted({1.0, run.inversion.guidance_scale}) if cache.inverted else ():
            typer.echo(round_trip_text(round_trip_error(model, cache, scale), scale))
        if cache.inverted:
            typer.echo(noise_text(noise_variance(cache), i.t_start, i.guidance_scale))
        if prepared.back:
            given = open_pairs(run.data, alone=takes_images(run)).read()
            typer.echo(write_reconstruction(output, model, cache, prepared.back, given))


def train(
    output: Output, overrides: Overrides = None, config: Preset = DEFAULT, dry_run: DryRun = False
) -> None:
    """Train a policy on preference pairs; leaves OUTPUT/adapter.

    Run it again with the same settings to resume; raise training.steps to go on.

    Example: inversion-dpo train -c sd15 -o runs/mine data.pairs=my_pairs.parquet
    """
    from inversion_dpo.run.folder import claim, occupied
    from inversion_dpo.run.processes import current_team
    from inversion_dpo.training import recipe
    from inversion_dpo.training.run_files import summary

    run = checked(resolved("train", config, overrides), output, dry_run)
    with occupied(output):
        claim(output, run)
        recipe.train(run, output)
    if current_team().main:  # which alone is sure to find what it wrote last
        typer.echo(summary(output, run))


def sample(
    output: Annotated[Path, written_to("Folder for the PNG files.")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]... [KEY=VALUE]...",
            help=f"Prompts, one image each, and settings of {DRAWS}.",
        ),
    ] = None,
    scene_graph: Annotated[
        Path | None,
        typer.Option(
            help="LAION-SG's JSON, a graph for each image; without prompts, its captions."
        ),
    ] = None,
    source: Annotated[
        list[Path] | None,
        typer.Option(help="Image to edit, for an editing model: one for all prompts, or one each."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Use this run's policy; without it, the model of --config as it is."),
    ] = None,
    config: Preset = DEFAULT,
    seed: FirstSeed = 0,
) -> None:
    """Generate images from a run's policy, or from the reference.

    For a published LoRA set model.lora, for a UNet or transformer model.network: a file, folder or
    hub id. Each PNG holds prompt, seed and a hash of the settings as text. Typed again, the command
    makes what is missing; a file that was made otherwise stops it.

    Example: inversion-dpo sample "a red star" --run runs/mine -o png evaluation.guidance_scale=5
    """
    from inversion_dpo.evaluation.prompt_sets import prompts_to_sample, sources_to_sample
    from inversion_dpo.evaluation.readiness import check_sampling
    from inversion_dpo.evaluation.sample_files import draw, missing, sample_files
    from inversion_dpo.evaluation.sides import adapter_of, sampler_of
    from inversion_dpo.run.fields import ConfigError
    from inversion_dpo.run.folder import going_on, run_file

    texts, overrides = split_settings(prompts or [])
    asked = prompts_to_sample(texts, scene_graph)
    settings = resolved("sample", run_file(run) if run else config, overrides)
    sources = sources_to_sample(source or [], len(asked))
    check_sampling(settings, output, len(asked), "the number of prompts", sources or [None])
    if run and (text := going_on(run)):
        logging.getLogger(__name__).warning(text)
    adapter, seeds = adapter_of(run) if run else None, [seed + k for k in range(len(asked))]
    files = sample_files(settings, adapter, output, asked, seeds, sources)
    absent = missing(files)
    sampler = sampler_of(settings, adapter) if absent else None
    if sampler and scene_graph and not sampler.takes_graphs:
        raise ConfigError(
            "--scene-graph needs a model that takes scene graphs: --run of a training with "
            "policy.kind=scene_graph, or --config of a file that sets model.scene_graph"
        )
    if sampler:
        draw(sampler, files, asked, sources)
    typer.echo("\n".join(str(file.path) for file in files))


def advise(
    run: Annotated[Path, typer.Argument(help="The folder of a run, which may still train.")],
) -> None:
    """Say in plain words how a training goes or went, and what to change.

    Reads RUN/metrics.jsonl, and RUN/metrics.json once the run is evaluated; loads no model.

    Example: inversion-dpo advise runs/mine
    """
    from inversion_dpo.training import advice

    typer.echo(advice.text(advice.advise(run)))


for command in (
    demo,
    invert,
    train,
    sample,
    evaluate.evaluate,
    evaluate.fid,
    evaluate.report,
    compare,
):
    app.command(cls=Heavy)(command)
app.command()(evaluate.prompts)
app.command()(advise)
app.command()(config)
app.command()(label.web)  # it loads networks when somebody first asks for a picture
app.command("export")(evaluate.export_run)
app.add_typer(pairs.pairs_app, name="pairs")
for heavy in (pairs.pairs_build, label.pairs_sample):
    pairs.pairs_app.command(heavy.__name__.removeprefix("pairs_"), cls=Heavy)(heavy)
pairs.pairs_app.command("export")(label.pairs_export)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; user errors become one line on standard error and exit code 2.

    SIGTERM ends it with exit code 0, once everything that was finished is saved.
    """
    from inversion_dpo.run.faults import Terminated, raise_terminated

    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
    handler = logging.StreamHandler()
    handler.setFormatter(Harmless("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    main_process = os.environ.get("RANK", "0") == "0"  # of a launch: the others say errors only
    logging.getLogger("inversion_dpo").setLevel(logging.INFO if main_process else logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False  # it prints what it says by itself
    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        app(list(arguments) if arguments is not None else None)
    except Exception as error:
        end_bars()
        print(f"error: {harmless(in_one_line(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except Terminated as stop:
        end_bars()
        print(f"{stop}; run the same command again to resume", file=sys.stderr)
        raise SystemExit(0) from None


class Harmless(logging.Formatter):
    """Writes text of the data so that no terminal takes it for a command."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one message."""
        return harmless(super().format(record))


def end_bars() -> None:
    """Close progress bars, so that what is said next has a line of its own."""
    for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
        bar.close()


def in_one_line(error: Exception) -> str:
    """Say what went wrong; what is neither ours nor a file that the system refuses is raised."""
    from inversion_dpo.run.disk import refusal

    path = getattr(error, "filename", None)
    if type(error).__module__.startswith("inversion_dpo"):
        return str(error)
    if isinstance(error, OSError) and path and error.strerror:
        return f"{path}: {error.strerror}; what was written before is intact"
    if isinstance(error, RuntimeError) and PEER_LEFT.search(str(error)):
        return "another process of this launch has ended; its own message says why"
    if (reason := refusal(error)) is None:
        raise error
    return (
        f"cannot write the output: {reason}; what was there is intact. Make room or choose another "
        "--output, and run the same command again"
    )


if __name__ == "__main__":
    main()
