"""Load a diffusers pipeline, from a folder or a hub id, and find its adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from inversion_dpo.models.base import DiffusionModel
from inversion_dpo.models.stable_diffusion import StableDiffusion

FAMILIES: dict[type[DiffusionPipeline], type[StableDiffusion]] = {
    StableDiffusionPipeline: StableDiffusion,
}


class ModelError(ValueError):
    """A model that cannot be loaded or is of no supported family; names the remedy."""


def load_pipeline(
    path: str,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> DiffusionPipeline:
    """Load safetensors weights only; ModelError if that is not possible."""
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ModelError(f"no diffusers folder at {path}: set model.path to a folder or a hub id")
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(Path(path).expanduser()) if path.startswith("~") else path,
            revision=revision,
            variant=variant,
            use_safetensors=True,
            **({} if dtype == torch.float32 else {"torch_dtype": dtype}),
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load a diffusers pipeline from {path!r}: {error}. The folder needs "
            "model_index.json and safetensors weights"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def adapt(pipeline: DiffusionPipeline) -> DiffusionModel:
    """The adapter of the pipeline's family; ModelError names the families there are."""
    for family, adapter in FAMILIES.items():
        if isinstance(pipeline, family):
            return adapter(pipeline)
    names = ", ".join(f.__name__ for f in FAMILIES)
    raise ModelError(f"{type(pipeline).__name__} is not supported; supported: {names}")
