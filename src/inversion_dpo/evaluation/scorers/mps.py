"""Score with MPS: the image's patches look at those words of the prompt that a condition marks.

Source: Zhang et al., Learning Multi-dimensional Human Preference for Text-to-Image Generation,
2024, https://arxiv.org/abs/2405.14705; code (MIT): https://github.com/Kwai-Kolors/MPS,
eval_overall_mps_on_hpdv2.py and trainer/models/cross_modeling.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError, Words, loaded
from inversion_dpo.evaluation.scorers.clip import LAION_H, TOKENS
from inversion_dpo.evaluation.scorers.open_clip import clip_of, layers
from inversion_dpo.evaluation.scorers.preprocess import Pixels, centre_crops

CONDITION = (  # the authors' for the overall score
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, attributes, position, number, location, word, things."
)
SEEN = 0.3  # the least similarity to the condition, by the largest of the prompt, of a seen word
CROSS = "cross_model.layers."


class MPSScorer:
    """exp(logit_scale) cos(prompt, image seen through the prompt's marked words); lazily loaded."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu"):
        self.checkpoint, self.device = checkpoint, device
        self.words = Words(checkpoint.scorer, TOKENS)
        self.conclude = self.words.conclude

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score uint8 images [H, W, 3] for their prompts, cut at 77 tokens: [B]."""
        clip = self.model
        size = clip.config.vision_config.image_size
        pixels = centre_crops(images, size, half_up=False).to(self.device)
        with torch.no_grad():
            text, end = self._text(prompts)
            alike = torch.einsum("bid,jd->bij", text, self._text([CONDITION])[0][0]).amax(dim=2)
            seen = alike / alike.amax(dim=1, keepdim=True) > SEEN  # [B, 77]
            state = clip.vision_model(pixel_values=pixels).last_hidden_state
            image = self._crossed(clip.visual_projection(state), text, seen)[:, 0]
            cosine = functional.cosine_similarity(image, end, dim=-1)
            scores = clip.logit_scale.exp() * cosine
        return np.asarray(scores.double().cpu().numpy())

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """All tensors by the authors' names."""
        read = self.checkpoint.tensors().items()
        return {name.removeprefix("mps."): tensor.to(self.device) for name, tensor in read}

    @cached_property
    def model(self) -> Any:
        """CLIP, whose settings follow from its weights."""
        own = {k[6:]: v for k, v in self.weights.items() if k.startswith("model.")}
        own = {k: v for k, v in own.items() if not k.endswith("position_ids")}
        return clip_of(own, self.checkpoint, "its weights are not MPS's").to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or the one that the authors name."""
        source = self.checkpoint.or_else(LAION_H, "tokenizer.json", "vocab.json")
        return loaded(CLIPTokenizer, source, complete=False)

    def _text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embed every token, padding too, and the end: [B, 77, D] and [B, D]."""
        tokens = self.words.tokens(self.tokenizer, prompts).input_ids.to(self.device)
        out = self.model.text_model(input_ids=tokens)
        project = self.model.text_projection
        return project(out.last_hidden_state), project(out.pooler_output)

    def _crossed(self, image: Tensor, text: Tensor, seen: Tensor) -> Tensor:
        """Pass image tokens [B, N, D] through cross-attention and self-attention blocks."""
        try:
            for k in range(layers(self.weights, CROSS)):
                image = image + self._looks(f"{CROSS}{k}.0.fn.", image, text, seen)
                image = image + self._mixes(f"{CROSS}{k}.1.fn.", image)
        except KeyError as error:
            reason = f"{error} is missing: it is not MPS's"
            raise ScorerError(self.checkpoint.complaint(reason)) from error
        return image

    def _looks(self, at: str, image: Tensor, text: Tensor, seen: Tensor) -> Tensor:
        """Attend to the seen words, with one key and value for all heads; a feed-forward beside."""
        normed = self._normed(at, image)
        keys, values = self._linear(at + "to_kv", text).chunk(2, dim=-1)
        read = attention(self._linear(at + "to_q", normed), keys, values, seen[:, None, None])
        rest = gated(self._linear(at + "ff.0", normed))
        return self._linear(at + "to_out", read) + self._linear(at + "ff.2", rest)

    def _mixes(self, at: str, image: Tensor) -> Tensor:
        """Attend to the other patches by rotated positions; a feed-forward beside."""
        wide = self.weights[at + "attn_out.weight"].shape[1]
        head = 2 * len(self.weights[at + "rotary_emb.inv_freq"])
        fused = self._linear(at + "fused_attn_ff_proj", self._normed(at, image))
        sizes = (wide, head, head, fused.shape[-1] - wide - 2 * head)
        queries, keys, values, rest = fused.split(sizes, dim=-1)
        place = torch.arange(image.shape[1], device=self.device, dtype=image.dtype)
        angles = torch.outer(place, self.weights[at + "rotary_emb.inv_freq"]).repeat(1, 2)
        turned = rotated(queries.unflatten(-1, (-1, head)), angles[:, None]).flatten(2)
        read = attention(turned, rotated(keys, angles), values)
        return self._linear(at + "attn_out", read) + self._linear(at + "ff_out.1", gated(rest))

    def _normed(self, at: str, x: Tensor) -> Tensor:
        scale, shift = (self.weights[f"{at}norm.{part}"] for part in ("weight", "bias"))
        return functional.layer_norm(x, scale.shape, scale, shift)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"])


def attention(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
    """Attend with heads [B, N, heads x d] that share keys and values [B, M, d]: as the queries."""
    heads = queries.unflatten(-1, (-1, keys.shape[-1])).transpose(1, 2)
    keys, values = (t[:, None].expand(-1, heads.shape[1], -1, -1) for t in (keys, values))
    read = functional.scaled_dot_product_attention(heads, keys, values, attn_mask=seen)
    return read.transpose(1, 2).flatten(2)


def gated(x: Tensor) -> Tensor:
    """Multiply the first half by SiLU of the second: SwiGLU."""
    value, gate = x.chunk(2, dim=-1)
    return functional.silu(gate) * value


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (k, k + d/2) of [..., d] by their angles: rotary positions."""
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
