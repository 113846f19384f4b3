"""What the keys of a LoRA's file say: a part of the pipeline, a layer of it, and a matrix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from inversion_dpo.models.intact import WRAPPERS

NETWORK = (
    "lora_unet_|lora_transformer_|lycoris_|unet\\.|transformer\\.|(?:model\\.)?diffusion_model\\."
)
STARTS = {  # of a key -> the pipeline's part; which encoder is T5 depends on the pipeline
    r"lora_te3_|te3_|text_encoder_3\.|text_encoders\.t5xxl\.transformer\.": (
        "text_encoder_3",
        "text_encoder_2",
        "text_encoder",
    ),
    r"lora_te2_|te2_|text_encoder_2\.|text_encoders\.clip_g\.transformer\.": ("text_encoder_2",),
    r"lora_te1?_|te1?_|text_encoder\.|text_encoders\.\w+\.transformer\.": ("text_encoder",),
    f"{NETWORK}|": ("unet", "transformer"),
}
WORDS = "bundle_emb."  # before embeddings of new words, by OneTrainer and AUTOMATIC1111
LANGUAGE = ("", "text_model_", "model_", "language_model_", "model_language_model_")
KEY = re.compile(
    r"(.+?)[._](?:(?P<A>lora_A|lora_down|lora\.down|lora_linear_layer\.down|(?<=lora[12]\.)down)"
    r"|(?P<B>lora_B|lora_up|lora\.up|lora_linear_layer\.up|(?<=lora[12]\.)up)"
    r"|(?P<own>lora_magnitude_vector|dora_scale|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))"
    r"|(?:lora\.down\.weight\.|lora\.down\.|lora_linear_layer\.down\.weight\.)?(?P<alpha>alpha))"
    r"(?:\.(?!weight|bias)\w+)?(?:\.weight)?"
)


def bare_of(key: str) -> tuple[tuple[str, ...], str]:
    """Cut off a key's start: the parts of a pipeline that it may be for, and the rest."""
    bare = WRAPPERS.sub("", key).removeprefix("base_model.model.")
    start, parts = next((s, p) for s, p in STARTS.items() if re.match(s, bare))
    return parts, re.sub(f"^(?:{start})", "", bare).removeprefix("base_model.model.")


def split(key: str) -> tuple[tuple[str, ...], re.Match[str] | None]:
    """Split a key into the parts of a pipeline that it may be for, and layer and matrix."""
    parts, name = bare_of(key)
    return parts, KEY.fullmatch(name)


def part_of(pipeline: Any, parts: Sequence[str]) -> str | None:
    """Choose the first part that a pipeline's class has, loaded or not."""
    return next((part for part in parts if hasattr(pipeline, part)), None)


def flat_of(layer: str) -> str:
    """Write a layer's name with underscores for its dots."""
    return layer.replace(".", "_").replace("_processor_", "_")


def spellings(layer: str) -> Iterator[str]:
    """Yield what a layer may be called in the pipeline, dots as underscores."""
    flat = re.sub("self_attn_to_(q|k|v|out)$", r"self_attn_\1_proj", flat_of(layer))
    bare = flat.removeprefix(max((n for n in LANGUAGE if flat.startswith(n)), key=len))
    for name in (flat, *(start + bare for start in LANGUAGE)):
        yield name
        yield f"{name}_0"  # to_out was a list later
