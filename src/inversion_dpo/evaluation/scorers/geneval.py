"""Score with GenEval: Mask2Former finds objects, CLIP names their colours, a rule decides.

Source: Ghosh et al., GenEval, 2023, https://arxiv.org/abs/2310.11513; code (MIT):
https://github.com/djghosh13/geneval, evaluation/evaluate_images.py. Detections are made of the
network's masks as mmdet 2.x does, MaskFormerFusionHead.instance_postprocess. The authors' weights
are mmdet's own training of the network, a pickle; the default is its inventors' checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import Mask2FormerForUniversalSegmentation
from transformers.image_processing_base import ImageProcessingMixin

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError, loaded
from inversion_dpo.evaluation.scorers.clip import ClipScorer
from inversion_dpo.evaluation.scorers.geneval_rule import (
    CLASSES,
    COLOURS,
    THRESHOLD,
    Detection,
    coloured,
    kept,
    verdict,
)
from inversion_dpo.evaluation.scorers.preprocess import Pixels, centre_crops, normalised

logger = logging.getLogger(__name__)
MOST = 100  # detections of an image
MULTIPLE = 32  # of the padded image's sides
SIZE = {"shortest_edge": 800, "longest_edge": 1333}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (153, 153, 153)  # around an object whose colour is asked
TEMPLATES = ("a photo of a {0} {1}", "a photo of a {0}-colored {1}", "a photo of a {0} object")


class GenEvalScorer:
    """(images, prompts) -> 1 where an image is as its prompt asks, else 0: [B].

    Args:
        checkpoint: a Mask2Former of COCO's 80 classes.
        clip: names the colours.
        asked: prompt -> its row of GenEval's metadata.
        device: of both networks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        clip: Checkpoint,
        asked: Callable[[str], Mapping[str, Any]],
        device: torch.device | str = "cpu",
    ):
        self.checkpoint, self.asked, self.device = checkpoint, asked, device
        self.clip = ClipScorer(clip, device)
        self.reasons: list[str] = []  # of images that are not as asked
        self.seen = 0

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score uint8 images [H, W, 3]."""
        results = [
            self.judged(image, self.asked(p)) for image, p in zip(images, prompts, strict=True)
        ]
        self.seen += len(results)
        self.reasons += [
            f"{p[:60]!r}: {text}" for p, (_, text) in zip(prompts, results, strict=True) if text
        ]
        return np.array([float(right) for right, _ in results])

    def judged(self, image: Pixels, asked: Mapping[str, Any]) -> tuple[bool, str]:
        """Find objects, name the colours that are asked for, and apply the rule."""
        found = kept(self.detections(image), str(asked.get("tag")))
        groups = coloured(asked, found)
        colours = {name: self.colours(image, name, group) for name, group in groups.items()}
        return verdict(asked, found, colours)

    def conclude(self) -> None:
        """Log how many images were not as asked, and why the first ones were not."""
        if self.reasons:
            text, first = "geneval: %d of %d images are not as asked; %s", self.reasons[:3]
            logger.info(text, len(self.reasons), self.seen, "; ".join(first))

    @cached_property
    def network(self) -> Any:
        """The detector; ScorerError if its classes are not COCO's 80."""
        network = loaded(Mask2FormerForUniversalSegmentation, self.checkpoint)
        names = network.config.id2label
        if len(names) != len(CLASSES) or names[0] not in (CLASSES[0], "LABEL_0"):
            reason = (
                f"it has {len(names)} classes beginning with {names[0]!r}, not COCO's 80 things"
            )
            raise ScorerError(self.checkpoint.complaint(reason))
        return network.to(self.device)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The checkpoint's sizes and channel statistics; the authors' where it states none."""
        own: dict[str, Any] = {}
        if self.checkpoint.has("preprocessor_config.json"):
            own, _ = ImageProcessingMixin.get_image_processor_dict(**self.checkpoint.arguments)
        size = own.get("size", SIZE)
        size = size if isinstance(size, dict) and {*SIZE} <= {*size} else SIZE
        return {"mean": own.get("image_mean", MEAN), "std": own.get("image_std", STD), **size}

    def detections(self, image: Pixels) -> list[Detection]:
        """Detect objects in an image uint8 [H, W, 3], with boxes and masks in its own pixels."""
        pixels, (height, width) = self.pixels(image)
        with torch.no_grad():
            out = self.network(pixel_values=pixels.to(self.device))
        scores = out.class_queries_logits[0].softmax(dim=-1)[:, :-1].flatten()
        scores, places = scores.topk(min(MOST, len(scores)))
        likely = scores > THRESHOLD  # a mask's own score can only lower it
        scores, places = scores[likely], places[likely]
        masks = out.masks_queries_logits[:, places // len(CLASSES)]
        if not len(scores):
            return []
        masks = resized(masks, (pixels.shape[2], pixels.shape[3]))[:, :, :height, :width]
        masks = resized(masks, (image.shape[0], image.shape[1]))[0]
        inside = masks > 0
        sure = (masks.sigmoid() * inside).sum(dim=(1, 2)) / (inside.sum(dim=(1, 2)) + 1e-6)
        return [
            Detection(CLASSES[place % len(CLASSES)], score, box_of(mask), mask)
            for place, score, mask in zip(
                places.tolist(), (scores * sure).tolist(), inside.cpu().numpy(), strict=True
            )
            if mask.any()
        ]

    def pixels(self, image: Pixels) -> tuple[Tensor, tuple[int, int]]:
        """Resize as mmdet does, normalise, pad below and right; also the size before padding."""
        settings, sides = self.settings, image.shape[:2]
        scale = min(settings["longest_edge"] / max(sides), settings["shortest_edge"] / min(sides))
        height, width = (int(side * scale + 0.5) for side in sides)
        whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        pixels = resized(whole, (height, width)).round() / 255
        pixels = normalised(pixels, settings["mean"], settings["std"])
        return functional.pad(pixels, (0, -width % MULTIPLE, 0, -height % MULTIPLE)), (
            height,
            width,
        )

    def colours(self, image: Pixels, name: str, group: Sequence[Detection]) -> list[str]:
        """Name the colour of each detection: CLIP sees the object alone, cut out, on grey."""
        picture, grey = Image.fromarray(image), Image.new("RGB", image.shape[1::-1], GREY)
        cut = [
            np.asarray(Image.composite(picture, grey, Image.fromarray(d.mask)).crop(d.box))
            for d in group
            if d.mask is not None
        ]
        size = self.clip.model.config.vision_config.image_size
        with torch.no_grad():
            pixels = centre_crops(cut, size, True, *self.clip.statistics)
            seen = functional.normalize(self.clip.image_embeddings(pixels), dim=-1)
            best = (seen @ self.words(name).T).argmax(dim=1)
        return [COLOURS[k] for k in best.tolist()]

    def words(self, name: str) -> Tensor:
        """Embed each colour of a class, the normalised mean of three sentences: [10, D]."""
        texts = [t.format(colour, name) for colour in COLOURS for t in TEMPLATES]
        each = functional.normalize(self.clip.text_embeddings(self.clip.tokens(texts)), dim=-1)
        return functional.normalize(each.unflatten(0, (len(COLOURS), -1)).mean(dim=1), dim=-1)


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate [B, C, H, W] bilinearly, without antialiasing."""
    return functional.interpolate(pixels, size, mode="bilinear", align_corners=False)


def box_of(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a mask that is not empty; right and bottom outside."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
