"""SANA: linear attention on the 32-fold latents of a deterministic autoencoder."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor, nn

from inversion_dpo.models.autoencoders import scaled
from inversion_dpo.models.base import (
    Condition,
    ModelError,
    Use,
    no_framing,
    plain_guidance,
    same_schedule,
)
from inversion_dpo.models.prompts import real_tokens
from inversion_dpo.models.schedules import flow_schedule

# What the pipeline's call puts before every prompt
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]


class Sana:
    """Adapter for ``SanaPipeline``; its empty prompt comes without the instruction."""

    component, chunked, edits = "transformer", False, "never"
    targets = ("to_q", "to_k", "to_v")
    unreached: str | None = None
    distilled: str | None = None
    framing, schedule_at = staticmethod(no_framing), same_schedule
    combine = staticmethod(plain_guidance)

    def __init__(self, pipeline: SanaPipeline, use: Use) -> None:
        self.pipeline: Any = pipeline
        if pipeline.transformer.config.guidance_embeds:
            raise ModelError("this is SANA-Sprint, distilled to few steps: train its base, SANA")
        self.multiple = self.pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
        self.reads = {"tokenizer": 300 - 2}
        self.encode, self.decode = scaled(pipeline.vae).both
        self.schedule = flow_schedule(pipeline.scheduler)

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> Condition:
        """Encode the instruction with each prompt, [B, L, D], with a mask [B, L]."""
        return self._encoded(prompts, INSTRUCTION.default)

    @torch.no_grad()
    def empty(self) -> Condition:
        """Encode the empty prompt alone."""
        return self._encoded([""], None)

    def _encoded(self, prompts: list[str], instruction: list[str] | None) -> Condition:
        padded, masks, *_ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.pipeline.text_encoder.device,
            complex_human_instruction=instruction,
        )
        rows = [h[m.bool()] for h, m in zip(padded, masks, strict=True)]
        hidden, mask = real_tokens(rows)
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """Predict the velocity eps - x_0 [B, 32, h, w], in float32."""
        config, dtype = self.pipeline.transformer.config, self.pipeline.transformer.dtype
        output: Tensor = network(
            x_t.to(dtype),
            encoder_hidden_states=condition["encoder_hidden_states"].to(x_t.device, dtype),
            encoder_attention_mask=condition["encoder_attention_mask"].to(x_t.device),
            timestep=timesteps.float() * config.timestep_scale,
            return_dict=False,
        )[0]
        return output.float()

    def call(self, scale: float, prompts: int) -> dict[str, Any]:
        """Ask for the size as it is: by default the pipeline takes the nearest of a table."""
        return {"guidance_scale": scale, "use_resolution_binning": False}
