"""Score images with LAION's aesthetic predictor 2: linear layers on CLIP ViT-L/14's embedding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError, loaded
from inversion_dpo.evaluation.scorers.heads import linear_head
from inversion_dpo.evaluation.scorers.preprocess import Pixels, centre_crops


class AestheticScorer:
    """LAION's aesthetic score, about 1 to 10; it ignores the prompt. Lazily loaded.

    The checkpoint is a CLIPVisionModelWithProjection. The same file holds the head's weights as
    ``layers.0.weight`` and so on, as in the ports to transformers.
    Source: Schuhmann, improved-aesthetic-predictor, 2022,
    https://github.com/christophschuhmann/improved-aesthetic-predictor
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu"):
        self.checkpoint, self.device = checkpoint, device

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score uint8 images [H, W, 3] as head(embedding / its norm): [B]."""
        with torch.no_grad():
            embedding = self.model(pixel_values=self.pixels(images).to(self.device)).image_embeds
            scores = self.head(functional.normalize(embedding, dim=-1))[:, 0]
        return np.asarray(scores.double().cpu().numpy())

    @cached_property
    def model(self) -> Any:
        """The image tower with its projection."""
        return loaded(CLIPVisionModelWithProjection, self.checkpoint).to(self.device)

    @cached_property
    def head(self) -> nn.Sequential:
        """The five linear layers."""
        try:
            return linear_head(self.checkpoint.tensors(), "layers.").to(self.device)
        except KeyError as error:
            raise ScorerError(self.checkpoint.complaint(f"no head: {error} is missing")) from error

    def pixels(self, images: Sequence[Pixels]) -> Tensor:
        """Prepare images as OpenAI's CLIP does: [B, 3, size, size]."""
        return centre_crops(images, self.model.config.image_size, half_up=True)
