"""Chroma: FLUX.1's shape without its guidance input and pooled text, read through a mask."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ChromaPipeline
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
from inversion_dpo.models.prompts import t5_reads
from inversion_dpo.models.schedules import flux_schedules


class Chroma:
    """Adapter for ``ChromaPipeline``, as the pipeline draws.

    Its mask is a float, which attention adds: padding is read at a weight of 1/e, not left out
    (https://github.com/huggingface/diffusers/issues/13619), so all 512 tokens are kept. The mask
    is made by the pipeline's own function and will follow if that is mended.
    """

    component, chunked, edits = "transformer", False, "never"
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    unreached: str | None = None
    distilled: str | None = None
    empty, framing = empty_prompt, staticmethod(no_framing)
    combine, call = staticmethod(plain_guidance), staticmethod(plain_call)

    def __init__(self, pipeline: ChromaPipeline, use: Use) -> None:
        self.pipeline: Any = pipeline
        self.multiple = 2 * pipeline.vae_scale_factor
        self.reads = t5_reads(pipeline, "tokenizer", 512)
        self.encode, self.decode = shifted(pipeline.vae).both
        self.schedule_at = flux_schedules(pipeline.scheduler, self.multiple)
        self.schedule = self.schedule_at(use.size)
        self._masks = _refill_masks(pipeline.transformer)

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> Condition:
        """Encode by T5, [B, 512, D], with the pipeline's mask [B, 512]."""
        pipe = self.pipeline
        hidden, _, mask, *_ = pipe.encode_prompt(
            prompts, device=pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "attention_mask": mask}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """Predict the velocity eps - x_0 [B, 16, h, w], in float32."""
        pipe, (batch, channels, h, w) = self.pipeline, x_t.shape
        dtype, device, f = pipe.transformer.dtype, x_t.device, pipe.vae_scale_factor
        text, mask = (
            v if v.dtype == torch.bool else v.to(dtype)
            for v in (condition[k].to(device) for k in ("encoder_hidden_states", "attention_mask"))
        )
        mask = pipe._prepare_attention_mask(batch, h * w // 4, dtype, mask)
        self._masks["now"] = mask
        output = network(
            hidden_states=pipe._pack_latents(x_t, batch, channels, h, w).to(dtype),
            timestep=timesteps.float() / 1000,
            encoder_hidden_states=text,
            attention_mask=mask,
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
            img_ids=pipe._prepare_latent_image_ids(batch, h // 2, w // 2, device, dtype),
            return_dict=False,
        )[0]
        velocity: Tensor = pipe._unpack_latents(output.float(), h * f, w * f, f)
        return velocity


def _refill_masks(transformer: nn.Module) -> dict[str, Tensor]:
    """Give the single blocks the mask that diffusers drops under gradient checkpointing.

    Returns:
        Where the mask of the pass under way is kept, under ``now``; one for each transformer.
    """
    if "_kept_masks" in transformer.__dict__:
        kept: dict[str, Tensor] = transformer.__dict__["_kept_masks"]
        return kept
    kept = transformer.__dict__["_kept_masks"] = {}

    def refill(block: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        return args, given if "attention_mask" in given else given | {"attention_mask": kept["now"]}

    for block in transformer.single_transformer_blocks:  # type: ignore[union-attr]
        block.register_forward_pre_hook(refill, with_kwargs=True)
    return kept
