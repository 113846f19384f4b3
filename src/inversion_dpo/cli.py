"""The ``inversion-dpo`` command: sub-commands and nothing else."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from inversion_dpo.config import PRESETS, Config, ConfigError, load_config, to_yaml

app = typer.Typer(
    help="Align a diffusion model to preference pairs by Inversion-DPO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
pairs_app = typer.Typer(help="Build and check preference pairs.", no_args_is_help=True)
app.add_typer(pairs_app, name="pairs")

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
        "--config", "-c",
        help="YAML file or preset: " + ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml"))),
    ),
]  # fmt: skip
Output = Annotated[Path, typer.Option("--output", "-o", help="The run's folder; resumed if begun.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and stop.")]
DEFAULT = "taste"


def resolved(preset: str, overrides: list[str] | None, dry_run: bool) -> Config:
    """Load the configuration; on a dry run print it and stop."""
    config = load_config(preset, overrides or [])
    if dry_run:
        typer.echo(to_yaml(config), nl=False)
        raise typer.Exit
    return config


@app.command()
def demo(
    output: Output,
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Training seed.")] = 0,
    pairs: Annotated[str, typer.Option(help="Labelling: taste or composition.")] = DEFAULT,
    dry_run: DryRun = False,
) -> None:
    """Align the embedded model on this machine's CPU: invert, train, evaluate, report."""
    if pairs not in ("taste", "composition"):
        raise ConfigError(f"--pairs {pairs!r}: the shipped labellings are taste and composition")
    config = resolved(pairs, [f"training.seed={seed}", *(overrides or [])], dry_run)
    run_all(config, output)


def run_all(config: Config, output: Path) -> None:
    """Every stage of a run, each skipped or resumed where it was left."""
    from inversion_dpo.evaluation.evaluate import evaluate, report
    from inversion_dpo.evaluation.report import headline

    train_run(config, output)
    metrics = evaluate(output, config)
    page = report(output)
    if "preference" in metrics:
        typer.echo(headline(metrics, config.evaluation.preference, "held-out prompts"))
    typer.echo(f"report:  {page}\nadapter: {output / 'adapter'}")


def train_run(config: Config, output: Path) -> None:
    """Claim the folder, invert and train as two timed stages."""
    from inversion_dpo.runs import claim, stage
    from inversion_dpo.training import train

    claim(output, config)
    with stage(output, "invert"):
        invert_run(config, output / "cache")
    with stage(output, "train"):
        train(config, output)


def invert_run(config: Config, cache: Path) -> Any:
    """Recover the trajectories of all pairs under the frozen reference."""
    from inversion_dpo.session import load_model, make_accelerator, prepare_cache

    accelerator = make_accelerator(config)
    model = load_model(config, accelerator.device)
    return model, prepare_cache(config, accelerator, model, cache), accelerator.device


@app.command()
def invert(
    output: Output, overrides: Overrides = None, config: Preset = DEFAULT, dry_run: DryRun = False
) -> None:
    """Recover every pair's noise trajectories and keep them in OUTPUT/cache.

    `train` does this itself; use it to prepare a cache ahead, to see what guidance costs, or,
    with inversion.reconstruct=true, which pairs the reference cannot reproduce.
    """
    from inversion_dpo.evaluation.reconstruction import write_reconstruction
    from inversion_dpo.runs import claim, stage
    from inversion_dpo.trajectories import noise_variance, round_trip_error

    run = resolved(config, overrides, dry_run)
    claim(output, run)
    with stage(output, "invert"):
        model, cache, device = invert_run(run, output / "cache")
    typer.echo(f"{cache.pairs} pairs in {cache.folder}")
    for scale in sorted({1.0, run.inversion.guidance_scale}):
        error = round_trip_error(model, cache, scale, device)
        typer.echo(
            f"relative error of inverting and sampling back, guidance {scale:g}: {error:.4f}"
        )
    typer.echo(
        f"variance of the recovered noise (1 is what sampling starts from): "
        f"{noise_variance(cache):.2f}"
    )
    if run.inversion.reconstruct:
        typer.echo(write_reconstruction(output, model, cache))


@app.command()
def train(
    output: Output, overrides: Overrides = None, config: Preset = DEFAULT, dry_run: DryRun = False
) -> None:
    """Train a policy on preference pairs; leaves OUTPUT/adapter.

    Run it again with the same settings to resume; raise training.steps to go on.
    """
    train_run(resolved(config, overrides, dry_run), output)
    typer.echo(f"policy: {output / 'adapter'}\nnext: inversion-dpo evaluate {output}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished training.")],
    overrides: Overrides = None,
) -> None:
    """Sample policy and reference from the same noise, score both; writes RUN/metrics.json."""
    from inversion_dpo.evaluation.evaluate import evaluate as evaluate_run
    from inversion_dpo.runs import claim

    config = load_config(str(_config_of(run)), overrides or [])
    claim(run, config)
    metrics = evaluate_run(run, config)
    for name, row in metrics.items():
        if isinstance(row, dict) and "gain" in row:
            typer.echo(
                f"{name:14s} reference {row['reference']:.4f}  policy {row['policy']:.4f}  gain "
                f"{row['gain']:+.4f} [{row['gain_low']:+.4f}, {row['gain_high']:+.4f}]"
            )
    if "win_rate" in metrics:
        typer.echo(f"win rate {metrics['win_rate']:.4f} on {metrics['n_prompts']} prompts")


def _config_of(run: Path) -> Path:
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is not a run: it has no config.yaml. Train one first")
    return run / "config.yaml"


@app.command()
def compare(
    output: Output,
    overrides: Overrides = None,
    config: Preset = DEFAULT,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; see docs/results.md.")
    ] = "x0,diffusion_dpo,sft",
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds of each method.")] = 5,
    vary: Annotated[
        str | None,
        typer.Option(metavar="KEY=V1,V2", help="An ablation: each method with every value."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="First find each method's rate and beta: equal trials.")
    ] = False,
    curve_prompts: Annotated[
        int, typer.Option(min=0, help="Prompts scored at six points of each run; 0: no curves.")
    ] = 200,
) -> None:
    """Train every method on the same pairs with several seeds; writes OUTPUT/report.html.

    The same model, pairs, steps, prompts and noise for all; scores, win rates between methods,
    score against compute, diversity, and the reference's best of n. Resumed if begun; methods,
    seeds and varied values can be added later. Settings found by tuning ship for taste and
    composition; for your own data, use --tune.
    """
    from inversion_dpo.compare.compare import Plan, parse_extra
    from inversion_dpo.compare.compare import compare as run_comparison
    from inversion_dpo.compare.methods import parse_methods

    plan = Plan(
        config, tuple(parse_methods(methods)), seeds, parse_extra(overrides), vary, tune,
        curve_prompts,
    )  # fmt: skip
    typer.echo(f"report: {run_comparison(output, plan)}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of an evaluated run.")],
) -> None:
    """Write RUN/report.html, one self-contained page, with PNG copies of its figures."""
    from inversion_dpo.evaluation.evaluate import report as write

    typer.echo(f"report: {write(run)}")


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(help="Prompts, one image each.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNG files.")],
    run: Annotated[
        Path | None, typer.Option(help="Use this run's policy; without it, the reference.")
    ] = None,
    config: Preset = DEFAULT,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next adds 1.")] = 0,
) -> None:
    """Generate images from a run's policy, or from the reference."""
    from PIL import Image

    from inversion_dpo.evaluation.evaluate import load_policy_pipeline
    from inversion_dpo.sampling import sample as draw

    settings = load_config(str(_config_of(run)) if run else config, [])
    pipeline = load_policy_pipeline(settings, run / "adapter" if run else None)
    e, seeds = settings.evaluation, [seed + k for k in range(len(prompts))]
    images = draw(
        pipeline, prompts, seeds, e.sample_steps, e.guidance_scale, e.batch_size,
        resolution=settings.model.resolution, prompt_chunks=settings.model.prompt_chunks,
    )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    for s, image in zip(seeds, images, strict=True):
        Image.fromarray(image).save(output / f"{s:06d}.png")
        typer.echo(str(output / f"{s:06d}.png"))


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
    config: Preset = DEFAULT,
    prompts: Annotated[int, typer.Option(min=1, help="Training prompts of the scenes.")] = 3000,
    samples: Annotated[int, typer.Option(min=2, help="Samples per prompt.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the prompts and the samples.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Most pairs per labelling.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Sample the reference on scene prompts, score, and pair the best against the worst.

    Writes OUTPUT/taste.parquet and OUTPUT/composition.parquet: two labellings of the same
    images. Sampling settings are the configuration's evaluation.*.
    """
    from inversion_dpo.evaluation.evaluate import load_policy_pipeline
    from inversion_dpo.scenes.build import build_pairs

    run = resolved(config, [], dry_run)
    pipeline, e = load_policy_pipeline(run, None), run.evaluation
    made = build_pairs(
        output, pipeline, prompts, samples, seed, e.sample_steps, e.guidance_scale, limit
    )
    for name, count in made.items():
        typer.echo(f"{count} pairs in {output / name}.parquet")


def quieten() -> None:
    """Our own messages at INFO; of the libraries below only errors, and no loading bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("inversion_dpo").setLevel(logging.INFO)
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; user errors become one line on standard error and exit code 2."""
    quieten()
    try:
        app(list(arguments) if arguments is not None else None)
    except (ValueError, RuntimeError, OSError) as error:
        if type(error).__module__.startswith("inversion_dpo"):
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        raise
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
