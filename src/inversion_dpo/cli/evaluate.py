"""``evaluate``, ``report``, ``fid`` and ``export``: commands about a run that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inversion_dpo.cli.options import DEFAULT, Overrides, Preset, say


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
    from inversion_dpo.evaluation.wording import lines
    from inversion_dpo.run.folder import claim, occupied, read_config
    from inversion_dpo.training.effects import load_checked

    if policy is None:
        read_config(run)
    own = run / "config.yaml"
    settings = load_checked(str(own) if own.is_file() else config, overrides or [])
    models = (reference, policy or str(run)) if policy or reference else None
    with occupied(run):
        claim(run, settings)
        metrics = evaluate_models(run, settings, models=models)
    say("\n".join(lines(metrics)))


def report(
    run: Annotated[Path, typer.Argument(help="The folder of an evaluated run.")],
) -> None:
    """Write RUN/report.html, one self-contained page, with PNG copies of its figures."""
    from inversion_dpo.evaluation.report import report as write

    typer.echo(f"report: {write(run)}")


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
    from inversion_dpo.run.folder import read_config

    found = measure(run, read_config(run, overrides or []), real, features)
    for word in ("reference", "policy"):
        f = found[word]
        typer.echo(
            f"{word:9s} FID {f['fid']:.4f}  KID {f['kid']:.5f} (over subsets: {f['kid_std']:.5f})  "
            f"{f['images']} images against {found['real']}, features {features}"
        )


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
