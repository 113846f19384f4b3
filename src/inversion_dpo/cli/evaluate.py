"""``evaluate``, ``report``, ``fid`` and ``export``: commands about a run that is trained."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from inversion_dpo.cli.options import DEFAULT, Preset, resolved, say, settings_of
from inversion_dpo.run.words import counted, typed


def evaluate(
    run: Annotated[
        Path, typer.Argument(help="A finished run, or a new folder for --policy and --reference.")
    ],
    overrides: Annotated[
        list[str] | None,
        settings_of("model.*, data.* and evaluation.*", "evaluation.limit=64"),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Model in place of RUN's policy: a run, LoRA, pipeline folder or hub id."
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Model in place of the run's reference, of the same kinds.")
    ] = None,
    config: Preset = DEFAULT,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Judge as papers do: sd15-dpo, sdxl-dpo, sd35-grpo, sd15- or sdxl-geneval."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="With --protocol: a published checkpoint; repeatable."),
    ] = None,
) -> None:
    """Sample two models from the same noise, score both, say which is better and how surely.

    Writes RUN/metrics.json and RUN/per_prompt.parquet; --config counts where RUN holds no run yet.
    Without a scorer, `report` shows what changed most, and `web` compares blind.

    Example: inversion-dpo evaluate runs/mine evaluation.scorer=pickscore evaluation.seeds=2
    """
    from inversion_dpo.api import evaluate as compare_models
    from inversion_dpo.evaluation import protocols
    from inversion_dpo.evaluation.diversity import diversity_text
    from inversion_dpo.evaluation.judges import doubts
    from inversion_dpo.evaluation.pairwise import pairwise_text
    from inversion_dpo.evaluation.wording import lines

    found = compare_models(
        run,
        *(overrides or []),
        policy=policy,
        reference=reference,
        preset=config,
        protocol=protocol,
        against=against or (),
    )
    _, spread = diversity_text(found) or ("", "")
    told = [pairwise_text(found), spread, *(f"warning: {text}" for text in doubts(found, str(run)))]
    more = [f"  {text}" for text in told if text]
    more += [f"next: inversion-dpo report {typed(run)}, a page with the pictures"]
    say("\n".join(protocols.lines(found) if protocol else [*lines(found, str(run)), *more]))


def report(
    run: Annotated[Path, typer.Argument(help="The folder of an evaluated run.")],
) -> None:
    """Write RUN/report.html, one self-contained page, with PNG copies of its figures.

    Example: inversion-dpo report runs/mine
    """
    from inversion_dpo.api import report as write

    typer.echo(f"report: {write(run)}")


def prompts(
    name: Annotated[str | None, typer.Argument(help="Read this set; without it, list all.")] = None,
) -> None:
    """Name the prompt sets that papers use, with number, licence and source; read one.

    Example: inversion-dpo prompts geneval
    """
    from inversion_dpo.evaluation.named_sets import lines

    typer.echo("\n".join(lines(name)))


def fid(
    run: Annotated[Path, typer.Argument(help="The folder of an evaluated run.")],
    real: Annotated[Path, typer.Option(help="Folder of real images.")],
    overrides: Annotated[
        list[str] | None, settings_of("model.* and evaluation.*", "model.dtype=bfloat16")
    ] = None,
    features: Annotated[
        str, typer.Option(help="clip, or inception: the classical FID, which needs torchvision.")
    ] = "clip",
) -> None:
    """Measure FID and KID of both models against real images; writes RUN/distribution.json.

    Example: inversion-dpo fid runs/mine --real real_images
    """
    from inversion_dpo.evaluation.distribution import measure
    from inversion_dpo.run.folder import run_file

    found = measure(run, resolved("fid", run_file(run), overrides), real, features)
    for word in ("reference", "policy"):
        f = found[word]
        typer.echo(
            f"{word:9s} FID {f['fid']:.4f}  KID {f['kid']:.5f} (over subsets: {f['kid_std']:.5f})  "
            f"{counted(f['images'], 'image')} against {found['real']}, features {features}"
        )


def export_run(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    form: Annotated[
        str, typer.Option("--format", help="diffusers; also comfyui, or kohya (for A1111).")
    ] = "diffusers",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it; private unless --public.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be written and uploaded, then stop.")
    ] = False,
) -> None:
    """Write RUN/export to give away: the policy, a model card, and other formats.

    Example: inversion-dpo export runs/mine --push-to-hub OWNER/NAME --dry-run
    """
    from inversion_dpo.evaluation.publish import export, push

    with tempfile.TemporaryDirectory() as trial:
        folder = export(run, form, Path(trial) / "export" if dry_run else None)
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = run / "export" / file.relative_to(folder)
            typer.echo(f"{name}  {file.stat().st_size:,} bytes")
    if dry_run:
        upload = f"; without --dry-run they go to {push_to_hub}" if push_to_hub else ""
        typer.echo(f"nothing was written or uploaded{upload}")
    elif push_to_hub:
        typer.echo(push(folder, push_to_hub, private=not public))
