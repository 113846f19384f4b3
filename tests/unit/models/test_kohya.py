"""LoRA under kohya's names, there and back, key by key, and the same images from both files."""

import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_krea2_lora_to_diffusers,
    _convert_non_diffusers_lumina2_lora_to_diffusers,
)
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_qwen_lora_to_diffusers as read_qwen,
)
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_z_image_lora_to_diffusers as read_z_image,
)
from safetensors.torch import load_file, save_file

from inversion_dpo.models.base import ModelError
from inversion_dpo.models.folders import index_of
from inversion_dpo.models.kohya import blocks_to_kohya, read_lora, to_comfyui, to_kohya, write_lora
from inversion_dpo.models.krea_2 import Krea2
from inversion_dpo.models.loading import adapt, load_pipeline
from inversion_dpo.models.lora import read_lora as read_file
from inversion_dpo.run.fields import ModelConfig, PolicyConfig
from inversion_dpo.training.policy import LoraPolicy
from tests.slow import slow_but

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [
    *ATTENTION,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
]


def trained(folder, out, targets, alpha=8.0, dora=False):
    """A LoRA of rank 4 whose every matrix is random, saved as train saves it."""
    how = PolicyConfig(rank=4, alpha=alpha, target_modules=targets, dora=dora)
    policy = LoraPolicy(adapt(load_pipeline(ModelConfig(str(folder))), 64), how, 0)
    torch.manual_seed(1)
    for parameter in policy.trainable().values():
        torch.nn.init.normal_(parameter.data, std=0.2)
    policy.save(out)
    return out


def drawn(folder, lora, name):
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora, weight_name=name)
    return pipe(
        "a small red star",
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images[0], pipe


@pytest.mark.parametrize("family", slow_but(["sdxl"], ["sd15", "sdxl"]))
@pytest.mark.parametrize("targets", slow_but([EVERYWHERE], [ATTENTION, EVERYWHERE]))
def test_there_and_back_key_by_key(family, targets, tiny, tmp_path):
    adapter = trained(tiny(family), tmp_path / "adapter", targets)
    file = write_lora(adapter, tmp_path / "kohya.safetensors", "kohya")
    ours, kohya = read_lora(adapter)[0], load_file(file)
    modules = {re.sub(r"\.lora_[AB]\.weight$", "", key) for key in ours}
    expected = {
        f"lora_unet_{m.removeprefix('unet.').replace('.', '_')}.{end}"
        for m in modules
        for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert set(kohya) == expected
    for module in modules:
        flat = f"lora_unet_{module.removeprefix('unet.').replace('.', '_')}"
        assert torch.equal(kohya[f"{flat}.lora_down.weight"], ours[f"{module}.lora_A.weight"])
        assert torch.equal(kohya[f"{flat}.lora_up.weight"], ours[f"{module}.lora_B.weight"])
        assert kohya[f"{flat}.alpha"].item() == 8.0
    _, pipe = drawn(tiny(family), tmp_path, file.name)
    state = {n: p for n, p in pipe.unet.named_parameters() if "lora_" in n}
    assert len(state) == len(ours)
    for name, tensor in state.items():
        key = "unet." + re.sub(r"\.default(_\d+)?\.weight$", ".weight", name)
        assert torch.equal(tensor, ours[key]), name
    scalings = {v for m in pipe.unet.modules() if hasattr(m, "scaling") for v in m.scaling.values()}
    assert scalings == {8.0 / 4}


@pytest.mark.slow  # above, the pipeline's own LoRA and its scale are compared key by key
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_both_files_give_the_same_image(family, tiny, tmp_path):
    adapter = trained(tiny(family), tmp_path / "adapter", ["to_q", "to_k", "to_v", "to_out.0"])
    file = write_lora(adapter, tmp_path / "kohya.safetensors", "kohya")
    bare, _ = drawn(tiny(family), None, None)
    theirs, _ = drawn(tiny(family), adapter, "pytorch_lora_weights.safetensors")
    ours, _ = drawn(tiny(family), tmp_path, file.name)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours - bare).max() > 1e-3


def test_what_cannot_be_exported_says_what_to_do(tiny, tmp_path):
    sd3 = trained(tiny("sd3"), tmp_path / "sd3", ["to_q"])
    with pytest.raises(ModelError, match="use --format comfyui"):
        to_kohya(sd3)
    odd = trained(tiny("flux"), tmp_path / "odd", ["to_q", "x_embedder"])
    with pytest.raises(ModelError, match="x_embedder"):
        to_kohya(odd)
    dora = trained(tiny("sd15"), tmp_path / "dora", ["to_q"], dora=True)
    for name in (to_kohya, to_comfyui):
        with pytest.raises(ModelError, match="DoRA"):
            name(dora)
    sana = trained(tiny("sana"), tmp_path / "sana", ["to_q"])
    for name in (to_kohya, to_comfyui):
        with pytest.raises(ModelError, match="does not load SANA; use the diffusers file"):
            name(sana)
    lumina = trained(tiny("lumina2"), tmp_path / "lumina", ["to_q"])
    with pytest.raises(ModelError, match="one matrix for attn.*attn.to_k.*: name all of them"):
        to_comfyui(lumina)
    with pytest.raises(ModelError, match="train one first"):
        to_kohya(tmp_path)
    (tmp_path / "bare").mkdir()
    save_file(
        {"unet.a.lora_A.weight": torch.zeros(1, 1)},
        tmp_path / "bare" / "pytorch_lora_weights.safetensors",
    )
    with pytest.raises(ModelError, match="alpha"):
        to_kohya(tmp_path / "bare")


def test_stable_diffusion_3_there_and_back(tiny, tmp_path):
    """By our own reader, which test_lora.py compares with diffusers' converter of the network."""
    targets = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.2"]
    adapter = trained(tiny("sd3"), tmp_path / "adapter", targets)
    kind = index_of(str(tiny("sd3")))["_class_name"]
    file = write_lora(adapter, tmp_path / "kohya.safetensors", "kohya", kind)
    kohya, ours = load_file(file), read_lora(adapter)[0]
    assert "lora_unet_joint_blocks_0_x_block_attn2_qkv.lora_down.weight" in kohya
    assert kohya["lora_unet_joint_blocks_1_context_block_attn_qkv.alpha"] == 3 * ALPHA
    pipe = load_pipeline(ModelConfig(str(tiny("sd3"))))
    back, changes = read_file(pipe, file)
    assert not changes and back.keys() >= ours.keys()
    for key in back.keys() - ours.keys():  # the last block's query, of which nothing is read
        assert ".1.attn.add_q_proj" in key and ("lora_A" in key or not back[key].any())
    for key in (key for key in ours if ".lora_A." in key):
        up = key.replace(".lora_A.", ".lora_B.")
        product = ours[up] @ ours[key] * ALPHA / RANK
        torch.testing.assert_close(back[up] @ back[key], product, rtol=1e-4, atol=1e-4)
    norms = trained(tiny("sd3"), tmp_path / "norms", ["norm1.linear"])
    with pytest.raises(ModelError, match="kohya's names have nothing for .*norm1.linear"):
        to_kohya(norms, kind)


def test_what_the_family_trains_of_krea_2_is_written(tiny, tmp_path):
    """Its layers outside the blocks too, which made an adapter of the preset unwritable."""
    adapter = trained(tiny("krea2"), tmp_path / "adapter", list(Krea2.targets))
    file = write_lora(adapter, tmp_path / "kohya.safetensors", "kohya", "Krea2Pipeline")
    top = {key.partition(".")[0].removeprefix("lora_unet_") for key in load_file(file)}
    assert {"first", "last_linear", "tmlp_0", "tproj_1", "txtfusion_projector"} <= top
    back, changes = read_file(load_pipeline(ModelConfig(str(tiny("krea2")))), file)
    ours = read_lora(adapter)[0]
    assert not changes and back.keys() == ours.keys()
    for key in (key for key in ours if ".lora_A." in key):
        up = key.replace(".lora_A.", ".lora_B.")
        product = ours[up] @ ours[key] * ALPHA / RANK
        torch.testing.assert_close(back[up] @ back[key], product, rtol=1e-4, atol=1e-4)


def test_krea_2_there_and_back(tiny, tmp_path):
    """By diffusers' reader of the original names, whose dots are underscores here, and by ours."""
    adapter = trained(tiny("krea2"), tmp_path / "adapter", [*ATTENTION, "to_gate", "ff.up"])
    kind = index_of(str(tiny("krea2")))["_class_name"]
    file = write_lora(adapter, tmp_path / "kohya.safetensors", "kohya", kind)
    kohya, ours = load_file(file), read_lora(adapter)[0]
    names = {key.partition(".")[0].removeprefix("lora_unet_") for key in kohya}
    assert {"blocks_0_attn_wq", "blocks_1_mlp_up", "txtfusion_refiner_blocks_0_attn_gate"} <= names
    dotted, layer = {}, r"lora_unet_(?:(txtfusion)_)?((?:\w+_)?blocks)_(\d+)_(attn|mlp)_(\w+)"
    for key in (key for key in kohya if "lora" in key.partition(".")[2]):
        name, _, half = key.partition(".")
        stem = ".".join(part for part in re.fullmatch(layer, name).groups() if part)
        half = "A" if "down" in half else "B"
        dotted[f"diffusion_model.{stem}.lora_{half}.weight"] = kohya[key]
    back = _convert_non_diffusers_krea2_lora_to_diffusers(dotted)
    assert back.keys() == ours.keys() and all(torch.equal(back[key], ours[key]) for key in ours)
    found, changes = read_file(load_pipeline(ModelConfig(str(tiny("krea2")))), file)
    assert not changes and found.keys() == ours.keys()
    for key in (key for key in ours if ".lora_B." in key):
        torch.testing.assert_close(found[key], ours[key] * ALPHA / RANK)


WIDTH, RANK, ALPHA = 3072, 4, 8.0  # of FLUX.1, which diffusers' way back knows by heart


def flux_lora(modules):
    """Random LoRA matrices of FLUX.1's own sizes."""
    torch.manual_seed(2)
    weights = {}
    for module in modules:
        inputs = 4 * WIDTH if module.endswith("ff.net.2") else WIDTH
        inputs = 5 * WIDTH if module.endswith("proj_out") else inputs
        wide = module.endswith(("proj_mlp", "ff.net.0.proj", "ff_context.net.0.proj"))
        weights[f"transformer.{module}.lora_A.weight"] = torch.randn(RANK, inputs)
        outputs = WIDTH * (4 if wide else 1)
        weights[f"transformer.{module}.lora_B.weight"] = torch.randn(outputs, RANK)
    return weights


DOUBLE = [
    f"transformer_blocks.3.{m}"
    for m in (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
    )
]
SINGLE = [
    f"single_transformer_blocks.37.{m}"
    for m in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
]


@pytest.mark.parametrize("modules", [[*DOUBLE, *SINGLE], [DOUBLE[0], SINGLE[0]], [SINGLE[3]]])
def test_flux_there_and_back_by_diffusers_own_reader(modules):
    """The reader splits what was fused; the change of every module's weight is the same.

    Two linear maps that agree on random vectors are one: so no matrix of FLUX's size is multiplied.
    """
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    ours = flux_lora(modules)
    kohya = blocks_to_kohya(ours, ALPHA)
    back = _convert_kohya_flux_lora_to_diffusers(dict(kohya))
    for module in {key.rsplit(".lora_", 1)[0] for key in back}:
        down = back[f"{module}.lora_A.weight"]
        vectors = torch.randn(down.shape[1], 3)
        change = back[f"{module}.lora_B.weight"] @ (down @ vectors)
        if f"{module}.lora_A.weight" not in ours:
            assert not change.any(), module
            continue
        own = ours[f"{module}.lora_B.weight"] @ (ours[f"{module}.lora_A.weight"] @ vectors)
        torch.testing.assert_close(change, own * ALPHA / RANK, rtol=1e-4, atol=1e-3)
    assert {f"transformer.{m}.lora_A.weight" for m in modules} <= set(back)


def test_a_trained_flux_adapter_is_written(tiny, tmp_path):
    adapter = trained(tiny("flux"), tmp_path / "flux", ["to_q", "to_k", "to_v", "to_out.0"])
    kohya = load_file(write_lora(adapter, tmp_path / "kohya.safetensors", "kohya"))
    names = {key.split(".")[0] for key in kohya}
    double = "lora_unet_double_blocks_0_img_attn"
    assert names == {f"{double}_qkv", f"{double}_proj", "lora_unet_single_blocks_0_linear1"}
    ours, _ = read_lora(adapter)
    fused = "lora_unet_double_blocks_0_img_attn_qkv"
    rank = kohya[f"{fused}.lora_down.weight"].shape[0]
    scale = kohya[f"{fused}.alpha"].item() / rank
    change = scale * kohya[f"{fused}.lora_up.weight"] @ kohya[f"{fused}.lora_down.weight"]
    block = "transformer.transformer_blocks.0.attn."
    own = torch.cat(
        [ours[f"{block}to_{n}.lora_B.weight"] @ ours[f"{block}to_{n}.lora_A.weight"] for n in "qkv"]
    )
    torch.testing.assert_close(change, own * 8 / 4)


# What ComfyUI reads of a LoRA: after transformer. diffusers' module names, from the tables of its
# comfy/utils.py; after lora_unet_ its own networks' names, _ for ., from comfy/ldm.
BLOCK = r"(single_)?transformer_blocks\.\d+\."
COMFY = {
    "sd3": rf"transformer\.{BLOCK}attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
    "flux": rf"transformer\.{BLOCK}attn\.(to_[qkv]|to_out\.0)",
    "chroma": rf"transformer\.{BLOCK}attn\.(to_[qkv]|to_out\.0)",
    "flux2-klein": rf"transformer\.{BLOCK}attn\.(to_[qkv]|to_out(\.0)?|to_qkv_mlp_proj)",
    "qwen-image": r"transformer\.transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)",
    "z-image": r"transformer\.(layers|(noise|context)_refiner)\.\d+\."
    r"attention\.(to_[qkv]|to_out\.0)",
    "krea2": r"transformer\.((transformer_blocks|text_fusion\.\w+_blocks)\.\d+\."
    r"(attn\.(to_[qkv]|to_gate|to_out\.0)|ff\.(up|down))|img_in|final_layer\.linear"
    r"|text_fusion\.projector|(txt_in|time_embed)\.linear_[12]|time_mod_proj)",
    "wan": r"lora_unet_blocks_\d+_(self|cross)_attn_[qkvo]",
    "lumina2": r"lora_unet_(layers|(noise|context)_refiner)_\d+_attention_(qkv|out)",
}


@pytest.mark.parametrize("family", COMFY)
def test_comfyui_finds_every_layer_at_its_scale(family, tiny, tmp_path):
    """Module by module: its name is in ComfyUI's table, and alpha's share is in the product."""
    adapter = trained(tiny(family), tmp_path / "adapter", None, alpha=12.0)
    file = write_lora(adapter, tmp_path / "comfyui.safetensors", "comfyui")
    ours, comfy = read_lora(adapter)[0], load_file(file)
    ends = ("lora_A", "lora_B") if "lora_B" in min(comfy) + max(comfy) else ("lora_down", "lora_up")
    modules = {re.sub(r"\.(lora_(A|B|down|up)\.weight|alpha)$", "", key) for key in comfy}
    assert all(re.fullmatch(COMFY[family], m) for m in modules)
    written = {}
    for m in modules:
        down, up = (comfy[f"{m}.{end}.weight"] for end in ends)
        scale = comfy[f"{m}.alpha"].item() / len(down) if f"{m}.alpha" in comfy else 1.0
        written[m] = scale * up @ down
    changes = {
        k.removesuffix(".lora_A.weight"): 3.0 * ours[k.replace("_A.", "_B.")] @ a
        for k, a in ours.items()
        if ".lora_A." in k
    }
    assert len(ours) == 2 * len(changes)
    if ends[0] == "lora_A":
        assert written.keys() == changes.keys()
        for m, change in changes.items():
            torch.testing.assert_close(written[m], change)
    else:  # each module's rows, wherever they are
        rows = torch.cat([w.flatten() for w in written.values()]).sort().values
        torch.testing.assert_close(
            rows, torch.cat([c.flatten() for c in changes.values()]).sort().values
        )


def lora_of(shapes):
    """Random matrices for diffusers' modules of these sizes [out, in]."""
    torch.manual_seed(3)
    made = {}
    for module, (outputs, inputs) in shapes.items():
        made[f"transformer.{module}.lora_A.weight"] = torch.randn(RANK, inputs)
        made[f"transformer.{module}.lora_B.weight"] = torch.randn(outputs, RANK)
    return made


def block_of_wan(k):
    names = [f"attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0")]
    return {f"blocks.{k}.{n}": (6, 6) for n in names} | {
        f"blocks.{k}.ffn.net.0.proj": (9, 6),
        f"blocks.{k}.ffn.net.2": (6, 9),
    }


def block_of_lumina(block):
    """Sizes that diffusers' reader knows by heart."""
    widths = {"attn.to_q": 2304, "attn.to_k": 768, "attn.to_v": 768, "attn.to_out.0": 2304}
    widths |= {f"feed_forward.linear_{n}": 8 for n in (1, 2, 3)}
    widths |= {} if "context" in block else {"norm1.linear": 8}
    return {f"{block}.{name}": (width, 5) for name, width in widths.items()}


def read_lumina(kohya):
    """By diffusers, whose reader takes ComfyUI's other spelling: dots, A and B, no alpha."""
    dotted = {}
    for key, value in kohya.items():
        layer, _, end = key.partition(".")
        if end == "alpha":
            continue
        name = re.fullmatch(
            r"lora_unet_(layers|\w+_refiner)_(\d+)_(attention|feed_forward|adaLN_modulation)_(\w+)",
            layer,
        )
        half = "A" if "down" in end else "B"
        scale = kohya[f"{layer}.alpha"] / len(value) if half == "A" else 1.0
        dotted[f"diffusion_model.{'.'.join(name.groups())}.lora_{half}.weight"] = value * scale
    return _convert_non_diffusers_lumina2_lora_to_diffusers(dotted)


TEXT = {"attn.to_add_out": (8, 8), **{f"attn.add_{n}_proj": (8, 8) for n in "qkv"}}
IMAGE = {f"attn.to_{n}": (8, 8) for n in ("q", "k", "v", "out.0")}
FEED = {f"{ff}.linear_{n}": (9, 8) for ff in ("ff", "ff_context") for n in ("in", "out")}
BLOCKS_OF_FLUX_2 = {f"transformer_blocks.1.{m}": s for m, s in (TEXT | IMAGE | FEED).items()} | {
    f"single_transformer_blocks.0.attn.{m}": (9, 8) for m in ("to_qkv_mlp_proj", "to_out")
}


@pytest.mark.parametrize(
    ("family", "read", "targets"),
    [
        ("z-image", read_z_image, None),
        ("qwen-image", read_qwen, None),
        (
            "qwen-image",
            read_qwen,
            ["add_q_proj", "img_mlp.net.2"],
        ),
    ],
)
def test_flat_names_there_and_back_by_diffusers_own_reader(family, read, targets, tiny, tmp_path):
    adapter = trained(tiny(family), tmp_path / "adapter", targets)
    kind = index_of(str(tiny(family)))["_class_name"]
    file = write_lora(adapter, tmp_path / "kohya.safetensors", "kohya", kind)
    ours, back = read_lora(adapter)[0], read(load_file(file))
    assert back.keys() == ours.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(back[key], tensor * (2.0 if ".lora_A." in key else 1.0))
    if family == "qwen-image":
        with pytest.raises(ModelError, match="use --format comfyui"):
            to_kohya(adapter)  # its names alone may be Stable Diffusion 3's


@pytest.mark.parametrize(
    ("read", "shapes"),
    [
        (_convert_musubi_wan_lora_to_diffusers, block_of_wan(0) | block_of_wan(1)),
        (read_lumina, block_of_lumina("layers.0") | block_of_lumina("context_refiner.0")),
        (_convert_kohya_flux2_lora_to_diffusers, BLOCKS_OF_FLUX_2),
    ],
    ids=["wan", "lumina2", "flux2"],
)
def test_original_names_there_and_back_by_diffusers_own_reader(read, shapes):
    ours = lora_of(shapes)
    back = read(blocks_to_kohya(ours, ALPHA))
    assert back.keys() == ours.keys()
    for key, down in ours.items():
        if ".lora_A." in key:
            other, vectors = key.replace("_A.", "_B."), torch.randn(down.shape[1], 2)
            change = ours[other] @ (down @ vectors) * ALPHA / RANK
            torch.testing.assert_close(
                back[other] @ (back[key] @ vectors), change, rtol=1e-4, atol=1e-4
            )
