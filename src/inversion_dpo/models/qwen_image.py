"""Qwen-Image (not 2.1, which is another model), and Qwen-Image-Edit: packed latents of video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as editing
from PIL import Image
from torch import Tensor, nn

from inversion_dpo.data.transforms import Size
from inversion_dpo.models.autoencoders import normalised
from inversion_dpo.models.base import (
    ALONE,
    Condition,
    ModelError,
    Use,
    joined,
    no_framing,
    plain_guidance,
)
from inversion_dpo.models.schedules import flux_schedules

MASK = "encoder_hidden_states_mask"


class QwenImage:
    """Adapter for ``QwenImagePipeline`` and those that edit, ``QwenImageEdit[Plus]Pipeline``.

    They keep the norm of the conditional prediction. A source is read by the text encoder, and is
    more packed latents. The last block drops the text's side of its output, which so is not
    trained.
    """

    component, chunked = "transformer", False
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    distilled: str | None = None
    framing = staticmethod(no_framing)

    def __init__(
        self,
        pipeline: QwenImagePipeline | QwenImageEditPipeline | QwenImageEditPlusPipeline,
        use: Use,
    ) -> None:
        self.pipeline: Any = pipeline
        if pipeline.transformer.config.guidance_embeds:
            raise ModelError(
                "its transformer is told its guidance (guidance_embeds), as no published "
                "Qwen-Image is: it is not supported"
            )
        self.edits = "never" if isinstance(pipeline, QwenImagePipeline) else "reads"
        last = len(pipeline.transformer.transformer_blocks) - 1
        text = r"(attn\.(add_q_proj|to_add_out|norm_added_q)|txt_mlp)(\..*)?"
        self.unreached: str | None = rf"transformer_blocks\.{last}\.{text}"
        self.multiple = 2 * pipeline.vae_scale_factor
        self.reads = {"tokenizer": 512} if self.edits == "never" else {}  # an instruction is whole
        self.encode, self.decode = normalised(pipeline.vae, video=True).both
        self.schedule_at = flux_schedules(pipeline.scheduler, self.multiple)
        self.schedule = self.schedule_at(use.size)

    @torch.no_grad()
    def condition(self, prompts: list[str], sources: Sequence[Image.Image] = ()) -> Condition:
        """Encode the chat with each prompt, [B, L, D], with a mask [B, L]."""
        if self.edits == "reads":
            rows = [self._read(p, source) for p, source in zip(prompts, sources, strict=True)]
            return {name: joined([row[name] for row in rows]) for name in rows[0]}
        return self._encoded(prompts, max_sequence_length=512)

    def _encoded(self, prompts: list[str], **how: Any) -> Condition:
        pipe = self.pipeline
        device = pipe.text_encoder.device
        hidden, mask = pipe.encode_prompt(prompts, device=device, **how)
        if mask is None:  # all are equally long
            mask = torch.ones(hidden.shape[:2], device=device)
        return {"encoder_hidden_states": hidden, MASK: mask.bool()}

    def _read(self, prompt: str, source: Image.Image) -> Condition:
        """Encode a source and an instruction; and, by a second mask, the source without it.

        The encoder is causal: without an instruction only what follows that is another.
        """
        pipe, image = self.pipeline, cast(Any, source)
        if isinstance(pipe, QwenImageEditPlusPipeline):
            width, height = _dimensions(384 * 384, source.width / source.height)
            image = [pipe.image_processor.resize(source, height, width)]
        both, alone = (
            self._encoded([text], image=image)["encoder_hidden_states"] for text in (prompt, "")
        )
        _, _, end = pipe.prompt_template_encode.partition("{}")
        tail, length = len(pipe.tokenizer(end).input_ids), both.shape[1]
        hidden = torch.cat([both, alone[:, -tail:]], 1)
        place = torch.arange(length + tail, device=hidden.device)[None]
        without = (place < alone.shape[1] - tail) | (place >= length)
        return {"encoder_hidden_states": hidden, MASK: place < length, ALONE + MASK: without}

    def empty(self) -> Condition:
        """Encode the chat with the empty prompt; where it has a source, that is the source's."""
        return self.condition([""]) if self.edits == "never" else {}

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """Predict the velocity eps - x_0 [B, 16, h, w], in float32."""
        dtype, (h, w) = self.pipeline.transformer.dtype, x_t.shape[2:]
        hidden, mask = (condition[k].to(x_t.device) for k in ("encoder_hidden_states", MASK))
        tokens, shapes = self._packed(x_t), [(1, h // 2, w // 2)]
        if "source" in condition:
            source = condition["source"].to(x_t)
            tokens = torch.cat([tokens, self._packed(source)], 1)
            shapes.append((1, source.shape[2] // 2, source.shape[3] // 2))
            order = (~mask).long().argsort(dim=1, stable=True)  # no gap before a token that is read
            hidden, mask = hidden.take_along_dim(order[..., None], 1), mask.take_along_dim(order, 1)
        output: Tensor = network(
            hidden_states=tokens.to(dtype),
            timestep=timesteps.float() / 1000,
            encoder_hidden_states=hidden.to(dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[shapes] * len(x_t),
            return_dict=False,
        )[0]
        return self._unpacked(output[:, : h * w // 4].float(), h, w)

    @staticmethod
    def source_size(size: Size) -> Size:
        """Bring a source to about 1024 x 1024 pixels and its own shape, as the pipelines do."""
        found: list[Size] = [size]
        while len(found) < 2 or found[-1] != found[-2]:  # until they would leave it as it is
            height, width = found[-1]
            found.append(_dimensions(1024 * 1024, width / height)[::-1])
        return found[-1]

    def edit(self, source: Image.Image) -> dict[str, Any]:
        """Name the source."""
        return {"image": source}

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


def _dimensions(area: int, ratio: float) -> tuple[int, int]:
    """Return (width, height) of a source for its area and width : height."""
    width, height, _ = editing.calculate_dimensions(area, ratio)
    return width, height
