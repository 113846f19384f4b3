"""Distances between two sets of images, FID and KID, by torchmetrics.

Sources: Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017,
https://arxiv.org/abs/1706.08500; Binkowski et al., Demystifying MMD GANs, 2018,
https://arxiv.org/abs/1801.01401. On CLIP's features instead of Inception's: Kynkaanniemi et al.,
The Role of ImageNet Classes in Frechet Inception Distance, 2023, https://arxiv.org/abs/2203.06026.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inversion_dpo.data.images import decode_image
from inversion_dpo.evaluation.prompt_sets import read_prompts
from inversion_dpo.evaluation.samples import sampled
from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint
from inversion_dpo.evaluation.scorers.clip import ClipScorer
from inversion_dpo.evaluation.scorers.preprocess import Pixels
from inversion_dpo.evaluation.scorers.registry import CHECKPOINTS
from inversion_dpo.run.config import Config, ConfigError
from inversion_dpo.run.disk import atomic_text

FEATURES = ("clip", "inception")
BATCH = 16
SUBSET = 1000  # images of each of KID's subsets, if there are as many
ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}


class ClipFeatures(nn.Module):
    """CLIP's image embedding [B, D] of uint8 images [B, 3, H, W]."""

    def __init__(self, scorer: ClipScorer) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, images: Tensor) -> Tensor:
        """Projected, not normalised."""
        pixels = [image.permute(1, 2, 0).cpu().numpy() for image in images]
        with torch.no_grad():
            return self.scorer.image_embeddings(self.scorer.pixels(pixels))


def distances(
    real: Sequence[Pixels], made: Sequence[Pixels], features: nn.Module | int
) -> dict[str, float]:
    """FID, and KID with its standard deviation over 100 subsets; 0 where the sets are alike.

    Args:
        real: uint8 images [H, W, 3].
        made: the same of a model.
        features: uint8 [B, 3, H, W] -> [B, D]; or 2048, torch-fidelity's Inception.

    Raises:
        ConfigError: torchmetrics, or for Inception torch-fidelity and torchvision, is not
            installed; or fewer than two images.
    """
    if min(len(real), len(made)) < 2:
        raise ConfigError(f"FID needs two images or more of each, got {len(real)} and {len(made)}")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        fid: Any = FrechetInceptionDistance(features)
        subset = min(SUBSET, len(real), len(made))
        kid: Any = KernelInceptionDistance(features, subset_size=subset)
    except ImportError as error:
        remedy = "`pip install torchmetrics`, and for --features inception `torchmetrics[image]`"
        raise ConfigError(f"FID and KID: {remedy} ({' '.join(str(error).split())})") from error
    for images, is_real in ((real, True), (made, False)):
        for batch in _batches(images):
            fid.update(batch, real=is_real)
            kid.update(batch, real=is_real)
    mean, spread = kid.compute()
    return {"fid": float(fid.compute()), "kid": float(mean), "kid_std": float(spread)}


def measure(folder: Path, config: Config, real: Path, features: str) -> dict[str, Any]:
    """Distances of the run's reference and policy samples from real images.

    Writes ``distribution.json``. ConfigError as :func:`distances`, or for a folder without images.
    """
    if features not in FEATURES:
        raise ConfigError(f"--features {features}: one of {', '.join(FEATURES)}")
    e = config.evaluation
    extractor: nn.Module | int = 2048
    if features == "clip":
        place = Checkpoint.at("clip", e.checkpoints.get("clip", CHECKPOINTS["clip"]))
        extractor = ClipFeatures(ClipScorer("clip", place))
    pictures, prompts = read_images(real), read_prompts(e.prompts, e.limit)
    found: dict[str, Any] = {"features": features, "real": len(pictures)}
    for word, adapter in (("reference", None), ("policy", folder / "adapter")):
        images, _ = sampled(config, adapter, folder / "samples", prompts, word, e.seeds)
        found[word] = {"images": len(images), **distances(pictures, images, extractor)}
    atomic_text(json.dumps(found, indent=1), folder / "distribution.json")
    return found


def read_images(folder: Path) -> list[Pixels]:
    """Every PNG, JPEG and WebP file of a folder, by name; ConfigError if there is none."""
    files = sorted(f for f in folder.glob("*") if f.suffix.lower() in ENDINGS)
    if not files:
        raise ConfigError(f"--real {folder} holds no PNG, JPEG or WebP files")
    return [np.asarray(decode_image(f.read_bytes(), str(f))) for f in files]


def _batches(images: Sequence[Pixels]) -> Iterator[Tensor]:
    """uint8 [B, 3, H, W], images of one size that follow each other together."""
    for _, group in groupby(images, key=lambda image: image.shape):
        same = list(group)
        for start in range(0, len(same), BATCH):
            stacked = np.stack(same[start : start + BATCH])
            yield torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
