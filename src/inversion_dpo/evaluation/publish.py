"""Export a finished run as a folder with weights, kohya's copy and model card, and upload it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inversion_dpo.evaluation.metrics import OTHER_GUIDANCE, metric_rows
from inversion_dpo.evaluation.wording import gain_text, win_text
from inversion_dpo.run.config import Config, resolve
from inversion_dpo.run.disk import atomic_folder, atomic_text
from inversion_dpo.run.folder import flat, read_config

FORMATS = ("diffusers", "kohya")
KINDS = {"lora": "LoRA", "full": "full fine-tuning", "scene_graph": "scene-graph encoder"}
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
CARD_SETTINGS = (
    "objective.target",
    "objective.beta",
    "objective.t_min",
    "objective.t_max",
    "inversion.steps",
    "inversion.spacing",
    "inversion.t_start",
    "inversion.guidance_scale",
    "objective.guidance_scale",
    "policy.rank",
    "policy.alpha",
    "policy.dora",
    "training.steps",
    "training.batch_size",
    "training.learning_rate",
    "training.optimizer",
    "training.mixed_precision",
    "training.seed",
    "model.resolution",
)


class PublishError(RuntimeError):
    """A run cannot be exported or uploaded; one line with the remedy."""


def export(run: Path, form: str = "diffusers", to: Path | None = None) -> Path:
    """Write the policy and its card to RUN/export or ``to``; ``kohya`` adds a copy under its names.

    PublishError if the run has no policy or the format is unknown; ModelError if its LoRA does not
    fit kohya's names.
    """
    if form not in FORMATS:
        raise PublishError(f"--format {form} is unknown: give one of {', '.join(FORMATS)}")
    config, adapter = read_config(run), run / "adapter"
    if not adapter.is_dir():
        raise PublishError(f"{run} has no adapter: finish its training first")

    def fill(folder: Path) -> None:
        shutil.copytree(adapter, folder)
        if form == "kohya":
            from inversion_dpo.models.kohya import write_kohya

            write_kohya(adapter, folder / f"{run.resolve().name}-kohya.safetensors")
        if (run / "grid.png").is_file():
            shutil.copy(run / "grid.png", folder / "grid.png")
        atomic_text(card(run, config), folder / "README.md")

    folder = to or run / "export"
    atomic_folder(folder, fill)
    return folder


def card(run: Path, config: Config) -> str:
    """Write the model card as Markdown with the hub's metadata and without local paths."""
    from huggingface_hub import ModelCard, ModelCardData

    file = run / "metrics.json"
    metrics: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    base, lora = hub_id(config.model.path), config.policy.kind == "lora"
    about = ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "dpo", "preference-alignment", *["lora"] * lora],
        datasets=[d] if (d := dataset_id(config.data.pairs)) else None,
    )
    e, values = config.evaluation, flat(config)
    other = metrics.get(OTHER_GUIDANCE, {"guidance_scale": e.guidance_scale})
    scales = dict.fromkeys([e.guidance_scale, other["guidance_scale"]])
    written = ModelCard.from_template(
        about,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=plain(run.resolve().name),
        kind=KINDS[config.policy.kind],
        base=f"`{base}`" if base else f"`{plain(Path(resolve(config.model.path)).name)}` (local)",
        objective=config.objective.name,
        lora_base=base if lora else None,
        grid=(run / "grid.png").is_file(),
        data=data_text(config, metrics),
        settings=[(key, values[key]) for key in CARD_SETTINGS],
        rows=score_rows(metrics),
        measured=measured_text(metrics, config),
        guidance=" and ".join(f"{scale:g}" for scale in scales),
        steps=e.sample_steps,
        limits=limits(metrics),
    )
    return re.sub(r"\n{3,}", "\n\n", str(written)).strip() + "\n"


def hub_id(path: str) -> str | None:
    """Return the path if it is a hub id, OWNER/NAME, and no folder here; else None."""
    name = path.split(":")[0]
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".")
    return name if is_id and not Path(path).exists() else None


def dataset_id(pairs: str) -> str | None:
    """Return OWNER/NAME of ``hf:OWNER/NAME``; None for local pairs."""
    return hub_id(pairs.removeprefix("hf:")) if pairs.startswith("hf:") else None


def plain(text: str) -> str:
    """Replace every sign that Markdown or HTML could read as markup."""
    return re.sub(r"[^\w .,+-]", "_", text)


def data_text(config: Config, metrics: Mapping[str, Any]) -> str:
    """Name the pairs and their number."""
    name = dataset_id(config.data.pairs) or plain(Path(resolve(config.data.pairs)).name)
    count = f"{metrics['pairs']:,} pairs" if metrics.get("pairs") else "Pairs"
    noise = config.data.label_noise
    swapped = f" {noise:.0%} of their labels were swapped." if noise else ""
    return f"{count} of `{name}`; {config.data.holdout:.0%} of them were held out.{swapped}"


def score_rows(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """List every score of both models."""
    return [
        {
            "name": f"`{plain(name)}`",
            "reference": f"{row['reference']:.4f}",
            "policy": f"{row['policy']:.4f}",
            "gain": gain_text(row, digits=4),
        }
        for name, row in metric_rows(metrics).items()
    ]


def measured_text(metrics: Mapping[str, Any], config: Config) -> str:
    """Describe how the scores were measured."""
    if "win_rate" not in metrics:
        return ""
    by = plain(config.evaluation.preference)
    text = (
        f"{metrics['n_prompts']} prompts of `{plain(Path(config.evaluation.prompts).name)}`, "
        f"{metrics['seeds']} image(s) each, both models from the same noise. The policy "
        f"wins {win_text(metrics, digits=3)} by `{by}`. "
        "Intervals are paired bootstraps over prompts."
    )
    if other := metrics.get(OTHER_GUIDANCE):
        text += (
            f" At guidance {other['guidance_scale']:g}, as it was trained, it wins "
            f"{win_text(other, digits=3)}; its gain there is {gain_text(other['preference'])}."
        )
    return text


def limits(metrics: Mapping[str, Any]) -> list[str]:
    """List warnings that the numbers themselves give."""
    worse = [r["name"] for r in score_rows(metrics) if metrics[r["name"][1:-1]]["gain_high"] < 0]
    out = [f"It is measurably worse than the base model by {', '.join(worse)}."] if worse else []
    if metrics and metrics["n_prompts"] < 100:
        out.append(f"{metrics['n_prompts']} prompts are few: read the scores as a trial.")
    return out


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Upload an exported folder to the hub and return its address.

    PublishError if that fails, for example offline; no message contains the token.
    """
    from huggingface_hub import HfApi, get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise PublishError(f"--push-to-hub {repository} is no hub id: write OWNER/NAME")
    token = get_token()
    if not token:
        raise PublishError("--push-to-hub needs a token: `hf auth login`, or set HF_TOKEN")
    try:
        api = HfApi(token=token)
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="inversion-dpo")
    except Exception as error:  # the hub's own errors and those of the network below
        reason = " ".join(str(error).split())[:300].replace(token, "***")
        raise PublishError(
            f"{repository} was not uploaded ({type(error).__name__}: {reason}). {folder} is "
            "complete: run the command again, or upload it by hand"
        ) from None
    return str(address)
