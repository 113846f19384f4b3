"""Score T2I-CompBench's spatial relations: OWLv2 finds two objects, the authors' rule decides.

The rule is in :mod:`compbench_rule`. The authors find objects with UniDet, whose weights are
pickles for a fork of detectron2. So these scores do not compare with published ones.
OWLv2: Minderer et al., Scaling Open-Vocabulary Object Detection, 2023,
https://arxiv.org/abs/2306.09683.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer, Owlv2ForObjectDetection

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, loaded
from inversion_dpo.evaluation.scorers.compbench_rule import Asked, score_of, size_of
from inversion_dpo.evaluation.scorers.geneval_rule import Detection
from inversion_dpo.evaluation.scorers.preprocess import MEAN, STD, Pixels, normalised

QUERY = "a photo of a {}"
SURE = 0.1  # a box's score must be above; OWLv2's usual one in transformers (UniDet's is 0.5)


class SpatialScorer:
    """(images, prompts) -> how surely both objects are there and stand as asked, in [0, 1]: [B].

    Args:
        checkpoint: transformers' OWLv2.
        asked: prompt -> its two objects and their relation.
        device: of the network.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        asked: Callable[[str], Asked],
        device: torch.device | str = "cpu",
    ):
        self.checkpoint, self.asked, self.device = checkpoint, asked, device

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score uint8 images [H, W, 3]."""
        asked = [self.asked(prompt) for prompt in prompts]
        both = zip(images, asked, strict=True)
        return np.array([score_of(a, self.best(i, (a.first, a.second))) for i, a in both])

    @cached_property
    def network(self) -> Any:
        """The detector."""
        return loaded(Owlv2ForObjectDetection, self.checkpoint).to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """CLIP's tokenizer."""
        return loaded(CLIPTokenizer, self.checkpoint, complete=False)

    def best(self, image: Pixels, names: Sequence[str]) -> dict[str, Detection]:
        """Return the surest detection of each name that is found.

        Each box is of the likelier name. Boxes are in pixels of an image of the authors' size, cut
        at its borders.
        """
        names = list(dict.fromkeys(names))
        length = self.network.config.text_config.max_position_embeddings
        words = self.tokenizer(
            [QUERY.format(name) for name in names],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).to(self.device)
        with torch.no_grad():
            out = self.network(
                input_ids=words.input_ids,
                attention_mask=words.attention_mask,
                pixel_values=self.pixels(image).to(self.device),
            )
        scores, labels = out.logits[0].sigmoid().double().max(dim=-1)
        long = size_of(*image.shape[:2])
        sides = torch.tensor(image.shape[1::-1]).double() * long / max(image.shape[:2])
        centres, extents = (out.pred_boxes[0].double().cpu() * long).split(2, dim=-1)
        corners = [(centres + sign * extents / 2).clamp(min=0).minimum(sides) for sign in (-1, 1)]
        found: dict[str, Detection] = {}
        for k in scores.argsort(descending=True, stable=True).tolist():
            one, other = (corner[k].tolist() for corner in corners)
            if scores[k] > SURE and one[0] < other[0] and one[1] < other[1]:
                name = names[int(labels[k])]
                found.setdefault(name, Detection(name, float(scores[k]), (*one, *other)))
        return found

    def pixels(self, image: Pixels) -> Tensor:
        """Pad below and right to a square, resize bilinearly, normalise: [1, 3, S, S]."""
        side = self.network.config.vision_config.image_size
        height, width = image.shape[:2]
        whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        square = functional.pad(whole, (0, max(0, height - width), 0, max(0, width - height)))
        square = functional.interpolate(
            square, (side, side), mode="bilinear", align_corners=False, antialias=True
        )
        return normalised(square, MEAN, STD)
