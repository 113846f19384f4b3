"""The ``inversion-dpo`` command: sub-commands and nothing else."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from inversion_dpo.cli.label import register
from inversion_dpo.cli.options import (
    DEFAULT,
    DryRun,
    Output,
    Overrides,
    People,
    Preset,
    Rounding,
    resolved,
    say,
)
from inversion_dpo.cli.pairs import load_pipeline, pairs_app
from inversion_dpo.run.config import Config, ConfigError, load_config

app = typer.Typer(
    help="Align a diffusion model to preference pairs by Inversion-DPO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(pairs_app, name="pairs")


@app.command()
def demo(
    output: Output,
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Training seed.")] = 0,
    pairs: Annotated[str, typer.Option(help="Labelling: taste or composition.")] = DEFAULT,
    rounds: Rounding = 1,
    people: People = 0,
    dry_run: DryRun = False,
) -> None:
    """Align the embedded model on this machine's CPU: invert, train, evaluate, report.

    Later rounds lie in OUTPUT/round-2 and so on, each with a report against the first model.
    """
    from inversion_dpo.compare.rounds import Rounds, check_rounds, later_rounds

    if pairs not in ("taste", "composition"):
        raise ConfigError(f"--pairs {pairs!r}: the shipped labellings are taste and composition")
    config = resolved(pairs, [f"training.seed={seed}", *(overrides or [])], dry_run)
    asked = Rounds(rounds, people=people)
    check_rounds(asked, config)
    run_all(config, output)
    for settings, folder in later_rounds(config, output, asked):
        run_all(settings, folder, config)


def run_all(config: Config, output: Path, origin: Config | None = None) -> None:
    """Every stage of a run, each skipped or resumed where it was left.

    origin: of a later round, the settings with the model that its policy is measured against.
    """
    from inversion_dpo.evaluation.evaluate import evaluate, report
    from inversion_dpo.evaluation.report import headline
    from inversion_dpo.run.folder import occupied

    with occupied(output):
        train_run(config, output)
        models = (None, str(output)) if origin else None
        metrics = evaluate(output, origin or config, models=models)
        page = report(output)
    if "preference" in metrics:
        typer.echo(headline(metrics, config.evaluation.preference, "held-out prompts"))
    typer.echo(f"report:  {page}\nadapter: {output / 'adapter'}")


def train_run(config: Config, output: Path) -> None:
    """Claim the folder, invert and train as two timed stages."""
    from inversion_dpo.run.folder import claim_together, stage
    from inversion_dpo.training.step import train
    from inversion_dpo.training.trackers import tracker_of

    tracker_of(config.training.tracker)  # that it is missing is said before hours of inversion
    claim_together(output, config)
    with stage(output, "invert"):
        invert_run(config, output / "cache")
    with stage(output, "train"):
        train(config, output)


def invert_run(config: Config, cache: Path) -> Any:
    """Recover the trajectories of all pairs under the frozen reference."""
    from inversion_dpo.run.faults import memory_advice
    from inversion_dpo.training.recipe import load_model, make_accelerator, prepare_cache

    accelerator = make_accelerator(config)
    with memory_advice("inversion"):
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
    from inversion_dpo.run.folder import claim_together, occupied, stage
    from inversion_dpo.run.processes import current_team
    from inversion_dpo.trajectories.fill import noise_variance, round_trip_error

    run = resolved(config, overrides, dry_run)
    with occupied(output):
        claim_together(output, run)
        with stage(output, "invert"):
            model, cache, device = invert_run(run, output / "cache")
        if not current_team().main:
            return
        typer.echo(f"{cache.pairs} pairs in {cache.folder}")
        if not cache.inverted:
            name = run.objective.name
            typer.echo(f"encoded, not inverted: objective.name={name} looks at no trajectories")
            return
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
    from inversion_dpo.run.folder import occupied

    run = resolved(config, overrides, dry_run)
    with occupied(output):
        train_run(run, output)
    say(f"policy: {output / 'adapter'}\nnext: inversion-dpo evaluate {output}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A finished run, or a folder for two --models.")],
    overrides: Overrides = None,
    policy: Annotated[
        str | None,
        typer.Option(help="Instead of RUN's policy: a run, LoRA, pipeline folder or hub id."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Instead of the configuration's model: the same kinds.")
    ] = None,
    config: Preset = DEFAULT,
) -> None:
    """Sample two models from the same noise, score both, say which is better and how surely.

    Writes RUN/metrics.json and RUN/per_prompt.parquet; --config counts where RUN holds no run yet.
    """
    from inversion_dpo.evaluation.evaluate import evaluate as evaluate_models
    from inversion_dpo.evaluation.report import lines
    from inversion_dpo.run.folder import claim_together, occupied

    begun = (run / "config.yaml").is_file()
    if not begun and policy is None:
        _config_of(run)
    settings = load_config(str(_config_of(run)) if begun else config, overrides or [])
    models = (reference, policy or str(run)) if policy or reference else None
    with occupied(run):
        claim_together(run, settings)
        metrics = evaluate_models(run, settings, models=models)
    say("\n".join(lines(metrics)))


def _config_of(run: Path) -> Path:
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is not a run: it has no config.yaml. Train one first")
    return run / "config.yaml"


@app.command()
def fid(
    run: Annotated[Path, typer.Argument(help="The folder of an evaluated run.")],
    real: Annotated[Path, typer.Option(help="Folder of real images.")],
    overrides: Overrides = None,
    features: Annotated[
        str, typer.Option(help="clip, or inception: the classical FID, which needs torchvision.")
    ] = "clip",
) -> None:
    """FID and KID of reference and policy against real images; writes RUN/distribution.json."""
    from inversion_dpo.evaluation.distribution import measure

    found = measure(run, load_config(str(_config_of(run)), overrides or []), real, features)
    for word in ("reference", "policy"):
        f = found[word]
        typer.echo(
            f"{word:9s} FID {f['fid']:.4f}  KID {f['kid']:.5f} (over subsets: {f['kid_std']:.5f})  "
            f"{f['images']} images against {found['real']}, features {features}"
        )


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
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2", help="An ablation: each method with every value. Repeatable."
        ),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="First find each method's rate and beta: equal trials.")
    ] = False,
    curve_prompts: Annotated[
        int, typer.Option(min=0, help="Prompts scored at six points of each run; 0: no curves.")
    ] = 200,
    rounds: Rounding = 1,
    round_prompts: Annotated[
        str, typer.Option(help="Of later rounds: how many of the scenes, or a prompt set.")
    ] = "1000",
    round_samples: Annotated[
        int, typer.Option(min=2, help="Samples per prompt, paired from both ends of their ranking.")
    ] = 4,
    people: People = 0,
) -> None:
    """Train every method on the same pairs with several seeds; writes OUTPUT/report.html.

    The same model, pairs, steps, prompts and noise for all; scores, win rates between methods,
    score against compute, diversity, and the reference's best of n. Resumed if begun; methods,
    seeds, varied values and rounds can be added later. Settings found by tuning ship for taste and
    composition; for your own data, use --tune.
    """
    from inversion_dpo.compare.experiment import Plan, parse_extra
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
    typer.echo(f"report: {run_comparison(output, plan)}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of an evaluated run.")],
) -> None:
    """Write RUN/report.html, one self-contained page, with PNG copies of its figures."""
    from inversion_dpo.evaluation.evaluate import report as write

    typer.echo(f"report: {write(run)}")


@app.command("export")
def export_run(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    form: Annotated[
        str, typer.Option("--format", help="diffusers, or kohya: also for ComfyUI and A1111.")
    ] = "diffusers",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it; private unless --public.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push-to-hub: list what would be uploaded.")
    ] = False,
) -> None:
    """Write RUN/export to give away: the policy, a model card, and other formats."""
    from inversion_dpo.evaluation.publish import export, push

    folder = export(run, form)
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        typer.echo(f"{file}  {file.stat().st_size:,} bytes")
    if push_to_hub and dry_run:
        typer.echo(f"nothing was uploaded; without --dry-run these go to {push_to_hub}")
    elif push_to_hub:
        typer.echo(push(folder, push_to_hub, private=not public))


@app.command()
def sample(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNG files.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, one image each.")] = None,
    scene_graph: Annotated[
        Path | None,
        typer.Option(help="LAION-SG's JSON, a graph for each image; prompts: its captions."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Use this run's policy; without it, the reference.")
    ] = None,
    config: Preset = DEFAULT,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next adds 1.")] = 0,
) -> None:
    """Generate images from a run's policy, or from the reference."""
    from PIL import Image

    from inversion_dpo.evaluation.evaluate import load_policy_pipeline
    from inversion_dpo.evaluation.prompt_sets import asked_for
    from inversion_dpo.models.sampler import sample as draw

    asked, graphs = asked_for(prompts or [], scene_graph)
    settings = load_config(str(_config_of(run)) if run else config, [])
    pipeline = load_policy_pipeline(settings, run / "adapter" if run else None)
    if graphs and getattr(pipeline, "scene_graph", None) is None:
        raise ConfigError(
            "--scene-graph needs a model that takes scene graphs: --run of a training with "
            "policy.kind=scene_graph, or --config of a file that sets model.scene_graph"
        )
    e, seeds = settings.evaluation, [seed + k for k in range(len(asked))]
    images = draw(
        pipeline,
        asked,
        seeds,
        e.sample_steps,
        e.guidance_scale,
        e.batch_size,
        resolution=settings.model.resolution,
        prompt_chunks=settings.model.prompt_chunks,
        graphs=graphs,
    )
    output.mkdir(parents=True, exist_ok=True)
    for s, image in zip(seeds, images, strict=True):
        Image.fromarray(image).save(output / f"{s:06d}.png")
        typer.echo(str(output / f"{s:06d}.png"))


register(app, pairs_app, load_pipeline)


def quieten() -> None:
    """Our own messages at INFO; of the libraries below only errors, and no loading bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    main_process = os.environ.get("RANK", "0") == "0"  # of a launch: the others say errors only
    logging.getLogger("inversion_dpo").setLevel(logging.INFO if main_process else logging.ERROR)
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; user errors become one line on standard error and exit code 2.

    SIGTERM ends it with exit code 0, once everything that was finished is saved.
    """
    from inversion_dpo.run.disk import refusal
    from inversion_dpo.run.faults import Terminated, raise_terminated

    quieten()
    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        app(list(arguments) if arguments is not None else None)
    except (ValueError, RuntimeError, OSError) as error:
        reason, ours = refusal(error), type(error).__module__.startswith("inversion_dpo")
        if not ours and reason is None:
            raise
        path = getattr(error, "filename", None) or "the output"
        text = str(error) if ours else f"cannot write {path}: {reason}; what was there is intact"
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2) from None
    except Terminated as stop:
        print(f"{stop}; run the same command again to resume", file=sys.stderr)
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
