"""Wan 2.1 and Wan 2.2 TI2V-5B, as models of images: videos of one frame."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor, nn

from inversion_dpo.models.autoencoders import normalised
from inversion_dpo.models.base import (
    Condition,
    ModelError,
    Use,
    empty_prompt,
    no_framing,
    plain_guidance,
    same_schedule,
)
from inversion_dpo.models.prompts import t5_reads
from inversion_dpo.models.schedules import flow_schedule

TOKENS = 512  # of a prompt; the network reads the zeros behind its end


class Wan:
    """Adapter for ``WanPipeline`` with one transformer: latents [B, C, h, w] of one frame."""

    component, chunked, edits = "transformer", False, "never"
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    unreached: str | None = None
    distilled: str | None = None
    empty, schedule_at = empty_prompt, same_schedule
    framing = staticmethod(no_framing)
    combine = staticmethod(plain_guidance)

    def __init__(self, pipeline: WanPipeline, use: Use) -> None:
        self.pipeline: Any = pipeline
        if pipeline.config.boundary_ratio is not None:
            raise ModelError(
                "this Wan divides the noise levels among two transformers (boundary_ratio), of "
                "which one would stay untrained: use Wan 2.1 or Wan 2.2 TI2V-5B"
            )
        self.multiple = 2 * self.pipeline.vae_scale_factor_spatial
        self.reads = t5_reads(pipeline, "tokenizer", TOKENS)
        self.encode, self.decode = normalised(pipeline.vae, video=True).both
        self.schedule = flow_schedule(pipeline.scheduler)

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> Condition:
        """Encode by UMT5, [B, L, D]; what follows a prompt's end is zeros."""
        hidden, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=TOKENS,
            device=self.pipeline.text_encoder.device,
        )
        longest = int(hidden.any(-1).any(0).sum())
        return {"encoder_hidden_states": hidden[:, :longest].contiguous()}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """Predict the velocity eps - x_0 [B, C, h, w], in float32."""
        dtype = self.pipeline.transformer.dtype
        text = condition["encoder_hidden_states"].to(x_t.device, dtype)
        text = nn.functional.pad(text, (0, 0, 0, TOKENS - text.shape[1]))
        output: Tensor = network(
            hidden_states=x_t.unsqueeze(2).to(dtype),
            timestep=timesteps.float(),
            encoder_hidden_states=text,
            return_dict=False,
        )[0]
        return output.float().squeeze(2)

    def call(self, scale: float, prompts: int) -> dict[str, Any]:
        """Ask for one frame."""
        return {"guidance_scale": scale, "num_frames": 1}
