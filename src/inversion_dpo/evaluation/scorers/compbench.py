"""Score as T2I-CompBench does attributes: BLIP answers whether each noun phrase is in the image.

Source: Huang et al., T2I-CompBench, 2023, https://arxiv.org/abs/2307.06350; code (MIT):
https://github.com/Karine-Huang/T2I-CompBench, BLIPvqa_eval. Spatial relations: see
:mod:`compbench_spatial`. Those in depth and the mean of three for complex prompts are not offered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BertTokenizerFast, BlipForQuestionAnswering

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError, loaded
from inversion_dpo.evaluation.scorers.preprocess import MEAN, STD, Pixels, squares

PHRASES = 8  # of a prompt, at most
WORDS, TOKENS = 50, 35  # of a question, at most
IGNORED = re.compile(r"[.!\"()*#:;~]")


class CompBenchScorer:
    """(images, prompts) -> the product of the probabilities of "yes" to each noun phrase: [B].

    Args:
        checkpoint: transformers' BLIP for questions about images.
        asked: prompt -> its noun phrases.
        device: of the network.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        asked: Callable[[str], Sequence[str]],
        device: torch.device | str = "cpu",
    ):
        self.checkpoint, self.asked, self.device = checkpoint, asked, device

    def __call__(self, images: Sequence[Pixels], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Score uint8 images [H, W, 3]; a prompt without a noun phrase scores 1, as there."""
        questions = [[question(text) for text in self.asked(p)[:PHRASES]] for p in prompts]
        with torch.no_grad():
            states = self.network.vision_model(pixel_values=self.pixels(images)).last_hidden_state
            yes = [
                float(np.prod([self.yes(state, text) for text in texts]))
                for state, texts in zip(states, questions, strict=True)
            ]
        return np.array(yes, dtype=np.float64)

    @cached_property
    def network(self) -> Any:
        """BLIP; ScorerError if its vocabulary has no place for its two marks."""
        network = loaded(BlipForQuestionAnswering, self.checkpoint)
        text = network.config.text_config
        if text.bos_token_id != text.vocab_size - 2:
            reason = "its vocabulary does not end with BLIP's marks of an answer and a question"
            raise ScorerError(self.checkpoint.complaint(reason))
        return network.to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """BERT's tokenizer."""
        return loaded(BertTokenizerFast, self.checkpoint, complete=False)

    def pixels(self, images: Sequence[Pixels]) -> Tensor:
        """Resize to a square whatever the sides, Pillow's bicubic, and normalise: [B, 3, S, S]."""
        side = self.network.config.vision_config.image_size
        return squares(images, side, MEAN, STD).to(self.device)

    def yes(self, state: Tensor, question: str) -> float:
        """Compute p(yes) / (p(yes) + p(no)) of the first token of the answer.

        One question at a time: padding would change what transformers' BLIP reads.

        Args:
            state: of the image [N, D].
            question: see :func:`question`.
        """
        text, network = self.network.config.text_config, self.network
        words = self.tokenizer(question, truncation=True, max_length=TOKENS, return_tensors="pt")
        words = words.input_ids.to(self.device)
        words[:, 0] = text.vocab_size - 1  # the mark of a question
        read = network.text_encoder(input_ids=words, encoder_hidden_states=state[None])[0]
        start = torch.full((1, 1), text.bos_token_id, device=self.device)
        answer = network.text_decoder(input_ids=start, encoder_hidden_states=read)
        both = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
        return float(answer.logits[0, 0, both].double().softmax(dim=-1)[0])


def question(phrase: str) -> str:
    """Word the question about a noun phrase."""
    return " ".join(IGNORED.sub("", f"{phrase}?".lower()).rstrip(" ").split(" ")[:WORDS])
