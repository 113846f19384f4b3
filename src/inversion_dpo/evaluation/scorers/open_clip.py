"""Convert weights in the names of other libraries for models of transformers.

open_clip (https://github.com/mlfoundations/open_clip) keeps query, key and value of an attention in
one matrix, transformers keeps three. All other weights only change their names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError

# (pattern, replacement), applied in this order to every name
RENAMED = (
    (r"^(?:module\.|model\.)", ""),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
)
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")
LEFT_OUT = re.compile(r"(?:attn_mask|position_ids|image_mean|image_std)$")


def to_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename open_clip's weights and split each attention's matrix in three."""
    ours: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        name = renamed(key, RENAMED)
        if LEFT_OUT.search(name):
            continue
        if packed := re.fullmatch(r"(.*\.self_attn)\.in_proj_(weight|bias)", name):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                ours[f"{packed[1]}.{part}_proj.{packed[2]}"] = third.contiguous()
        else:
            ours[name] = tensor.T.contiguous() if name in TRANSPOSED else tensor
    return ours


def renamed(name: str, table: Sequence[tuple[str, str]]) -> str:
    """Apply every (pattern, replacement) in turn."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def layers(names: Iterable[str], prefix: str) -> int:
    """Count the layers whose weights begin with ``prefix`` and a number."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def clip_of(weights: dict[str, Tensor], checkpoint: Checkpoint, fault: str) -> Any:
    """Build transformers' CLIP of renamed weights, whose shapes give its settings.

    Args:
        weights: by transformers' names.
        checkpoint: where they come from.
        fault: what is wrong where they do not fit, for the ScorerError.
    """
    try:
        model: Any = CLIPModel(vit_h_settings(weights)).eval().requires_grad_(False)
        model.load_state_dict(weights)
    except (ArithmeticError, KeyError, RuntimeError, ValueError) as error:
        reason = f"{fault} ({' '.join(str(error).split())[:200]})"
        raise ScorerError(checkpoint.complaint(reason)) from error
    return model


def vit_h_settings(weights: dict[str, Tensor]) -> Any:
    """Derive the CLIPConfig from renamed weights; heads as wide as ViT-H's, act ``gelu``."""
    vision, text = "vision_model.", "text_model."
    patch = weights[vision + "embeddings.patch_embedding.weight"]
    positions = len(weights[vision + "embeddings.position_embedding.weight"]) - 1
    vocabulary = weights[text + "embeddings.token_embedding.weight"]
    projection = len(weights["visual_projection.weight"])
    return CLIPConfig(
        projection_dim=projection,
        vision_config=_tower(weights, vision, len(patch), head=80)
        | {"patch_size": patch.shape[-1], "projection_dim": projection}
        | {"image_size": patch.shape[-1] * math.isqrt(positions)},
        text_config=_tower(weights, text, vocabulary.shape[1], head=64)
        | {"vocab_size": len(vocabulary), "projection_dim": projection}
        | {"max_position_embeddings": len(weights[text + "embeddings.position_embedding.weight"])}
        | {"eos_token_id": len(vocabulary) - 1, "bos_token_id": len(vocabulary) - 2},
    )


def _tower(weights: dict[str, Tensor], tower: str, width: int, head: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers(weights, f"{tower}encoder.layers."),
        "num_attention_heads": width // head,
        "intermediate_size": len(weights[f"{tower}encoder.layers.0.mlp.fc1.weight"]),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }
