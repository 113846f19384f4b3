"""Rename networks as the original ones: a whole Stable Diffusion 1 or XL, and transformers.

The way back of diffusers' ``convert_ldm_unet_checkpoint``, ``convert_ldm_vae_checkpoint`` and
``convert_open_clip_checkpoint``: what published checkpoints look like, from a tiny pipeline.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "mid_block.attentions.0.": "mid.attn_1.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    ".fc1.": ".c_fc.",
    ".fc2.": ".c_proj.",
    ".self_attn": ".attn",
    "encoder.layers.": "transformer.resblocks.",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
}


Z_IMAGE = {
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    **{f"attention.to_{n}.": "attention.qkv." for n in "qkv"},
    "attention.to_out.0.": "attention.out.",
    "norm_k.": "k_norm.",
    "norm_q.": "q_norm.",
}
SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "transformer_blocks.": "joint_blocks.",
    **{f"attn.to_{n}.": "x_block.attn.qkv." for n in "qkv"},
    **{f"attn2.to_{n}.": "x_block.attn2.qkv." for n in "qkv"},
    **{f"attn.add_{n}_proj.": "context_block.attn.qkv." for n in "qkv"},
    "attn.to_add_out.": "context_block.attn.proj.",
    "attn.norm_added_q.": "context_block.attn.ln_q.",
    "attn.norm_added_k.": "context_block.attn.ln_k.",
    "attn.norm_q.": "x_block.attn.ln_q.",
    "attn.norm_k.": "x_block.attn.ln_k.",
    "attn.to_out.0.": "x_block.attn.proj.",
    "attn2.norm_q.": "x_block.attn2.ln_q.",
    "attn2.norm_k.": "x_block.attn2.ln_k.",
    "attn2.to_out.0.": "x_block.attn2.proj.",
    "norm1_context.linear.": "context_block.adaLN_modulation.1.",
    "norm1.linear.": "x_block.adaLN_modulation.1.",
    "ff_context.net.0.proj.": "context_block.mlp.fc1.",
    "ff_context.net.2.": "context_block.mlp.fc2.",
    "ff.net.0.proj.": "x_block.mlp.fc1.",
    "ff.net.2.": "x_block.mlp.fc2.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
}
KREA_2 = {
    "img_in.": "first.",
    "time_embed.linear_1.": "tmlp.0.",
    "time_embed.linear_2.": "tmlp.2.",
    "time_mod_proj.": "tproj.1.",
    "txt_in.norm.weight": "txtmlp.0.scale",
    "txt_in.linear_1.": "txtmlp.1.",
    "txt_in.linear_2.": "txtmlp.3.",
    "text_fusion.": "txtfusion.",
    "final_layer.norm.weight": "last.norm.scale",
    "final_layer.scale_shift_table": "last.modulation.lin",
    "final_layer.": "last.",
    "transformer_blocks.": "blocks.",
    "attn.to_q.": "attn.wq.",
    "attn.to_k.": "attn.wk.",
    "attn.to_v.": "attn.wv.",
    "attn.to_out.0.": "attn.wo.",
    "attn.to_gate.": "attn.gate.",
    "attn.norm_q.weight": "attn.qknorm.qnorm.scale",
    "attn.norm_k.weight": "attn.qknorm.knorm.scale",
    ".ff.": ".mlp.",
    ".norm1.weight": ".prenorm.scale",
    ".norm2.weight": ".postnorm.scale",
    ".scale_shift_table": ".mod.lin",
}
FLUX_2 = {
    "time_guidance_embed.timestep_embedder.linear_1.": "time_in.in_layer.",
    "time_guidance_embed.timestep_embedder.linear_2.": "time_in.out_layer.",
    "time_guidance_embed.guidance_embedder.linear_1.": "guidance_in.in_layer.",
    "time_guidance_embed.guidance_embedder.linear_2.": "guidance_in.out_layer.",
    "x_embedder.": "img_in.",
    "context_embedder.": "txt_in.",
    "modulation_img.linear.": "modulation_img.lin.",
    "modulation_txt.linear.": "modulation_txt.lin.",
    "stream_modulation.linear.": "stream_modulation.lin.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
    "single_transformer_blocks.": "single_blocks.",
    "transformer_blocks.": "double_blocks.",
    "attn.to_qkv_mlp_proj.": "linear1.",
    "attn.to_out.weight": "linear2.weight",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    **{f"attn.to_{n}.": "img_attn.qkv." for n in "qkv"},
    **{f"attn.add_{n}_proj.": "txt_attn.qkv." for n in "qkv"},
    "attn.to_out.0.": "img_attn.proj.",
    "attn.to_add_out.": "txt_attn.proj.",
    "ff_context.linear_in.": "txt_mlp.0.",
    "ff_context.linear_out.": "txt_mlp.2.",
    "ff.linear_in.": "img_mlp.0.",
    "ff.linear_out.": "img_mlp.2.",
}
WAN = {
    "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
    "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
    "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
    "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
    "condition_embedder.time_proj.": "time_projection.1.",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    ".to_out.0.": ".o.",
    **{f".to_{n}.": f".{n}." for n in "qkv"},
    "ffn.net.0.proj.": "ffn.0.",
    "ffn.net.2.": "ffn.2.",
    ".norm2.": ".norm.",  # and the third for the second
    ".norm3.": ".norm2.",
    ".norm.": ".norm3.",
    "proj_out.": "head.head.",
    ".scale_shift_table": ".modulation",
    "scale_shift_table": "head.modulation",
}
SANA = {
    "patch_embed.": "x_embedder.",
    "time_embed.emb.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_embed.emb.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_embed.linear.": "t_block.1.",
    "caption_projection.linear_": "y_embedder.y_proj.fc",
    "caption_norm.": "attention_y_norm.",
    "transformer_blocks.": "blocks.",
    **{f"attn1.to_{n}.": "attn.qkv." for n in "qkv"},
    "attn1.to_out.0.": "attn.proj.",
    "attn2.to_q.": "cross_attn.q_linear.",
    "attn2.to_k.": "cross_attn.kv_linear.",
    "attn2.to_v.": "cross_attn.kv_linear.",
    "attn2.to_out.0.": "cross_attn.proj.",
    "ff.conv_inverted.": "mlp.inverted_conv.conv.",
    "ff.conv_depth.": "mlp.depth_conv.conv.",
    "ff.conv_point.": "mlp.point_conv.conv.",
    "proj_out.": "final_layer.linear.",
    ".scale_shift_table": ".table",
    "scale_shift_table": "final_layer.scale_shift_table",
    ".table": ".scale_shift_table",
}
LUMINA_2 = {
    "time_caption_embed.caption_embedder.": "cap_embedder.",
    "time_caption_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_caption_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "norm_out.linear_1.": "final_layer.adaLN_modulation.1.",
    "norm_out.linear_2.": "final_layer.linear.",
    **{f"attn.to_{n}.": "attention.qkv." for n in "qkv"},
    "attn.to_out.0.": "attention.out.",
    "attn.norm_q.": "attention.q_norm.",
    "attn.norm_k.": "attention.k_norm.",
    "feed_forward.linear_": "feed_forward.w",
    "norm1.linear.": "adaLN_modulation.1.",
    ".norm1.norm.": ".attention_norm1.",
    ".norm1.": ".attention_norm1.",
    ".norm2.": ".attention_norm2.",
}


def _renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def unet_to_original(unet: Any) -> dict[str, Tensor]:
    """Rename a UNet's weights."""
    layers, made = unet.config.layers_per_block, dict[str, Tensor]()
    for name, tensor in unet.state_dict().items():
        block = re.match(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", name)
        if not block:
            made[_renamed(name, UNET)] = tensor
            continue
        side, level, kind, place, rest = block.groups()
        i, j = int(level or 0), int(place)
        if kind == "resnets":
            rest = _renamed(rest, RESNET)
        if side == "mid":
            made[f"middle_block.{1 if kind == 'attentions' else 2 * j}.{rest}"] = tensor
        elif side == "down":
            if kind == "downsamplers":
                stem = f"input_blocks.{(layers + 1) * (i + 1)}.0"
                rest = rest.replace("conv", "op")
            else:
                stem = f"input_blocks.{(layers + 1) * i + j + 1}.{int(kind == 'attentions')}"
            made[f"{stem}.{rest}"] = tensor
        elif kind == "upsamplers":
            attends = bool(getattr(unet.up_blocks[i], "attentions", None))
            made[f"output_blocks.{(layers + 1) * i + layers}.{1 + attends}.{rest}"] = tensor
        else:
            number = (layers + 1) * i + j
            made[f"output_blocks.{number}.{int(kind == 'attentions')}.{rest}"] = tensor
    return made


def vae_to_original(vae: Any) -> dict[str, Tensor]:
    """Rename an autoencoder's weights; its attention was a convolution."""
    levels, made = len(vae.config.block_out_channels), dict[str, Tensor]()
    for name, tensor in vae.state_dict().items():
        new = _renamed(name, VAE)
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        up = re.match(r"decoder\.up_blocks\.(\d)\.(resnets\.(\d)|upsamplers\.0)\.(.*)", new)
        if up:
            place = f"block.{up[3]}" if up[3] else "upsample"
            new = f"decoder.up.{levels - 1 - int(up[1])}.{place}.{up[4]}"
        if ".attn_1." in new and tensor.ndim == 2:
            tensor = tensor[..., None, None]
        made[new] = tensor
    return made


def open_clip_to_original(encoder: Any) -> dict[str, Tensor]:
    """Rename SDXL's second text encoder; query, key and value were one matrix."""
    made, fused = dict[str, Tensor](), dict[str, dict[str, Tensor]]()
    for name, tensor in encoder.state_dict().items():
        bare = name.removeprefix("text_model.")
        if bare == "text_projection.weight":
            made["text_projection"] = tensor.T.contiguous()
            continue
        new = _renamed(bare, OPEN_CLIP).replace(".mlp.c", ".mlp.c")
        part = re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", new)
        if part:
            fused.setdefault(f"{part[1]}.in_proj_{part[3]}", {})[part[2]] = tensor
        else:
            made[new] = tensor
    return made | {k: torch.cat([parts[x] for x in "qkv"]) for k, parts in fused.items()}


TRANSFORMERS = {
    "SD3Transformer2DModel": SD3,
    "ZImageTransformer2DModel": Z_IMAGE,
    "Krea2Transformer2DModel": KREA_2,
    "Flux2Transformer2DModel": FLUX_2,
    "WanTransformer3DModel": WAN,
    "SanaTransformer2DModel": SANA,
    "Lumina2Transformer2DModel": LUMINA_2,
}
UNREAD = {  # tensors of the original files that have no place in diffusers' networks
    "SanaTransformer2DModel": ("pos_embed", "y_embedder.y_embedding"),
    "Lumina2Transformer2DModel": ("norm_final.weight",),
}


def transformer_to_original(network: Any) -> dict[str, Tensor]:
    """Rename a transformer's weights; some had one matrix for query, key and value.

    Of SD3 and FLUX.2 the shift stood before the scale in the last norm, and Krea 2's tables were
    flat.
    """
    kind = type(network).__name__
    names, weights = TRANSFORMERS[kind], network.state_dict()
    made = {name: [torch.zeros(1)] for name in UNREAD.get(kind, ())}
    last = f".{len(getattr(network, 'transformer_blocks', ())) - 1}.norm1_context"
    for name in sorted(weights, key=lambda n: (".to_v" in n or "add_v" in n) - ("_q" in n)):
        tensor = weights[name]
        swapped = name.startswith("norm_out.") and names in (SD3, FLUX_2)
        if swapped or (names is SD3 and last in name):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if names is KREA_2 and name.startswith("transformer_blocks.") and "table" in name:
            tensor = tensor.flatten()
        new = _renamed(name, names)
        if new.startswith("single_blocks."):
            new = new.replace("img_attn.norm", "norm")
        made.setdefault(new, []).append(tensor)
    return {k: torch.cat(parts) for k, parts in made.items()}


def write_single_file(folder: Path, file: Path) -> Path:
    """Write the pipeline of a folder as one file of original names; return the file."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    named = {"model.diffusion_model.": unet_to_original(pipe.unet)}
    named["first_stage_model."] = vae_to_original(pipe.vae)
    first = pipe.text_encoder.state_dict()
    first = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in first.items()}
    if hasattr(pipe, "text_encoder_2"):
        named["conditioner.embedders.0.transformer."] = first
        named["conditioner.embedders.1.model."] = open_clip_to_original(pipe.text_encoder_2)
    else:
        named["cond_stage_model.transformer."] = first
    tensors = {f"{start}{k}": v for start, part in named.items() for k, v in part.items()}
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, file)
    return file
