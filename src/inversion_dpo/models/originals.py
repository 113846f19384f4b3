"""Names of the original networks' layers, which kohya's programs and ComfyUI write, beside ours.

Some original layers are several of diffusers', whose weights lie below one another. Sources:
https://github.com/kohya-ss/sd-scripts (networks/convert_flux_lora.py, networks/lora_sd3.py),
https://github.com/kohya-ss/musubi-tuner, https://github.com/XLabs-AI/x-flux (the last of FLUX.1's
names) and diffusers' converters of whole networks.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models.normalization import AdaLayerNormContinuous
from torch import nn

Names = dict[str, tuple[str, ...]]  # original name, _ for . -> modules, below one another
Table = dict[str, tuple[str, Names]]  # diffusers' list of blocks -> the original's, and its names
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
TIME = "time_text_embed.timestep_embedder.linear_"
POOLED = "time_text_embed.text_embedder.linear_"

ATTENTION: Names = {
    "img_attn_qkv": QKV,
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_qkv": TEXT_QKV,
    "txt_attn_proj": ("attn.to_add_out",),
}
DOUBLE: Names = ATTENTION | {
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
    "qkv_lora1": QKV,
    "qkv_lora2": TEXT_QKV,
    "proj_lora1": ("attn.to_out.0",),
    "proj_lora2": ("attn.to_add_out",),
}
SINGLE: Names = {
    "linear1": (*QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
    "qkv": QKV,
    "proj": ("proj_out",),
}
FLUX: Table = {
    "transformer_blocks": ("double_blocks_", DOUBLE),
    "single_transformer_blocks": ("single_blocks_", SINGLE),
}
FLUX_TOP: Names = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in_in_layer": (f"{TIME}1",),
    "time_in_out_layer": (f"{TIME}2",),
    "vector_in_in_layer": (f"{POOLED}1",),
    "vector_in_out_layer": (f"{POOLED}2",),
    "guidance_in_in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in_out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer_linear": ("proj_out",),
    "final_layer_adaLN_modulation_1": ("norm_out.linear",),
}
FLUX_2: Table = {
    "transformer_blocks": (
        "double_blocks_",
        ATTENTION
        | {
            "img_mlp_0": ("ff.linear_in",),
            "img_mlp_2": ("ff.linear_out",),
            "txt_mlp_0": ("ff_context.linear_in",),
            "txt_mlp_2": ("ff_context.linear_out",),
        },
    ),
    "single_transformer_blocks": (
        "single_blocks_",
        {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
    ),
}
EMBED = "time_guidance_embed."
FLUX_2_TOP: Names = FLUX_TOP | {
    "time_in_in_layer": (f"{EMBED}timestep_embedder.linear_1",),
    "time_in_out_layer": (f"{EMBED}timestep_embedder.linear_2",),
    "guidance_in_in_layer": (f"{EMBED}guidance_embedder.linear_1",),
    "guidance_in_out_layer": (f"{EMBED}guidance_embedder.linear_2",),
    "double_stream_modulation_img_lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt_lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation_lin": ("single_stream_modulation.linear",),
}
SD3: Names = {
    "x_block_attn_qkv": QKV,
    "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
    "context_block_attn_qkv": TEXT_QKV,
    "context_block_attn_proj": ("attn.to_add_out",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
    "context_block_adaLN_modulation_1": ("norm1_context.linear",),
}
SD3_TOP: Names = {
    "x_embedder_proj": ("pos_embed.proj",),
    "t_embedder_mlp_0": (f"{TIME}1",),
    "t_embedder_mlp_2": (f"{TIME}2",),
    "y_embedder_mlp_0": (f"{POOLED}1",),
    "y_embedder_mlp_2": (f"{POOLED}2",),
    "final_layer_linear": ("proj_out",),
    "final_layer_adaLN_modulation_1": ("norm_out.linear",),
}
WAN: Table = {
    "blocks": (
        "blocks_",
        {
            **{f"self_attn_{n}": (f"attn1.to_{n}",) for n in "qkv"},
            "self_attn_o": ("attn1.to_out.0",),
            **{f"cross_attn_{n}": (f"attn2.to_{n}",) for n in "qkv"},
            "cross_attn_o": ("attn2.to_out.0",),
            "ffn_0": ("ffn.net.0.proj",),
            "ffn_2": ("ffn.net.2",),
        },
    )
}
WAN_TOP: Names = {
    "text_embedding_0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding_2": ("condition_embedder.text_embedder.linear_2",),
    "time_embedding_0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding_2": ("condition_embedder.time_embedder.linear_2",),
    "time_projection_1": ("condition_embedder.time_proj",),
    "head_head": ("proj_out",),
}
SANA: Table = {
    "transformer_blocks": (
        "blocks_",
        {
            "attn_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
            "attn_proj": ("attn1.to_out.0",),
            "cross_attn_q_linear": ("attn2.to_q",),
            "cross_attn_kv_linear": ("attn2.to_k", "attn2.to_v"),
            "cross_attn_proj": ("attn2.to_out.0",),
            "mlp_inverted_conv_conv": ("ff.conv_inverted",),
            "mlp_depth_conv_conv": ("ff.conv_depth",),
            "mlp_point_conv_conv": ("ff.conv_point",),
        },
    )
}
SANA_TOP: Names = {
    "x_embedder_proj": ("patch_embed.proj",),
    "t_embedder_mlp_0": ("time_embed.emb.timestep_embedder.linear_1",),
    "t_embedder_mlp_2": ("time_embed.emb.timestep_embedder.linear_2",),
    "t_block_1": ("time_embed.linear",),
    "y_embedder_y_proj_fc1": ("caption_projection.linear_1",),
    "y_embedder_y_proj_fc2": ("caption_projection.linear_2",),
    "final_layer_linear": ("proj_out",),
}
REFINED = ("layers", "noise_refiner", "context_refiner")  # lists of blocks
LUMINA: Names = {
    "attention_qkv": QKV,
    "attention_out": ("attn.to_out.0",),
    **{f"feed_forward_w{n}": (f"feed_forward.linear_{n}",) for n in "123"},
    "adaLN_modulation_1": ("norm1.linear",),
}
LUMINA_2: Table = {name: (f"{name}_", LUMINA) for name in REFINED}
Z_IMAGE: Names = {
    "attention_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention_out": ("attention.to_out.0",),
}
Z_IMAGE_TOP: Names = {
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer_linear": ("all_final_layer.2-1.linear",),
    "final_layer_adaLN_modulation_1": ("all_final_layer.2-1.adaLN_modulation.1",),
}
KREA: Names = {
    **{f"attn_w{n}": (f"attn.to_{n}",) for n in "qkv"},
    "attn_wo": ("attn.to_out.0",),
    "attn_gate": ("attn.to_gate",),
    **{f"mlp_{n}": (f"ff.{n}",) for n in ("gate", "up", "down")},
}
KREA_2: Table = {
    "transformer_blocks": ("blocks_", KREA),
    "text_fusion.layerwise_blocks": ("txtfusion_layerwise_blocks_", KREA),
    "text_fusion.refiner_blocks": ("txtfusion_refiner_blocks_", KREA),
}
KREA_2_TOP: Names = {
    "first": ("img_in",),
    "last_linear": ("final_layer.linear",),
    "tmlp_0": ("time_embed.linear_1",),
    "tmlp_2": ("time_embed.linear_2",),
    "tproj_1": ("time_mod_proj",),
    "txtmlp_1": ("txt_in.linear_1",),
    "txtmlp_3": ("txt_in.linear_2",),
    "txtfusion_projector": ("text_fusion.projector",),
}
NETWORKS: dict[str, tuple[Table, Names]] = {  # of diffusers: the blocks' names, and the others
    "FluxTransformer2DModel": (FLUX, FLUX_TOP),
    "ChromaTransformer2DModel": (FLUX, FLUX_TOP),
    "Flux2Transformer2DModel": (FLUX_2, FLUX_2_TOP),
    "SD3Transformer2DModel": ({"transformer_blocks": ("joint_blocks_", SD3)}, SD3_TOP),
    "WanTransformer3DModel": (WAN, WAN_TOP),
    "SanaTransformer2DModel": (SANA, SANA_TOP),
    "Lumina2Transformer2DModel": (LUMINA_2, {}),
    "ZImageTransformer2DModel": ({n: (f"{n}_", Z_IMAGE) for n in REFINED}, Z_IMAGE_TOP),
    "Krea2Transformer2DModel": (KREA_2, KREA_2_TOP),
}


@dataclass(frozen=True)
class Place:
    """Where a matrix of a file goes: to modules of a part of the pipeline, below one another.

    swapped: whether its shift stands before its scale, which diffusers has the other way round.
    """

    part: str
    modules: tuple[str, ...]
    swapped: bool = False


def places(network: nn.Module, part: str) -> dict[str, Place]:
    """Map the names of a network's layers, its own and the original ones, to their places.

    Args:
        network: of diffusers or transformers.
        part: its name in the pipeline.
    """
    held = {n: m for n, m in network.named_modules() if hasattr(m, "weight")}
    table, top = NETWORKS.get(type(network).__name__, ({}, {}))
    found = dict(top)
    for blocks, (prefix, names) in table.items():
        for k in range(len(network.get_submodule(blocks))):  # type: ignore[arg-type]
            for name, modules in names.items():
                found[f"{prefix}{k}_{name}"] = tuple(f"{blocks}.{k}.{m}" for m in modules)
    made = {}
    for name, modules in found.items():
        if held.keys() >= set(modules):
            above = network.get_submodule(modules[0].rpartition(".")[0])
            made[name] = Place(part, modules, isinstance(above, AdaLayerNormContinuous))
    return made | {name.replace(".", "_"): Place(part, (name,)) for name in held}
