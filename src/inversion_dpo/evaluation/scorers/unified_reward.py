"""Score and compare with UnifiedReward 2.0, a vision-language model that rates images in words.

Source: Wang et al., Unified Reward Model for Multimodal Understanding and Generation, 2025,
https://arxiv.org/abs/2503.05236; questions as in https://github.com/CodeGoat24/UnifiedReward,
inference_qwen/UnifiedReward-2.0-inference. It is usually served: the weights have 8B parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.evaluation.scorers.asking import READ, Asking, Images
from inversion_dpo.evaluation.scorers.preprocess import Pixels

UNIFIED, PAIR = "unifiedreward", "unifiedreward-pair"
AXES = ("alignment", "coherence", "style")
SCORES = (UNIFIED, *(f"{UNIFIED}_{axis}" for axis in (*AXES, "read")))
LOWEST, HIGHEST = 1.0, 5.0
POINT = """You are presented with a generated image and its associated text caption. \
Your task is to analyze the image across multiple dimensions in relation to the caption. \
Specifically:
Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object \
distortions, etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: [{}]"""
COMPARE = """You are presented with two generated images (Image 1 and Image 2) along with a \
shared text caption. Your task is to comparatively evaluate the two images across three specific \
dimensions:

- Alignment Score: How well each image matches the caption in terms of content.
- Coherence Score: How logically consistent and visually coherent each image is (absence of \
visual glitches, distorted objects, etc.).
- Style Score: How aesthetically appealing each image is, regardless of caption accuracy.

For each dimension, you must assign a relative score to Image 1 and Image 2, such that:
- Each score is a float between 0 and 1 (inclusive).
- The scores for Image 1 and Image 2 must sum to exactly 1.0 for each dimension.
- The higher the score, the better that image is in the corresponding dimension *relative to the \
other*.

This format emphasizes comparative quality rather than absolute evaluation.

Please provide your evaluation in the format below:

Alignment Score:
 Image 1: X
 Image 2: Y

Coherence Score:
 Image 1: X
 Image 2: Y

Style Score:
 Image 1: X
 Image 2: Y

Your task is provided as follows:
Text Caption: [{}]"""
# a number that ends there: not 3 of "3,5" or 1 of "1e9"
NUMBER = r"([-+]?\d*\.?\d+)(?![\d.,]*\d|[^\W\d_]|%)"


class UnifiedRewardScorer(Asking):
    """(images, prompts) -> unifiedreward, its three axes from 1 to 5, and whether it was read.

    unifiedreward is the mean of alignment, coherence and style. An answer that misses an axis, or
    leaves the scale, has 1 in all, and unifiedreward_read is 0.
    """

    name = UNIFIED

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> dict[str, Any]:
        """Score uint8 images [H, W, 3]."""
        jobs = [((i,), POINT.format(p)) for i, p in zip(images, prompts, strict=True)]
        results = self.each(jobs)
        axes = {axis: np.array([result.get(axis, LOWEST) for result in results]) for axis in AXES}
        named = {f"{UNIFIED}_{axis}": values for axis, values in axes.items()}
        read = np.array([float(not result[READ]) for result in results])
        return {UNIFIED: _mean(axes), **named, f"{UNIFIED}_read": read}

    def ask(self, images: Images, text: str) -> dict[str, Any]:
        """Ask for the ratings."""
        reply = self.backend.say(images, text)
        return read_point(reply.text) if not reply.fault else {READ: reply.fault}


class PairJudge(Asking):
    """Compare two images of a prompt, in both orders, since such models prefer a place."""

    name = PAIR

    def __call__(
        self, first: Sequence[Pixels], second: Sequence[Pixels], prompts: Sequence[str]
    ) -> dict[str, Any]:
        """Return the second images' share of each axis and of their mean, [n]; 0.5 is even.

        ``read`` tells which pairs had an answer in both orders; the others have 0.5.
        """
        texts = [COMPARE.format(prompt) for prompt in prompts]
        there = [(pair, t) for *pair, t in zip(first, second, texts, strict=True)]
        back = [((b, a), t) for (a, b), t in there]
        answers = self.each([*there, *back])
        both = list(zip(answers[: len(there)], answers[len(there) :], strict=True))
        read = np.array([not a[READ] and not b[READ] for a, b in both])
        shares = {
            axis: np.array([0.5 + (b.get(axis, 0.5) - a.get(axis, 0.5)) / 2 for a, b in both])
            for axis in AXES
        }
        shares = {axis: np.where(read, values, 0.5) for axis, values in shares.items()}
        return {PAIR: _mean(shares), **shares, READ: read}

    def ask(self, images: Images, text: str) -> dict[str, Any]:
        """Ask for the shares."""
        reply = self.backend.say(images, text)
        return read_pair(reply.text) if not reply.fault else {READ: reply.fault}


def _mean(axes: Mapping[str, NDArray[np.float64]]) -> Any:
    """Average, rounded so that what is even is a tie, in whatever order it is added."""
    return np.asarray(np.mean(list(axes.values()), axis=0)).round(9)


def read_point(text: str) -> dict[str, Any]:
    """Read three ratings from 1 to 5, or name the fault; nothing is guessed."""
    found: dict[str, Any] = {}
    for axis in AXES:
        label = rf"{axis} score\s*(?:\([^)]+\))?\s*[:\uff1a]\s*{NUMBER}"
        numbers = re.findall(label, text.replace("*", ""), flags=re.IGNORECASE)
        if not numbers:
            return {READ: f"no {axis}"}
        found[axis] = float(numbers[0])
        if not LOWEST <= found[axis] <= HIGHEST:
            return {READ: f"{axis} off the scale"}
    return found | {READ: ""}


def read_pair(text: str) -> dict[str, Any]:
    """Read the first image's share of each axis, or name the fault.

    The two shares of an axis must sum to 1, within rounding.
    """
    found: dict[str, Any] = {}
    for axis in AXES:
        label = rf"{axis} score\s*[:\uff1a]\s*image 1\s*[:\uff1a]\s*{NUMBER}\s*[,;]?\s*"
        label += rf"image 2\s*[:\uff1a]\s*{NUMBER}"
        numbers = re.findall(label, text.replace("*", ""), flags=re.IGNORECASE)
        if not numbers:
            return {READ: f"no {axis}"}
        one, two = map(float, numbers[0])
        if min(one, two) < 0 or not math.isclose(one + two, 1, abs_tol=0.02):
            return {READ: f"{axis} does not sum to 1"}
        found[axis] = one / (one + two)
    return found | {READ: ""}
