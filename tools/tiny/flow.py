"""Tiny random pipelines of the flow-matching families of 2025 and later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import Qwen2VLImageProcessorPil, Qwen3ForCausalLM

from inversion_dpo.models.prompts import ImagesAndText
from tools.tiny.parts import (
    T5_WIDTH,
    build_gemma2,
    build_gemma_tokenizer,
    build_mistral3,
    build_mistral_tokenizer,
    build_qwen3,
    build_qwen3_vl,
    build_qwen25_vl,
    build_qwen_tokenizer,
    build_t5,
    build_t5_tokenizer,
    build_umt5,
    build_vae,
    enliven,
)

HEADS: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}
AXES: dict[str, Any] = {"axes_dims_rope": (4, 6, 6)}
SHIFT: dict[str, Any] = {"use_dynamic_shifting": True, "base_image_seq_len": 256}


def build_z_image() -> ZImagePipeline:
    """Z-Image: a single stream whose padding tokens are trained; the time is that of the data."""
    tokenizer = build_qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    enliven(transformer.all_final_layer["2-1"].linear)
    for blocks in (transformer.layers, transformer.noise_refiner):
        for block in blocks:
            enliven(block.adaLN_modulation[0])
    nn.init.normal_(transformer.x_pad_token)
    nn.init.normal_(transformer.cap_pad_token)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=build_vae(16, 0.3611, shift=0.1159),
        text_encoder=build_qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def build_flux2_vae() -> AutoencoderKLFlux2:
    """FLUX.2's autoencoder: 32 channels, and statistics of the patches in a batch norm."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=4,
        sample_size=64,
    )
    for layer in (vae.decoder.conv_out, vae.encoder.conv_out):
        enliven(layer, 1 / 0.6)
    for layer in (vae.quant_conv, vae.post_quant_conv):
        enliven(layer)
    with torch.no_grad():
        vae.quant_conv.weight[32:] = 0
        vae.quant_conv.bias[32:] = -10
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
    return vae


def build_flux2_transformer(guidance: bool) -> Flux2Transformer2DModel:
    """FLUX.2's transformer of one double and two single blocks; dev takes a guidance."""
    transformer = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=3 * 16,  # three layers of the text encoder side by side
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
        **HEADS,
    )
    enliven(transformer.proj_out)
    return transformer


def build_flux2_klein() -> Flux2KleinPipeline:
    """FLUX.2 klein's base: guided by an empty prompt."""
    tokenizer = build_qwen_tokenizer()
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **SHIFT),
        vae=build_flux2_vae(),
        text_encoder=build_qwen3(tokenizer, layers=28, kind=Qwen3ForCausalLM),
        tokenizer=tokenizer,
        transformer=build_flux2_transformer(guidance=False),
        is_distilled=False,
    )


def build_flux2_dev() -> Flux2Pipeline:
    """FLUX.2 dev, with a plain tokenizer in the place of its processor."""
    tokenizer = build_mistral_tokenizer()
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **SHIFT),
        vae=build_flux2_vae(),
        text_encoder=build_mistral3(tokenizer),
        tokenizer=tokenizer,
        transformer=build_flux2_transformer(guidance=True),
    )


def lively_video_vae(vae: Any) -> Any:
    """Give a video autoencoder normal weights at both ends, and a narrow posterior."""
    channels = vae.config.z_dim
    for layer in (vae.quant_conv, vae.post_quant_conv):
        enliven(layer)
    for layer, gain in ((vae.encoder.conv_out, 7.0), (vae.decoder.conv_out, 1.7)):
        enliven(layer, gain)  # of a kernel's three frames two are empty
    with torch.no_grad():
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = -10
    return vae


VIDEO: dict[str, Any] = {
    "base_dim": 8,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}


def build_qwen_image(
    kind: type[DiffusionPipeline] = QwenImagePipeline, **parts: Any
) -> DiffusionPipeline:
    """Qwen-Image: packed latents of a video autoencoder, a schedule that ends at 0.02."""
    tokenizer = build_qwen_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=2, joint_attention_dim=16, **HEADS, **AXES
    )
    enliven(transformer.proj_out)
    if kind is not QwenImagePipeline:
        parts["processor"] = ImagesAndText(Qwen2VLImageProcessorPil(), tokenizer)
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(
            max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, **SHIFT
        ),
        vae=lively_video_vae(AutoencoderKLQwenImage(z_dim=16, **VIDEO)),
        text_encoder=build_qwen25_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
        **parts,
    )


def build_qwen_image_edit() -> DiffusionPipeline:
    """Qwen-Image-Edit, whose text encoder reads the image."""
    return build_qwen_image(QwenImageEditPipeline)


def build_qwen_image_edit_plus() -> DiffusionPipeline:
    """Qwen-Image-Edit-2509."""
    return build_qwen_image(QwenImageEditPlusPipeline)


def build_krea2() -> Krea2Pipeline:
    """Krea 2, which reads several layers of its text encoder: three here."""
    tokenizer = build_qwen_tokenizer()
    transformer = Krea2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        **AXES,
    )
    enliven(transformer.final_layer.linear)
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(max_image_seq_len=6400, **SHIFT),
        vae=lively_video_vae(AutoencoderKLQwenImage(z_dim=16, **VIDEO)),
        text_encoder=build_qwen3_vl(tokenizer, layers=3),
        tokenizer=tokenizer,
        transformer=transformer,
        text_encoder_select_layers=(0, 1, 2),
        is_distilled=False,
    )


def build_chroma() -> ChromaPipeline:
    """Chroma: FLUX.1's blocks, modulated by one small network, and T5 alone."""
    tokenizer = build_t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=T5_WIDTH,
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
        **HEADS,
        **AXES,
    )
    enliven(transformer.proj_out)
    enliven(transformer.distilled_guidance_layer.out_proj)
    encoder = build_t5(tokenizer)
    nn.init.normal_(encoder.get_input_embeddings().weight)
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_vae(16, 0.3611, shift=0.1159),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def build_wan(channels: int = 16, wide: bool = False, **vae: Any) -> WanPipeline:
    """Wan 2.1, sampled by UniPC at a fixed shift; ``wide``: one timestep for each token."""
    tokenizer = build_t5_tokenizer()
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=T5_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    )
    enliven(transformer.proj_out)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_umt5(tokenizer),
        vae=lively_video_vae(AutoencoderKLWan(z_dim=channels, **VIDEO, **vae)),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
        expand_timesteps=wide,
    )


def build_wan_5b() -> WanPipeline:
    """Wan 2.2 TI2V-5B: 48 channels of 16-fold latents."""
    return build_wan(
        48,
        wide=True,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.1 * k for k in range(48)],
        latents_std=[1.0 + 0.01 * k for k in range(48)],
    )


def build_sana() -> SanaPipeline:
    """SANA: 32-fold latents of a deterministic autoencoder, sampled by DPM-Solver."""
    tokenizer = build_gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        mlp_ratio=2.0,
        sample_size=32,
    )
    enliven(transformer.proj_out)
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_block_types"] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
        sides[f"{side}_block_out_channels"] = (8, 8, 8, 8, 16, 32)
        sides[f"{side}_layers_per_block"] = (1,) * 6
        sides[f"{side}_qkv_multiscales"] = ((),) * 3 + ((5,),) * 3
    vae = AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
        **sides,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=build_gemma2(tokenizer),
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def build_lumina2() -> Lumina2Pipeline:
    """Lumina 2: captions of at most 300 tokens, and the time of the data."""
    tokenizer = build_gemma_tokenizer()
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=16,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 64, 64),
        cap_feat_dim=16,
    )
    enliven(transformer.norm_out.linear_2)
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=build_vae(16, 0.3611, shift=0.1159),
        text_encoder=build_gemma2(tokenizer),
        tokenizer=tokenizer,
    )


FLOW: dict[str, Callable[[], DiffusionPipeline]] = {
    "z-image": build_z_image,
    "flux2-klein": build_flux2_klein,
    "flux2-dev": build_flux2_dev,
    "qwen-image": build_qwen_image,
    "chroma": build_chroma,
    "krea2": build_krea2,
    "wan": build_wan,
    "wan-5b": build_wan_5b,
    "sana": build_sana,
    "lumina2": build_lumina2,
}
