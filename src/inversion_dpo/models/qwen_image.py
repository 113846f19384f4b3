"""Qwen-Image (not 2.1, which is another model): packed latents of a video autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.models.autoencoders import normalised
from inversion_dpo.models.base import Condition, Use, no_framing, plain_guidance
from inversion_dpo.models.schedules import dynamic_shift, flow_schedules


class QwenImage:
    """Adapter for ``QwenImagePipeline``, which keeps the norm of the conditional prediction.

    The last block drops the text's side of its output, which so is not trained.
    """

    component, chunked, edits = "transformer", False, "never"
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    distilled: str | None = None
    framing = staticmethod(no_framing)

    def __init__(self, pipeline: QwenImagePipeline, use: Use) -> None:
        self.pipeline: Any = pipeline
        last = len(pipeline.transformer.transformer_blocks) - 1
        text = r"(attn\.(add_q_proj|to_add_out|norm_added_q)|txt_mlp)(\..*)?"
        self.unreached: str | None = rf"transformer_blocks\.{last}\.{text}"
        self.multiple = 2 * pipeline.vae_scale_factor
        self.reads = {"tokenizer": 512}
        autoencoder = normalised(pipeline.vae, video=True)
        self.encode, self.decode = autoencoder.encode, autoencoder.decode
        mu = partial(dynamic_shift, pipeline.scheduler, default=1.15)
        self.schedule_at = flow_schedules(pipeline.scheduler, self.multiple, mu, flux_sigmas=True)
        self.schedule = self.schedule_at(use.size)

    @torch.no_grad()
    def condition(
        self, prompts: list[str], graphs: Sequence[SceneGraph | None] | None = None
    ) -> Condition:
        """Encode the chat with each prompt, [B, L, D], with a mask [B, L]."""
        pipe = self.pipeline
        device = pipe.text_encoder.device
        hidden, mask = pipe.encode_prompt(prompts, device, max_sequence_length=512)
        if mask is None:  # all are equally long
            mask = torch.ones(hidden.shape[:2], device=device)
        return {"encoder_hidden_states": hidden, "encoder_hidden_states_mask": mask.bool()}

    def empty(self) -> Condition:
        """Encode the chat with the empty prompt."""
        return self.condition([""])

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """Predict the velocity eps - x_0 [B, 16, h, w], in float32."""
        dtype, (h, w) = self.pipeline.transformer.dtype, x_t.shape[2:]
        output: Tensor = network(
            hidden_states=self._packed(x_t).to(dtype),
            timestep=timesteps.float() / 1000,
            encoder_hidden_states=condition["encoder_hidden_states"].to(x_t.device, dtype),
            encoder_hidden_states_mask=condition["encoder_hidden_states_mask"].to(x_t.device),
            img_shapes=[[(1, h // 2, w // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return self._unpacked(output.float(), h, w)

    def combine(self, p_u: Tensor, p_c: Tensor, scale: float) -> Tensor:
        """Guide, and give each 2x2 patch the norm that it has without guidance."""
        p, p_c = self._packed(plain_guidance(p_u, p_c, scale)), self._packed(p_c)
        kept = p_c.norm(dim=-1, keepdim=True) / p.norm(dim=-1, keepdim=True)
        return self._unpacked(p * kept, *p_u.shape[2:])

    def call(self, scale: float, prompts: int) -> dict[str, Any]:
        """Name the guidance, and the empty prompt without which there is none."""
        negative = {"negative_prompt": [""] * prompts} if scale > 1 else {}
        return {"true_cfg_scale": scale, **negative}

    def _packed(self, x: Tensor) -> Tensor:
        packed: Tensor = self.pipeline._pack_latents(x, *x.shape)
        return packed

    def _unpacked(self, x: Tensor, h: int, w: int) -> Tensor:
        f = self.pipeline.vae_scale_factor
        unpacked: Tensor = self.pipeline._unpack_latents(x, h * f, w * f, f)
        return unpacked.squeeze(2)
