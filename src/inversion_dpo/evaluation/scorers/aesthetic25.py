"""Score images with Aesthetic Predictor V2.5: linear layers on SigLIP's embedding.

Source: https://github.com/discus0434/aesthetic-predictor-v2-5, siglip_v2_5.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import SiglipVisionModel

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError, loaded
from inversion_dpo.evaluation.scorers.heads import linear_head
from inversion_dpo.evaluation.scorers.preprocess import Pixels, normalised

HEAD = "head.safetensors"
ENCODER = "google/siglip-so400m-patch14-384"
PLACES = (0, 2, 4, 6, 8)  # of the linear layers in the authors' Sequential
HALF = (0.5, 0.5, 0.5)


class Aesthetic25Scorer:
    """Aesthetic V2.5, about 1 to 10; it ignores the prompt. Lazily loaded.

    The checkpoint is a folder with the authors' head as ``head.safetensors``. SigLIP lies beside
    it, with its ``config.json``, or comes from the hub.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu"):
        self.checkpoint, self.device = checkpoint, device

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score uint8 images [H, W, 3] as head(embedding / its norm): [B]."""
        with torch.no_grad():
            embedding = self.model(pixel_values=self.pixels(images).to(self.device)).pooler_output
            scores = self.head(functional.normalize(embedding, dim=-1))[:, 0]
        return np.asarray(scores.double().cpu().numpy())

    @cached_property
    def model(self) -> Any:
        """SigLIP's image tower."""
        own = self.checkpoint.has("config.json")
        source = self.checkpoint if own else Checkpoint(self.checkpoint.scorer, ENCODER)
        return loaded(SiglipVisionModel, source).to(self.device)

    @cached_property
    def head(self) -> nn.Sequential:
        """The five linear layers."""
        weights = self.checkpoint.tensors(HEAD)
        try:
            return linear_head(weights, "scoring_head.", PLACES).to(self.device)
        except KeyError as error:
            raise ScorerError(self.checkpoint.complaint(f"no head: {error} is missing")) from error

    def pixels(self, images: Sequence[Pixels]) -> Tensor:
        """Resize both sides (Pillow's bicubic), whatever the shape, to [-1, 1]: [B, 3, S, S]."""
        side = (self.model.config.image_size,) * 2
        small = [Image.fromarray(i).resize(side, Image.Resampling.BICUBIC) for i in images]
        pixels = torch.from_numpy(np.stack([np.asarray(i) for i in small])).permute(0, 3, 1, 2)
        return normalised(pixels.float() / 255, HALF, HALF)
