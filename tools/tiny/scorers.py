"""Tiny random checkpoints of the scorers, in the classes and names of the published ones.

Nothing is downloaded: ``python -m tools.tiny pickscore FOLDER``. The scores
mean nothing, but they depend on image and prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Qwen2VLConfig,
    Qwen2VLModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
)

from inversion_dpo.evaluation.scorers.open_clip import to_transformers
from inversion_dpo.world.captions import COLOURS, SHAPES, SIZES
from tools.tiny.parts import CLIP_TOKENS, build_clip_tokenizer
from tools.tiny.vlm import byte_tokenizer

Shapes = dict[str, tuple[int, ...]]
PATCH, IMAGE, WIDTH, DEPTH = 8, 32, 64, 2
VIT_H_HEAD = 80  # width of a head of HPSv2's image tower


def clip_settings(vocabulary: int) -> CLIPConfig:
    """Two layers a tower, 32x32 pixels."""
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "projection_dim": 16,
        "initializer_factor": 4.0,
    }
    vision = tower | {"image_size": IMAGE, "patch_size": PATCH}
    text = tower | {"vocab_size": vocabulary, "max_position_embeddings": CLIP_TOKENS}
    text |= {"eos_token_id": vocabulary - 1, "bos_token_id": vocabulary - 2}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


def write_clip(folder: Path) -> None:
    """Build a CLIPModel with its tokenizer, as CLIP score, PickScore and HPSv2's port have it."""
    tokenizer = build_clip_tokenizer()
    CLIPModel(clip_settings(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_open_clip(folder: Path) -> None:
    """Open_clip's names, the three of an attention in one matrix, as HPSv2.1's copy has them."""
    tokenizer = build_clip_tokenizer()
    wide, grid = 2 * VIT_H_HEAD, (IMAGE // PATCH) ** 2
    shapes: Shapes = {
        "visual.class_embedding": (wide,),
        "visual.positional_embedding": (grid + 1, wide),
        "visual.conv1.weight": (wide, 3, PATCH, PATCH),
        "visual.proj": (wide, 16),
        "token_embedding.weight": (len(tokenizer), WIDTH),
        "positional_embedding": (CLIP_TOKENS, WIDTH),
        "text_projection": (WIDTH, 16),
        "logit_scale": (),
    }
    for norm, width in (("visual.ln_pre", wide), ("visual.ln_post", wide), ("ln_final", WIDTH)):
        shapes |= _normed(norm, width)
    for tower, width in (("visual.transformer", wide), ("transformer", WIDTH)):
        for k in range(DEPTH):
            block = f"{tower}.resblocks.{k}"
            shapes |= _normed(f"{block}.ln_1", width) | _normed(f"{block}.ln_2", width)
            shapes |= {
                f"{block}.attn.in_proj_weight": (3 * width, width),
                f"{block}.attn.in_proj_bias": (3 * width,),
            }
            shapes |= _linear(f"{block}.attn.out_proj", width, width)
            shapes |= _linear(f"{block}.mlp.c_fc", width, 2 * width)
            shapes |= _linear(f"{block}.mlp.c_proj", 2 * width, width)
    save_file({f"model.{k}": v for k, v in _random(shapes).items()}, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)


def write_image_reward(folder: Path) -> None:
    """ImageReward in its authors' names: a ViT, a BERT with cross-attention, the linear head."""
    vision, text, wide = "blip.visual_encoder.", "blip.text_encoder.", 2 * WIDTH
    words = [*SIZES, *COLOURS, *SHAPES, "a", "left", "right", "of", "above", "below"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    shapes: Shapes = {
        f"{vision}cls_token": (1, 1, wide),
        f"{vision}pos_embed": (1, (IMAGE // PATCH) ** 2 + 1, wide),
        f"{vision}patch_embed.proj.weight": (wide, 3, PATCH, PATCH),
        f"{vision}patch_embed.proj.bias": (wide,),
        f"{text}embeddings.word_embeddings.weight": (len(pieces), WIDTH),
        f"{text}embeddings.position_embeddings.weight": (40, WIDTH),
    }
    shapes |= _normed(f"{vision}norm", wide) | _normed(f"{text}embeddings.LayerNorm", WIDTH)
    for k in range(DEPTH):
        block, layer = f"{vision}blocks.{k}", f"{text}encoder.layer.{k}"
        shapes |= _normed(f"{block}.norm1", wide) | _normed(f"{block}.norm2", wide)
        shapes |= _linear(f"{block}.attn.qkv", wide, 3 * wide)
        shapes |= _linear(f"{block}.attn.proj", wide, wide)
        shapes |= _linear(f"{block}.mlp.fc1", wide, wide) | _linear(f"{block}.mlp.fc2", wide, wide)
        for attention, seen in (("attention", WIDTH), ("crossattention", wide)):
            shapes |= _linear(f"{layer}.{attention}.self.query", WIDTH, WIDTH)
            shapes |= _linear(f"{layer}.{attention}.self.key", seen, WIDTH)
            shapes |= _linear(f"{layer}.{attention}.self.value", seen, WIDTH)
            shapes |= _linear(f"{layer}.{attention}.output.dense", WIDTH, WIDTH)
            shapes |= _normed(f"{layer}.{attention}.output.LayerNorm", WIDTH)
        shapes |= _linear(f"{layer}.intermediate.dense", WIDTH, wide)
        shapes |= _linear(f"{layer}.output.dense", wide, WIDTH)
        shapes |= _normed(f"{layer}.output.LayerNorm", WIDTH)
    shapes |= _head("mlp.", WIDTH)
    save_file(_random(shapes), folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    vocabulary = {piece: k for k, piece in enumerate(pieces)}
    BertTokenizerFast(vocab=vocabulary, do_lower_case=True).save_pretrained(folder)


def write_aesthetic(folder: Path) -> None:
    """CLIP's image tower with the aesthetic head in the same file, as the port has it."""
    settings = clip_settings(1000).vision_config
    CLIPVisionModelWithProjection(settings).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | _random(_head("", 16)), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "aesthetics_predictor", "architectures": ["AestheticsPredictorV2"]}
    (folder / "config.json").write_text(json.dumps(config))


def write_aesthetic25(folder: Path) -> None:
    """SigLIP's image tower, and the V2.5 head beside it in its authors' names."""
    size = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": DEPTH}
    config = SiglipVisionConfig(**size, num_attention_heads=2, image_size=IMAGE, patch_size=PATCH)
    SiglipVisionModel(config).save_pretrained(folder)
    widths, shapes = (WIDTH, 1024, 128, 64, 16, 1), Shapes()
    for place, inputs, outputs in zip((0, 2, 4, 6, 8), widths, widths[1:], strict=False):
        shapes |= _linear(f"scoring_head.{place}", inputs, outputs)
    save_file(_random(shapes), folder / "head.safetensors")


def write_hpsv3(folder: Path) -> None:
    """Qwen2-VL with a tokenizer of bytes, and the rating network in the same file."""
    tokenizer = byte_tokenizer()
    marks = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks, "<|Reward|>"]})
    tokenizer.save_pretrained(folder)
    start, end, picture = tokenizer.convert_tokens_to_ids(list(marks[2:]))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        "initializer_range": 0.2,
    }
    vision = {"depth": DEPTH, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=picture,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    Qwen2VLModel(config).save_pretrained(folder)
    shapes = _linear("rm_head.0", WIDTH, 1024) | _linear("rm_head.3", 1024, 16)
    shapes |= _linear("rm_head.5", 16, 2)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | _random(shapes), folder / "model.safetensors", {"format": "pt"})


def write_mps(folder: Path) -> None:
    """CLIP and two layers that cross image and text, in the names of the safetensors copy."""
    write_open_clip(folder)
    head = 8
    clip = to_transformers(load_file(folder / "model.safetensors"))
    shapes: Shapes = {}
    for k in range(DEPTH):
        cross, own = (f"mps.cross_model.layers.{k}.{part}.fn." for part in (0, 1))
        shapes |= _normed(f"{cross}norm", 16) | _normed(f"{own}norm", 16)
        shapes |= {f"{cross}to_q.weight": (32, 16), f"{cross}to_kv.weight": (2 * head, 16)}
        shapes |= {f"{cross}to_out.weight": (16, 32)}
        shapes |= {f"{cross}ff.0.weight": (128, 16), f"{cross}ff.2.weight": (16, 64)}
        shapes |= {f"{own}fused_attn_ff_proj.weight": (32 + 2 * head + 128, 16)}
        shapes |= {f"{own}attn_out.weight": (16, 32), f"{own}ff_out.1.weight": (16, 64)}
    turns = {
        f"mps.cross_model.layers.{k}.1.fn.rotary_emb.inv_freq": 1e4 ** (-torch.arange(4) / 4)
        for k in range(DEPTH)
    }
    weights = {f"mps.model.{name}": tensor for name, tensor in clip.items()} | _random(shapes)
    save_file(weights | turns, folder / "model.safetensors")


def write_mask2former(folder: Path) -> None:
    """Mask2Former of COCO's 80 classes; random classes that are sure of themselves."""
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=8,
        num_labels=80,
    )
    network = Mask2FormerForUniversalSegmentation(config)
    nn.init.normal_(network.class_predictor.weight, std=2.0)
    for name, weight in network.named_parameters():
        if "mask_embedder" in name and name.endswith("weight"):
            nn.init.normal_(weight, std=1.0)  # so that a mask is somewhere and not everywhere
    network.save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 96}
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": size}))


def write_blip(folder: Path) -> None:
    """BLIP for questions about images, with a tokenizer of words that knows yes and no."""
    words = [*SIZES, *COLOURS, *SHAPES, "a", "left", "right", "of", "above", "below", "yes", "no"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", *words]
    vocabulary = {piece: k for k, piece in enumerate(pieces)}
    BertTokenizerFast(vocab=vocabulary, do_lower_case=True).save_pretrained(folder)
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
    }
    text = tower | {
        "encoder_hidden_size": WIDTH,
        "vocab_size": len(pieces) + 2,
        "bos_token_id": len(pieces),
        "max_position_embeddings": 40,
    }
    vision = tower | {"image_size": IMAGE, "patch_size": PATCH}
    config = BlipConfig(text_config=text, vision_config=vision, initializer_range=0.2)
    config.text_config.initializer_range = config.vision_config.initializer_range = 0.2
    BlipForQuestionAnswering(config).save_pretrained(folder)


def write_owlv2(folder: Path) -> None:
    """OWLv2 of small images, with boxes of random size that are sure of themselves."""
    tokenizer = build_clip_tokenizer(pad_token="!")
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "initializer_factor": 4.0,
    }
    vision = tower | {"image_size": IMAGE, "patch_size": PATCH}
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    network = Owlv2ForObjectDetection(
        Owlv2Config(text_config=text, vision_config=vision, projection_dim=WIDTH)
    )
    nn.init.normal_(network.box_head.dense2.weight, std=0.005)
    nn.init.normal_(network.class_head.logit_shift.weight, std=0.1)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _normed(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _head(prefix: str, width: int) -> Shapes:
    widths = (width, 1024, 128, 64, 16, 1)
    shapes: Shapes = {}
    for place, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        shapes |= _linear(f"{prefix}layers.{place}", inputs, outputs)
    return shapes


def _random(shapes: Shapes) -> dict[str, Tensor]:
    """Draw normal weights that keep the root mean square; every bias is a little off 0."""
    weights = {}
    for name, shape in shapes.items():
        spread = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.2
        centre = float("norm" in name.lower() or ".ln_" in name) if name.endswith("weight") else 0.0
        weights[name] = nn.init.normal_(torch.empty(shape), centre, spread)
    return weights


WRITERS: dict[str, Callable[[Path], None]] = {
    "clip": write_clip,
    "pickscore": write_clip,
    "hpsv2": write_clip,
    "hpsv21": write_open_clip,
    "imagereward": write_image_reward,
    "aesthetic": write_aesthetic,
    "aesthetic25": write_aesthetic25,
    "hpsv3": write_hpsv3,
    "mps": write_mps,
    "geneval": write_mask2former,
    "compbench": write_blip,
    "compbench-spatial": write_owlv2,
}


def write_tiny_scorer(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a scorer's folder and return it; FileExistsError if the folder is not empty."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: choose a new folder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        WRITERS[name](folder)
    return folder
