"""The scorers against their authors' formulas, written here a second time from the papers' code.

What torchvision would do is written out with Pillow and NumPy; open_clip's towers and ImageReward's
BLIP are built again from torch's own layers, under the authors' names, and load the same files.
"""

import math
import shutil
import sqlite3
import sys
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import BertTokenizerFast, CLIPModel, CLIPTokenizer

from inversion_dpo.evaluation.prompt_sets import PromptSet
from inversion_dpo.evaluation.scorers import mps, registry
from inversion_dpo.evaluation.scorers.checkpoint import TENSORS, Checkpoint, ScorerError, loaded
from inversion_dpo.evaluation.scorers.clip import ClipScorer
from inversion_dpo.evaluation.scorers.preprocess import centre_crops, whole_images
from inversion_dpo.evaluation.scorers.registry import load_scorers
from inversion_dpo.run.config import ConfigError
from tools.tiny.scorers import WRITERS, write_tiny_scorer

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
PROMPTS = ["a small red star", "a large blue circle left of a small green square"]
SIZES = [(64, 64), (48, 64), (64, 39), (100, 37), (33, 224), (51, 45), (64, 46), (32, 32)]


def picture(seed, height=64, width=64):
    """Smooth colour with an edge: bicubic overshoots at it."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR))
    image[height // 3 :, width // 2 :] = 255 * rng.integers(0, 2, 3)
    return image


IMAGES = [picture(k) for k in range(2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("scorers")
    return {name: write_tiny_scorer(name, root / name) for name in WRITERS}


def torchvision_clip(image, size):
    """Resize(size, BICUBIC), CenterCrop(size), ToTensor, Normalize, as torchvision defines them."""
    pil = Image.fromarray(image)
    w, h = pil.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    pil = pil.resize((w, h), Image.Resampling.BICUBIC)
    top, left = int(round((h - size) / 2.0)), int(round((w - size) / 2.0))
    cut = np.asarray(pil)[top : top + size, left : left + size].astype(np.float64) / 255
    return ((cut - MEAN) / STD).transpose(2, 0, 1)


def hps_whole(image, size):
    """ToTensor, then ResizeMaxSize on it, with Pillow's float bicubic as the antialiased resize."""
    h, w = image.shape[:2]
    scale = size / float(max(h, w))
    nh, nw = round(h * scale), round(w * scale)
    out = np.zeros((size, size, 3))
    top, left = (size - nh) // 2, (size - nw) // 2
    for c in range(3):
        channel = Image.fromarray((image[..., c] / 255).astype(np.float32))
        out[top : top + nh, left : left + nw, c] = channel.resize(
            (nw, nh), Image.Resampling.BICUBIC
        )
    return ((out - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("height, width", SIZES)
def test_centre_crop_equals_torchvision_number_by_number(height, width):
    image = picture(3, height, width)
    ours = centre_crops([image], 32, half_up=True)[0].numpy()
    np.testing.assert_allclose(ours, torchvision_clip(image, 32), atol=1e-6)


@pytest.mark.parametrize("height, width", SIZES)
def test_centre_crop_equals_the_processor_of_transformers(height, width):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = picture(4, height, width)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    theirs = processor(Image.fromarray(image), return_tensors="np").pixel_values[0]
    ours = centre_crops([image], 32, half_up=False)[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_two_crops_differ_where_the_rest_leaves_three():
    images = [picture(5, 32, 35)]
    assert not torch.equal(centre_crops(images, 32, True), centre_crops(images, 32, False))
    images = [picture(5, 32, 37)]
    assert torch.equal(centre_crops(images, 32, True), centre_crops(images, 32, False))


@pytest.mark.parametrize("height, width", SIZES)
def test_whole_image_equals_resize_max_size(height, width):
    image = picture(6, height, width)
    ours = whole_images([image], 32)[0].numpy()
    np.testing.assert_allclose(ours, hps_whole(image, 32), atol=3e-5)


def by_hand(folder, images, prompts, prepare):
    """Normalised embeddings [B, D] of both towers and exp(logit_scale), by CLIPModel itself."""
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    pixels = torch.tensor(np.stack([prepare(i) for i in images]), dtype=torch.float32)
    text = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels, **text)
    return out.image_embeds, out.text_embeds, model.logit_scale.exp().item()


def processed(image):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    return processor(Image.fromarray(image), return_tensors="np").pixel_values[0]


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2"])
def test_clip_scores_are_their_formula(folders, name):
    images = [picture(k, 64, 50 + k) for k in range(4)]
    prompts = [*PROMPTS, "a small red star &amp; more", "word " * 100]
    folder = folders[name]
    clean = [p.replace("&amp;", "&") for p in prompts] if name == "hpsv2" else prompts
    prepare = (lambda i: hps_whole(i, 32)) if name == "hpsv2" else processed
    image, text, scale = by_hand(folder, images, clean, prepare)
    cosine = (image * text).sum(-1).numpy().astype(np.float64)
    expected = {
        "clip": 100 * np.maximum(cosine, 0),
        "pickscore": scale * cosine,
        "hpsv2": cosine,
    }[name]
    scores = load_scorers(name, {name: str(folder)})(images, prompts)[name]
    np.testing.assert_allclose(scores, expected, atol=2e-4 * max(1.0, np.abs(expected).max()))
    assert len(set(np.round(cosine, 6))) == 4 and scale > 10


def test_clip_score_is_never_negative(folders):
    scorer = ClipScorer(Checkpoint("clip", str(folders["clip"])))
    images = [picture(k) for k in range(12)]
    image = scorer.image_embeddings(scorer.pixels(images))
    text = scorer.text_embeddings(scorer.tokens(["a small red star"] * 12))
    cosine = F.cosine_similarity(image, text).numpy()
    scores = scorer(images, ["a small red star"] * 12)
    np.testing.assert_allclose(scores, 100 * np.maximum(cosine, 0), atol=1e-4)
    flipped = ClipScorer(Checkpoint("pickscore", str(folders["clip"])))
    assert np.sign(flipped(images, ["a small red star"] * 12)).tolist() == np.sign(cosine).tolist()


def test_what_follows_the_end_token_changes_nothing(folders):
    scorer = ClipScorer(Checkpoint("pickscore", str(folders["pickscore"])))
    short = scorer.tokenizer(PROMPTS[:1], return_tensors="pt").input_ids
    alone = scorer.text_embeddings(short)
    torch.testing.assert_close(alone, scorer.text_embeddings(scorer.tokens(PROMPTS[:1])))
    zeros = F.pad(short, (0, 77 - short.shape[1]))  # how open_clip pads
    torch.testing.assert_close(alone, scorer.text_embeddings(zeros))


class OpenClipBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(width, 2 * width),
                "c_proj": nn.Linear(2 * width, width),
            }
        )

    def forward(self, x, mask):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class OpenClip(nn.Module):
    """open_clip's CLIP from torch's layers: heads 80 wide in the image tower, 64 in the other."""

    def __init__(self, wide, narrow, vocabulary, out, patch, positions):
        super().__init__()
        self.visual = nn.Module()
        self.visual.class_embedding = nn.Parameter(torch.empty(wide))
        self.visual.positional_embedding = nn.Parameter(torch.empty(positions, wide))
        self.visual.conv1 = nn.Conv2d(3, wide, patch, patch, bias=False)
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(wide), nn.LayerNorm(wide)
        self.visual.proj = nn.Parameter(torch.empty(wide, out))
        self.visual.transformer = nn.Module()
        blocks = [OpenClipBlock(wide, wide // 80) for _ in range(2)]
        self.visual.transformer.resblocks = nn.ModuleList(blocks)
        self.token_embedding = nn.Embedding(vocabulary, narrow)
        self.positional_embedding = nn.Parameter(torch.empty(77, narrow))
        self.transformer = nn.Module()
        blocks = [OpenClipBlock(narrow, narrow // 64) for _ in range(2)]
        self.transformer.resblocks = nn.ModuleList(blocks)
        self.ln_final = nn.LayerNorm(narrow)
        self.text_projection = nn.Parameter(torch.empty(narrow, out))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def image(self, pixels):
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        x = v.ln_pre(x)
        for block in v.transformer.resblocks:
            x = block(x, None)
        return F.normalize(v.ln_post(x[:, 0]) @ v.proj, dim=-1)

    def text(self, tokens):
        mask = torch.full((77, 77), -math.inf).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding
        for block in self.transformer.resblocks:
            x = block(x, mask)
        x = self.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)]
        return F.normalize(x @ self.text_projection, dim=-1)


def test_hpsv2_in_open_clips_names_is_open_clips_network(folders):
    folder = folders["hpsv21"]
    weights = {k[6:]: v for k, v in load_file(folder / "model.safetensors").items()}
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    network = OpenClip(160, 64, len(tokenizer), 16, 8, 17).eval()
    network.load_state_dict(weights)
    tokens = torch.zeros(2, 77, dtype=torch.long)
    for k, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt).input_ids
        tokens[k, : len(ids)] = torch.tensor(ids)
    images = [picture(k, 64, 48) for k in range(2)]
    pixels = torch.tensor(np.stack([hps_whole(i, 32) for i in images]), dtype=torch.float32)
    with torch.no_grad():
        expected = (network.image(pixels) * network.text(tokens)).sum(-1).numpy()
    scores = load_scorers("hpsv21", {"hpsv21": str(folder)})(images, PROMPTS)["hpsv21"]
    np.testing.assert_allclose(scores, expected, atol=2e-4)
    assert abs(scores[0] - scores[1]) > 1e-3


def head_by_hand(weights, prefix, x):
    for k in (0, 2, 4, 6, 7):
        x = x @ weights[f"{prefix}layers.{k}.weight"].T + weights[f"{prefix}layers.{k}.bias"]
    return x[:, 0]


def test_aesthetic_is_the_head_on_the_normalised_embedding(folders):
    folder = folders["aesthetic"]
    weights = load_file(folder / "model.safetensors")
    images = [picture(k, 64, 52) for k in range(3)]
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tower = CLIPVisionModelWithProjection(CLIPVisionConfig.from_pretrained(folder)).eval()
    tower.load_state_dict({k: v for k, v in weights.items() if not k.startswith("layers.")})
    pixels = torch.tensor(np.stack([torchvision_clip(i, 32) for i in images]), dtype=torch.float32)
    with torch.no_grad():
        x = tower(pixel_values=pixels).image_embeds
        expected = head_by_hand(weights, "", x / x.norm(dim=-1, keepdim=True)).numpy()
    scores = load_scorers("aesthetic", {"aesthetic": str(folder)})(images, ["x", "y", "z"])
    np.testing.assert_allclose(scores["aesthetic"], expected, atol=1e-4)
    assert np.ptp(expected) > 1e-3


def attention(q, k, v, heads, mask=0.0):
    b, n, d = q.shape
    q, k, v = (x.reshape(b, -1, heads, d // heads).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(d // heads) + mask).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(b, n, d)


def reward_by_hand(w, pixels, ids, mask):
    """ImageReward's forward pass, from its authors' vit.py and med.py, heads 64 wide."""

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    p = f"{v}patch_embed.proj."
    x = F.conv2d(pixels, w[p + "weight"], w[p + "bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w[v + "cls_token"].expand(len(x), 1, -1), x], 1) + w[v + "pos_embed"]
    for k in range(2):
        b = f"{v}blocks.{k}."
        q, key, value = linear(b + "attn.qkv", norm(b + "norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(b + "attn.proj", attention(q, key, value, x.shape[-1] // 64))
        x = x + linear(b + "mlp.fc2", F.gelu(linear(b + "mlp.fc1", norm(b + "norm2", x, 1e-6))))
    seen = norm(v + "norm", x, 1e-6)
    e = f"{t}embeddings."
    h = w[e + "word_embeddings.weight"][ids]
    h = h + w[e + "position_embeddings.weight"][: ids.shape[1]]
    h = norm(e + "LayerNorm", h, 1e-12)
    hidden = (1.0 - mask[:, None, None, :].float()) * -10000.0
    for k in range(2):
        for part, source, m in (("attention", None, hidden), ("crossattention", seen, 0.0)):
            a = f"{t}encoder.layer.{k}.{part}."
            s = h if source is None else source
            q, key, value = (
                linear(a + f"self.{n}", y) for n, y in (("query", h), ("key", s), ("value", s))
            )
            out = linear(a + "output.dense", attention(q, key, value, h.shape[-1] // 64, m))
            h = norm(a + "output.LayerNorm", out + h, 1e-12)
        layer = f"{t}encoder.layer.{k}."
        out = linear(layer + "output.dense", F.gelu(linear(layer + "intermediate.dense", h)))
        h = norm(layer + "output.LayerNorm", out + h, 1e-12)
    return (head_by_hand(w, "mlp.", h[:, 0]) - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_its_authors_forward_pass(folders):
    from transformers import BertTokenizerFast

    folder = folders["imagereward"]
    images = [picture(k, 64, 52) for k in range(3)]
    prompts = [*PROMPTS, "a red " * 40]
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    text = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    assert text.input_ids.shape == (3, 35) and text.input_ids[2, -1] == tokenizer.sep_token_id
    assert text.input_ids[0, 0] == tokenizer.cls_token_id and 1 not in text.input_ids
    pixels = torch.tensor(np.stack([torchvision_clip(i, 32) for i in images]), dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    expected = reward_by_hand(weights, pixels, text.input_ids, text.attention_mask).numpy()
    scores = load_scorers("imagereward", {"imagereward": str(folder)})(images, prompts)
    np.testing.assert_allclose(scores["imagereward"], expected, rtol=2e-4, atol=2e-4)
    swapped = load_scorers("imagereward", {"imagereward": str(folder)})(images[::-1], prompts)
    assert np.abs(swapped["imagereward"] - expected).max() > 1e-3


def test_aesthetic_25_is_its_authors_siglip_head(folders):
    """Resize to a square, 0.5 and 0.5, SigLIP's pooled state by its norm, five linear layers."""
    from transformers import SiglipImageProcessorPil, SiglipVisionModel

    folder, images = folders["aesthetic25"], [picture(k, *SIZES[k]) for k in range(4)]
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    with torch.no_grad():
        tower = SiglipVisionModel.from_pretrained(folder)
        state = tower(**processor(images=images, return_tensors="pt")).pooler_output
        state = state / state.norm(dim=-1, keepdim=True)
        weights = load_file(folder / "head.safetensors")
        for k in (0, 2, 4, 6, 8):
            name = f"scoring_head.{k}."
            state = F.linear(state, weights[name + "weight"], weights[name + "bias"])
    group = load_scorers("aesthetic25", {"aesthetic25": str(folder)})
    found = group(images, [PROMPTS[0]] * 4)["aesthetic25"]
    np.testing.assert_allclose(found, state[:, 0].numpy(), rtol=1e-4, atol=1e-5)


def mps_by_hand(folder, image, prompt, least):
    """Their eval_overall_mps_on_hpdv2.py and cross_modeling.py, one image and prompt at a time."""
    from inversion_dpo.evaluation.scorers.mps import CONDITION
    from inversion_dpo.evaluation.scorers.open_clip import vit_h_settings

    weights = {
        k.removeprefix("mps."): v for k, v in load_file(folder / "model.safetensors").items()
    }
    clip = {k[6:]: v for k, v in weights.items() if k.startswith("model.")}
    model = CLIPModel(vit_h_settings(clip)).eval()
    model.load_state_dict(clip)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    heads, head = 4, 8

    def text(words):
        how = {"max_length": 77, "padding": "max_length", "truncation": True}
        ids = tokenizer(words, **how, return_tensors="pt").input_ids
        out = model.text_model(input_ids=ids)
        return model.text_projection(out[0]), model.text_projection(out[1])

    def norm(x, at):
        return F.layer_norm(x, x.shape[-1:], weights[at + "weight"], weights[at + "bias"])

    def swiglu(x):
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x

    def heads_of(x):
        return x.reshape(1, -1, heads, head).permute(0, 2, 1, 3) * head**-0.5

    def attend(q, k, v, mask, out):
        sim = torch.einsum("bhid,bjd->bhij", q, k) + mask
        found = torch.einsum("bhij,bjd->bhid", sim.softmax(dim=-1), v)
        return found.permute(0, 2, 1, 3).reshape(1, -1, heads * head) @ out.T

    def turned(x):
        turns = 1.0 / (10000 ** (torch.arange(0, head, 2).float() / head))
        freqs = torch.einsum("i,j->ij", torch.arange(x.shape[-2]).float(), turns)
        pos = torch.cat((freqs, freqs), dim=-1)
        x1, x2 = x[..., : head // 2], x[..., head // 2 :]
        return x * pos.cos() + torch.cat((-x2, x1), dim=-1) * pos.sin()

    with torch.no_grad():
        pixels = torch.tensor(processed(image)[None]).float()
        x = model.visual_projection(model.vision_model(pixel_values=pixels)[0])
        text_f, end = text(prompt)
        sim = torch.einsum("bid,bjd->bji", text_f, text(CONDITION)[0])
        sim = torch.max(sim, dim=1, keepdim=True)[0]
        mask = torch.where(sim / sim.max() > least, 0, float("-inf"))[:, None]
        assert (0 < mask.isinf().sum() < 77) == (least > 0.3)  # tiny weights see every word
        for k in range(2):
            at, own = f"cross_model.layers.{k}.0.fn.", f"cross_model.layers.{k}.1.fn."
            y = norm(x, at + "norm.")
            keys, values = (text_f @ weights[at + "to_kv.weight"].T).chunk(2, dim=-1)
            q = heads_of(y @ weights[at + "to_q.weight"].T)
            out = attend(q, keys, values, mask, weights[at + "to_out.weight"])
            ff = swiglu(y @ weights[at + "ff.0.weight"].T) @ weights[at + "ff.2.weight"].T
            x = x + out + ff
            y = norm(x, own + "norm.") @ weights[own + "fused_attn_ff_proj.weight"].T
            q, keys, values, ff = y.split((32, head, head, 128), dim=-1)
            out = weights[own + "attn_out.weight"]
            q = turned(heads_of(q))
            out = attend(q, turned(keys), values, 0, out)
            x = x + out + swiglu(ff) @ weights[own + "ff_out.1.weight"].T
        image_f, end = x[:, 0] / x[:, 0].norm(), end / end.norm()
    return (model.logit_scale.exp() * end @ image_f.T).item()


@pytest.mark.parametrize("least", [0.3, 0.9])
def test_mps_is_its_authors_cross_attention(folders, monkeypatch, least):
    assert mps.SEEN == 0.3
    monkeypatch.setattr(mps, "SEEN", least)
    images, prompts = [picture(k, *SIZES[k]) for k in range(3)], [*PROMPTS, PROMPTS[0]]
    rows = zip(images, prompts, strict=True)
    expected = [mps_by_hand(folders["mps"], image, prompt, least) for image, prompt in rows]
    found = load_scorers("mps", {"mps": str(folders["mps"])})(images, prompts)["mps"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert len({*found.round(4)}) == 3


def hpsv3_size(height, width, factor=28, pixels=256 * 28 * 28):
    """The authors' smart_resize, written again."""
    h, w = (max(factor, round(n / factor) * factor) for n in (height, width))
    if h * w > pixels:
        beta = math.sqrt((height * width) / pixels)
        return tuple(math.floor(n / beta / factor) * factor for n in (height, width))
    if h * w < pixels:
        beta = math.sqrt(pixels / (height * width))
        return tuple(math.ceil(n * beta / factor) * factor for n in (height, width))
    return h, w


def test_hpsv3_is_the_head_at_the_reward_token(folders):
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLModel

    from inversion_dpo.evaluation.scorers.hpsv3 import INSTRUCTION, seen_size

    for size in [(1024, 1024), (512, 768), (448, 448), (64, 64), (1344, 768), (300, 50)]:
        assert seen_size(*size) == hpsv3_size(*size)
    folder, image = folders["hpsv3"], picture(1, 90, 60)
    h, w = hpsv3_size(90, 60)
    small = Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)
    made = Qwen2VLImageProcessorPil()(images=[small], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, h // 14, w // 14]]
    pads = "<|image_pad|>" * (h * w // 28**2)
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    text += f"<|vision_start|>{pads}<|vision_end|>{INSTRUCTION.format(prompt=PROMPTS[0])}"
    text += "<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text, return_tensors="pt").input_ids
    types = (tokens == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    with torch.no_grad():
        network = Qwen2VLModel.from_pretrained(folder)
        states = network(input_ids=tokens, mm_token_type_ids=types, **made).last_hidden_state
        at = (tokens[0] == tokenizer.convert_tokens_to_ids("<|Reward|>")).nonzero().item()
        state, weights = states[0, at], load_file(folder / "model.safetensors")
        for k in (0, 3, 5):
            state = F.linear(state, weights[f"rm_head.{k}.weight"], weights[f"rm_head.{k}.bias"])
            state = F.relu(state) if k < 5 else state
    group = load_scorers("hpsv3", {"hpsv3": str(folder)})
    found = group([image, picture(2, 90, 60)], [PROMPTS[0]] * 2)["hpsv3"]
    assert found[0] == pytest.approx(float(state[0]), rel=1e-4) and found[1] != found[0]
    with pytest.raises(ScorerError, match="holds <|Reward|>"):
        group([image], ["a <|Reward|> cup"])


@pytest.mark.parametrize("name", ["aesthetic25", "hpsv3"])
def test_a_scorer_without_a_published_folder_says_what_to_give(name):
    with pytest.raises(ScorerError, match=f"evaluation.checkpoints.{name}=FOLDER"):
        load_scorers(name)


@pytest.mark.parametrize("name", sorted({*WRITERS} - {"hpsv3", *registry.PER_PROMPT}))
def test_batches_do_not_change_a_score(folders, name):
    images, prompts = [picture(k) for k in range(5)], [PROMPTS[k % 2] for k in range(5)]
    one = load_scorers(name, {name: str(folders[name])}, batch_size=1)(images, prompts)[name]
    all_ = load_scorers(name, {name: str(folders[name])}, batch_size=5)(images, prompts)[name]
    np.testing.assert_allclose(one, all_, rtol=1e-4, atol=1e-5)
    assert one.shape == (5,) and one.dtype == np.float64


calls = []


def counted(images, prompts):
    calls.append(len(images))
    return [float(i.mean()) for i in images]


def two(images, prompts):
    return {"a": np.ones(len(images)), "b": np.zeros(len(images))}


def wrong_length(images, prompts):
    return [1.0]


def not_finite(images, prompts):
    return [1.0, float("nan")]


def words(images, prompts):
    return ["good", "bad"]


HERE = "tests.unit.evaluation.test_scorers"


@pytest.fixture
def here(monkeypatch):
    """This module under a name that can be imported."""
    monkeypatch.setitem(sys.modules, "my_scorers", sys.modules[__name__])
    return "my_scorers"


def test_several_scorers_at_once(folders, here):
    group = load_scorers(f"clip, {here}:counted,{here}:two", {"clip": str(folders["clip"])})
    scores = group(IMAGES, PROMPTS)
    assert list(scores) == ["clip", "counted", "a", "b"]
    assert scores["counted"].tolist() == [i.mean() for i in IMAGES]
    as_list = load_scorers(["clip", f"{here}:two"], {"clip": str(folders["clip"])})
    assert list(as_list(IMAGES, PROMPTS)) == ["clip", "a", "b"]


def test_scenes_are_the_exact_checker():
    from inversion_dpo.world.checker import NAMES, judge

    images = [np.zeros((64, 64, 3), np.uint8)] * 2
    theirs, ours = judge(images, PROMPTS), load_scorers("scenes")(images, PROMPTS)
    assert list(ours) == list(NAMES) and all(np.array_equal(ours[k], theirs[k]) for k in ours)


def tensors(images, prompts):
    return torch.ones(len(images), requires_grad=True) * 2


def test_tensors_are_taken_and_nothing_to_score_is_refused(here):
    assert load_scorers(f"{here}:tensors")(IMAGES, PROMPTS)["tensors"].tolist() == [2, 2]
    for images, prompts in (([], []), (IMAGES, PROMPTS[:1])):
        with pytest.raises(ScorerError, match="give one each"):
            load_scorers(f"{here}:tensors")(images, prompts)


@pytest.mark.parametrize(("name", "tokens"), [("imagereward", 35), ("clip", 77)])
def test_prompts_that_lose_their_end_are_counted(folders, caplog, name, tokens):
    group = load_scorers(name, {name: str(folders[name])})
    group(IMAGES * 2, [*PROMPTS, "a red star and " * 40, "a blue star and " * 40])
    assert "reads" not in caplog.text
    group.conclude()
    told = f"{name} reads {tokens} tokens: the end of 2 of 4 prompts does not count, such as 'a red"
    assert told in caplog.text


def test_a_scorer_beside_the_reader_is_found(tmp_path, monkeypatch):
    (tmp_path / "beside_me.py").write_text("def score(images, prompts): return [1.0] * len(images)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert load_scorers("beside_me:score")(IMAGES, PROMPTS)["score"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "function, message",
    [
        ("wrong_length", "shape [1] for 2 images"),
        ("not_finite", "not_finite is nan for the prompt 'a large blue circle"),
        ("words", "no list of numbers"),
    ],
)
def test_a_bad_answer_is_named(here, function, message):
    with pytest.raises(ScorerError, match=message.replace("[", r"\[").replace("]", r"\]")):
        load_scorers(f"{here}:{function}")(IMAGES, PROMPTS)


def test_an_answer_in_bfloat16_is_taken_and_odd_ones_are_named(monkeypatch):
    own = SimpleNamespace(
        half=lambda images, prompts: torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
        turned=lambda images, prompts: np.array([1 + 1j, 2]),
        numbered=lambda images, prompts: {3: [1.0, 2.0]},
        nameless=lambda images, prompts: {" ": [1.0, 2.0]},
        graded=lambda images, prompts: [torch.ones((), requires_grad=True)] * 2,
    )
    monkeypatch.setitem(sys.modules, "my_scorers", own)
    assert load_scorers("my_scorers:half")(IMAGES, PROMPTS)["half"].tolist() == [1.5, 2.5]
    for name, fault in (
        ("turned", "no list of numbers .they are complex"),
        ("numbered", "a score is called 3: give it a name"),
        ("nameless", "a score is called ' ': give it a name"),
        ("graded", "no list of numbers"),
    ):
        with pytest.raises(ScorerError, match=fault):
            load_scorers(f"my_scorers:{name}")(IMAGES, PROMPTS)


def test_scores_that_change_their_names_are_one_line(monkeypatch):
    names, function = iter("aaab"), lambda images, prompts: {next(names): [1.0] * len(images)}
    monkeypatch.setitem(sys.modules, "my_scorers", SimpleNamespace(changing=function))
    group = load_scorers("my_scorers:changing", batch_size=1)
    assert group(IMAGES, PROMPTS)["a"].tolist() == [1, 1]
    with pytest.raises(ScorerError, match="gives a, b for some images only: return the same"):
        group(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("my_scorers:win_rate", "a scorer may not give a score called 'win_rate'"),
        ("my_scorers:clip,clip", "two scorers give a score called 'clip'"),
    ],
)
def test_names_that_cannot_stand_are_refused_before_anything_is_sampled(
    folders, monkeypatch, spec, fault
):
    own = SimpleNamespace(win_rate=counted, clip=counted)
    monkeypatch.setitem(sys.modules, "my_scorers", own)
    with pytest.raises(ScorerError, match=fault):
        load_scorers(spec, {"clip": str(folders["clip"])}).names(PROMPTS)


def test_an_own_scorer_changes_no_image_and_ends_no_command(monkeypatch):
    def spoils(images, prompts):
        images[0][:] = 0
        images.clear()
        return [1.0] * len(prompts)

    own = SimpleNamespace(spoils=spoils, ends=lambda images, prompts: sys.exit(0))
    monkeypatch.setitem(sys.modules, "my_scorers", own)
    before = IMAGES[0].copy()
    assert load_scorers("my_scorers:spoils")(IMAGES, PROMPTS)["spoils"].tolist() == [1, 1]
    np.testing.assert_array_equal(IMAGES[0], before)
    with pytest.raises(ScorerError, match=r"my_scorers:ends fails in .*SystemExit\(0\)"):
        load_scorers("my_scorers:ends")(IMAGES, PROMPTS)


def write_modules(folder, files, monkeypatch):
    """A reader's own modules, in the folder where the command is typed."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_samples_are_scored_again_when_a_module_of_the_scorer_changes(tmp_path, monkeypatch):
    files = {
        "taste_of_mine.py": "import numpy\nimport weights_of_mine\n",
        "weights_of_mine.py": "def f():\n    from parts_of_mine import deep\n",
        "parts_of_mine/__init__.py": "",
        "parts_of_mine/deep.py": "from . import other\nfrom .gone import nothing\n",
        "parts_of_mine/other.py": "",
        "unrelated.py": "",
    }
    write_modules(tmp_path, files, monkeypatch)
    (one,) = load_scorers("taste_of_mine:score").members
    assert {str(p.relative_to(tmp_path)) for p in one.places()} == files.keys() - {"unrelated.py"}
    (one,) = load_scorers("parts_of_mine.deep:score").members
    inner = {name for name in files if name.startswith("parts")}
    assert {str(p.relative_to(tmp_path)) for p in one.places()} == inner
    (tmp_path / "taste_of_mine.py").write_text("import weights_of_mine\n(")
    (one,) = load_scorers("taste_of_mine:score").members
    assert [p.name for p in one.places()] == ["taste_of_mine.py"]


def test_an_own_scorer_in_or_beside_a_folder_without_init_is_taken(tmp_path, monkeypatch):
    files = {
        "bare_of_mine/deep/score.py": "from bare_of_mine import other\nfrom .. import again\n",
        "bare_of_mine/other.py": "import bare_beside.one\nimport bare_beside.gone\n",
        "bare_of_mine/again.py": "",
        "bare_beside/one.py": "",
    }
    write_modules(tmp_path, files, monkeypatch)
    (one,) = load_scorers("bare_of_mine.deep.score:score").members
    assert {str(p.relative_to(tmp_path)) for p in one.places()} == {*files}


def test_the_embedded_worlds_checker_refuses_other_sizes():
    with pytest.raises(ConfigError, match=r"scenes reads pictures of 64x64 .* not \[64, 80, 3\]"):
        load_scorers("scenes")([picture(0, 64, 80)], PROMPTS[:1])


@pytest.mark.parametrize(
    "spec, checkpoints, message",
    [
        ("pikscore", {}, "did you mean 'pickscore'"),
        ("", {}, "names no scorer"),
        ("clip,", {}, "names no scorer"),
        ("clip,scenes, clip", {}, "evaluation.scorer names clip twice: give each scorer once"),
        ("no.such.module:f", {}, "module:function"),
        ("clip", {"clop": "x"}, "evaluation.checkpoints.clop"),
        ("clip", {"clip": "/no/such/folder"}, "no such folder"),
    ],
)
def test_a_bad_name_is_one_line_with_its_remedy(spec, checkpoints, message):
    with pytest.raises(ScorerError) as error:
        load_scorers(spec, checkpoints)(IMAGES, PROMPTS)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_weight_is_an_error_and_never_random(folders, tmp_path):
    from safetensors.torch import save_file

    for name, dropped in (
        ("clip", "visual_projection.weight"),
        ("aesthetic", "layers.4.bias"),
        ("hpsv21", "model.visual.ln_post.bias"),
        ("imagereward", "mlp.layers.7.weight"),
    ):
        folder = tmp_path / name
        write_tiny_scorer(name, folder)
        weights = load_file(folder / "model.safetensors")
        del weights[dropped]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ScorerError, match=f"evaluation.checkpoints.{name}="):
            load_scorers(name, {name: str(folder)})(IMAGES, PROMPTS)


@pytest.mark.parametrize("name", ["clip", "compbench", "compbench-spatial"])
def test_a_tokenizer_that_was_not_fetched_is_an_error_and_never_empty(folders, tmp_path, name):
    folder = shutil.copytree(folders[name], tmp_path / "part")
    for file in ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"):
        (folder / file).unlink(missing_ok=True)
    words = load_tokenizer(name, Checkpoint.at(name, str(folders[name])))
    assert len(words) > len(words.all_special_ids)
    with pytest.raises(ScorerError, match=f"checkpoints.{name}=.* no vocabulary"):
        load_tokenizer(name, Checkpoint.at(name, str(folder)))


def load_tokenizer(name, checkpoint):
    kind = BertTokenizerFast if name == "compbench" else CLIPTokenizer
    return loaded(kind, checkpoint, complete=False)


@pytest.mark.parametrize("name", ["clip", "aesthetic", "compbench"])
def test_weights_without_their_settings_are_one_line(folders, tmp_path, name):
    folder = shutil.copytree(folders[name], tmp_path / "part")
    (folder / "config.json").unlink()
    row = {"prompt": PROMPTS[0], "phrases": ["a star"]}
    whole = PromptSet(PROMPTS[:1], [""], [None], rows=[row])
    score = load_scorers(name, {name: str(folder)}, prompt_set=lambda: whole)
    with pytest.raises(ScorerError, match=f"checkpoints.{name}=.* no config.json"):
        score(IMAGES[:1], PROMPTS[:1])


def test_a_folder_has_no_revision_and_may_have_an_at_in_its_name(folders, tmp_path):
    named = shutil.copytree(folders["clip"], tmp_path / "me@work")
    assert Checkpoint.at("clip", str(named)).folder == named
    with pytest.raises(ScorerError, match="work@v9: a folder has no revision. Leave out the @"):
        Checkpoint.at("clip", f"{named.rename(tmp_path / 'work')}@v9")


@pytest.mark.parametrize("name", ["clip", "mps", "hpsv3", "aesthetic25", "imagereward"])
def test_damaged_weights_are_named_before_anything_is_sampled(tmp_path, name):
    (tmp_path / "model.safetensors").write_text("<html>404</html>")
    with pytest.raises(ScorerError, match=f"checkpoints.{name}=.*model.safetensors is no safeten"):
        load_scorers(name, {name: str(tmp_path)}).names(PROMPTS)


@pytest.mark.parametrize("name", TENSORS)
def test_another_networks_weights_are_named_before_anything_is_sampled(folders, name):
    other = "hpsv3" if "clip" in name or name in ("pickscore", "hpsv2", "hpsv21") else "clip"
    Checkpoint(name, str(folders[name])).check()
    with pytest.raises(ScorerError, match=f"checkpoints.{name}=.* another network's weights"):
        Checkpoint(name, str(folders[other])).check()


@pytest.mark.parametrize(
    ("place", "other"),
    [("openai/clip-vit-large-patch14", "clip"), ("adams-story/HPSv2-hf@refs/pr/2", "hpsv2")],
)
def test_weights_of_one_clip_under_two_names_are_refused(folders, place, other):
    """Their tensors have the same names and shapes: only where they come from tells."""
    with pytest.raises(ScorerError, match=f"checkpoints.pickscore={place}: {other} has the same"):
        load_scorers("pickscore", {"pickscore": place}).names(PROMPTS)
    two = dict.fromkeys(("hpsv21", "pickscore"), str(folders["pickscore"]))
    with pytest.raises(ScorerError, match="checkpoints.pickscore=.*: hpsv21 has the same weights"):
        load_scorers("hpsv21,pickscore", two).names(PROMPTS)
    load_scorers("pickscore", {"pickscore": str(folders["pickscore"])}).names(PROMPTS)


def test_another_model_is_not_built_to_be_hpsv3(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ScorerError, match="checkpoints.hpsv3=.* is of 'bert', not of qwen2_vl"):
        load_scorers("hpsv3", {"hpsv3": str(tmp_path)})(IMAGES, PROMPTS)


def test_no_pickle_is_opened(tmp_path):
    write_tiny_scorer("clip", tmp_path / "clip")
    weights = tmp_path / "clip" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "clip" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ScorerError, match="clip"):
        load_scorers("clip", {"clip": str(tmp_path / "clip")})(IMAGES, PROMPTS)


def test_offline_a_hub_checkpoint_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ScorerError, match="evaluation.checkpoints.pickscore=no-one/nothing"):
        load_scorers("pickscore", {"pickscore": "no-one/nothing"}, store=tmp_path / "s.sqlite")(
            IMAGES, PROMPTS
        )


def counting(monkeypatch, folder, name="clip"):
    """How many images the scorer itself was given, call by call."""
    seen = []
    real = registry.built

    def built(spec, checkpoint):
        scorer = real(spec, checkpoint)

        def call(images, prompts):
            seen.append(len(images))
            return scorer(images, prompts)

        return call

    monkeypatch.setattr(registry, "built", built)
    return seen


def test_kept_scores_are_not_computed_again(folders, tmp_path, monkeypatch):
    seen = counting(monkeypatch, folders["clip"])
    at, store = {"clip": str(folders["clip"])}, tmp_path / "scores.sqlite"
    first = load_scorers("clip", at, 2, store)(IMAGES, PROMPTS)["clip"]
    again = load_scorers("clip", at, 2, store)(IMAGES, PROMPTS)["clip"]
    assert first.tolist() == again.tolist() and seen == [2]
    load_scorers("clip", at, 2, store)([*IMAGES, picture(9)], [*PROMPTS, PROMPTS[0]])
    assert seen == [2, 1]
    load_scorers("clip", at, 2, store)(IMAGES, PROMPTS[::-1])
    assert seen == [2, 1, 2]
    other = {"pickscore": str(folders["clip"])}
    assert load_scorers("pickscore", other, 2, store)(IMAGES, PROMPTS)["pickscore"][0] != first[0]
    assert seen == [2, 1, 2, 2]


def test_other_weights_are_scored_anew(folders, tmp_path, monkeypatch):
    seen, store = counting(monkeypatch, folders["clip"]), tmp_path / "scores.sqlite"
    load_scorers("clip", {"clip": str(folders["clip"])}, 2, store)(IMAGES, PROMPTS)
    other = write_tiny_scorer("clip", tmp_path / "other", seed=1)
    load_scorers("clip", {"clip": str(other)}, 2, store)(IMAGES, PROMPTS)
    assert seen == [2, 2]


def test_a_crash_loses_one_batch_at_most(folders, tmp_path, monkeypatch):
    at, store = {"clip": str(folders["clip"])}, tmp_path / "scores.sqlite"
    images, prompts = [picture(k) for k in range(6)], PROMPTS[:1] * 6
    real, fail = registry.built, [True]
    seen = []

    def built(spec, checkpoint):
        scorer = real(spec, checkpoint)

        def call(images, prompts):
            seen.append(len(images))
            if len(seen) == 3 and fail.pop():
                raise KeyboardInterrupt
            return scorer(images, prompts)

        return call

    monkeypatch.setattr(registry, "built", built)
    with pytest.raises(KeyboardInterrupt):
        load_scorers("clip", at, 2, store)(images, prompts)
    load_scorers("clip", at, 2, store)(images, prompts)
    assert seen == [2, 2, 2, 2]


def test_a_damaged_store_is_named(folders, tmp_path):
    store = tmp_path / "scores.sqlite"
    store.write_bytes(b"no database" * 100)
    with pytest.raises(ScorerError, match="delete it"):
        load_scorers("clip", {"clip": str(folders["clip"])}, 2, store)(IMAGES, PROMPTS)


def test_a_store_that_another_command_has_locked_is_not_called_damaged(
    folders, tmp_path, monkeypatch
):
    """Who deleted it, as the message said, lost every score."""
    store, connect = tmp_path / "scores.sqlite", sqlite3.connect
    monkeypatch.setattr("sqlite3.connect", lambda path, timeout: connect(path, timeout=0.01))
    with closing(connect(store)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(
            ScorerError, match="cannot be used now .*locked.*wait for the other command"
        ):
            load_scorers("clip", {"clip": str(folders["clip"])}, 2, store)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("error", "offline", "told"),
    [
        (RemoteEntryNotFoundError, False, False),
        (LocalEntryNotFoundError, True, False),
        (LocalEntryNotFoundError, False, "OWNER/x: no answer"),
        (OSError, False, "OWNER/x: no answer"),
    ],
)
def test_a_hub_that_does_not_answer_is_no_missing_file(monkeypatch, error, offline, told):
    def download(*_, **__):
        raise error.__new__(error) if error is RemoteEntryNotFoundError else error("no answer")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    place = Checkpoint("clip", "OWNER/x")
    if not told:
        assert place.has("preprocessor_config.json") is False
    else:
        with pytest.raises(ScorerError, match=told):
            place.has("preprocessor_config.json")


def test_a_reason_of_the_hub_ends_with_one_full_stop():
    assert ": not there. Give a folder" in Checkpoint("clip", "a/b").complaint("not there.")
