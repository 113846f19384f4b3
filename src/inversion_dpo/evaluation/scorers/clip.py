"""Score by the cosine of CLIP's two embeddings: CLIP score, PickScore, HPSv2."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_processing_base import ImageProcessingMixin

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, Words, loaded
from inversion_dpo.evaluation.scorers.open_clip import clip_of, to_transformers
from inversion_dpo.evaluation.scorers.preprocess import (
    MEAN,
    STD,
    Pixels,
    centre_crops,
    whole_images,
)

TOKENS = 77
LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # its tokenizer reads HPSv2's prompts


@dataclass(frozen=True)
class Form:
    """The differences between the scores.

    value: (cosine [B], exp(logit_scale)) -> scores [B]. whole: the whole image with black bars, or
    its centre. half_up: see :func:`preprocess.centre_crops`. unescape: decode HTML entities in
    prompts, as open_clip does. tokenizer: its repository if the checkpoint has none.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    whole: bool = False
    half_up: bool = False
    unescape: bool = False
    tokenizer: str | None = None


FORMS = {
    # 100 max(cos, 0): torchmetrics' CLIPScore. The paper (Hessel et al., CLIPScore, 2021,
    # https://arxiv.org/abs/2104.08718) has 2.5 max(cos, 0) and the prefix "A photo depicts".
    "clip": Form(lambda cosine, _: 100 * cosine.clamp(min=0)),
    # exp(logit_scale) cos: Kirstain et al., Pick-a-Pic, 2023, https://arxiv.org/abs/2305.01569;
    # code: https://github.com/yuvalkirstain/PickScore, README
    "pickscore": Form(lambda cosine, scale: scale * cosine),
    # cos: Wu et al., Human Preference Score v2, 2023, https://arxiv.org/abs/2306.09341;
    # code: https://github.com/tgxs002/HPSv2, hpsv2/img_score.py
    **dict.fromkeys(
        ("hpsv2", "hpsv21"),
        Form(lambda cosine, _: cosine, whole=True, unescape=True, tokenizer=LAION_H),
    ),
}


class ClipScorer:
    """CLIP's cosine between image and prompt, in the units of its FORMS; lazily loaded."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu"):
        self.form, self.checkpoint, self.device = FORMS[checkpoint.scorer], checkpoint, device
        self.words = Words(checkpoint.scorer, TOKENS)
        self.conclude = self.words.conclude

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score uint8 images [H, W, 3] for their prompts, cut at 77 tokens: [B]."""
        with torch.no_grad():
            image = self.image_embeddings(self.pixels(images))
            text = self.text_embeddings(self.tokens(prompts))
            cosine = (functional.normalize(image, dim=-1) * functional.normalize(text, dim=-1)).sum(
                -1
            )
            scores = self.form.value(cosine, self.model.logit_scale.exp())
        return np.asarray(scores.double().cpu().numpy())

    @cached_property
    def model(self) -> Any:
        """CLIPModel, loaded from transformers' names or open_clip's."""
        if self.checkpoint.has("config.json"):
            return loaded(CLIPModel, self.checkpoint).to(self.device)
        weights = to_transformers(self.checkpoint.tensors())
        fault = "it has no config.json, and its weights are not open_clip's"
        return clip_of(weights, self.checkpoint, fault).to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or the one of its form."""
        source, other = self.checkpoint, self.form.tokenizer
        source = source.or_else(other, "tokenizer.json", "vocab.json") if other else source
        return loaded(CLIPTokenizer, source, complete=False)

    @cached_property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of the channels, from the checkpoint or CLIP's."""
        if not self.checkpoint.has("preprocessor_config.json"):
            return MEAN, STD
        settings, _ = ImageProcessingMixin.get_image_processor_dict(**self.checkpoint.arguments)
        return settings.get("image_mean", MEAN), settings.get("image_std", STD)

    def pixels(self, images: Sequence[Pixels]) -> Tensor:
        """Prepare images for the image tower: [B, 3, size, size]."""
        size = self.model.config.vision_config.image_size
        if self.form.whole:
            return whole_images(images, size, *self.statistics)
        return centre_crops(images, size, self.form.half_up, *self.statistics)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Tokenize for the text tower: [B, 77]; tokens after the first end change no score."""
        if self.form.unescape:
            prompts = [html.unescape(html.unescape(p)).strip() for p in prompts]
        return self.words.tokens(self.tokenizer, prompts).input_ids

    def image_embeddings(self, pixels: Tensor) -> Tensor:
        """Embed pixels, projected but not normalised: [B, D]."""
        pooled = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return self.model.visual_projection(pooled)

    def text_embeddings(self, tokens: Tensor) -> Tensor:
        """Embed tokens, projected but not normalised: [B, D]."""
        pooled = self.model.text_model(input_ids=tokens.to(self.device)).pooler_output
        return self.model.text_projection(pooled)
