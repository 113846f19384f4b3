"""Export a finished run as a folder with weights, kohya's copy and model card, and upload it."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from jinja2 import Template
from safetensors import SafetensorError, safe_open

from inversion_dpo.evaluation.metrics import (
    OTHER_GUIDANCE,
    gain_text,
    metric_rows,
    win_text,
)
from inversion_dpo.maths.methods import BETAS
from inversion_dpo.run.config import Config, resolve
from inversion_dpo.run.disk import atomic_folder, atomic_text, digest_of, sha256_of
from inversion_dpo.run.folder import alone_at, flat, going_on, read_config, read_metrics, read_rows
from inversion_dpo.run.judged import WEIGHTS
from inversion_dpo.run.settings import every_setting, written
from inversion_dpo.run.words import typed
from inversion_dpo.training.effects import without_effect
from inversion_dpo.training.health import heldout_units
from inversion_dpo.trajectories.method import chosen_method

logger = logging.getLogger(__name__)
FORMATS = ("diffusers", "kohya", "comfyui")
KINDS = {"lora": "LoRA", "full": "full fine-tuning", "scene_graph": "scene-graph encoder"}
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
CARD_SETTINGS = (  # which a card always has; of others those that differ from their default
    "objective.loss",
    "objective.path",
    "objective.target",
    "objective.beta",
    "objective.t_min",
    "objective.t_max",
    "inversion.steps",
    "inversion.spacing",
    "inversion.t_start",
    "inversion.guidance_scale",
    "objective.guidance_scale",
    "model.guidance_embed",
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
CARD_GROUPS = ("data", "inversion", "objective", "policy", "training")
OWN_PLACE = frozenset(  # paths, what changes no weight, and what the card says in words
    {
        "data.pairs",
        "data.format",
        "data.columns",
        "data.root",
        "data.revision",
        "data.holdout",
        "data.label_noise",
        "inversion.cache",
        "inversion.batch_size",
        "inversion.reconstruct",
        "objective.name",
        "policy.kind",
        "training.gradient_accumulation",
        "training.gradient_checkpointing",
        "training.compile",
        "training.eval_every",
        "training.checkpoint_every",
        "training.keep_checkpoints",
        "training.snapshot_every",
        "training.tracker",
    }
)
BY_DIFFUSERS = re.compile(  # names of a LoRA that load_lora_weights and fuse_lora take as they are
    r"(unet|transformer)\..+\.(lora(_[AB]|\.(down|up))\.weight|lora_magnitude_vector)"
    r"|lora_unet_(down|mid|up|input|middle|output)_.+\.(lora_(down|up)\.weight|alpha)"
)
UNTOUCHED = ("model.guidance_embed", Config().model.guidance_embed)  # of most models: no input


class PublishError(RuntimeError):
    """A run cannot be exported or uploaded; one line with the remedy."""


def export(run: Path, form: str = "diffusers", to: Path | None = None) -> Path:
    """Write the policy and its card to RUN/export or ``to``; other formats add a copy of the LoRA.

    PublishError if the run has no policy or the format is unknown; ModelError if its LoRA does not
    fit the format's names; BusyError if another command writes RUN/export.

    Args:
        run: its folder.
        form: one of ``FORMATS``.
        to: another folder than RUN/export.
    """
    if form not in FORMATS:
        raise PublishError(f"--format {form} is unknown: give one of {', '.join(FORMATS)}")
    config, adapter = read_config(run), run / "adapter"
    if not adapter.is_dir():
        raise PublishError(f"{run} has no adapter: finish its training first")
    check_weights(adapter)
    if text := going_on(run):
        raise PublishError(text)
    if of_others(run):
        logger.warning(
            "%s is of other models, or of the policy before it was trained further: the card "
            "states no score. Run `inversion-dpo evaluate %s` and `report`, then export again",
            run / "metrics.json",
            typed(run),
        )

    def fill(folder: Path) -> None:
        shutil.copytree(adapter, folder)
        if form != "diffusers":
            from inversion_dpo.models.folders import index_of
            from inversion_dpo.models.kohya import write_lora

            m, kind = config.model, ""
            with suppress(OSError, ValueError):  # a base that is not within reach
                kind = index_of(resolve(m.config or m.path), m.revision)["_class_name"]
            write_lora(adapter, folder / f"{run.resolve().name}-{form}.safetensors", form, kind)
        if (run / "grid.png").is_file() and not of_others(run):
            shutil.copy(run / "grid.png", folder / "grid.png")
        atomic_text(card(run, config), folder / "README.md")

    folder = to or run / "export"
    with alone_at(folder):
        atomic_folder(folder, fill)
    return folder


def check_weights(adapter: Path) -> None:
    """Refuse a policy without weights, with damaged ones, or with numbers that are not finite."""
    files = sorted(adapter.rglob("*.safetensors"))
    if not files:
        raise PublishError(f"{adapter} holds no .safetensors file: run its training again")
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118, it is no dictionary
                    weight = opened.get_tensor(name)
                    if weight.is_floating_point() and not weight.float().isfinite().all():
                        raise PublishError(
                            f"{file}: {name} is not finite. The policy draws nothing: train with a "
                            "lower training.learning_rate in another --output"
                        )
        except SafetensorError as error:
            raise PublishError(f"{file} is damaged ({error}): run its training again") from error


def of_others(run: Path) -> bool:
    """Tell whether ``metrics.json`` is of another policy than the run's own as it is now.

    It is too if the reference was another than the configuration's model.
    """
    metrics = read_metrics(run)
    models, weights = metrics.get("models"), metrics.get(WEIGHTS)
    if weights is None:  # of an earlier version
        return bool(models)
    return bool(models and models[0]) or weights != digest_of([run / "adapter"])


def card(run: Path, config: Config) -> str:
    """Write the model card as Markdown with the hub's metadata and without local paths."""
    from huggingface_hub import ModelCardData

    others = of_others(run)
    metrics = {} if others else read_metrics(run)
    m, lora = config.model, config.policy.kind == "lora"
    base = hub_id(m.path)
    network = hub_id(m.network or "")
    data = hub_id(config.data.pairs.removeprefix("hf:")) if "hf:" in config.data.pairs else None
    edits = next((run / "images").glob("*-source.png"), None)
    task = "image-to-image" if edits else "text-to-image"
    about = ModelCardData(
        base_model=[network, base] if base and network else network or base,
        library_name="diffusers",
        pipeline_tag=task,
        tags=[task, "diffusers", "dpo", "preference-alignment", *["lora"] * lora],
        datasets=[data] if data else None,
    )
    rows = metric_rows(metrics)
    template = Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True)
    written = template.render(
        card_data=about.to_yaml(),
        name=plain(run.resolve().name),
        kind=KINDS[config.policy.kind],
        base=base or plain(Path(resolve(m.path)).name),
        base_id=base,
        lora=lora,
        start=described(m.lora),
        foldable=is_plain_lora(m.lora),
        network=described(m.network, ("unet", "transformer")),
        vae=described(m.vae, ("vae",)),
        whole=config.policy.kind == "full",
        grid=(run / "grid.png").is_file() and not others,
        data=data or plain(Path(resolve(config.data.pairs)).name),
        units=heldout_units((read_rows(run / "metrics.jsonl") or [{}])[-1]),
        config=config,
        settings=card_settings(config),
        method=chosen_method(config),
        metrics=metrics,
        rows={plain(name): row for name, row in rows.items()},
        gains={plain(name): gain_text(row, digits=4) for name, row in rows.items()},
        by=plain(config.evaluation.preference),
        prompts=plain(Path(config.evaluation.prompts).name),
        other=metrics.get(OTHER_GUIDANCE),
        gain_text=gain_text,
        win_text=win_text,
    )
    return re.sub(r"\n{3,}", "\n\n", written).strip() + "\n"


def card_settings(config: Config) -> dict[str, str]:
    """List what shaped the policy: the chosen settings, and others that differ from their default.

    Args:
        config: of the run.

    Returns:
        Values as a table's cells, by key. The method's loss, path, target and beta are there
        whether or not they were given; what had no effect is not.
    """
    method, values = chosen_method(config), flat(config)
    parts = {f"objective.{name}": value for name, value in asdict(method).items()}
    values |= parts | {"objective.beta": values["objective.beta"] or BETAS.get(method.loss)}
    idle = without_effect(config) - set(parts) | OWN_PLACE
    changed = [
        key
        for key, setting in every_setting().items()
        if key.partition(".")[0] in CARD_GROUPS and values[key] != setting.default
    ]
    return {
        key: written(values[key]).replace("|", "\\|").replace("`", "'")
        for key in dict.fromkeys([*CARD_SETTINGS, *changed])
        if key not in idle and values[key] is not None and (key, values[key]) != UNTOUCHED
    }


def files_of(name: str, parts: Sequence[str] = ()) -> list[Path]:
    """List the weights at a setting's place; none of a hub id.

    Args:
        name: file, folder or hub id.
        parts: folders inside that hold them, where it is a whole pipeline's.
    """
    path = Path(name).expanduser()
    place = next((path / part for part in parts if (path / part).is_dir()), path)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    return [file for file in files if file.is_file()]


def described(name: str | None, parts: Sequence[str] = ()) -> str | None:
    """Name what :func:`files_of` lists, with the hashes; None without a name."""
    if not name:
        return None
    hashes = ", ".join(f"SHA-256 `{sha256_of(file)}`" for file in files_of(name, parts))
    called = f"`{hub_id(name) or plain(Path(name).name)}`"
    return f"{called} ({hashes})" if hashes else called


def is_plain_lora(name: str | None) -> bool:
    """Say whether diffusers adds a LoRA's file that is here, whole and at its scale."""
    keys = list[str]()
    for file in files_of(name) if name else ():
        with suppress(SafetensorError), safe_open(file, "np") as opened:
            keys += opened.keys()
    return all(BY_DIFFUSERS.fullmatch(key) for key in keys)


def hub_id(path: str) -> str | None:
    """Return the path if it is a hub id, OWNER/NAME, and no folder here; else None."""
    name = path.split(":")[0]
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".")
    return name if is_id and not Path(path).exists() else None


def plain(text: str) -> str:
    """Replace every sign that Markdown or HTML could read as markup."""
    return re.sub(r"[^\w .,+-]", "_", text)


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Upload an exported folder to the hub and return its address.

    PublishError if that fails, for example offline; no message contains the token.

    Args:
        folder: an exported one.
        repository: OWNER/NAME.
        private: whether only its owner sees it.
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
