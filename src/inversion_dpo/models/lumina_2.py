"""Lumina 2: a single-stream transformer that predicts x_0 - eps at the data's time."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Lumina2Pipeline
from torch import Tensor, nn

from inversion_dpo.models.autoencoders import shifted
from inversion_dpo.models.base import (
    Condition,
    Use,
    no_framing,
    plain_call,
    plain_guidance,
    same_schedule,
)
from inversion_dpo.models.prompts import real_tokens
from inversion_dpo.models.schedules import dynamic_shift, flow_schedule


class Lumina2:
    """Adapter for ``Lumina2Pipeline``; its empty prompt comes without the system prompt."""

    component, chunked, edits = "transformer", False, "never"
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    unreached: str | None = None
    distilled: str | None = None
    schedule_at = same_schedule
    framing, call = staticmethod(no_framing), staticmethod(plain_call)

    def __init__(self, pipeline: Lumina2Pipeline, use: Use) -> None:
        self.pipeline: Any = pipeline
        self.multiple = 2 * pipeline.vae_scale_factor
        system = self.pipeline.tokenizer(f"{self.pipeline.system_prompt} <Prompt Start> ")
        self.reads = {"tokenizer": 256 - len(system.input_ids)}
        self.encode, self.decode = shifted(pipeline.vae).both
        # the pipeline takes the channels for the tokens
        # (https://github.com/huggingface/diffusers/issues/12913)
        mu = dynamic_shift(pipeline.scheduler, pipeline.transformer.config.in_channels, 1.15)
        self.schedule = flow_schedule(pipeline.scheduler, mu, flux_sigmas=True)

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> Condition:
        """Encode the system prompt with each prompt, [B, L, D], with a mask [B, L]."""
        device = self.pipeline.text_encoder.device
        return _cut(*self.pipeline.encode_prompt(prompts, False, device=device)[:2])

    @torch.no_grad()
    def empty(self) -> Condition:
        """Encode the empty prompt alone."""
        device = self.pipeline.text_encoder.device
        return _cut(*self.pipeline.encode_prompt([""], True, device=device)[2:])

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """Predict the velocity eps - x_0 [B, 16, h, w], in float32."""
        dtype = self.pipeline.transformer.dtype
        total = self.pipeline.scheduler.config.num_train_timesteps
        output: Tensor = network(
            hidden_states=x_t.to(dtype),
            timestep=1 - timesteps.float() / total,
            encoder_hidden_states=condition["encoder_hidden_states"].to(x_t.device, dtype),
            encoder_attention_mask=condition["encoder_attention_mask"].to(x_t.device),
            return_dict=False,
        )[0]
        return -output.float()

    def combine(self, p_u: Tensor, p_c: Tensor, scale: float) -> Tensor:
        """Guide, and give each row of latents the norm that it has without guidance."""
        p = plain_guidance(p_u, p_c, scale)
        return p * (p_c.norm(dim=-1, keepdim=True) / p.norm(dim=-1, keepdim=True))


def _cut(padded: Tensor, masks: Tensor) -> Condition:
    hidden, mask = real_tokens([h[m.bool()] for h, m in zip(padded, masks, strict=True)])
    return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
