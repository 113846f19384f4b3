"""FLUX.1: a flow-matching transformer of packed latents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.models.autoencoders import shifted
from inversion_dpo.models.base import Condition, Use, no_framing, plain_call, plain_guidance
from inversion_dpo.models.prompts import clip_reads, t5_reads
from inversion_dpo.models.schedules import dynamic_shift, flow_schedules


class Flux:
    """Adapter for ``FluxPipeline``: packed latents, guidance as an input of the network."""

    component, chunked = "transformer", False
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    unreached: str | None = None
    framing = staticmethod(no_framing)
    combine, call = staticmethod(plain_guidance), staticmethod(plain_call)

    def __init__(self, pipeline: FluxPipeline, use: Use) -> None:
        self.pipeline: Any = pipeline
        self.guidance_embed = use.guidance_embed
        takes_guidance = pipeline.transformer.config.guidance_embeds
        self.distilled = None if takes_guidance else "it takes no guidance, as FLUX.1 schnell"
        self.reads = clip_reads(pipeline) | t5_reads(pipeline, "tokenizer_2", 512)
        self.multiple = 2 * pipeline.vae_scale_factor
        autoencoder = shifted(pipeline.vae)
        self.encode, self.decode = autoencoder.encode, autoencoder.decode
        mu = partial(dynamic_shift, pipeline.scheduler, default=1.15)
        self.schedule_at = flow_schedules(pipeline.scheduler, self.multiple, mu, flux_sigmas=True)
        self.schedule = self.schedule_at(use.size)

    @torch.no_grad()
    def condition(
        self, prompts: list[str], graphs: Sequence[SceneGraph | None] | None = None
    ) -> Condition:
        """Encode T5's embeddings [B, L, D] and CLIP's pooled one [B, E], as the pipeline does."""
        pipe = self.pipeline
        hidden, pooled, _ = pipe.encode_prompt(prompts, None, device=pipe.text_encoder.device)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def empty(self) -> Condition:
        """Encode the empty prompt."""
        return self.condition([""])

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """Predict the velocity eps - x_0 [B, 16, h, w], in float32."""
        pipe, (batch, channels, h, w) = self.pipeline, x_t.shape
        dtype, device = pipe.transformer.dtype, x_t.device
        text = {k: v.to(device, dtype) for k, v in condition.items()}
        guidance = None
        if pipe.transformer.config.guidance_embeds:
            guidance = torch.full([batch], self.guidance_embed, device=device)
        packed = pipe._pack_latents(x_t, batch, channels, h, w)
        output = network(
            hidden_states=packed.to(dtype),
            timestep=timesteps.float() / pipe.scheduler.config.num_train_timesteps,
            guidance=guidance,
            txt_ids=torch.zeros(text["encoder_hidden_states"].shape[1], 3, device=device),
            img_ids=pipe._prepare_latent_image_ids(batch, h // 2, w // 2, device, dtype),
            return_dict=False,
            **text,
        )[0]
        f = pipe.vae_scale_factor
        velocity: Tensor = pipe._unpack_latents(output, h * f, w * f, f)
        return velocity.float()
