"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from inversion_dpo.models.autoencoders import shifted
from inversion_dpo.models.base import (
    Condition,
    Use,
    empty_prompt,
    no_framing,
    plain_call,
    plain_guidance,
)
from inversion_dpo.models.prompts import clip_reads, t5_reads
from inversion_dpo.models.schedules import dynamic_shift, flow_schedules


class StableDiffusion3:
    """Adapter for ``StableDiffusion3Pipeline``: two CLIPs and, if it is there, T5.

    The last block drops the text's side of its output, so what makes the text's queries there
    is never reached by a loss and is not trained.
    """

    component, chunked, edits = "transformer", False, "never"
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    empty, framing = empty_prompt, staticmethod(no_framing)
    combine, call = staticmethod(plain_guidance), staticmethod(plain_call)
    distilled: str | None = None

    def __init__(self, pipeline: StableDiffusion3Pipeline, use: Use) -> None:
        self.pipeline: Any = pipeline
        self.reads = clip_reads(pipeline) | t5_reads(pipeline, "tokenizer_3", 256)
        self.multiple = 2 * pipeline.vae_scale_factor
        self.encode, self.decode = shifted(pipeline.vae).both
        last = len(pipeline.transformer.transformer_blocks) - 1
        self.unreached: str | None = rf"transformer_blocks\.{last}\.attn\.(add_q_proj|norm_added_q)"
        patch = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
        mu = partial(dynamic_shift, pipeline.scheduler, default=1.16)
        self.schedule_at = flow_schedules(pipeline.scheduler, patch, mu)
        self.schedule = self.schedule_at(use.size)

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> Condition:
        """Encode joint embeddings [B, L, D] and the pooled one [B, E], as the pipeline does."""
        device = self.pipeline.text_encoder.device
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """Predict the velocity eps - x_0 [B, 16, h, w], in float32."""
        dtype = self.pipeline.transformer.dtype
        text = {k: v.to(x_t.device, dtype) for k, v in condition.items()}
        output: Tensor = network(
            hidden_states=x_t.to(dtype), timestep=timesteps.float(), return_dict=False, **text
        )[0]
        return output.float()
