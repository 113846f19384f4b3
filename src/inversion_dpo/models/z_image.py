"""Z-Image: a single-stream flow-matching transformer that takes lists and predicts x_0 - eps."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from inversion_dpo.models.autoencoders import shifted
from inversion_dpo.models.base import Condition, Use, empty_prompt, no_framing, plain_guidance
from inversion_dpo.models.prompts import chat_reads, real_tokens
from inversion_dpo.models.schedules import flux_schedules


class ZImage:
    """Adapter for ``ZImagePipeline``, whose guidance_scale is ours less one."""

    component, chunked, edits = "transformer", False, "never"
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    empty, framing = empty_prompt, staticmethod(no_framing)
    combine = staticmethod(plain_guidance)

    def __init__(self, pipeline: ZImagePipeline, use: Use) -> None:
        self.pipeline: Any = pipeline
        self.multiple = 2 * pipeline.vae_scale_factor
        self.reads = chat_reads(pipeline.tokenizer, 512, enable_thinking=True)
        self.encode, self.decode = shifted(pipeline.vae).both
        tokens = math.prod(side // self.multiple for side in use.size)
        # the image is filled up to a multiple of 32 tokens: often nothing is filled
        self.unreached: str | None = "x_pad_token" if tokens % 32 == 0 else None
        turbo = pipeline.scheduler.config.get("shift") == 3  # the base's is 6
        self.distilled = "its schedule has the shift of Z-Image-Turbo, 3" if turbo else None
        self.schedule_at = flux_schedules(pipeline.scheduler, self.multiple)
        self.schedule = self.schedule_at(use.size)

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> Condition:
        """Encode the chat with each prompt, [B, L, D], with a mask [B, L]."""
        pipe = self.pipeline  # it writes the chats over the list that it is given
        rows, _ = pipe.encode_prompt(list(prompts), pipe.text_encoder.device, False)
        hidden, mask = real_tokens(rows)
        return {"encoder_hidden_states": hidden, "mask": mask}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """Predict the velocity eps - x_0 [B, 16, h, w], in float32.

        A text is cut to its own tokens: the image's rotary positions begin where it ends.
        """
        dtype, device = self.pipeline.transformer.dtype, x_t.device
        hidden = condition["encoder_hidden_states"].to(device, dtype)
        texts = [h[m] for h, m in zip(hidden, condition["mask"].to(device), strict=True)]
        images = list(x_t.to(dtype).unsqueeze(2).unbind())
        output = network(images, 1 - timesteps.float() / 1000, texts, return_dict=False)[0]
        return -torch.stack([o.float() for o in output]).squeeze(2)

    def call(self, scale: float, prompts: int) -> dict[str, Any]:
        """Name the guidance as the pipeline does."""
        return {"guidance_scale": scale - 1}
