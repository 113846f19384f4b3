"""Autoencoders, tokenizers and text encoders of tiny pipelines, made without a download."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from inversion_dpo.run.config import PACKAGE
from inversion_dpo.world.captions import COLOURS, SHAPES, SIZES

TOKENIZER = PACKAGE / "assets" / "pipeline" / "tokenizer"
LATENT_SIZE = 8  # 64 pixels where an autoencoder halves three times, as most published ones do
CLIP_TOKENS = 77
T5_TOKENS = 512
CLIP_WIDTH = 16
T5_WIDTH = 32
WORDS = (*SIZES, *COLOURS, *SHAPES, "a", "left", "right", "of", "above", "below", "which", "is")
QWEN_SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:"
)
QWEN_MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_CHAT = (  # Qwen3's template as far as turns of text go
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


@torch.no_grad()
def enliven(layer: Any, gain: float = 1.0) -> None:
    """Draw normal weights which multiply the input's root mean square by the gain; no bias."""
    fan_in = layer.weight[0].numel()
    nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def build_vae(latent_channels: int, scaling: float, shift: float | None = None) -> AutoencoderKL:
    """64x64x3 -> 8x8xC; with a shift, as in SD3 and FLUX, there are no quantisation layers.

    Scaled latents have a variance near 1, and so have the decoded pixels.
    """
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=8 * LATENT_SIZE,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )
    rms = 0.6  # of SiLU of a standard normal, which both convolutions see
    enliven(vae.decoder.conv_out, 1 / rms)
    enliven(vae.encoder.conv_out, 1 / rms / scaling)
    if vae.quant_conv is not None:
        enliven(vae.quant_conv)
    last = vae.quant_conv or vae.encoder.conv_out
    with torch.no_grad():  # the posterior is narrow, as in a trained autoencoder
        last.weight[latent_channels:] = 0
        last.bias[latent_channels:] = -10
    return vae


def build_clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Build the embedded tokenizer at CLIP's own length; SD2's and bigG's pad with ``!``."""
    return CLIPTokenizer.from_pretrained(
        TOKENIZER, model_max_length=CLIP_TOKENS, pad_token=pad_token
    )


def build_clip(tokenizer: CLIPTokenizer, kind: type = CLIPTextModel, act: str = "gelu") -> Any:
    """Two layers of width 16: CLIP-L's activation is quick_gelu, that of the larger ones gelu."""
    encoder = kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_TOKENS,
            projection_dim=CLIP_WIDTH,
            hidden_act=act,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder


def build_t5_tokenizer() -> T5TokenizerFast:
    """T5's Unigram model over printable ASCII, with the scenes' words as one token each."""
    characters = [chr(code) for code in range(33, 127)]
    pieces = dict.fromkeys(("<pad>", "</s>", "<unk>"), 0.0)
    pieces |= dict.fromkeys(("▁", *characters), -10.0)
    pieces |= dict.fromkeys((f"▁{word}" for word in WORDS), -5.0)
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    with TemporaryDirectory() as folder:  # the one form that every version of the class reads
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        return T5TokenizerFast.from_pretrained(folder, model_max_length=T5_TOKENS)


T5: dict[str, Any] = {
    "d_model": T5_WIDTH,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}


def build_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """One layer of T5 v1.1, 32 wide."""
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **T5))


def build_umt5(tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    """One layer of UMT5, 32 wide."""
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **T5))
    nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder


def build_qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's byte-level BPE: the scenes' words and those of the system prompt are one token each.

    The prefix that the pipelines cut off so has as many tokens as the published one.
    """
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated", False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    corpus = [f"system\n{QWEN_SYSTEM}\nuser\nassistant\n", " ".join(WORDS), *WORDS]
    corpus += [f" {word}" for word in WORDS]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(corpus, trainer)
    state = json.loads(raw.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(m) for m in state["merges"]],
        extra_special_tokens=QWEN_MARKS,
        model_max_length=131072,
    )
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


def build_qwen3(tokenizer: Qwen2Tokenizer, layers: int = 2, kind: type = Qwen3Model) -> Any:
    """Qwen3, 16 wide."""
    return kind(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=4096,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def qwen_vision(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """Ids of the marks around images."""
    names = ("vision_start", "vision_end", "image", "video")
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    ids = tokenizer.convert_tokens_to_ids(list(marks))
    return {f"{n}_token_id": k for n, k in zip(names, ids, strict=True)}


def qwen_text(tokenizer: Qwen2Tokenizer, layers: int, **settings: Any) -> dict[str, Any]:
    """Describe the text's side of a Qwen that reads images, 16 wide."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": rope | settings.pop("rope", {}),
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        **settings,
    }


VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
}


def build_qwen25_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers of Qwen2.5-VL."""
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=qwen_text(tokenizer, 2),
            vision_config=VISION | {"fullatt_block_indexes": [0]},
            **qwen_vision(tokenizer),
        )
    )


def build_qwen3_vl(tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3VLModel:
    """Qwen3-VL without its head."""
    return Qwen3VLModel(
        Qwen3VLConfig(
            text_config=qwen_text(tokenizer, layers, head_dim=8, rope={"mrope_interleaved": True}),
            vision_config=VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **qwen_vision(tokenizer),
        )
    )


def build_mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Mistral's marks; the published processor needs torchvision."""
    marks = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    marks += ["[IMG]", "<pad>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        show_progress=False,
        special_tokens=marks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator([" ".join(WORDS), *WORDS, *(f" {w}" for w in WORDS)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=131072,
    )
    tokenizer.chat_template = (
        "<s>{% for m in messages %}"
        "{% set mark = 'SYSTEM_PROMPT' if m['role'] == 'system' else 'INST' %}[{{ mark }}]"
        "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}[/{{ mark }}]{% endfor %}"
    )
    return tokenizer


def build_mistral3(tokenizer: PreTrainedTokenizerFast) -> Mistral3ForConditionalGeneration:
    """Mistral Small 3, 16 wide, as deep as FLUX.2 dev reads it."""
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 31,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "initializer_range": 0.2,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 32,
        "patch_size": 16,
    }
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=text,
            vision_config=vision,
            image_token_id=tokenizer.convert_tokens_to_ids("[IMG]"),
            vision_feature_layer=-1,
        )
    )


def build_gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's pieces over printable ASCII and bytes; it puts ``<bos>`` before a text."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["▁", *(chr(code) for code in range(33, 127))]
    tokenizer = GemmaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[])
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return tokenizer


def build_gemma2(tokenizer: GemmaTokenizer) -> Gemma2Model:
    """Two layers of Gemma 2, 16 wide."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=1,  # eager, over the hundreds of tokens of an instruction
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=8192,
            query_pre_attn_scalar=8,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
            initializer_range=0.2,
        )
    )
