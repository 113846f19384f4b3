"""LoRA files in every spelling: all of a file reaches the pipeline, or none and one line."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from inversion_dpo.cli.main import main
from inversion_dpo.evaluation.sides import side
from inversion_dpo.models.base import ModelError
from inversion_dpo.models.kohya import blocks_to_kohya
from inversion_dpo.models.loading import adapt, check_model, load_pipeline
from inversion_dpo.models.lora import add_lora, merge_lora, read_lora
from inversion_dpo.models.parts import check_lora
from inversion_dpo.run.config import ConfigError, load_config, to_yaml
from inversion_dpo.run.fields import ModelConfig, PolicyConfig
from inversion_dpo.training.policy import LoraPolicy
from tests.slow import slow_but
from tools.tiny.single_file import transformer_to_original, unet_to_original

ALPHA, RANK = 4.0, 2
ENDINGS = ("to_q", "to_out.0", "conv1", "proj_in", "linear_1")


def network_of(pipeline):
    return getattr(pipeline, "unet", None) or pipeline.transformer


def random_lora(network, endings=ENDINGS):
    """Layer -> A, B of random numbers, for every layer with such an ending."""
    torch.manual_seed(0)
    made = {}
    for name, module in network.named_modules():
        if name.endswith(endings) and hasattr(module, "weight"):
            out, *inputs = module.weight.shape
            ones = (1,) * (len(inputs) - 1)
            made[name] = torch.randn(RANK, *inputs), torch.randn(out, RANK, *ones)
    return made


def pairs(lora, start, a, b, flat=False, alpha=True):
    """Spell a LoRA's keys: start, the layer (dots as underscores), and the matrices' names."""
    tensors = {}
    for layer, (down, up) in lora.items():
        key = start + (layer.replace(".", "_") if flat else layer)
        tensors |= {f"{key}.{a}": down, f"{key}.{b}": up}
        tensors |= {f"{key}.alpha": torch.tensor(ALPHA)} if alpha else {}
    return tensors


PEFT, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
SPELLINGS = {
    "diffusers": lambda lora, part: pairs(lora, f"{part}.", *PEFT),
    "diffusers' first": lambda lora, part: pairs(
        lora, f"{part}.", "lora.down.weight", "lora.up.weight"
    ),
    "peft": lambda lora, part: pairs(lora, "base_model.model.", *PEFT),
    "peft with the adapter's name": lambda lora, part: pairs(
        lora, f"base_model.model.{part}.", "lora_A.default.weight", "lora_B.default.weight"
    ),
    "bare": lambda lora, part: pairs(lora, "", *PEFT),
    "kohya": lambda lora, part: pairs(lora, "lora_unet_", *KOHYA, flat=True),
    "LyCORIS": lambda lora, part: pairs(lora, "lycoris_", *KOHYA, flat=True),
    "ComfyUI": lambda lora, part: pairs(lora, "diffusion_model.", *PEFT),
}


FAMILIES = ["sd15", "sdxl", "sd3", "flux", "z-image", "qwen-image", "flux2-klein", "chroma", "wan"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_leads_to_the_same_layers(family, spelling, pipe, tmp_path):
    pipeline = pipe(family)
    lora = random_lora(network_of(pipeline))
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    save_file(SPELLINGS[spelling](lora, part), tmp_path / "lora.safetensors")
    weights, changes = read_lora(pipeline, tmp_path / "lora.safetensors")
    assert not changes and len(weights) == 2 * len(lora)
    for layer, (down, up) in lora.items():
        assert torch.equal(weights[f"{part}.{layer}.lora_A.weight"], down)
        assert torch.equal(weights[f"{part}.{layer}.lora_B.weight"], up * ALPHA / RANK)


@pytest.mark.parametrize("start", ["module.", "{}._orig_mod.", "base_model.model.module.{}."])
def test_the_names_of_wrappers_are_left_out(start, pipe, tmp_path):
    """DDP's and torch.compile's; inside the network too, where blocks are wrapped one by one."""
    for family, part in (("sd15", "unet"), ("flux", "transformer")):
        lora = random_lora(network_of(pipe(family)), ("to_q",))
        inner = {re.sub(r"(blocks\.\d+)\.", r"\1._orig_mod.", k): v for k, v in lora.items()}
        save_file(pairs(inner, start.format(part), *PEFT), tmp_path / "lora.safetensors")
        weights, _ = read_lora(pipe(family), tmp_path / "lora.safetensors")
        assert weights.keys() == {f"{part}.{n}.lora_{x}.weight" for n in lora for x in "AB"}
    flat = pairs(lora, "lora_unet__orig_mod_", *KOHYA, flat=True)
    save_file(flat, tmp_path / "lora.safetensors")
    assert read_lora(pipe(family), tmp_path / "lora.safetensors")[0].keys() == weights.keys()
    twice = pairs(lora, "", *PEFT) | pairs(lora, "module.", *PEFT)
    save_file({k: v.clone() for k, v in twice.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match=r"fit no layer .* \(a second time\)': give a L"):
        read_lora(pipe(family), tmp_path / "lora.safetensors")


def test_the_original_unets_names(pipe, tmp_path):
    """kohya's LoRA of SDXL: input_blocks, middle_block and output_blocks; and LyCORIS' LoKr."""
    unet = pipe("sdxl").unet
    fake = SimpleNamespace(config=unet.config, up_blocks=unet.up_blocks)
    fake.state_dict = lambda: {name: name for name in unet.state_dict()}
    original = {ours.removesuffix(".weight"): k for k, ours in unet_to_original(fake).items()}
    lora = random_lora(unet, ("to_k", "conv2", "proj_out", "conv_shortcut", "ff.net.2"))
    tensors = {}
    for layer, matrices in lora.items():
        name = original[layer].removesuffix(".weight")
        tensors |= pairs({name: matrices}, "lora_unet_", *KOHYA, flat=True)
    value = next(n for n in original if n.endswith("attn2.to_v"))
    name = original[value].removesuffix(".weight").replace(".", "_")
    whole = torch.randn_like(unet.get_submodule(value).weight)
    tensors |= {f"lora_unet_{name}.lokr_w1": torch.ones(1, 1), f"lora_unet_{name}.lokr_w2": whole}
    save_file(tensors, tmp_path / "lora.safetensors")
    weights, changes = read_lora(pipe("sdxl"), tmp_path / "lora.safetensors")
    assert len(weights) == 2 * len(lora)
    for layer, (_, up) in lora.items():
        assert torch.equal(weights[f"unet.{layer}.lora_B.weight"], up * ALPHA / RANK)
    assert changes.keys() == {("unet", value)} and torch.equal(changes["unet", value], whole)


ORIGINAL = ["sd3", "z-image", "krea2", "flux2-klein", "wan", "sana"]


@pytest.mark.parametrize("family", ORIGINAL)
@pytest.mark.parametrize("flat", [True, False], ids=["kohya", "ComfyUI"])
def test_the_original_transformers_names(family, flat, pipe, tmp_path):
    """Every layer: what the LoRA adds is what diffusers makes of the changed original weights."""
    network = pipe(family).transformer
    original = transformer_to_original(network)
    weighty = {k for k, v in original.items() if k.endswith(".weight") and v.ndim > 1}
    torch.manual_seed(0)
    lora, changed = {}, dict(original)
    for key in sorted(weighty):
        out, *inputs = original[key].shape
        down, up = torch.randn(RANK, *inputs), torch.randn(out, RANK)
        lora[key.removesuffix(".weight")] = down, up.reshape(out, RANK, *[1] * (len(inputs) - 1))
        product = (up @ down.flatten(1)).reshape(original[key].shape)
        changed[key] = original[key] + (ALPHA / RANK if flat else 1) * product
    names = ("lora_unet_", *KOHYA) if flat else ("diffusion_model.", *PEFT)
    save_file(pairs(lora, *names, flat=flat, alpha=flat), tmp_path / "lora.safetensors")
    weights, changes = read_lora(pipe(family), tmp_path / "lora.safetensors")
    convert = SINGLE_FILE_LOADABLE_CLASSES[type(network).__name__]["checkpoint_mapping_fn"]
    expected, before = convert(config=network.config, checkpoint=changed), network.state_dict()
    moved = {k for k, v in expected.items() if not torch.equal(v, before[k])}
    assert not changes and len(weights) == 2 * len(moved) >= 2 * len(weighty)
    for key in moved:
        start = f"transformer.{key.removesuffix('.weight')}.lora_"
        product = weights[f"{start}B.weight"].flatten(1) @ weights[f"{start}A.weight"].flatten(1)
        torch.testing.assert_close(product, (expected[key] - before[key]).flatten(1))


@pytest.mark.parametrize("family", ["flux", "chroma", "lumina2"])
def test_kohyas_names_come_back_from_the_export(family, pipe, tmp_path):
    """Of the families whose converter in diffusers knows the real width alone."""
    ends = ("to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "add_k_proj", "ff.net.2", "linear_2")
    found = random_lora(pipe(family).transformer, ends)
    outside = ("time", "norm_out", "distilled")  # which the export leaves out
    found = {n: matrices for n, matrices in found.items() if not n.startswith(outside)}
    ours = {f"transformer.{k}": v for k, v in pairs(found, "", *PEFT, alpha=False).items()}
    save_file(blocks_to_kohya(ours, ALPHA), tmp_path / "lora.safetensors")
    weights, changes = read_lora(pipe(family), tmp_path / "lora.safetensors")
    assert not changes
    for key in weights.keys() - ours.keys():  # a part of a layer that has others
        assert "lora_A" in key or not weights[key].any()
    for layer, (down, up) in found.items():
        start = f"transformer.{layer}.lora_"
        product = weights[f"{start}B.weight"] @ weights[f"{start}A.weight"]
        torch.testing.assert_close(product, up @ down * ALPHA / RANK, rtol=1e-4, atol=1e-4)


def test_what_flux_loras_are_called_elsewhere(pipe, tmp_path):
    """XLabs' names, kohya's parts for CLIP and T5, and ComfyUI's for CLIP."""
    flux = pipe("flux")
    single = random_lora(flux.transformer, "0.proj_out")["single_transformer_blocks.0.proj_out"]
    down, up = torch.randn(RANK, 32), torch.randn(96, RANK)
    tensors = {
        "double_blocks.0.processor.qkv_lora1.down.weight": down,
        "double_blocks.0.processor.qkv_lora1.up.weight": up,
        "single_blocks.0.processor.proj_lora.down.weight": single[0],
        "single_blocks.0.processor.proj_lora.up.weight": single[1],
    }
    clip, t5 = "encoder.layers.0.mlp.fc1", "encoder.block.0.layer.0.SelfAttention.q"
    for part, layer, start in (
        ("text_encoder", clip, "lora_te1_text_model_"),
        ("text_encoder_2", t5, "lora_te3_"),
    ):
        table = {n.removeprefix("text_model."): m for n, m in getattr(flux, part).named_modules()}
        out, inputs = table[layer].weight.shape
        pair = torch.ones(RANK, inputs), torch.ones(out, RANK)
        tensors |= pairs({layer: pair}, start, *KOHYA, flat=True)
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "lora.safetensors")
    weights, changes = read_lora(flux, tmp_path / "lora.safetensors")
    for row, n in enumerate("qkv"):
        key = f"transformer.transformer_blocks.0.attn.to_{n}.lora_"
        assert torch.equal(weights[f"{key}B.weight"], up[32 * row : 32 * row + 32])
        assert torch.equal(weights[f"{key}A.weight"], down)
    assert sum(k.startswith("text_encoder.") for k in weights) == 2 and len(weights) == 10
    assert (changes["text_encoder_2", t5] == RANK * ALPHA / RANK).all() and len(changes) == 1


T5_LAYER, LLM_LAYER = "encoder.block.0.layer.0.SelfAttention.q", "layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("family", "part", "layer", "key"),
    [
        ("chroma", "text_encoder", T5_LAYER, f"lora_te_{T5_LAYER.replace('.', '_')}"),
        ("chroma", "text_encoder", T5_LAYER, f"lora_te3_{T5_LAYER.replace('.', '_')}"),
        ("chroma", "text_encoder", T5_LAYER, f"text_encoder.{T5_LAYER}"),
        ("chroma", "text_encoder", T5_LAYER, f"text_encoders.t5xxl.transformer.{T5_LAYER}"),
        ("wan", "text_encoder", T5_LAYER, f"text_encoders.umt5xxl.transformer.{T5_LAYER}"),
        (
            "z-image",
            "text_encoder",
            LLM_LAYER,
            f"text_encoders.qwen3_4b.transformer.model.{LLM_LAYER}",
        ),
        ("z-image", "text_encoder", LLM_LAYER, f"lora_te_model_{LLM_LAYER.replace('.', '_')}"),
        (
            "qwen-image",
            "text_encoder",
            f"model.language_model.{LLM_LAYER}",
            f"text_encoders.qwen25_7b.transformer.model.{LLM_LAYER}",
        ),
        ("sdxl", "text_encoder_2", "text_projection", "lora_te2_text_projection"),
    ],
)
def test_parts_for_text_encoders_that_diffusers_does_not_load(
    family, part, layer, key, pipe, fresh, tmp_path
):
    """T5 alone, language models, and layers of CLIP that its loader passes over."""
    weight = getattr(pipe(family), part).get_submodule(layer).weight
    down, up = torch.randn(RANK, weight.shape[1]), torch.randn(len(weight), RANK)
    names = KOHYA if key.startswith("lora_") else PEFT
    save_file(
        {f"{key}.{n}": m for n, m in zip(names, (down, up), strict=True)},
        tmp_path / "x.safetensors",
    )
    changed = fresh(family)
    add_lora(changed, str(tmp_path / "x.safetensors"))
    torch.testing.assert_close(
        getattr(changed, part).get_submodule(layer).weight, weight + up @ down
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("bundle_emb.word.clip_l", "'bundle_emb.*': embeddings of new words are not read, so .*"),
        ("lora_te3_x.alpha", "'lora_te3_.*': they are for text_encoder_3, .* set model.t5=true"),
    ],
)
def test_what_a_lora_has_beside_layers_is_named(more, message, pipe, tmp_path):
    lora = pairs(random_lora(pipe("sd3-no-t5").transformer, ("to_q",)), "transformer.", *PEFT)
    save_file(lora | {more: torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=rf"1 of {len(lora) + 1} tensors .*{message}"):
        add_lora(pipe("sd3-no-t5"), str(tmp_path / "x.safetensors"))


def test_a_lokr_of_a_fused_layer_is_cut_into_its_parts(pipe, tmp_path):
    size = pipe("z-image").transformer.layers[0].attention.to_q.weight.shape
    whole = torch.randn(3 * size[0], size[1])
    key = "diffusion_model.layers.0.attention.qkv.lokr_w"
    save_file({f"{key}1": torch.ones(1, 1), f"{key}2": whole}, tmp_path / "x.safetensors")
    weights, changes = read_lora(pipe("z-image"), tmp_path / "x.safetensors")
    parts = [changes["transformer", f"layers.0.attention.to_{n}"] for n in "qkv"]
    assert not weights and torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("layer", ["attn1.to_q", "conv1"])
def test_a_dora_by_kohya_is_pefts(layer, pipe, tmp_path):
    """The norms of rows; those of columns, LyCORIS' former kind, peft does not have."""
    unet = pipe("sd15").unet
    name, (down, up) = next((n, m) for n, m in random_lora(unet).items() if n.endswith(layer))
    flat = f"lora_unet_{name.replace('.', '_')}"
    tensors = pairs({name: (down, up)}, "lora_unet_", *KOHYA, flat=True)
    norm = torch.rand(len(up), *[1] * (down.ndim - 1))
    save_file(tensors | {f"{flat}.dora_scale": norm}, tmp_path / "x.safetensors")
    pipeline = copy.deepcopy(pipe("sd15"))
    add_lora(pipeline, str(tmp_path / "x.safetensors"))
    before = unet.get_submodule(name).weight
    merge_lora(pipeline)
    changed = before + ALPHA / RANK * (up.flatten(1) @ down.flatten(1)).reshape(before.shape)
    rows = changed.flatten(1).norm(dim=1).reshape(norm.shape)
    torch.testing.assert_close(pipeline.unet.get_submodule(name).weight, changed * norm / rows)
    save_file(tensors | {f"{flat}.dora_scale": norm.transpose(0, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=f"matrices for unet.{name}.*DoRA.*merge it first"):
        add_lora(pipe("sd15"), str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("family", "part", "start"),
    [("sd15", "text_encoder", "lora_te_"), ("sdxl", "text_encoder_2", "lora_te2_")],
)
def test_parts_for_the_text_encoder_are_merged_into_it(family, part, start, pipe, tiny, tmp_path):
    before = pipe(family)
    loras = {"unet": random_lora(before.unet, ("to_v",))}
    loras[part] = random_lora(getattr(before, part), ("q_proj", "fc1"))
    spelt = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in loras[part].items()}
    tensors = pairs(loras["unet"], "lora_unet_", *KOHYA, flat=True)
    save_file(tensors | pairs(spelt, start, *KOHYA, flat=True), tmp_path / "lora.safetensors")
    after = load_pipeline(ModelConfig(str(tiny(family)), lora=str(tmp_path / "lora.safetensors")))
    for name, lora in loras.items():
        for layer, (down, up) in lora.items():
            old, new = (getattr(p, name).get_submodule(layer).weight for p in (before, after))
            torch.testing.assert_close(new, old + ALPHA / RANK * up @ down)
        assert not any("lora" in n for n, _ in getattr(after, name).named_modules())


@pytest.mark.parametrize(
    ("family", "part", "ends"),
    [
        ("sd15", "text_encoder", ["q_proj", "fc1"]),
        ("flux", "text_encoder_2", ["SelfAttention.q"]),
        ("z-image", "text_encoder", ["q_proj"]),
    ],
)
def test_a_dora_of_a_text_encoder_is_merged_as_peft_does(family, part, ends, pipe, tiny, tmp_path):
    """diffusers' loader loses its magnitudes, and T5 and language models it does not load."""
    encoder = copy.deepcopy(getattr(pipe(family), part))
    torch.manual_seed(0)
    about = LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=ends)
    inject_adapter_in_model(about, encoder)
    for name, parameter in encoder.named_parameters():
        parameter.data += 0.2 * torch.randn_like(parameter) if "lora_" in name else 0
    tensors = {f"{part}.{k}": v for k, v in get_peft_model_state_dict(encoder).items()}
    told = {f"{part}.{k}": v for k, v in {"r": RANK, "lora_alpha": ALPHA, "use_dora": True}.items()}
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(told)})
    check_lora(ModelConfig(str(tiny(family))), str(file), "model.lora")  # without weights
    after = load_pipeline(ModelConfig(str(tiny(family)), lora=str(file)))
    layers = {n: m for n, m in encoder.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, layer in layers.items():
        layer.merge()
        new = getattr(after, part).get_submodule(name).weight
        torch.testing.assert_close(new, layer.weight)
        assert (new - getattr(pipe(family), part).get_submodule(name).weight).abs().max() > 0.1
    assert layers


@pytest.mark.parametrize(
    "settings",
    [
        LoHaConfig(r=RANK, alpha=ALPHA, target_modules=["to_q", "conv1"], init_weights=False),
        LoHaConfig(r=RANK, target_modules=["conv1"], use_effective_conv2d=True, init_weights=False),
        LoKrConfig(r=RANK, alpha=ALPHA, target_modules=["to_q"], init_weights=False),
        LoKrConfig(
            r=1, alpha=ALPHA, target_modules=["conv1"], decompose_both=True, init_weights=False
        ),
        LoKrConfig(
            r=2,
            alpha=ALPHA,
            target_modules=["conv1"],
            use_effective_conv2d=True,
            init_weights=False,
        ),
        LoKrConfig(
            r=9,
            alpha=ALPHA,
            target_modules=["to_q", "to_k"],
            rank_pattern={"to_q": 8},
            alpha_pattern={"to_k": 3},
            init_weights=False,
        ),
    ],
    ids=["LoHa", "LoHa of convolutions", "LoKr", "both decomposed", "with a core", "own ranks"],
)
def test_loha_and_lokr_change_weights_as_peft_does(settings, tiny, pipe, tmp_path):
    unet = load_pipeline(ModelConfig(str(tiny("sd15")))).unet
    torch.manual_seed(0)
    inject_adapter_in_model(settings, unet)
    tensors = get_peft_model_state_dict(unet)
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, tmp_path / "a.safetensors")
    about = {"r": settings.r, "alpha": settings.alpha, "rank_pattern": settings.rank_pattern}
    about["alpha_pattern"] = settings.alpha_pattern
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    weights, changes = read_lora(pipe("sd15"), tmp_path / "a.safetensors")
    layers = [n for n, m in unet.named_modules() if hasattr(m, "get_delta_weight")]
    assert not weights and {layer for _, layer in changes} == set(layers)
    for layer in layers:
        expected = unet.get_submodule(layer).get_delta_weight("default")
        torch.testing.assert_close(changes["unet", layer], expected)
        assert changes["unet", layer].abs().max() > 0


def test_a_lora_in_fp8_is_read(pipe, tmp_path):
    lora = pairs(random_lora(pipe("sd15").unet, ("to_q",)), "", *PEFT, alpha=False)
    eight = {k: v.to(torch.float8_e4m3fn) for k, v in lora.items()}
    save_file(eight, tmp_path / "eight.safetensors")
    save_file({k: v.float() for k, v in eight.items()}, tmp_path / "wide.safetensors")
    found, wanted = (
        read_lora(pipe("sd15"), tmp_path / f"{name}.safetensors")[0] for name in ("eight", "wide")
    )
    assert found and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("<html>", "adapter_config.json is no JSON of settings .*: fetch it again"),
        ("[1]", "adapter_config.json is no JSON of settings"),
        ('{"init_lora_weights": "pissa_niter_16"}', "it began as pissa_niter_16.*changes the base"),
        ('{"init_lora_weights": "OLoRA"}', "it began as OLoRA.*changes the base"),
        ('{"init_lora_weights": "lora_ga"}', "it began as lora_ga.*changes the base"),
        (None, None),
    ],
)
def test_what_scales_a_lora_of_peft_is_read_or_missed(about, message, pipe, tmp_path, caplog):
    """Without its file the scale is not known; some kinds go with another base."""
    lora = pairs(random_lora(pipe("sd15").unet, ("to_q",)), "base_model.model.", *PEFT, alpha=False)
    save_file(lora, tmp_path / "adapter_model.safetensors")
    if about is None:
        read_lora(pipe("sd15"), tmp_path / "adapter_model.safetensors")
        assert "no adapter_config.json beside it: its alpha is taken to be its rank" in caplog.text
        return
    (tmp_path / "adapter_config.json").write_text(about)
    with pytest.raises(ModelError, match=message):
        read_lora(pipe("sd15"), tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"r": RANK, "lora_alpha": None}, "no number as the alpha of .*: fetch it again"),
        ({"r": RANK, "lora_alpha": 1, "alpha_pattern": {"to_q": "x"}}, "no number as the alpha"),
        ({"r": RANK, "lora_alpha": 1, "alpha_pattern": ["to_q"]}, "no number as the alpha"),
        ({"r": RANK, "lora_alpha": 1, "alpha_pattern": {"(to_q": 1}}, "no number as the alpha"),
        ({"r": RANK, "lora_alpha": float("inf")}, "no number as the alpha"),
        ({"r": RANK, "lora_alpha": 1, "use_dora": True}, "lacks the magnitudes of the DoRA"),
        ({"r": 9, "lora_alpha": 9}, f"has a rank of {RANK}, and the file's settings say another"),
        ({"r": RANK, "rank_pattern": {"to_q": 9}}, f"to_q has a rank of {RANK}, and the file's"),
    ],
)
def test_settings_that_scale_another_lora_are_refused(about, message, pipe, tmp_path):
    lora = pairs(random_lora(pipe("sd15").unet, ("to_q",)), "unet.", *PEFT, alpha=False)
    told = {f"unet.{key}": value for key, value in about.items()}
    save_file(lora, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    with pytest.raises(ModelError, match=message):
        read_lora(pipe("sd15"), tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("start", "name", "scale"),
    [
        ("unet.", "style", 1.0),
        ("unet.", "pytorch_lora_weights", 1.0),
        ("unet.", "adapter_model", 4.0),
        ("base_model.model.unet.", "style", 4.0),
    ],
)
def test_pefts_settings_scale_no_other_file_of_a_folder(start, name, scale, pipe, tmp_path, caplog):
    """Of two LoRAs in one folder, diffusers' own has alpha as its rank."""
    lora = random_lora(pipe("sd15").unet, ("to_q",))
    file = tmp_path / f"{name}.safetensors"
    save_file(pairs(lora, start, *PEFT, alpha=False), file)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 8}))
    layer, (_, up) = next(iter(lora.items()))
    found = read_lora(pipe("sd15"), file)[0][f"unet.{layer}.lora_B.weight"]
    assert torch.equal(found, up * scale)
    assert (f"adapter_config.json is not of {file}, and is not read" in caplog.text) == (scale == 1)


def test_alphas_of_layers_that_are_not_there_are_counted(pipe, tmp_path, caplog):
    """Under the names of another program they would be passed over, and the scale be wrong."""
    layer = "encoder.layers.0.self_attn.q_proj"
    weight = pipe("sd15").text_encoder.get_submodule(layer).weight
    matrices = {layer: (torch.ones(RANK, weight.shape[1]), torch.ones(len(weight), RANK))}
    lora = pairs(matrices, "text_encoder.", *PEFT, alpha=False)
    for name, alpha, warned in ((f"text_model.{layer}", 6.0, False), ("blocks.0.q", 4.0, True)):
        told = {"r": RANK, "lora_alpha": 4.0, "alpha_pattern": {name: 6.0}}
        told = {f"text_encoder.{key}": value for key, value in told.items()}
        save_file(lora, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(told)})
        weights, _ = read_lora(pipe("sd15"), tmp_path / "x.safetensors")
        assert (weights[f"text_encoder.{layer}.lora_B.weight"] == alpha / RANK).all()
        assert (
            "scale 1 layers that it does not have, for example 'blocks" in caplog.text
        ) == warned


def test_layers_that_lost_their_alpha_are_counted(pipe, tmp_path, caplog):
    lora = pairs(random_lora(pipe("sd15").unet, ("to_q",)), "lora_unet_", *KOHYA, flat=True)
    save_file(lora, tmp_path / "lora.safetensors")
    read_lora(pipe("sd15"), tmp_path / "lora.safetensors")
    assert not caplog.text
    lora.pop(next(key for key in lora if key.endswith("alpha")))
    save_file(lora, tmp_path / "lora.safetensors")
    read_lora(pipe("sd15"), tmp_path / "lora.safetensors")
    assert f"1 of {(len(lora) + 1) // 3} layers have no alpha, for example" in caplog.text


def test_sample_draws_from_a_published_lora(tiny, pipe, tmp_path):
    """By the setting, in place of an option of its own; build.models takes what --policy takes."""
    lora = pairs(random_lora(pipe("sd15").unet, ("to_q", "to_v")), "", *PEFT, alpha=False)
    save_file({k: v * 9 for k, v in lora.items()}, tmp_path / "lora.safetensors")
    settings = [f"model.path={tiny('sd15')}", "model.resolution=128", "evaluation.sample_steps=2"]
    drawn = []
    for more in ([], [f"model.lora={tmp_path}/lora.safetensors"]):
        output = tmp_path / f"png{len(more)}"
        with pytest.raises(SystemExit, match="0"):
            main(["sample", "a star", "-o", str(output), *settings, *more])
        drawn.append((output / "000000.png").read_bytes())
    assert drawn[0] != drawn[1]


def test_a_lora_that_the_model_has_already_is_not_added_twice(tiny, pipe, tmp_path, capsys):
    """Also under another name; as --policy, as build.models, and as the policy of a run."""
    lora = pairs(random_lora(pipe("sd15").unet, ("to_q", "to_v")), "", *PEFT, alpha=False)
    file = tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir(parents=True)
    save_file(lora, file)
    copied = shutil.copy(file, tmp_path / "style.safetensors")
    settings = [f"model.path={tiny('sd15')}", f"model.lora={copied}"]
    for name in (copied, file, file.parent):
        with pytest.raises(ConfigError, match=f"{name} is the LoRA of model.lora={copied}.*twice"):
            side(load_config(None, settings), str(name))
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(load_config(None, settings[:1])))
    assert side(load_config(None, settings), str(tmp_path / "run")).config.model.lora is None
    ask = ["sample", "a star", "-o", str(tmp_path / "png"), "--run", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="2"):
        main([*ask, f"model.lora={file.parent}"])
    assert "which the model has already: it would be added twice" in capsys.readouterr().err
    save_file({k: v * 2 for k, v in lora.items()}, copied)
    assert side(load_config(None, settings), str(file)).adapter == file


def test_what_a_runs_lora_was_trained_with_is_not_left_out_in_silence(tiny, pipe, tmp_path, caplog):
    """A LoRA over a LoRA, as model.lora of the next run and as --policy beside the base alone."""
    lora = pairs(random_lora(pipe("sd15").unet, ("to_q",)), "", *PEFT, alpha=False)
    first, second = tmp_path / "first.safetensors", tmp_path / "run/adapter/x.safetensors"
    second.parent.mkdir(parents=True)
    save_file(lora, first)
    save_file({k: v * 2 for k, v in lora.items()}, second)
    base = [f"model.path={tiny('sd15')}"]
    own = load_config(None, [*base, f"model.lora={first}"])
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(own))
    said = f"{second} was trained on a model with model.lora={first}, which this model lacks"
    side(own, str(second))
    side(load_config(None, base), str(tmp_path / "run"))
    side(load_config(None, base), str(first))
    assert said not in caplog.text
    check_model(load_config(None, [*base, f"model.lora={second}"]).model)
    assert caplog.text.count(said) == 1
    side(load_config(None, base), str(second.parent))
    assert caplog.text.count(said) == 2
    snapshot = shutil.copytree(second.parent, tmp_path / "run/snapshots/step-000001")
    side(load_config(None, base), str(snapshot))
    assert f"{snapshot / second.name} was trained on a model with" in caplog.text


def foreign(lora):
    return lora | {"nonsense.lora_A.weight": torch.zeros(1, 1)}


REFUSED = {
    "one strange key": (foreign, r"1 of \d+ tensors fit no layer .*'nonsense.lora_A.weight'"),
    "another model": (
        lambda lora: {f"layers.{k}": v for k, v in lora.items()},
        r"(\d+) of \1 tensors fit no layer of StableDiffusionPipeline, for example 'layers",
    ),
    "half of the pairs": (
        lambda lora: {k: v for k, v in lora.items() if "lora_A" in k},
        r"(\d+) of \1 tensors .*half a pair",
    ),
    "another width": (
        lambda lora: {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in lora.items()},
        r"matrices for unet\..* do not fit a weight of \[",
    ),
    "values that are none": (
        lambda lora: {k: v / 0 for k, v in lora.items()},
        r"its matrices for unet\..* are not finite: train or fetch it anew",
    ),
    "whole numbers": (
        lambda lora: {k: v.to(torch.int8) for k, v in lora.items()},
        r"its matrices for unet\..* are whole numbers, of few bits: give them in bf16",
    ),
    "a rank of 0": (
        lambda lora: {k: v[:0] if "lora_A" in k else v[:, :0] for k, v in lora.items()},
        "to_q has a rank of 0, or several alphas: fetch it again",
    ),
    "several alphas": (
        lambda lora: lora | {f"{min(lora)[:-14]}.alpha": torch.ones(2)},
        "to_q has a rank of 0, or several alphas: fetch it again",
    ),
    "no LoRA": (lambda lora: {"x": torch.zeros(1)}, "1 of 1 tensors fit no layer.*'x'"),
    "nothing": (lambda lora: {}, "0 of 0 tensors.*an empty file"),
    "a layer twice": (
        lambda lora: lora | {f"unet.{k}": v.clone() for k, v in lora.items()},
        r"\d+ of \d+ tensors fit no layer",
    ),
    "a LoKr beside the matrices": (
        lambda lora: lora | {f"{min(lora)[:-14]}.lokr_w1": torch.ones(1, 1)},
        r"1 of \d+ tensors fit no layer.*to_q \(of two kinds\)': give a L",
    ),
    "a factor less": (
        lambda lora: lora | {"mid_block.attentions.0.proj_in.hada_w1_a": torch.ones(1, 1)},
        "it lacks hada_w1_b, of the factors of LoHa or LoKr: fetch it again",
    ),
    "a bias beside the matrices": (
        lambda lora: lora | {f"{min(lora)[:-14]}.diff_b": torch.ones(1)},
        "1 of .* tensors fit no layer.*diff_b': only LoRA, DoRA, LoHa and LoKr are read",
    ),
    "a bias of peft's": (
        lambda lora: lora | {f"{min(lora)[:-14]}.lora_B.bias": torch.ones(1)},
        "1 of .* tensors fit no layer.*lora_B.bias': only LoRA, DoRA, LoHa and LoKr are read",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_lora_that_does_not_fit_whole_is_refused(spoil, message, pipe, tiny, tmp_path):
    """By model.lora, and by --policy before anything is sampled."""
    lora = pairs(random_lora(pipe("sd15").unet, ("to_q",)), "", *PEFT, alpha=False)
    file = tmp_path / "lora.safetensors"
    save_file(spoil(lora), file)
    with pytest.raises(ModelError, match=message):
        add_lora(pipe("sd15"), str(file))
    held = [n for n, _ in pipe("sd15").unet.named_modules() if "lora" in n]
    assert not held
    if "lora_A" in str(spoil(lora)):
        config = load_config(None, [f"model.path={tiny('sd15')}"])
        run = tmp_path / "run"  # whose own policy is damaged
        (run / "adapter").mkdir(parents=True)
        (run / "config.yaml").write_text(to_yaml(config))
        save_file(spoil(lora), run / "adapter" / file.name)
        for policy in (file, run):
            with pytest.raises(ModelError, match=message) as caught:
                side(config, str(policy))
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("nought", ["lora_B", "alpha"])
def test_a_lora_that_changes_nothing_is_warned_of(nought, pipe, tmp_path, caplog):
    lora = pairs(random_lora(pipe("sd15").unet, ("to_q",)), "", *PEFT)
    for none in (False, True):
        given = {k: v * (nought not in k or not none) for k, v in lora.items()}
        save_file(given, tmp_path / "lora.safetensors")
        read_lora(pipe("sd15"), tmp_path / "lora.safetensors")
        assert ("changes nothing: its matrices B, or its alphas, are 0" in caplog.text) == none


@pytest.mark.parametrize("end", ["diff", "oft_blocks", "on_input", "a1.weight"])
def test_an_adapter_of_a_kind_that_is_not_read_is_called_so(end, pipe, tiny, tmp_path):
    """By model.lora and by --policy: full differences, OFT, (IA)3 and GLoRA, by LyCORIS."""
    file = tmp_path / "x.safetensors"
    layer = next(n for n, _ in pipe("sd15").unet.named_modules() if n.endswith("to_q"))
    save_file({f"lora_unet_{layer.replace('.', '_')}.{end}": torch.zeros(2)}, file)
    message = "1 of 1 tensors fit no layer.*: only LoRA, DoRA, LoHa and LoKr are read. Merge"
    with pytest.raises(ModelError, match=message):
        add_lora(pipe("sd15"), str(file))
    with pytest.raises(ModelError, match=message):
        side(load_config(None, [f"model.path={tiny('sd15')}"]), str(file))


def test_files_of_a_folder(pipe, tmp_path):
    lora = pairs(random_lora(pipe("sd15").unet, ("to_q",)), "", *PEFT, alpha=False)
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"0")
    with pytest.raises(ModelError, match="no .safetensors file; pytorch_lora_weights.bin can run"):
        add_lora(pipe("sd15"), str(tmp_path))
    (tmp_path / "all/unet").mkdir(parents=True)
    save_file(lora, tmp_path / "all/unet/adapter_model.safetensors")
    with pytest.raises(ModelError, match="all/unet has one: give that folder"):
        add_lora(pipe("sd15"), str(tmp_path / "all"))
    shutil.copytree(tmp_path / "all/unet", tmp_path / "all/text_encoder")
    with pytest.raises(ModelError, match="; text_encoder and unet have one each: write those of o"):
        add_lora(pipe("sd15"), str(tmp_path / "all"))
    for name in "ab":
        save_file(lora, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match="several files: name one"):
        add_lora(pipe("sd15"), str(tmp_path))
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-9])
    with pytest.raises(ModelError, match="a.safetensors is damaged"):
        add_lora(pipe("sd15"), str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("dora", slow_but([False], [False, True]), ids=["LoRA", "DoRA"])
def test_a_trained_adapter_acts_as_in_plain_diffusers(dora, tiny, tmp_path):
    p = PolicyConfig(rank=4, alpha=6.0, target_modules=["to_q", "conv1"], dora=dora)
    policy = LoraPolicy(adapt(load_pipeline(ModelConfig(str(tiny("sd15")))), 64), p, 0)
    listed = policy.trainable()
    assert listed == {n: p for n, p in policy.network.named_parameters() if "lora_" in n}
    for parameter in listed.values():
        parameter.data += 0.2 * torch.randn_like(parameter)
    layer = next(m for n, m in policy.network.named_modules() if n.endswith("lora_A.default"))
    layer.weight = torch.nn.Parameter(layer.weight.data)  # as FSDP2 puts its own in the place
    assert any(layer.weight is p for p in policy.trainable().values())
    policy.save(tmp_path)
    ours, theirs = (load_pipeline(ModelConfig(str(tiny("sd15")))) for _ in range(2))
    add_lora(ours, str(tmp_path))
    theirs.load_lora_weights(tmp_path)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 16)
    with torch.no_grad():
        outputs = [p.unet(x, 500, text).sample for p in (ours, theirs)]
        base = policy.network(x, 500, text).sample
        policy.network.disable_adapters()
        bare = policy.network(x, 500, text).sample
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], base)
    assert (outputs[0] - bare).abs().max() > 1e-2
