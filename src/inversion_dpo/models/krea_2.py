"""Krea 2: a single-stream transformer that reads twelve layers of its text encoder."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import Krea2Pipeline
from torch import Tensor, nn

from inversion_dpo.models.autoencoders import normalised
from inversion_dpo.models.base import Condition, Use, empty_prompt, no_framing, plain_guidance
from inversion_dpo.models.prompts import real_tokens
from inversion_dpo.models.schedules import dynamic_shift, flow_schedules


class Krea2:
    """Adapter for ``Krea2Pipeline``, whose guidance_scale is ours less one."""

    component, chunked, edits = "transformer", False, "never"
    targets = (  # of the authors' own script, train_dreambooth_lora_krea2.py
        *("to_q", "to_k", "to_v", "to_out.0", "to_gate", "ff.up", "ff.down", "img_in"),
        *("final_layer.linear", "text_fusion.projector", "txt_in.linear_1", "txt_in.linear_2"),
        *("time_embed.linear_1", "time_embed.linear_2", "time_mod_proj"),
    )
    unreached: str | None = None
    empty, framing = empty_prompt, staticmethod(no_framing)
    combine = staticmethod(plain_guidance)

    def __init__(self, pipeline: Krea2Pipeline, use: Use) -> None:
        self.pipeline: Any = pipeline
        self.multiple = self.pipeline.vae_scale_factor * self.pipeline.patch_size
        self.distilled = "is_distilled is set" if pipeline.config.is_distilled else None
        self.reads = {"tokenizer": 512 - self.pipeline.prompt_template_encode_num_suffix_tokens}
        self.encode, self.decode = normalised(pipeline.vae, video=True).both
        mu = partial(dynamic_shift, pipeline.scheduler, default=1.15)
        shift = (lambda tokens: 1.15) if self.distilled else mu
        self.schedule_at = flow_schedules(
            pipeline.scheduler, self.multiple, shift, flux_sigmas=True
        )
        self.schedule = self.schedule_at(use.size)

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> Condition:
        """Encode the chat with each prompt, [B, L, 12, D], with a mask [B, L].

        The padding in the middle is left out: the network masks it, and gives text no positions.
        """
        pipe = self.pipeline
        padded, masks = pipe.encode_prompt(prompts, device=pipe.text_encoder.device)
        hidden, mask = real_tokens([h[m] for h, m in zip(padded, masks, strict=True)])
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """Predict the velocity eps - x_0 [B, 16, h, w], in float32."""
        pipe, device, f = self.pipeline, x_t.device, self.pipeline.vae_scale_factor
        dtype, (h, w) = pipe.transformer.dtype, x_t.shape[2:]
        text = condition["encoder_hidden_states"].to(device, dtype)
        output: Tensor = network(
            hidden_states=pipe._pack_latents(x_t, *x_t.shape).to(dtype),
            timestep=timesteps.float() / pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=text,
            encoder_attention_mask=condition["encoder_attention_mask"].to(device),
            position_ids=pipe.prepare_position_ids(text.shape[1], h // 2, w // 2, device),
            return_dict=False,
        )[0]
        velocity: Tensor = pipe._unpack_latents(output.float(), h * f, w * f)
        return velocity.squeeze(2)

    def call(self, scale: float, prompts: int) -> dict[str, Any]:
        """Name the guidance as the pipeline does."""
        return {"guidance_scale": scale - 1}
