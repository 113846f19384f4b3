"""Stable Diffusion 1.x and 2.x (and the embedded pipeline, which is one of them), and SDXL."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from inversion_dpo.data.transforms import Framing
from inversion_dpo.models.autoencoders import normalised, scaled
from inversion_dpo.models.base import (
    Condition,
    Use,
    empty_prompt,
    no_framing,
    plain_call,
    plain_guidance,
    same_schedule,
)
from inversion_dpo.models.prompts import clip_reads, encode_clip, encode_two_clips
from inversion_dpo.models.schedules import discrete_schedule

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class StableDiffusion:
    """Adapter for ``StableDiffusionPipeline``: eps- or v-prediction, any discrete schedule."""

    component, targets, chunked, edits = "unet", TARGETS, True, "never"
    unreached: str | None = None
    empty, schedule_at = empty_prompt, same_schedule
    framing = staticmethod(no_framing)
    combine, call = staticmethod(plain_guidance), staticmethod(plain_call)

    def __init__(self, pipeline: StableDiffusionPipeline, use: Use) -> None:
        self.pipeline: Any = pipeline
        self.prompt_chunks, self.multiple = use.prompt_chunks, 2 * pipeline.vae_scale_factor
        self.schedule = discrete_schedule(pipeline.scheduler)
        self.distilled = _distilled(pipeline.unet)
        self.reads = clip_reads(pipeline, use.prompt_chunks)
        self.encode, self.decode = scaled(pipeline.vae).both

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> Condition:
        """Encode prompts as the pipeline does, [B, L, D]; in several chunks [B, chunks * L, D]."""
        pipe = self.pipeline
        if self.prompt_chunks > 1:
            return {"encoder_hidden_states": encode_clip(pipe, prompts, self.prompt_chunks)}
        embeddings, _ = pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, False)
        return {"encoder_hidden_states": embeddings}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """eps or v [B, C, h, w], in float32; the network computes in its own precision."""
        dtype = self.pipeline.unet.dtype
        hidden = condition["encoder_hidden_states"].to(x_t.device, dtype)
        output: Tensor = network(x_t.to(dtype), timesteps, encoder_hidden_states=hidden).sample
        return output.float()


class StableDiffusionXL:
    """Adapter for ``StableDiffusionXLPipeline``: two text encoders, sizes told per image."""

    component, targets, chunked, edits = "unet", TARGETS, True, "never"
    unreached: str | None = None
    empty, schedule_at = empty_prompt, same_schedule
    combine, call = staticmethod(plain_guidance), staticmethod(plain_call)

    def __init__(self, pipeline: StableDiffusionXLPipeline, use: Use) -> None:
        self.pipeline: Any = pipeline
        self.prompt_chunks, self.multiple = use.prompt_chunks, 2 * pipeline.vae_scale_factor
        self.schedule = discrete_schedule(pipeline.scheduler)
        self.distilled = _distilled(pipeline.unet)
        self.reads = clip_reads(pipeline, use.prompt_chunks)
        vae: Any = pipeline.vae
        known = all(vae.config.get(f"latents_{n}") is not None for n in ("mean", "std"))
        autoencoder = scaled(vae)
        autoencoder = normalised(vae, autoencoder.scale) if known else autoencoder
        self.encode, self.decode = autoencoder.both

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> Condition:
        """Encode by both encoders, [B, chunks * 77, D] and pooled [B, E]; zeros for no prompt."""
        pipe = self.pipeline
        if self.prompt_chunks > 1:
            hidden, pooled = encode_two_clips(pipe, prompts, self.prompt_chunks)
        else:
            hidden, _, pooled, _ = pipe.encode_prompt(
                prompts, device=pipe.text_encoder_2.device, do_classifier_free_guidance=False
            )
        if pipe.config.force_zeros_for_empty_prompt:
            given = torch.tensor([bool(p) for p in prompts], device=hidden.device)
            hidden, pooled = hidden * given[:, None, None], pooled * given[:, None]
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}

    def framing(self, framings: list[Framing]) -> Condition:
        """List original size, crop's corner, target size, [B, 6] (https://arxiv.org/abs/2307.01952)."""
        ids = [[*f.original, *f.crop, *f.target] for f in framings]
        return {"time_ids": torch.tensor(ids, dtype=torch.float32)}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """eps or v [B, 4, h, w], in float32; the network computes in its own precision."""
        dtype, device = self.pipeline.unet.dtype, x_t.device
        added = {
            "text_embeds": condition["text_embeds"].to(device, dtype),
            "time_ids": condition["time_ids"].to(device),
        }
        hidden = condition["encoder_hidden_states"].to(device, dtype)
        output: Tensor = network(
            x_t.to(dtype), timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added
        ).sample
        return output.float()


def _distilled(unet: Any) -> str | None:
    told = unet.config.get("time_cond_proj_dim")
    return "its UNet has an input for the guidance, as LCM's" if told else None
