"""FLUX.1, and FLUX.1 Kontext, which edits: a flow-matching transformer of packed latents."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from PIL import Image
from torch import Tensor, nn

from inversion_dpo.data.transforms import Size
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
from inversion_dpo.models.schedules import flux_schedules


class Flux:
    """Adapter for ``FluxPipeline`` and ``FluxKontextPipeline``: guidance is the network's input.

    Kontext's source is more packed latents, which a third coordinate tells apart.
    """

    component, chunked = "transformer", False
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    unreached: str | None = None
    empty, framing = empty_prompt, staticmethod(no_framing)
    combine, call = staticmethod(plain_guidance), staticmethod(plain_call)

    def __init__(self, pipeline: FluxPipeline | FluxKontextPipeline, use: Use) -> None:
        self.pipeline: Any = pipeline
        self.edits = "must" if isinstance(pipeline, FluxKontextPipeline) else "never"
        self.guidance_embed = use.guidance_embed
        takes_guidance = pipeline.transformer.config.guidance_embeds
        self.distilled = None if takes_guidance else "it takes no guidance, as FLUX.1 schnell"
        self.reads = clip_reads(pipeline) | t5_reads(pipeline, "tokenizer_2", 512)
        self.multiple = 2 * pipeline.vae_scale_factor
        self.encode, self.decode = shifted(pipeline.vae).both
        self.schedule_at = flux_schedules(pipeline.scheduler, self.multiple)
        self.schedule = self.schedule_at(use.size)

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> Condition:
        """Encode T5's embeddings [B, L, D] and CLIP's pooled one [B, E], as the pipeline does."""
        pipe = self.pipeline
        hidden, pooled, _ = pipe.encode_prompt(prompts, None, device=pipe.text_encoder.device)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """Predict the velocity eps - x_0 [B, 16, h, w], in float32."""
        pipe, (batch, _, h, w) = self.pipeline, x_t.shape
        dtype, device = pipe.transformer.dtype, x_t.device
        text = {k: v.to(device, dtype) for k, v in condition.items() if k != "source"}
        guidance = None
        if pipe.transformer.config.guidance_embeds:
            guidance = torch.full([batch], self.guidance_embed, device=device)
        packed, ids = self._tokens(x_t)
        if "source" in condition:
            source, own = self._tokens(condition["source"].to(x_t))
            own[:, 0] = 1
            packed, ids = torch.cat([packed, source], 1), torch.cat([ids, own])
        output = network(
            hidden_states=packed.to(dtype),
            timestep=timesteps.float() / 1000,
            guidance=guidance,
            txt_ids=torch.zeros(text["encoder_hidden_states"].shape[1], 3, device=device),
            img_ids=ids,
            return_dict=False,
            **text,
        )[0][:, : h * w // 4]
        f = pipe.vae_scale_factor
        velocity: Tensor = pipe._unpack_latents(output, h * f, w * f, f)
        return velocity.float()

    def _tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pack latents to tokens [B, hw/4, 64], and give their coordinates [hw/4, 3]."""
        pipe, (h, w) = self.pipeline, x.shape[2:]
        ids = pipe._prepare_latent_image_ids(
            len(x), h // 2, w // 2, x.device, pipe.transformer.dtype
        )
        return pipe._pack_latents(x, *x.shape), ids

    def source_size(self, size: Size) -> Size:
        """Take a source of the same size as the images."""
        return size

    def edit(self, source: Image.Image) -> dict[str, Any]:
        """Keep the pipeline from changing the size of the source, and of the image."""
        return {"image": source, "max_area": source.width * source.height, "_auto_resize": False}
