"""Prompts longer than a text encoder reads at once: in chunks, and which are cut all the same.

CLIP reads 77 tokens, two of them its marks of beginning and end. With ``chunks`` > 1 a prompt's
tokens are cut into windows of 75, each between marks of its own, encoded one by one and laid end
to end: the cross-attention of a UNet takes any length. The number of chunks is the run's, not the
prompt's: winner and loser, a short caption and the empty prompt all come out equally long, so that
they stack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLProcessor

from inversion_dpo.models.base import Condition, DiffusionModel, ModelError, joined


class ImagesAndText(Qwen2VLProcessor):  # type: ignore[misc]
    """Qwen-VL's processor without the one of videos, which needs torchvision and is not used."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Name the two parts that are loaded and saved."""
        return ["image_processor", "tokenizer"]


# a pipeline that is saved names its parts by these
ImagesAndText.__name__ = Qwen2VLProcessor.__name__
ImagesAndText.__module__ = Qwen2VLProcessor.__module__


def chunk_ids(tokenizer: Any, prompts: Sequence[str], chunks: int) -> Tensor:
    """Cut prompts into token ids [B * chunks, L]; L is what the encoder reads.

    A first chunk is what the pipelines make of the prompt; one past its end is the empty prompt.
    What does not fit into the last is cut.

    Args:
        tokenizer: CLIP's.
        prompts: B texts.
        chunks: of 75 tokens, for each prompt.
    """
    inner = tokenizer.model_max_length - 2
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        for start in range(0, inner * chunks, inner):
            window = ids[start : start + inner]
            fill = [tokenizer.pad_token_id] * (inner - len(window))
            rows.append([tokenizer.bos_token_id, *window, tokenizer.eos_token_id, *fill])
    return torch.tensor(rows)


def encode_clip(pipeline: Any, prompts: Sequence[str], chunks: int) -> Tensor:
    """Encode as Stable Diffusion 1 and 2 do: last hidden states [B, chunks * L, D].

    Args:
        pipeline: has one tokenizer and text encoder.
        prompts: B texts.
        chunks: of 75 tokens that are read of each.
    """
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    ids = chunk_ids(tokenizer, prompts, chunks)
    mask = None
    if getattr(encoder.config, "use_attention_mask", False):
        ends = (ids == tokenizer.eos_token_id).int()
        mask = (ends.cumsum(1) - ends == 0).long().to(encoder.device)  # 1 up to the first end
    hidden: Tensor = encoder(ids.to(encoder.device), attention_mask=mask)[0]
    return hidden.reshape(len(prompts), -1, hidden.shape[-1])


def encode_two_clips(pipeline: Any, prompts: Sequence[str], chunks: int) -> tuple[Tensor, Tensor]:
    """Encode as SDXL does: last hidden states but one [B, chunks * L, D], and pooled [B, E].

    The pooled one is the second encoder's of the first chunk.

    Args:
        pipeline: has two tokenizers and text encoders.
        prompts: B texts.
        chunks: of 75 tokens that are read of each.
    """
    parts = []
    for part in ("", "_2"):
        encoder = getattr(pipeline, f"text_encoder{part}")
        ids = chunk_ids(getattr(pipeline, f"tokenizer{part}"), prompts, chunks)
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
        hidden = output.hidden_states[-2]
        parts.append(hidden.reshape(len(prompts), -1, hidden.shape[-1]))
    pooled: Tensor = output[0].reshape(len(prompts), chunks, -1)[:, 0]
    return torch.cat(parts, dim=-1), pooled


def call_arguments(empty: Condition, condition: Condition) -> dict[str, Tensor]:
    """Name encoded prompts as a Stable Diffusion pipeline takes them.

    ``empty`` is what guidance leads away from, repeated for each prompt.
    """
    names = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
    found = {names[k]: v for k, v in condition.items()}
    count = len(found["prompt_embeds"])
    negative = {k: v.expand(count, *v.shape[1:]) for k, v in empty.items()}
    return found | {f"negative_{names[k]}": v for k, v in negative.items()}


def clip_reads(pipeline: Any, chunks: int = 1) -> dict[str, int]:
    """Count the tokens that each of CLIP's tokenizers reads of a prompt, marks left out."""
    own = ("tokenizer", "tokenizer_2")
    found = {n: getattr(pipeline, n, None) for n in own}
    return {n: (t.model_max_length - 2) * chunks for n, t in found.items() if t is not None}


def t5_reads(pipeline: Any, name: str, longest: int) -> dict[str, int]:
    """Count what a pipeline reads of T5's tokens, if it has T5; there is no mark of beginning.

    Args:
        pipeline: of diffusers.
        name: of T5's tokenizer in it.
        longest: tokens that the pipeline reads.
    """
    return {name: longest - 1} if getattr(pipeline, name) is not None else {}


def chat_reads(tokenizer: Any, longest: int, **how: Any) -> dict[str, int]:
    """Count what is left for a prompt of the tokens that a pipeline reads of a chat.

    Raises:
        ModelError: the tokenizer has no template of a chat.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"{tokenizer.name_or_path}: it has no chat template (chat_template.jinja, or one "
            "in tokenizer_config.json): fetch it again"
        )
    chat = [{"role": "user", "content": ""}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **how)
    return {"tokenizer": longest - len(tokenizer(text).input_ids)}


def real_tokens(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put texts [L_i, D] into one tensor [B, L, D], with a mask [B, L] of what is no padding."""
    masks = [torch.ones(1, len(row), dtype=torch.bool, device=row.device) for row in rows]
    return joined([row[None] for row in rows]), joined(masks)


def overlong_text(
    cut: Mapping[str, int], model: DiffusionModel, chunks: int | None, of: str
) -> str:
    """Say how many texts lose their end, and what to do about it; empty if none does.

    Args:
        cut: how many do, by tokenizer.
        model: that reads them.
        chunks: ``model.prompt_chunks``, None where it may not change, as a policy was trained so.
        of: number and name of all texts.
    """
    read = model.reads
    told = [f"{n} by {name} (reads {read[name]} tokens)" for name, n in cut.items() if n]
    text = f"of {of} the end is cut: {', '.join(told)}"
    if not told:
        return ""
    if not model.chunked or not chunks:
        return f"{text}; put what matters first"
    return f"{text}; model.prompt_chunks={chunks + 1} reads {read['tokenizer'] // chunks} more"


def overlong(model: DiffusionModel, prompts: Sequence[str]) -> dict[str, int]:
    """Count the prompts that lose their end, by tokenizer."""
    counts = {}
    for name, read in model.reads.items():
        given = getattr(model.pipeline, name)
        tokenizer = getattr(given, "tokenizer", given)  # of a processor of text and images
        ids = [tokenizer(p, add_special_tokens=False, verbose=False).input_ids for p in prompts]
        counts[name] = sum(len(row) > read for row in ids)
    return counts
