"""Score by the probability that a vision-language model says yes: VQAScore.

Source: Lin et al., Evaluating Text-to-Visual Generation with Image-to-Text Generation, 2024,
https://arxiv.org/abs/2404.01291; question and answer as in
https://github.com/linzhiqiu/t2v_metrics, models/vqascore_models/qwen3vl_model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from inversion_dpo.evaluation.scorers.asking import READ, Asking, Images
from inversion_dpo.evaluation.scorers.preprocess import Pixels

VQA = "vqa"
QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
ANSWER = "Yes"
SCORES = (VQA, f"{VQA}_read")


class VqaScorer(Asking):
    """(images, prompts) -> vqa, the probability of "Yes", and vqa_read, each [B].

    An answer without a probability for yes or no scores 0, and vqa_read is 0.
    """

    name = VQA

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> dict[str, Any]:
        """Score uint8 images [H, W, 3]."""
        questions = [QUESTION.format(prompt) for prompt in prompts]
        jobs = [((image,), text) for image, text in zip(images, questions, strict=True)]
        results = self.each(jobs)
        return {
            VQA: np.array([result["yes"] for result in results]),
            f"{VQA}_read": np.array([float(not result[READ]) for result in results]),
        }

    def ask(self, images: Images, text: str) -> dict[str, Any]:
        """Ask for the probability of "Yes"."""
        yes = self.backend.starts(images, text, ANSWER)
        return {"yes": yes or 0.0, READ: "" if yes is not None else "neither yes nor no"}
