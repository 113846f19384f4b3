"""Score with ImageReward: BLIP reads prompt and image, five linear layers score the result.

Source: Xu et al., ImageReward, 2023, https://arxiv.org/abs/2304.05977;
code: https://github.com/THUDM/ImageReward. The authors' checkpoint is a pickle. This module reads
a safetensors copy in the authors' own names and gives it to transformers' BLIP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import BertTokenizerFast, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError, Words, loaded
from inversion_dpo.evaluation.scorers.heads import linear_head
from inversion_dpo.evaluation.scorers.open_clip import layers, renamed
from inversion_dpo.evaluation.scorers.preprocess import Pixels, centre_crops

REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072  # the authors' constants
TOKENS = 35
HEAD_WIDTH = 64  # of both towers
TOKENIZER = "google-bert/bert-base-uncased"
VISION, TEXT = "blip.visual_encoder.", "blip.text_encoder."
RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"^norm\.", "post_layernorm."),
)


class ImageRewardScorer:
    """ImageReward's reward, which has mean 0 and standard deviation 1 on its own data."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu"):
        self.checkpoint, self.device = checkpoint, device
        self.words = Words(checkpoint.scorer, TOKENS)
        self.conclude = self.words.conclude

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Compute rewards [B] of uint8 images [H, W, 3]; prompts are cut at 35 tokens."""
        vision, text, head = self.networks
        words = self.words.tokens(self.tokenizer, prompts).to(self.device)
        with torch.no_grad():
            image = vision(pixel_values=self.pixels(images).to(self.device)).last_hidden_state
            both = text(
                input_ids=words.input_ids,
                attention_mask=words.attention_mask,
                encoder_hidden_states=image,
            ).last_hidden_state
            rewards = (head(both[:, 0])[:, 0] - REWARD_MEAN) / REWARD_STD
        return np.asarray(rewards.double().cpu().numpy())

    @cached_property
    def networks(self) -> tuple[Any, Any, nn.Sequential]:
        """Image tower, text tower and head."""
        weights = self.checkpoint.tensors()
        try:
            towers = build_towers(weights)
            head = linear_head(weights, "mlp.layers.")
        except (KeyError, RuntimeError) as error:
            reason = f"its weights are not ImageReward's ({' '.join(str(error).split())[:200]})"
            raise ScorerError(self.checkpoint.complaint(reason)) from error
        vision, text, head = (part.to(self.device) for part in (*towers, head))
        return vision, text, head

    @cached_property
    def tokenizer(self) -> Any:
        """BERT's tokenizer, the checkpoint's own if it has one."""
        source = self.checkpoint.or_else(TOKENIZER, "tokenizer.json", "vocab.txt")
        return loaded(BertTokenizerFast, source, complete=False)

    def pixels(self, images: Sequence[Pixels]) -> Tensor:
        """Prepare images for the image tower: [B, 3, size, size]."""
        return centre_crops(images, self.networks[0].config.image_size, half_up=True)


def build_towers(weights: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Build transformers' BLIP towers with ImageReward's weights, whose shapes give the sizes.

    KeyError or RuntimeError if a weight is missing or does not fit.
    """
    vision_state = {
        renamed(k[len(VISION) :], RENAMED): v for k, v in weights.items() if k.startswith(VISION)
    }
    text_state = {
        k[len(TEXT) :]: v
        for k, v in weights.items()
        if k.startswith(TEXT) and not k.endswith("position_ids")
    }
    vision: Any = BlipVisionModel(_vision_settings(vision_state))
    text: Any = BlipTextModel(_text_settings(text_state, vision.config), add_pooling_layer=False)
    for network, state in ((vision, vision_state), (text, text_state)):
        network.load_state_dict(state)
        network.eval().requires_grad_(False)
    return vision, text


def _vision_settings(state: Mapping[str, Tensor]) -> Any:
    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=layers(state, "encoder.layers."),
        num_attention_heads=width // HEAD_WIDTH,
        patch_size=patch,
        image_size=patch * math.isqrt(state["embeddings.position_embedding"].shape[1] - 1),
        layer_norm_eps=1e-6,
    )


def _text_settings(state: Mapping[str, Tensor], vision: Any) -> Any:
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=vision.hidden_size,
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=layers(state, "encoder.layer."),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
    )
