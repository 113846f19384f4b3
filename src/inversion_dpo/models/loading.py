"""Load a diffusers pipeline, from a folder or a hub id, and find its adapter."""

from __future__ import annotations

import logging
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import GatedRepoError

from inversion_dpo.models.base import DiffusionModel, ModelError, Use, frozen_parts, network_of
from inversion_dpo.models.graph_encoder import SceneGraphEncoder, install, shape_for
from inversion_dpo.models.graph_model import SceneGraphModel, load_encoder
from inversion_dpo.run.config import Config, resolve
from inversion_dpo.run.fields import ModelConfig

logger = logging.getLogger(__name__)
FAMILIES = {  # of diffusers' pipelines: file in this folder, and class
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("stable_diffusion", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("stable_diffusion_3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
    "ZImagePipeline": ("z_image", "ZImage"),
}
DISTILLED = re.compile("turbo|lightning|schnell|lcm|hyper-?sd|distill", re.IGNORECASE)  # in names


def load_pipeline(m: ModelConfig, device: torch.device | None = None) -> Any:
    """Load a diffusers pipeline, safetensors only, with its LoRA merged and its graph encoder.

    Args:
        m: a hub id in it is looked up in the local hub cache when offline.
        device: where the pipeline goes, the CPU by default.

    Raises:
        ModelError: says what cannot be loaded, and what to do.
    """
    path = resolve(m.path)
    if Path(path).suffix in (".safetensors", ".ckpt", ".bin", ".gguf"):
        raise ModelError(
            f"{path} is a single file, not a diffusers folder: make one with diffusers, e.g. "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ModelError(f"no diffusers folder at {path}: set model.path to a folder or a hub id")
    how: dict[str, Any] = {"use_safetensors": True, "torch_dtype": getattr(torch, m.dtype)}
    parts: dict[str, Any] = {} if m.t5 else {"text_encoder_3": None, "tokenizer_3": None}
    try:
        if m.vae:
            parts["vae"] = AutoencoderKL.from_pretrained(os.path.expanduser(m.vae), **how)
        pipeline: Any = DiffusionPipeline.from_pretrained(
            os.path.expanduser(path), revision=m.revision, variant=m.variant, **how, **parts
        )
        if m.lora:
            lora = os.path.expanduser(m.lora)
            offline = constants.HF_HUB_OFFLINE and not Path(lora).exists()  # knows no file names
            named = {"weight_name": "pytorch_lora_weights.safetensors"} if offline else {}
            pipeline.load_lora_weights(lora, use_safetensors=True, **named)
            merge_lora(pipeline)
    except Exception as error:  # damaged files and wrong names end in nearly any error
        extras = "".join(f", {n} {v!r}" for n, v in (("vae", m.vae), ("lora", m.lora)) if v)
        reason = " ".join(str(error).split()).rstrip(".")
        raise ModelError(
            f"cannot load a diffusers pipeline from {path!r}{extras}: {reason}. {_remedy(error)}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    if m.scene_graph:
        install(pipeline, load_encoder(m.scene_graph), m.prompt_chunks)
    return pipeline


def check_model(m: ModelConfig) -> None:
    """Look for the model and its parts, without loading weights; ModelError names the setting."""
    path = os.path.expanduser(resolve(m.path))
    try:
        if Path(path).is_dir():
            DiffusionPipeline.load_config(path)
        elif path.startswith((".", "/")) and not Path(path).exists():
            raise FileNotFoundError("nothing is there")
        elif not Path(path).exists():
            hf_hub_download(path, "model_index.json", revision=m.revision)
    except Exception as error:  # of the hub, the network and the disk
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model.path={m.path}: no diffusers pipeline there ({reason}). {_remedy(error)}"
        ) from error
    for key in ("vae", "lora", "scene_graph"):
        part = getattr(m, key) or ""
        if part.startswith((".", "/", "~")) and not Path(part).expanduser().exists():
            raise ModelError(f"model.{key}={part} does not exist: give a file, folder or hub id")


def merge_lora(pipeline: Any) -> None:
    """Add the LoRA that is loaded into a pipeline to its weights, and remove it."""
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def _remedy(error: Exception) -> str:
    text = str(error)
    if isinstance(error, GatedRepoError):
        return "Accept its licence on the hub and log in (hf auth login)"
    if "not fully cached" in text or "outgoing traffic" in text or "connect" in text.lower():
        return (
            "Check the name and model.revision; it is neither a folder here nor in the hub's cache "
            "(HF_HOME), and the hub is not reached: download it first (hf download OWNER/NAME)"
        )
    if "variant=" in text:
        return "Set model.variant to one that is there, or to null"
    if "no file named" in text and ".safetensors" in text:
        return (
            "Set model.variant if its files carry one, e.g. fp16; weights in .bin are not opened: "
            "convert them to safetensors"
        )
    return "The folder needs model_index.json and safetensors weights"


def load_model(config: Config, device: torch.device) -> DiffusionModel:
    """Load the configured pipeline as the frozen model; weights to be trained are in float32.

    With ``policy.kind=scene_graph`` and no ``model.scene_graph`` a new encoder is installed, which
    is what will be trained.
    """
    m, p = config.model, config.policy
    pipeline = load_pipeline(m, device)
    if p.kind == "scene_graph" and not m.scene_graph:
        shape = shape_for(pipeline, p.graph_tokens, p.graph_width, p.graph_layers)
        install(pipeline, SceneGraphEncoder(shape, config.training.seed), m.prompt_chunks)
    model = adapt(pipeline, m.resolution, m.guidance_embed, m.prompt_chunks)
    used = {
        "t5": hasattr(pipeline, "text_encoder_3"),
        "guidance_embed": getattr(network_of(model).config, "guidance_embeds", False),
    }
    for key, value in ((key, getattr(m, key)) for key in used if not used[key]):
        if value != getattr(ModelConfig(), key):
            raise ModelError(
                f"model.{key}={value} has no effect with {type(pipeline).__name__}: leave it out"
            )
    name = Path(m.path).name
    if why := model.distilled or (DISTILLED.search(name) and "so says its name"):
        logger.warning(
            "%s seems to be distilled to few steps (%s): training undoes that, and pairs are "
            "inverted inexactly. Train its base model",
            name,
            why,
        )
    if p.kind == "full":
        network_of(model).float()
    return model


def base_name(path: str) -> str:
    """Shorten a model's path to a name that may be given away: the hub's or asset's, no folder."""
    return Path(path).name if Path(path).expanduser().exists() else path


def adapt(
    pipeline: Any, resolution: int, guidance_embed: float = 1.0, prompt_chunks: int = 1
) -> DiffusionModel:
    """Freeze the pipeline and return its family's adapter, with its scene-graph encoder if any.

    Args:
        pipeline: as loaded.
        resolution: side of the images in pixels, which flow models shift their schedule by.
        guidance_embed: the guidance that FLUX.1-dev's network gets as an input.
        prompt_chunks: of 75 tokens, see :mod:`.prompts`; one where the family has T5.

    Raises:
        ModelError: another family, or a setting that this family does not take.
    """
    for part in frozen_parts(pipeline).values():
        part.requires_grad_(False).eval()
    found = [FAMILIES[c.__name__] for c in type(pipeline).__mro__ if c.__name__ in FAMILIES]
    if not found:
        raise ModelError(
            f"{type(pipeline).__name__} is not supported; supported: {', '.join(FAMILIES)}"
        )
    file, name = found[0]
    family = getattr(import_module(f"inversion_dpo.models.{file}"), name)
    model: DiffusionModel = family(pipeline, Use(resolution, guidance_embed, prompt_chunks))
    if resolution % model.multiple:
        raise ModelError(
            f"model.resolution={resolution} must be a multiple of {model.multiple} for this "
            "pipeline"
        )
    if prompt_chunks > 1 and not model.chunked:
        raise ModelError(
            f"model.prompt_chunks={prompt_chunks} is for Stable Diffusion 1, 2 and XL; "
            f"{type(pipeline).__name__} reads long prompts at once: set model.prompt_chunks=1"
        )
    encoder = getattr(pipeline, "scene_graph", None)
    return model if encoder is None else cast(DiffusionModel, SceneGraphModel(model, encoder))
