"""Score images with aesthetic predictors: linear layers on an image tower's embedding.

LAION's predictor 2 reads CLIP ViT-L/14. Source: Schuhmann, improved-aesthetic-predictor, 2022,
https://github.com/christophschuhmann/improved-aesthetic-predictor. Aesthetic Predictor V2.5 reads
SigLIP. Source: https://github.com/discus0434/aesthetic-predictor-v2-5, siglip_v2_5.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection, SiglipVisionModel

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, loaded
from inversion_dpo.evaluation.scorers.heads import head_of
from inversion_dpo.evaluation.scorers.preprocess import Pixels, centre_crops, squares

HEAD_25 = "head.safetensors"
ENCODER_25 = "google/siglip-so400m-patch14-384"
PLACES_25 = (0, 2, 4, 6, 8)  # of the linear layers in the authors' Sequential
HALF = (0.5, 0.5, 0.5)


class AestheticScorer:
    """LAION's aesthetic score, about 1 to 10; it ignores the prompt. Lazily loaded.

    The checkpoint is a CLIPVisionModelWithProjection. The same file holds the head's weights as
    ``layers.0.weight`` and so on, as in the ports to transformers.
    """

    embedding = "image_embeds"  # of the tower's outputs

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu"):
        self.checkpoint, self.device = checkpoint, device

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score uint8 images [H, W, 3] as head(embedding / its norm): [B]."""
        with torch.no_grad():
            output = self.model(pixel_values=self.pixels(images).to(self.device))
            embedding = getattr(output, self.embedding)
            scores = self.head(functional.normalize(embedding, dim=-1))[:, 0]
        return np.asarray(scores.double().cpu().numpy())

    @cached_property
    def model(self) -> Any:
        """The image tower with its projection."""
        return loaded(CLIPVisionModelWithProjection, self.checkpoint).to(self.device)

    @cached_property
    def head(self) -> nn.Sequential:
        """The five linear layers."""
        return head_of(self.checkpoint, "layers.").to(self.device)

    def pixels(self, images: Sequence[Pixels]) -> Tensor:
        """Prepare images as OpenAI's CLIP does: [B, 3, size, size]."""
        return centre_crops(images, self.model.config.image_size, half_up=True)


class Aesthetic25Scorer(AestheticScorer):
    """Aesthetic V2.5, about 1 to 10; it ignores the prompt. Lazily loaded.

    The checkpoint is a folder with the authors' head as ``head.safetensors``. SigLIP lies beside
    it, with its ``config.json``, or comes from the hub.
    """

    embedding = "pooler_output"

    @cached_property
    def model(self) -> Any:
        """SigLIP's image tower."""
        source = self.checkpoint.or_else(ENCODER_25, "config.json")
        return loaded(SiglipVisionModel, source).to(self.device)

    @cached_property
    def head(self) -> nn.Sequential:
        """The five linear layers."""
        return head_of(self.checkpoint, "scoring_head.", PLACES_25, HEAD_25).to(self.device)

    def pixels(self, images: Sequence[Pixels]) -> Tensor:
        """Resize both sides, whatever the shape, to [-1, 1]: [B, 3, S, S]."""
        return squares(images, self.model.config.image_size, HALF, HALF)
