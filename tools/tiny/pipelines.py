"""Tiny random pipelines of the genuine diffusers and transformers classes, one for each family.

Nothing is downloaded: ``python -m tools.tiny sdxl FOLDER`` writes a folder which
``DiffusionPipeline.from_pretrained(FOLDER)`` loads. Schedulers, latent channels, scaling factors,
padding tokens and the order of the blocks are those of the published models; only the widths and
depths are small. The pictures are noise, but they depend on the prompt. Every weight has a
gradient, but for the last block of SD3, which computes a query for the text and drops it (so do
the published weights: a LoRA on that ``add_q_proj`` never moves).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from tools.tiny.flow import FLOW, build_qwen_image_edit, build_qwen_image_edit_plus
from tools.tiny.parts import (
    CLIP_WIDTH,
    LATENT_SIZE,
    T5_WIDTH,
    TOKENIZER,
    build_clip,
    build_clip_tokenizer,
    build_t5,
    build_t5_tokenizer,
    build_vae,
    enliven,
)

SD_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
FLUX_SHIFT = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}


def build_unet(text_width: int, channels: tuple[int, ...], **settings: Any) -> UNet2DConditionModel:
    """Build a UNet on 8x8x4 latents with one residual block a level."""
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=text_width,
        norm_num_groups=4,
        **settings,
    )
    enliven(unet.conv_out, 1.0)
    return unet


def build_sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5: eps-prediction, sampled by PNDM."""
    tokenizer = build_clip_tokenizer()
    return StableDiffusionPipeline(
        vae=build_vae(4, 0.18215),
        unet=build_unet(CLIP_WIDTH, (8, 8, 16, 16), attention_head_dim=2),
        text_encoder=build_clip(tokenizer, act="quick_gelu"),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **SD_BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sd2(**scheduler: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 2.1: v-prediction, sampled by DDIM; heads grow with the width."""
    tokenizer = build_clip_tokenizer("!")
    unet = build_unet(
        CLIP_WIDTH, (8, 8, 16, 16), attention_head_dim=(1, 1, 2, 2), use_linear_projection=True
    )
    return StableDiffusionPipeline(
        vae=build_vae(4, 0.18215),
        unet=unet,
        text_encoder=build_clip(tokenizer),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            **SD_BETAS,
            **scheduler,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sd2_zsnr() -> StableDiffusionPipeline:
    """Build SD2 with zero signal at the last step (Lin et al., 2023, arxiv.org/abs/2305.08891)."""
    return build_sd2(rescale_betas_zero_snr=True, timestep_spacing="trailing")


def build_sdxl() -> StableDiffusionXLPipeline:
    """SDXL base: two text encoders, pooled text and sizes added to the time, sampled by Euler."""
    first, second = build_clip_tokenizer(), build_clip_tokenizer("!")
    size_width = 8  # of each of the six numbers: original size, crop and target size
    unet = build_unet(
        2 * CLIP_WIDTH,
        (8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=size_width,
        projection_class_embeddings_input_dim=6 * size_width + CLIP_WIDTH,
    )
    return StableDiffusionXLPipeline(
        vae=build_vae(4, 0.13025),
        unet=unet,
        text_encoder=build_clip(first, act="quick_gelu"),
        text_encoder_2=build_clip(second, CLIPTextModelWithProjection),
        tokenizer=first,
        tokenizer_2=second,
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **SD_BETAS),
        force_zeros_for_empty_prompt=True,
    )


def build_sd3(with_t5: bool = True) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5: flow matching; normalised queries and keys, dual attention first."""
    first, second = build_clip_tokenizer(), build_clip_tokenizer("!")
    third = build_t5_tokenizer() if with_t5 else None
    heads, width = 2, 16
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=width,
        num_attention_heads=heads,
        joint_attention_dim=T5_WIDTH,  # the two CLIP embeddings side by side fit as well
        caption_projection_dim=heads * width,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    enliven(transformer.proj_out)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=build_vae(16, 1.5305, shift=0.0609),
        text_encoder=build_clip(first, CLIPTextModelWithProjection, act="quick_gelu"),
        text_encoder_2=build_clip(second, CLIPTextModelWithProjection),
        text_encoder_3=build_t5(third) if third is not None else None,
        tokenizer=first,
        tokenizer_2=second,
        tokenizer_3=third,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
    )


def build_sd3_without_t5() -> StableDiffusion3Pipeline:
    """Build the same without its third text encoder, as it is loaded to save memory.

    Diffusers leaves the place empty in model_index.json but does not fill it by itself: load with
    ``from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)``.
    """
    return build_sd3(with_t5=False)


def build_flux(guidance: bool = True, kind: Any = FluxPipeline) -> FluxPipeline:
    """FLUX.1 dev, guidance-distilled with a shift by image size; without guidance: schnell."""
    tokenizer, second = build_clip_tokenizer(), build_t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=4 * 16,  # 2x2 patches
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),  # even numbers which sum to the head's width
    )
    enliven(transformer.proj_out)
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0 if guidance else 1.0,
        use_dynamic_shifting=guidance,
        **FLUX_SHIFT,
    )
    pipeline: FluxPipeline = kind(
        transformer=transformer,
        vae=build_vae(16, 0.3611, shift=0.1159),
        text_encoder=build_clip(tokenizer, act="quick_gelu"),
        text_encoder_2=build_t5(second),
        tokenizer=tokenizer,
        tokenizer_2=second,
        scheduler=scheduler,
    )
    return pipeline


def build_flux_schnell() -> FluxPipeline:
    """FLUX.1 schnell: no guidance input and no shift."""
    return build_flux(guidance=False)


def build_flux_kontext() -> FluxPipeline:
    """FLUX.1 Kontext: dev's parts, whose pipeline edits an image."""
    return build_flux(kind=FluxKontextPipeline)


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd15": build_sd15,
    "sd2": build_sd2,
    "sd2-zsnr": build_sd2_zsnr,
    "sdxl": build_sdxl,
    "sd3": build_sd3,
    "sd3-no-t5": build_sd3_without_t5,
    "flux": build_flux,
    "flux-schnell": build_flux_schnell,
    "flux-kontext": build_flux_kontext,
    "qwen-image-edit": build_qwen_image_edit,
    "qwen-image-edit-plus": build_qwen_image_edit_plus,
    **FLOW,
}


def write_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """Write the family's folder and return it; the same seed gives the same weights.

    Raises ValueError for an unknown family, FileExistsError if the folder is not empty.
    """
    if family not in FAMILIES:
        raise ValueError(f"no family {family!r}: choose one of {', '.join(FAMILIES)}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: choose a new folder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FAMILIES[family]()
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):  # older versions of CLIPTokenizer read these only
        for part in folder.glob("tokenizer*"):
            if type(getattr(pipeline, part.name)) is CLIPTokenizer:
                shutil.copy(TOKENIZER / name, part / name)
    return folder
