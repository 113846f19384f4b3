"""Ask a vision-language model of transformers, from a folder or the hub, on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError, loaded
from inversion_dpo.evaluation.scorers.endpoint import Reply, Turn
from inversion_dpo.evaluation.scorers.preprocess import Pixels


class LocalModel:
    """A model that answers greedily, one image at a time; lazily loaded, no remote code.

    Its tokens are not restricted: after an answer outside the schema it is asked once more, as a
    model behind a server is. The processor needs a chat template.
    """

    def __init__(
        self, checkpoint: Checkpoint, max_tokens: int = 1000, device: torch.device | str = "cpu"
    ) -> None:
        self.checkpoint, self.max_tokens, self.device = checkpoint, max_tokens, device

    @cached_property
    def identity(self) -> str:
        """Everything that an answer depends on besides image and question."""
        return f"{self.checkpoint.identity()} {self.max_tokens}"

    def answer(
        self, image: Pixels, system: str, turns: Sequence[Turn], schema: Mapping[str, Any]
    ) -> Reply:
        """Return the model's reply to an image uint8 [H, W, 3]; ``schema`` is not used."""
        return self._generate(self.inputs(image, system, turns))

    def say(self, images: Sequence[Pixels], text: str) -> Reply:
        """Return the model's reply to one question about images uint8 [H, W, 3]."""
        return self._generate(self.chat(images, [Turn("user", text)]))

    def starts(self, images: Sequence[Pixels], text: str, word: str) -> float:
        """Return the probability that the answer begins with the tokens of ``word``."""
        inputs = self.chat(images, [Turn("user", text)])
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        told = tokenizer(word, add_special_tokens=False, return_tensors="pt").input_ids
        told = told.to(self.device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], told], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for extra in {"token_type_ids", "mm_token_type_ids"} & set(inputs):
            inputs[extra] = torch.cat([inputs[extra], torch.zeros_like(told)], dim=1)
        count = told.shape[1]
        with torch.no_grad():
            logits = self.model(**inputs).logits[0, -count - 1 : -1].double()
        return float(logits.log_softmax(-1).gather(1, told[0][:, None]).sum().exp())

    def _generate(self, inputs: Any) -> Reply:
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            tokens = self.model.generate(
                **inputs, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1
            )[0, length:]
        text = self.processor.decode(tokens, skip_special_tokens=True)
        cut = len(tokens) >= self.max_tokens
        return Reply(text, length, len(tokens), fault="cut" if cut else "")

    def inputs(self, image: Pixels, system: str, turns: Sequence[Turn]) -> Any:
        """Make tokens and pixels of a conversation that a system message begins."""
        return self.chat([image], (Turn("system", system), *turns))

    def chat(self, images: Sequence[Pixels], turns: Sequence[Turn]) -> Any:
        """Make tokens and pixels with the processor's chat template, batch of 1."""
        messages: list[dict[str, Any]] = [
            {"role": t.role, "content": [{"type": "text", "text": t.text}]} for t in turns
        ]
        pictures = [{"type": "image", "image": Image.fromarray(image)} for image in images]
        first = next(m for m in messages if m["role"] == "user")
        first["content"][:0] = pictures
        try:
            return self.processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self.device)
        except (ValueError, TypeError, AttributeError, ImportError) as error:
            reason = f"its processor cannot read an image in a chat ({error})"
            raise ScorerError(self.checkpoint.complaint(" ".join(reason.split())[:300])) from error

    @cached_property
    def model(self) -> Any:
        """The network."""
        return loaded(AutoModelForImageTextToText, self.checkpoint).to(self.device)

    @cached_property
    def processor(self) -> Any:
        """Tokenizer, image processor and chat template."""
        return loaded(AutoProcessor, self.checkpoint, complete=False)
