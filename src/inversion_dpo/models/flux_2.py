"""FLUX.2: klein, guided by an empty prompt, and dev, whose network is told its guidance.

Both draw from text, or edit a source.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from PIL import Image
from torch import Tensor, nn

from inversion_dpo.data.transforms import Size
from inversion_dpo.models.autoencoders import Autoencoder
from inversion_dpo.models.base import (
    Condition,
    Use,
    empty_prompt,
    no_framing,
    plain_call,
    plain_guidance,
)
from inversion_dpo.models.prompts import chat_reads
from inversion_dpo.models.schedules import flow_schedules

DOUBLE = r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)"
SINGLE = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
TABLE, TABLE_STEPS = 1000, 50  # the shift was fitted for 10 to 200 steps, not for the table's


def shift(tokens: int, steps: int) -> float:
    """Compute mu for so many image tokens and steps, as the pipelines do."""
    mu: float = compute_empirical_mu(tokens, steps if steps < TABLE else TABLE_STEPS)
    return mu


class Flux2:
    """Adapter for ``Flux2KleinPipeline`` and ``Flux2Pipeline``: latents [B, 128, h, w]."""

    component, chunked, edits = "transformer", False, "may"
    targets = (rf"^({DOUBLE}|{SINGLE})$",)
    unreached: str | None = None
    empty, framing = empty_prompt, staticmethod(no_framing)
    combine, call = staticmethod(plain_guidance), staticmethod(plain_call)

    def __init__(self, pipeline: Flux2KleinPipeline | Flux2Pipeline, use: Use) -> None:
        self.pipeline: Any = pipeline
        pipe, bn = self.pipeline, self.pipeline.vae.bn
        self.guidance_embed = use.guidance_embed
        self.multiple = 2 * pipe.vae_scale_factor
        self.distilled = "is_distilled is set" if pipe.config.get("is_distilled") else None
        if isinstance(pipeline, Flux2KleinPipeline):
            self.reads = chat_reads(pipe.tokenizer, 512, enable_thinking=False)
        else:
            chat = format_input([""], pipe.system_message)
            ids = pipe.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)
            self.reads = {"tokenizer": 512 - len(ids["input_ids"][0])}
        self._plain = Autoencoder(pipe.vae, 0.0, 1.0)
        variance = bn.running_var.float() + pipe.vae.config.batch_norm_eps
        self._mean, self._std = (v.view(1, -1, 1, 1) for v in (bn.running_mean, variance.sqrt()))
        self.schedule_at = flow_schedules(
            pipe.scheduler, self.multiple, lambda tokens: partial(shift, tokens), flux_sigmas=True
        )
        self.schedule = self.schedule_at(use.size)

    def encode(self, images: Tensor) -> Tensor:
        """Images -> latents of 2x2 patches, normalised by the autoencoder's own statistics."""
        z = self.pipeline._patchify_latents(self._plain.encode(images))
        latents: Tensor = (z - self._mean.to(z)) / self._std.to(z)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Undo the normalisation and the patches, and decode."""
        z = latents * self._std.to(latents) + self._mean.to(latents)
        return self._plain.decode(self.pipeline._unpatchify_latents(z))

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> Condition:
        """Encode the chat with each prompt, [B, 512, 3 D]: the padding is read as well."""
        pipe = self.pipeline
        return {"encoder_hidden_states": pipe.encode_prompt(prompts, pipe.text_encoder.device)[0]}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """Predict the velocity eps - x_0 [B, 128, h, w], in float32."""
        pipe, device, dtype = self.pipeline, x_t.device, self.pipeline.transformer.dtype
        text = condition["encoder_hidden_states"].to(device, dtype)
        guidance = None
        if pipe.transformer.config.guidance_embeds:
            guidance = torch.full([len(x_t)], self.guidance_embed, device=device)
        tokens, ids = x_t.flatten(2), pipe._prepare_latent_ids(x_t[:1])[0]
        if "source" in condition:
            source = condition["source"].to(x_t)
            tokens = torch.cat([tokens, source.flatten(2)], 2)
            ids = torch.cat([ids, pipe._prepare_image_ids([source[:1]])[0]])
        output: Tensor = network(
            hidden_states=tokens.transpose(1, 2).to(dtype),
            timestep=timesteps.float() / 1000,
            guidance=guidance,
            encoder_hidden_states=text,
            txt_ids=pipe._prepare_text_ids(text[:1])[0].to(device),
            img_ids=ids.to(device),
            return_dict=False,
        )[0][:, : x_t[0, 0].numel()]
        return output.float().transpose(1, 2).reshape(x_t.shape)

    def source_size(self, size: Size) -> Size:
        """Shrink what is larger than a square of 1024 pixels, as the pipelines do."""
        less = min(1.0, math.sqrt(1024 * 1024 / (size[0] * size[1])))
        height, width = (int(side * less) // self.multiple * self.multiple for side in size)
        return height, width

    def edit(self, source: Image.Image) -> dict[str, Any]:
        """Name the source."""
        return {"image": source}
