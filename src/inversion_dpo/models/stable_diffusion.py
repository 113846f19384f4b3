"""Stable Diffusion 1.x and 2.x (and the embedded pipeline, which is one of them)."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from inversion_dpo.models.base import Condition
from inversion_dpo.schedule import Schedule, to_eps


class StableDiffusion:
    """Adapter for ``StableDiffusionPipeline``: eps- or v-prediction, any discrete betas."""

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        self.pipeline: Any = pipeline
        scheduler = pipeline.scheduler
        self.schedule = Schedule(
            scheduler.alphas_cumprod.double(), scheduler.config.prediction_type
        )
        for module in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            module.requires_grad_(False).eval()

    @property
    def network(self) -> nn.Module:
        """The UNet."""
        unet: nn.Module = self.pipeline.unet
        return unet

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> latents [B, C, H/f, W/f]: the posterior's mode, scaled."""
        vae = self.pipeline.vae
        latents: Tensor = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        return latents.float() * vae.config.scaling_factor

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> Condition:
        """Text embeddings [B, L, D], padded and truncated exactly as the pipeline does."""
        pipe = self.pipeline
        embeddings, _ = pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, False)
        return {"encoder_hidden_states": embeddings.float()}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """eps [B, C, h, w], in float32; the network computes in its own precision."""
        dtype = self.pipeline.unet.dtype
        hidden = condition["encoder_hidden_states"].to(x_t.device, dtype)
        output = network(x_t.to(dtype), timesteps, encoder_hidden_states=hidden).sample
        alpha_bar = self.schedule.alpha_bar(timesteps)
        return to_eps(output.float(), x_t.float(), alpha_bar, self.schedule.prediction_type)

    def identity(self) -> str:
        """SHA-256 over the weights of UNet, text encoder and autoencoder."""
        digest = hashlib.sha256()
        for module in (self.pipeline.unet, self.pipeline.text_encoder, self.pipeline.vae):
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()
