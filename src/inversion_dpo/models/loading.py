"""Load a diffusers pipeline, from a folder or a hub id, and find its adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError

from inversion_dpo.models.base import DiffusionModel, ModelError, freeze, network_of
from inversion_dpo.models.flow import Flux, StableDiffusion3
from inversion_dpo.models.graph_encoder import SceneGraphEncoder, install, shape_for
from inversion_dpo.models.graph_model import SceneGraphModel, load_encoder
from inversion_dpo.models.stable_diffusion import StableDiffusion, StableDiffusionXL
from inversion_dpo.run.config import Config, resolve

FAMILIES = (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableDiffusion3Pipeline,
    FluxPipeline,
)


def load_pipeline(
    path: str,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
    lora: str | None = None,
    t5: bool = True,
) -> Any:
    """Load a diffusers pipeline, safetensors only; ModelError if that is not possible.

    Args:
        path: a folder or a hub id; an id is looked up in the local hub cache when offline.
        revision: of the hub repository.
        variant: of the weight files, e.g. ``fp16``.
        dtype: of all frozen weights.
        vae: folder or hub id of another autoencoder, e.g. SDXL's fp16 fix.
        lora: folder or hub id of a LoRA to add to the weights.
        t5: whether Stable Diffusion 3 loads its third and largest text encoder.
    """
    _check_path(path)
    settings: dict[str, Any] = {"use_safetensors": True, "torch_dtype": dtype}
    try:
        extra = (
            {"vae": AutoencoderKL.from_pretrained(os.path.expanduser(vae), **settings)}
            if vae
            else {}
        )
        extra |= {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
        pipeline: Any = DiffusionPipeline.from_pretrained(
            os.path.expanduser(path), revision=revision, variant=variant, **settings, **extra
        )
        if lora:
            _add_lora(pipeline, os.path.expanduser(lora))
    except Exception as error:  # damaged files and wrong names end in nearly any error
        extras = "".join(f", {n} {v!r}" for n, v in (("vae", vae), ("lora", lora)) if v)
        reason = " ".join(str(error).split()).rstrip(".")
        raise ModelError(
            f"cannot load a diffusers pipeline from {path!r}{extras}: {reason}. {_remedy(error)}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_path(path: str) -> None:
    if Path(path).suffix in (".safetensors", ".ckpt", ".bin", ".gguf"):
        raise ModelError(
            f"{path} is a single file, not a diffusers folder: make one with diffusers, e.g. "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ModelError(f"no diffusers folder at {path}: set model.path to a folder or a hub id")


def _add_lora(pipeline: Any, lora: str) -> None:
    """Add a LoRA to the weights; of a hub id offline, the name of its file must be known."""
    cached = constants.HF_HUB_OFFLINE and not Path(lora).exists()
    named = {"weight_name": "pytorch_lora_weights.safetensors"} if cached else {}
    pipeline.load_lora_weights(lora, use_safetensors=True, **named)
    merge_lora(pipeline)


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
    dtype = getattr(torch, m.dtype)
    pipeline = load_pipeline(resolve(m.path), m.revision, m.variant, dtype, m.vae, m.lora, m.t5)
    pipeline.to(device)
    if m.scene_graph:
        install(pipeline, load_encoder(m.scene_graph), m.prompt_chunks)
    elif p.kind == "scene_graph":
        shape = shape_for(pipeline, p.graph_tokens, p.graph_width, p.graph_layers)
        install(pipeline, SceneGraphEncoder(shape, config.training.seed), m.prompt_chunks)
    model = adapt(pipeline, m.resolution, m.guidance_embed, m.prompt_chunks)
    if p.kind == "full":
        network_of(model).float()
    return model


def base_name(path: str) -> str:
    """What a file that is given away may say of its model: the hub's or asset's name, no path."""
    return Path(path).name if Path(path).expanduser().exists() else path


def adapt(
    pipeline: Any, resolution: int, guidance_embed: float = 1.0, prompt_chunks: int = 1
) -> DiffusionModel:
    """Freeze the pipeline and return its family's adapter; ModelError names the families.

    With a scene-graph encoder installed (:mod:`.scene_graph`), its condition takes graphs too.

    Args:
        pipeline: as loaded.
        resolution: side of the images in pixels, which flow models shift their schedule by.
        guidance_embed: the guidance that FLUX.1-dev's network is told.
        prompt_chunks: of 75 tokens, see :mod:`.prompts`; one where the family has T5.
    """
    freeze(pipeline)
    factor = 2 * getattr(pipeline, "vae_scale_factor", 8)
    if resolution % factor:
        raise ModelError(
            f"model.resolution={resolution} must be a multiple of {factor} for this pipeline"
        )
    model = _of_family(pipeline, resolution, guidance_embed, prompt_chunks)
    encoder = getattr(pipeline, "scene_graph", None)
    return model if encoder is None else SceneGraphModel(model, encoder)


def _of_family(
    pipeline: Any, resolution: int, guidance_embed: float, prompt_chunks: int
) -> DiffusionModel:
    if isinstance(pipeline, StableDiffusionXLPipeline):
        return StableDiffusionXL(pipeline, prompt_chunks)
    if isinstance(pipeline, StableDiffusionPipeline):
        return StableDiffusion(pipeline, prompt_chunks)
    if prompt_chunks > 1:
        raise ModelError(
            f"model.prompt_chunks={prompt_chunks} is for Stable Diffusion 1, 2 and XL; "
            f"{type(pipeline).__name__} reads long prompts with T5: set model.prompt_chunks=1"
        )
    if isinstance(pipeline, StableDiffusion3Pipeline):
        return StableDiffusion3(pipeline, resolution)
    if isinstance(pipeline, FluxPipeline):
        return Flux(pipeline, resolution, guidance_embed)
    names = ", ".join(f.__name__ for f in FAMILIES)
    raise ModelError(f"{type(pipeline).__name__} is not supported; supported: {names}")
