"""Measure FID and KID, distances between two sets of images, with torchmetrics.

Sources: Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017,
https://arxiv.org/abs/1706.08500; Binkowski et al., Demystifying MMD GANs, 2018,
https://arxiv.org/abs/1801.01401. With CLIP's features: Kynkaanniemi et al., The Role of ImageNet
Classes in Frechet Inception Distance, 2023, https://arxiv.org/abs/2203.06026.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from inversion_dpo.data.images import decode_image
from inversion_dpo.evaluation.defaults import settled
from inversion_dpo.evaluation.prompt_sets import read_prompts
from inversion_dpo.evaluation.samples import pictures, sampled_file
from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint
from inversion_dpo.evaluation.scorers.clip import ClipScorer
from inversion_dpo.evaluation.scorers.preprocess import Pixels
from inversion_dpo.evaluation.scorers.registry import CHECKPOINTS
from inversion_dpo.evaluation.sides import side
from inversion_dpo.run.config import Config, ConfigError
from inversion_dpo.run.disk import atomic_json
from inversion_dpo.run.folder import occupied
from inversion_dpo.run.words import counted

logger = logging.getLogger(__name__)
FEATURES = ("clip", "inception")
BATCH = 16
SUBSET = 1000  # images in each of KID's subsets, at most
ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}


class ClipFeatures(nn.Module):
    """Compute CLIP's image embeddings [B, D] from uint8 images [B, 3, H, W]."""

    def __init__(self, scorer: ClipScorer) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, images: Tensor) -> Tensor:
        """Return the projected embeddings [B, D], not normalised."""
        pixels = [image.permute(1, 2, 0).cpu().numpy() for image in images]
        with torch.no_grad():
            return self.scorer.image_embeddings(self.scorer.pixels(pixels))


@dataclass(frozen=True)
class Images:
    """Images that are decoded one by one, each time that they are read."""

    count: int
    decoded: Callable[[], Iterator[Image.Image]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Pixels]:
        return map(np.array, self.decoded())


def distances(
    real: Sequence[Pixels] | Images, made: Sequence[Pixels] | Images, features: nn.Module | int
) -> dict[str, float]:
    """Compute FID, and KID with its standard deviation over 100 subsets.

    Args:
        real: uint8 images [H, W, 3].
        made: a model's images, in the same form.
        features: a module uint8 [B, 3, H, W] -> [B, D]; or 2048 for torch-fidelity's Inception.

    Returns:
        ``fid``, ``kid`` and ``kid_std``; equal sets have distance 0.

    Raises:
        ConfigError: torchmetrics is missing, or for Inception torch-fidelity and torchvision; or a
            set has fewer than two images.
    """
    if min(len(real), len(made)) < 2:
        raise ConfigError(
            f"FID needs at least two images in each set, got {len(real)} and {len(made)}"
        )
    fid, kid = meters(features, min(SUBSET, len(real), len(made)))
    for images, is_real in ((real, True), (made, False)):
        for batch in _batches(images):
            fid.update(batch, real=is_real)
            kid.update(batch, real=is_real)
    mean, spread = kid.compute()
    return {"fid": float(fid.compute()), "kid": float(mean), "kid_std": float(spread)}


def meters(features: nn.Module | int, subset: int = SUBSET) -> tuple[Any, Any]:
    """Make torchmetrics' FID and KID; ConfigError if a package is missing."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        kid = KernelInceptionDistance(features, subset_size=subset)
        return FrechetInceptionDistance(features), kid
    except ImportError as error:
        remedy = "`pip install torchmetrics`, and for --features inception `torchmetrics[image]`"
        raise ConfigError(f"FID and KID: {remedy} ({' '.join(str(error).split())})") from error


def measure(folder: Path, config: Config, real: Path, features: str) -> dict[str, Any]:
    """Measure distances of a run's reference and policy samples from real images.

    Args:
        folder: the run; ``distribution.json`` is written there.
        config: its settings.
        real: a folder of PNG, JPEG or WebP images.
        features: ``clip`` or ``inception``.

    Returns:
        What ``distribution.json`` holds: for each side :func:`distances` and the number of images.

    Raises:
        ConfigError: as :func:`distances`; unknown features; a folder without images.
        BusyError: another command is using the run.
    """
    if features not in FEATURES:
        raise ConfigError(f"--features {features} is unknown: give one of {', '.join(FEATURES)}")
    files = images_in(real)
    config = settled(config, folder)
    e = config.evaluation
    extractor: nn.Module | int = 2048
    if features == "clip":
        place = Checkpoint.at("clip", e.checkpoints.get("clip", CHECKPOINTS["clip"]))
        place.check()
        extractor = ClipFeatures(ClipScorer(place))
        if "clip" not in e.scorers:  # whose scorers would refuse its weights
            others = {k: v for k, v in e.checkpoints.items() if k != "clip"}
            config = replace(config, evaluation=replace(e, checkpoints=others))
    meters(extractor)  # what is missing is said before anything is sampled
    side(config, str(folder))  # a run without a policy, too
    real_images, prompts = read_images(files), read_prompts(e.prompts, e.limit)
    for _ in real_images:
        pass  # one that cannot be read is named before anything is sampled
    report: dict[str, Any] = {"features": features, "real": len(files)}
    with occupied(folder):  # an evaluation at the same time would write the same samples
        for word, adapter in (("reference", None), ("policy", folder / "adapter")):
            file = sampled_file(config, adapter, folder / "samples", prompts, word, e.seeds)
            made = Images(len(prompts) * e.seeds, partial(pictures, file))
            report[word] = {"images": len(made), **distances(real_images, made, extractor)}
        atomic_json(report, folder / "distribution.json")
    return report


def images_in(folder: Path) -> list[Path]:
    """List every PNG, JPEG and WebP file in a folder, by name; ConfigError if there is none.

    Hidden files, such as ``._1.png`` of macOS, are left out and counted.
    """
    if not folder.is_dir():
        raise ConfigError(f"--real {folder} is no folder: give one with real images")
    every = sorted(f for f in folder.glob("*") if f.suffix.lower() in ENDINGS)
    files = [f for f in every if not f.name.startswith(".")]
    if len(files) < len(every):
        hidden = counted(len(every) - len(files), "hidden file")
        logger.warning("--real %s: %s left out", folder, hidden)
    if not files:
        raise ConfigError(f"--real {folder} holds no PNG, JPEG or WebP files")
    return files


def read_images(files: Sequence[Path]) -> Images:
    """Decode image files while they are read."""
    return Images(len(files), lambda: (decode_image(f.read_bytes(), str(f)) for f in files))


def _batches(images: Iterable[Pixels]) -> Iterator[Tensor]:
    """Yield uint8 [B, 3, H, W]; consecutive images of one size share a batch."""
    for _, group in groupby(images, key=lambda image: image.shape):
        while batch := list(islice(group, BATCH)):
            yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()
