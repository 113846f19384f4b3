"""Flow-matching transformers: Stable Diffusion 3 and 3.5, and FLUX.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from inversion_dpo.data.transforms import Framing
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.models.base import Condition
from inversion_dpo.models.schedules import flow_schedule


def dynamic_shift(scheduler: Any, image_tokens: int, max_shift: float) -> float | None:
    """mu for this many image tokens, where the scheduler shifts by resolution.

    ``max_shift`` is the pipeline's own default, for a configuration that does not name one.
    """
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return None
    mu: float = calculate_shift(
        image_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )
    return mu


class StableDiffusion3:
    """Adapter for ``StableDiffusion3Pipeline``: two CLIPs and, if it is there, T5.

    The last block drops the text's side of its output, so what makes the text's queries there
    is never reached by a loss and is not trained.
    """

    component = "transformer"

    def __init__(self, pipeline: StableDiffusion3Pipeline, resolution: int) -> None:
        self.pipeline: Any = pipeline
        last = len(pipeline.transformer.transformer_blocks) - 1
        self.unreached: str | None = rf"transformer_blocks\.{last}\.attn\.(add_q_proj|norm_added_q)"
        side = resolution // pipeline.vae_scale_factor // pipeline.transformer.config.patch_size
        mu = dynamic_shift(pipeline.scheduler, side * side, 1.16)
        self.schedule = flow_schedule(pipeline.scheduler, mu)

    @torch.no_grad()
    def condition(
        self, prompts: list[str], graphs: Sequence[SceneGraph | None] | None = None
    ) -> Condition:
        """Joint embeddings [B, L, D] and the pooled one [B, E], as the pipeline makes them."""
        pipe = self.pipeline
        hidden, _, pooled, _ = pipe.encode_prompt(
            prompts,
            None,
            None,
            device=pipe.text_encoder.device,
            do_classifier_free_guidance=False,
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def framing(self, framings: list[Framing]) -> Condition:
        """Nothing: this model is not told the image's size."""
        return {}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """The velocity eps - x_0 [B, 16, h, w], in float32."""
        dtype = self.pipeline.transformer.dtype
        text = {k: v.to(x_t.device, dtype) for k, v in condition.items()}
        output: Tensor = network(
            hidden_states=x_t.to(dtype), timestep=timesteps.float(), return_dict=False, **text
        )[0]
        return output.float()


class Flux:
    """Adapter for ``FluxPipeline``: packed latents, guidance as an input of the network."""

    component = "transformer"
    unreached: str | None = None

    def __init__(self, pipeline: FluxPipeline, resolution: int, guidance_embed: float) -> None:
        self.pipeline: Any = pipeline
        self.guidance_embed = guidance_embed
        side = resolution // pipeline.vae_scale_factor // 2
        mu = dynamic_shift(pipeline.scheduler, side * side, 1.15)
        self.schedule = flow_schedule(pipeline.scheduler, mu, flux_sigmas=True)

    @torch.no_grad()
    def condition(
        self, prompts: list[str], graphs: Sequence[SceneGraph | None] | None = None
    ) -> Condition:
        """T5's embeddings [B, L, D] and CLIP's pooled one [B, E], as the pipeline makes them."""
        pipe = self.pipeline
        hidden, pooled, _ = pipe.encode_prompt(prompts, None, device=pipe.text_encoder.device)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def framing(self, framings: list[Framing]) -> Condition:
        """Nothing: this model is not told the image's size."""
        return {}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """The velocity eps - x_0 [B, 16, h, w], in float32."""
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
