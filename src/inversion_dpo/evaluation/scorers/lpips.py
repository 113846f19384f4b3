"""Measure how far apart images look: LPIPS on AlexNet.

Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, 2018,
https://arxiv.org/abs/1801.03924; code (BSD-2): https://github.com/richzhang/PerceptualSimilarity,
lpips/lpips.py, version 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError
from inversion_dpo.evaluation.scorers.preprocess import Pixels, normalised

FILES = ("alexnet.safetensors", "lin.safetensors")  # torchvision's network, the authors' weights
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]
LAYERS = (0, 3, 6, 8, 10)  # AlexNet's convolutions, by their place among torchvision's features
STRIDE, PADDING = (4, 1, 1, 1, 1), (2, 2, 1, 1, 1)
POOLED = (3, 6)  # those with a maximum over 3x3 before them


class Lpips:
    """Distances between images of one size; 0 for equal ones. Lazily loaded."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu"):
        self.checkpoint, self.device = checkpoint, device

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Both files' tensors; ScorerError for one that is missing."""
        found = {k: v.to(self.device) for f in FILES for k, v in self.checkpoint.tensors(f).items()}
        names = [f"features.{k}.{part}" for k in LAYERS for part in ("weight", "bias")]
        names += [f"lin{k}.model.1.weight" for k in range(len(LAYERS))]
        if lost := [name for name in names if name not in found]:
            raise ScorerError(self.checkpoint.complaint(f"{lost[0]} is missing"))
        return found

    def spread(self, images: Sequence[Pixels]) -> float:
        """Compute the mean distance of all pairs of two or more uint8 images [H, W, 3]."""
        with torch.no_grad():
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
            features = self._features(normalised(pixels, SHIFT, SCALE).to(self.device))
            first, second = map(list, zip(*combinations(range(len(images)), 2), strict=True))
            away = torch.zeros(len(first), device=self.device)
            for level, state in enumerate(features):
                squares = (state[first] - state[second]).square()
                weighted = functional.conv2d(squares, self.weights[f"lin{level}.model.1.weight"])
                away += weighted.mean(dim=(1, 2, 3))
        return float(away.double().mean())

    def _features(self, x: Tensor) -> list[Tensor]:
        """Return the state after each convolution, of length 1 at each place."""
        states = []
        for k, stride, padding in zip(LAYERS, STRIDE, PADDING, strict=True):
            x = functional.max_pool2d(x, 3, 2) if k in POOLED else x
            weight, bias = (self.weights[f"features.{k}.{part}"] for part in ("weight", "bias"))
            x = functional.relu(functional.conv2d(x, weight, bias, stride, padding))
            states.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return states
