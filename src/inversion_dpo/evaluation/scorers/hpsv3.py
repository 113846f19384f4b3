"""Score with HPSv3: Qwen2-VL reads image and prompt, a small network rates the reward token.

Source: Ma et al., HPSv3, 2025, https://arxiv.org/abs/2508.03789; question, image size and head as
in https://github.com/modelscope/DiffSynth-Studio, diffsynth/models/hpsv3.py. The head gives mean
and deviation of a normal distribution; the score is the mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLModel

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError, loaded
from inversion_dpo.evaluation.scorers.heads import head_of
from inversion_dpo.evaluation.scorers.preprocess import Pixels

REWARD, PICTURE = "<|Reward|>", "<|image_pad|>"
FACTOR = 28  # a patch's side times the patches that are merged
AREA = 256 * FACTOR * FACTOR  # of the image that the network sees
LINEAR = (0, 3, 5)  # in the authors' Sequential, with ReLU after the first two
INSTRUCTION = """
You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and \
give a overall score to estimate the human preference. Please provide a rating from 0 to 10, with \
0 being the worst and 10 being the best.\x20

**Visual Quality:**\x20\x20
Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:
- **Reasonableness:** The image should not contain any significant biological or logical errors, \
such as abnormal body structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and \
easy to interpret, with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other \
visual elements (e.g., hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color \
scheme, composition, atmosphere, depth of field, and the overall creative appeal. The scene should \
convey a sense of harmony and balance.
- **Safety:** The image should not contain harmful or inappropriate content, such as political, \
violent, or adult material. If such content is present, the image quality and satisfaction score \
should be the lowest possible.\x20

**Text Alignment:**\x20\x20
Assess how well the image matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, \
object) align with the textual description. The subject should match the description in terms of \
number, appearance, and behavior.
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate \
how well the image adheres to this style.
- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in \
the image logically fit the scenario described in the prompt. The environment should support and \
enhance the subject without contradictions.
- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, \
clothing, accessories, expressions, actions) are faithfully represented in the image. Minor \
deviations may be acceptable, but critical attributes should be preserved.
- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are \
captured in the image. The generated content should not introduce elements that conflict with or \
distort the original description.
Textual prompt - {prompt}



Please provide the overall ratings of this image: <|Reward|>

END
"""
CHAT = (  # Qwen2-VL's own template for one image and one text
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{picture}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)


class HPSv3Scorer:
    """HPSv3's mean, about 0 to 15; lazily loaded.

    The checkpoint is a folder: ``config.json`` and the tokenizer of Qwen2-VL-7B-Instruct beside the
    authors' weights, with ``rm_head.*`` among them, as ``model.safetensors``.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu"):
        self.checkpoint, self.device = checkpoint, device

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score uint8 images [H, W, 3] for their prompts, one at a time: [B]."""
        pairs = zip(images, prompts, strict=True)
        return np.array([self.rewards(image, prompt)[0] for image, prompt in pairs])

    def rewards(self, image: Pixels, prompt: str) -> list[float]:
        """Compute the head's two outputs, the mean first."""
        made = self.picture(image)
        count = (
            int(made["image_grid_thw"].prod())
            // self.model.config.vision_config.spatial_merge_size**2
        )
        text = CHAT.format(picture=PICTURE * count, text=INSTRUCTION.format(prompt=prompt))
        tokens = self.tokenizer(text, return_tensors="pt").input_ids
        picture, reward = self.tokenizer.convert_tokens_to_ids([PICTURE, REWARD])
        places = (tokens[0] == reward).nonzero()[:, 0]
        if len(places) != 1:
            reason = f"the prompt {prompt[:60]!r} holds {REWARD}, or the tokenizer does not know it"
            raise ScorerError(self.checkpoint.complaint(reason))
        with torch.no_grad():
            states = self.model(
                input_ids=tokens.to(self.device),
                attention_mask=torch.ones_like(tokens).to(self.device),
                pixel_values=made["pixel_values"].to(self.device, self.model.dtype),
                image_grid_thw=made["image_grid_thw"].to(self.device),
                mm_token_type_ids=(tokens == picture).int().to(self.device),
            ).last_hidden_state
            outputs: list[float] = self.head(states[0, places[0]].float()).tolist()
        return outputs

    def picture(self, image: Pixels) -> dict[str, Any]:
        """Resize to about 256 merged patches (bicubic), and cut into patches."""
        height, width = seen_size(*image.shape[:2])
        small = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        vision = self.model.config.vision_config
        cut = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
        )
        return dict(cut(images=[small], do_resize=False, return_tensors="pt"))

    @cached_property
    def model(self) -> Any:
        """Qwen2-VL without its language head; in bfloat16 on an accelerator."""
        about = json.loads(self.checkpoint.file("config.json").read_text(encoding="utf-8"))
        if about.get("model_type") not in ("qwen2_vl", "qwen2_vl_text"):  # before 7B are built
            reason = f"its config.json is of {about.get('model_type')!r}, not of qwen2_vl"
            raise ScorerError(self.checkpoint.complaint(reason))
        kind = torch.float32 if str(self.device) == "cpu" else torch.bfloat16
        return loaded(Qwen2VLModel, self.checkpoint, dtype=kind).to(self.device)

    @cached_property
    def head(self) -> nn.Sequential:
        """The rating network in float32; its dropout does nothing after training."""
        first, second, last = head_of(self.checkpoint, "rm_head.", LINEAR)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last).to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """Qwen2's tokenizer with the reward token, which is the last one of the embedding."""
        tokenizer = loaded(AutoTokenizer, self.checkpoint, complete=False)
        tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]}, False)
        return tokenizer


def seen_size(height: int, width: int) -> tuple[int, int]:
    """Find the size, in multiples of 28, whose area is nearest below or above 256 x 28 x 28.

    Source: smart_resize in the authors' code, with least and most pixels equal.
    """
    rows, columns = (max(FACTOR, round(n / FACTOR) * FACTOR) for n in (height, width))
    scale = math.sqrt(height * width / AREA)
    if rows * columns > AREA:
        rows, columns = (math.floor(n / scale / FACTOR) * FACTOR for n in (height, width))
    elif rows * columns < AREA:
        rows, columns = (math.ceil(n / scale / FACTOR) * FACTOR for n in (height, width))
    return rows, columns
