"""Models as people have them: one file, a network or autoencoder alone, a safety checker."""

import json
import logging
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from inversion_dpo.evaluation.samples import model_digest
from inversion_dpo.evaluation.sides import side
from inversion_dpo.models.base import ModelError
from inversion_dpo.models.folders import folder_fault, index_of
from inversion_dpo.models.loading import check_model, load_pipeline
from inversion_dpo.models.one_file import encoders_in
from inversion_dpo.models.parts import save_pipeline
from inversion_dpo.models.sampler import Sampler
from inversion_dpo.run.config import Config, ConfigError, load_config
from inversion_dpo.run.fields import ModelConfig
from tests.slow import slow_but
from tools.tiny.single_file import (
    open_clip_to_original,
    transformer_to_original,
    unet_to_original,
    vae_to_original,
    write_single_file,
)


def drawn(pipeline, side, **how):
    return pipeline(
        "a small red star",
        height=side,
        width=side,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        **how,
    ).images


@pytest.mark.parametrize("family", slow_but(["sdxl"], ["sd15", "sdxl"]))
def test_a_single_file_samples_what_its_folder_samples(family, pipe, tiny, tmp_path):
    """To the bit: the same latents, so the same text encoders, network and schedule."""
    file = write_single_file(tiny(family), tmp_path / "model.safetensors")
    single = load_pipeline(ModelConfig(str(file), config=str(tiny(family))))
    both = [drawn(p, 64, output_type="latent") for p in (pipe(family), single)]
    assert torch.equal(*both) and both[0].std() > 0.1
    for name, part in pipe(family).components.items():
        if isinstance(part, torch.nn.Module):
            theirs = getattr(single, name).state_dict()
            assert all(torch.equal(v, theirs[k]) for k, v in part.state_dict().items()), name
    config = load_config(None, [f"model.path={tiny(family)}"])
    chosen = side(config, str(file)).config.model
    assert (chosen.path, chosen.config) == (str(file), str(tiny(family)))


TRANSFORMERS = ["flux", "sd3", "chroma", "qwen-image", "z-image", "flux2-klein", "krea2", "wan"]
TRANSFORMERS += ["sana", "lumina2"]
ORIGINAL = ["sd3", "z-image", "krea2", "flux2-klein", "flux2-dev", "wan", "sana"]


@pytest.mark.parametrize(
    ("family", "names"),
    slow_but(
        [("sd3", "original"), ("wan", "in bfloat16")],
        [*product(TRANSFORMERS, ["diffusers"]), *product(ORIGINAL, ["original"])]
        + [("wan", "in bfloat16"), ("krea2", "in bfloat16")],
    ),
)
def test_a_transformer_in_one_file(family, names, pipe, tiny, tmp_path):
    """To the bit the folder's, as model.network and as model.path; prefix and other parts."""
    network = pipe(family).transformer
    tensors = transformer_to_original(network) if names == "original" else network.state_dict()
    file = tmp_path / "x.safetensors"
    start = "model.diffusion_model." if names == "original" else ""
    others = {"vae.a": torch.zeros(1)} if start else {}
    save_file({f"{start}{k}": v.clone() for k, v in tensors.items()} | others, file)
    folder, how = str(tiny(family)), {"dtype": "bfloat16" if "bf" in names else "float32"}
    theirs = load_pipeline(ModelConfig(folder, **how)).transformer.state_dict()
    for m in (
        ModelConfig(folder, network=str(file), **how),
        ModelConfig(str(file), config=folder, **how),
    ):
        found = load_pipeline(m).transformer.state_dict()
        assert found.keys() == theirs.keys()
        check_model(m)  # which reads no weight
        assert all(
            v.dtype == theirs[k].dtype and torch.equal(v, theirs[k]) for k, v in found.items()
        )


@pytest.mark.parametrize("start", ["_orig_mod.", "module."])
def test_a_network_that_was_saved_in_its_wrapper(start, pipe, tiny, tmp_path):
    """One file is read without the wrapper's name; a folder is refused with that remedy."""
    network, folder = pipe("flux").transformer, shutil.copytree(tiny("flux"), tmp_path / "model")
    file = next((folder / "transformer").glob("*.safetensors"))
    save_file({f"{start}{k}": v for k, v in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=f"{start}' in its names, .* as model.network"):
        check_model(ModelConfig(str(folder)))
    m = ModelConfig(str(tiny("flux")), network=str(file))
    check_model(m)
    found, theirs = load_pipeline(m).transformer.state_dict(), network.state_dict()
    assert all(torch.equal(found[k], v) for k, v in theirs.items())


@pytest.mark.parametrize("start", ["transformer.", "pipe.dit.", "_orig_mod.diffusion_model."])
@pytest.mark.parametrize("names", [transformer_to_original, lambda network: network.state_dict()])
def test_a_start_that_all_names_share_is_left_out(start, names, pipe, tiny, tmp_path):
    """As trainers save it, and inside a wrapper."""
    network, file = pipe("sd3").transformer, tmp_path / "x.safetensors"
    save_file({f"{start}{k}": v.clone() for k, v in names(network).items()}, file)
    m = ModelConfig(str(tiny("sd3")), network=str(file))
    check_model(m)
    found = load_pipeline(m).transformer.state_dict()
    assert all(torch.equal(found[k], v) for k, v in network.state_dict().items())


def test_a_start_that_most_names_have_is_told_in_words(pipe, tiny, tmp_path):
    tensors = pipe("sd3").transformer.state_dict()
    most = {f"{'transformer.' * (k % 3 > 0)}{n}": v for k, (n, v) in enumerate(tensors.items())}
    save_file(most, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="its names, for example '.*', are not all diffusers' or"):
        check_model(ModelConfig(str(tiny("sd3")), network=str(tmp_path / "x.safetensors")))


def test_lumina_2_in_its_original_names_has_every_weight_at_its_place():
    """Key by key at its real widths, which diffusers' converter knows by heart."""
    from accelerate import init_empty_weights
    from diffusers import Lumina2Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers

    with init_empty_weights():
        network = Lumina2Transformer2DModel(num_layers=1, num_refiner_layers=2)
    original = transformer_to_original(network)
    assert "layers.0.attention.qkv.weight" in original and "norm_final.weight" in original
    found = convert_lumina2_to_diffusers(dict(original))
    theirs = network.state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in theirs.items()}


def test_another_transformer_takes_the_place_of_the_folders(tiny, pipe, tmp_path):
    """Of Wan diffusers lets the folder's win, for its pipeline could do without one."""
    tensors = {k: v + 1 for k, v in pipe("wan").transformer.state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    found = load_pipeline(ModelConfig(str(tiny("wan")), network=str(tmp_path / "x.safetensors")))
    assert torch.equal(found.transformer.scale_shift_table, tensors["scale_shift_table"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: t | {"guidance_in.weight": torch.zeros(2)},
            "too many: 1 tensors, for example 'guidance_in.weight'.*Give a file of the same model",
        ),
        (lambda t: t | {"a.scale_weight": torch.zeros(1)}, "a.weight is held in few bits.*in bf16"),
        (lambda t: dict(list(t.items())[1:]), "lacks 1 tensors, for example '.*Give a file of"),
    ],
    ids=["more", "scaled", "less"],
)
def test_a_transformer_that_does_not_fit_is_refused(spoil, message, pipe, tiny, tmp_path):
    save_file(spoil(pipe("qwen-image").transformer.state_dict()), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=message):
        m = ModelConfig(str(tiny("qwen-image")), network=str(tmp_path / "x.safetensors"))
        load_pipeline(m)


def test_a_transformer_of_another_family_is_named(pipe, tiny, tmp_path):
    save_file(transformer_to_original(pipe("wan").transformer), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="no Flux2Transformer2DModel, but wan-.*of the same model"):
        load_pipeline(
            ModelConfig(str(tiny("flux2-klein")), network=str(tmp_path / "x.safetensors"))
        )


def test_whole_numbers_are_refused_before_any_work(pipe, tiny, tmp_path):
    tensors = {k: v.to(torch.int8) for k, v in pipe("sd15").unet.state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    for load in (check_model, load_pipeline):
        with pytest.raises(ModelError, match="is held in few bits of an unknown kind: give it in"):
            load(ModelConfig(str(tiny("sd15")), network=str(tmp_path / "x.safetensors")))


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
def test_weights_in_scaled_fp8_are_multiplied_out(ending, pipe, tiny, tmp_path):
    """As ComfyUI has them: one scale for a weight, or for a row; with marks and inputs' scales."""
    tensors = transformer_to_original(pipe("z-image").transformer)
    file, expected = {"scaled_fp8": torch.empty(0)}, {}
    for key, tensor in tensors.items():
        name = f"model.diffusion_model.{key}"
        file[name] = expected[key] = tensor
        if key.endswith(".weight") and tensor.ndim == 2:
            rows = torch.rand(len(tensor) if ending == "weight_scale" else 1) + 0.5
            file[name] = (tensor / rows[:, None]).to(torch.float8_e4m3fn)
            expected[key] = file[name].float() * rows[:, None]
            start = name.removesuffix("weight")
            file |= {f"{start}{ending}": rows, f"{start}scale_input": torch.ones(1)}
            file[f"{start}comfy_quant"] = torch.zeros(3, dtype=torch.uint8)
    save_file({k: v.clone() for k, v in file.items()}, tmp_path / "x.safetensors")
    m = ModelConfig(str(tiny("z-image")), network=str(tmp_path / "x.safetensors"))
    check_model(m)
    found = transformer_to_original(load_pipeline(m).transformer)
    assert all(torch.equal(found[k], v) for k, v in expected.items() if k != "norm_final.weight")
    assert not torch.equal(
        found["layers.0.attention.qkv.weight"], tensors["layers.0.attention.qkv.weight"]
    )


ORIGINALLY = {"unet": unet_to_original, "vae": vae_to_original}


@pytest.mark.parametrize("part", ORIGINALLY)
@pytest.mark.parametrize("start", ["", "first_stage_model.", "model.diffusion_model."])
def test_a_part_in_its_original_names_is_whole_or_refused(part, start, pipe, tiny, tmp_path):
    """diffusers passes over a tensor that it does not know, and leaves a missing one random."""
    if start.startswith("first") == (part == "unet") and start:
        return
    network, file = pipe("sd15").components[part], tmp_path / "x.safetensors"
    tensors = {f"{start}{k}": v.contiguous() for k, v in ORIGINALLY[part](network).items()}
    m = ModelConfig(str(tiny("sd15")), **{"network" if part == "unet" else "vae": str(file)})
    save_file(tensors | {f"{start}{n}": torch.zeros(1) for n in ["loss.a"] * (part == "vae")}, file)
    found = load_pipeline(m).components[part].state_dict()
    assert all(torch.equal(v, found[k]) for k, v in network.state_dict().items())
    save_file(tensors | {f"{start}input_blocks.0.9.weight": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="too many: 1 tensors, for example 'input_blocks.0.9.weig"):
        load_pipeline(m)
    save_file(
        {
            k: v
            for k, v in tensors.items()
            if not k.endswith("conv_out.bias") and not k.endswith("out.2.bias")
        },
        file,
    )
    with pytest.raises(ModelError, match="lacks . tensors, for example '.*conv_out.bias'"):
        load_pipeline(m)


@pytest.mark.parametrize("load", [check_model, load_pipeline])
@pytest.mark.parametrize("lost", [True, False])
def test_a_networks_folder_is_whole_or_refused(load, lost, tiny, tmp_path):
    """diffusers draws what is missing."""
    folder = shutil.copytree(tiny("sd15") / "unet", tmp_path / "unet")
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    gone = {k: v for k, v in tensors.items() if k != "conv_out.bias"}
    save_file(gone if lost else tensors | {"a": torch.zeros(1)}, file, {"format": "pt"})
    message = "lacks 1 tensors, for example 'conv_out.bias'" if lost else "too many: 1 tensors.*'a'"
    with pytest.raises(ModelError, match=message):
        load(ModelConfig(str(tiny("sd15")), network=str(folder)))


@pytest.mark.parametrize("load", [check_model, load_pipeline])
@pytest.mark.parametrize(
    ("key", "value"), [("scaling_factor", 0.13025), ("latent_channels", 16), ("shift_factor", 0.1)]
)
def test_an_autoencoder_of_another_latent_space_is_refused(load, key, value, tiny, tmp_path):
    """Its weights fit; what the network would see does not."""
    folder = shutil.copytree(tiny("sd15") / "vae", tmp_path / "vae")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {key: value}))
    with pytest.raises(ModelError, match=f"its {key} is {value}, the pipeline's .*another model"):
        load(ModelConfig(str(tiny("sd15")), vae=str(folder)))


@pytest.mark.parametrize("load", [check_model, load_pipeline])
def test_another_class_of_network_is_refused(load, tiny):
    other = str(tiny("flux") / "transformer")
    with pytest.raises(ModelError, match="its _class_name is FluxTransformer2DModel, the pipeline"):
        load(ModelConfig(str(tiny("chroma")), network=other))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.gguf", "GGUF is not read: give bf16 safetensors, and set model.quantize"),
        ("x-00001-of-00002.safetensors", "one of several files: give the folder"),
    ],
)
def test_a_file_of_another_kind_says_what_to_do(name, message, tiny, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / name)
    for key in ("path", "network", "vae"):
        m = {"path": str(tiny("sd15")), key: str(tmp_path / name)}
        with pytest.raises(ModelError, match=f"model.{key}=.*{message}"):
            load_pipeline(ModelConfig(**m))


@pytest.mark.parametrize("key", ["path", "network", "vae"])
def test_a_file_that_is_no_safetensors_is_called_so(key, tiny, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"0" * 99)
    m = {"path": str(tiny("sd15")), key: str(tmp_path / "x.onnx")}
    with pytest.raises(ModelError, match=f"model.{key}=.*: it is no safetensors file"):
        check_model(ModelConfig(**m))


def test_shards_of_a_variant_and_shards_without_their_index(tiny, tmp_path):
    vae = AutoencoderKL.from_pretrained(tiny("sd15") / "vae")
    vae.save_pretrained(tmp_path, variant="fp16", max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.fp16-*-of-*.safetensors"))) > 1
    m = ModelConfig(str(tiny("sd15")), vae=str(tmp_path))
    assert torch.equal(load_pipeline(m).vae.encoder.conv_in.weight, vae.encoder.conv_in.weight)
    next(tmp_path.glob("*.index.*json")).unlink()
    with pytest.raises(ModelError, match="lacks the index of its weights"):
        load_pipeline(m)


@pytest.mark.parametrize("mark", ["v_pred", "ztsnr"])
def test_a_mark_of_another_schedule_is_heard(mark, tiny, tmp_path):
    """No weight says it; the scheduler in model.config is the base model's."""
    file = write_single_file(tiny("sd15"), tmp_path / "model.safetensors")
    save_file(load_file(file) | {mark: torch.empty(0)}, file)
    message = f"mark '{mark}' asks for .*set model.config to a folder"
    for m in (
        ModelConfig(str(file), config=str(tiny("sd15"))),
        ModelConfig(str(tiny("sd15")), network=str(file)),
    ):
        for load in (check_model, load_pipeline):
            with pytest.raises(ModelError, match=message):
                load(m)


def test_a_mark_beside_a_network_of_its_schedule_is_no_weight(pipe, tiny, tmp_path):
    folder = shutil.copytree(tiny("sd15"), tmp_path / "model")
    about = folder / "scheduler/scheduler_config.json"
    told = json.loads(about.read_text()) | {"prediction_type": "v_prediction"}
    about.write_text(json.dumps(told))
    unet = {k: v.clone() for k, v in pipe("sd15").unet.state_dict().items()}
    save_file(unet | {"v_pred": torch.empty(0)}, tmp_path / "x.safetensors")
    load_pipeline(ModelConfig(str(folder), network=str(tmp_path / "x.safetensors")))


def test_a_part_beside_a_revision(tiny, hub_cache):
    """Offline only that revision is there, and it says the class."""
    hub_cache("models", "owner/name", tiny("sd15"), "v2", "b" * 40)
    load_pipeline(ModelConfig("owner/name", "v2", vae=str(tiny("sd2") / "vae")))


def test_a_file_without_a_configuration_says_whose_it_takes(tiny, hub_cache, tmp_path, caplog):
    file = write_single_file(tiny("sd15"), tmp_path / "model.safetensors")
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    hub_cache("models", name, tiny("sd15"))
    load_pipeline(ModelConfig(str(file)))
    assert f"model.config is not set: {file} is built as {name}" in caplog.text


def test_what_a_single_file_lacks_is_said(tiny, tmp_path):
    file = write_single_file(tiny("sd15"), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="Set model.config to the folder or hub id"):
        load_pipeline(ModelConfig(str(file)))
    with pytest.raises(ModelError, match=r"Set model.config to the folder.*of this family"):
        load_pipeline(ModelConfig(str(file), config=str(tiny("sdxl"))))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is damaged or not complete: fetch it again"):
        load_pipeline(ModelConfig(str(file), config=str(tiny("sd15"))))
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1, 1)}, file)
    with pytest.raises(ModelError, match="This is a LoRA: set model.lora"):
        load_pipeline(ModelConfig(str(file)))


@pytest.mark.parametrize("names", slow_but(["original"], ["diffusers", "original"]))
def test_an_autoencoder_in_one_file(names, pipe, tiny, tmp_path):
    vae = pipe("sd2").vae
    tensors = vae_to_original(vae) if names == "original" else vae.state_dict()
    file = tmp_path / "vae.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    found = load_pipeline(ModelConfig(str(tiny("sd15")), vae=str(file))).vae
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in vae.state_dict().items())
    assert found.config.scaling_factor == pipe("sd15").vae.config.scaling_factor


@pytest.mark.parametrize(
    ("family", "kind"),
    slow_but(
        [("sdxl", "hub id"), ("flux", "folder")],
        [("sdxl", k) for k in ("repository", "folder", "file", "hub id")] + [("flux", "folder")],
    ),
)
def test_a_network_alone_as_model_and_as_policy(kind, family, pipe, tiny, tmp_path, hub_cache):
    """A published DPO checkpoint holds a UNet only: the images are those of the whole pipeline."""
    component = "unet" if family == "sdxl" else "transformer"
    network = load_pipeline(ModelConfig(str(tiny(family)))).components[component]
    torch.nn.init.normal_(network.state_dict()[min(network.state_dict())], std=0.1)
    where = tmp_path / ("model" if kind == "folder" else f"model/{component}")
    network.save_pretrained(where)
    name = str(tmp_path / "model")
    if kind == "file":
        name = str(next(where.glob("*.safetensors")))
    if kind == "hub id":
        hub_cache("models", "owner/dpo", tmp_path / "model")
        name = "owner/dpo"
    config = load_config(None, [f"model.path={tiny(family)}", "evaluation.sample_steps=2"])
    policy = side(config, name)
    assert policy.adapter is None and policy.config.model.network == name
    started = replace(config, model=replace(config.model, lora="style.safetensors"))
    assert side(started, name) == policy  # as it was published, without that LoRA
    whole = load_pipeline(ModelConfig(str(tiny(family))))
    whole.register_modules(**{component: network})
    ours = Sampler(load_pipeline(policy.config.model), config).draw(["a star"], [0])[0]
    np.testing.assert_array_equal(ours, Sampler(whole, config).draw(["a star"], [0])[0])
    base = Sampler(pipe(family), config).draw(["a star"], [0])[0]
    assert not np.array_equal(ours, base)


def test_a_network_in_one_file_is_counted_under_its_own_names(pipe, tiny, tmp_path):
    """Not under the original ones, of which it has none."""
    tensors = pipe("sd15").unet.state_dict()
    del tensors["conv_out.bias"]
    save_file(tensors, tmp_path / "x.safetensors")
    for place in ("path", "network"):
        m = ModelConfig(str(tiny("sd15")), config=str(tiny("sd15")) if place == "path" else None)
        with pytest.raises(ModelError, match=r"lacks 1 tensors, for example 'conv_out.bias'\)"):
            check_model(replace(m, **{place: str(tmp_path / "x.safetensors")}))


def test_a_whole_file_that_lacks_a_weight_is_refused_before_any_work(tiny, tmp_path):
    file = write_single_file(tiny("sd15"), tmp_path / "model.safetensors")
    m = ModelConfig(str(file), config=str(tiny("sd15")))
    check_model(m)
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "decoder.conv_out" not in k}, file)
    with pytest.raises(ModelError, match="for AutoencoderKL it lacks 2 tensors"):
        check_model(m)
    save_file({k: v for k, v in tensors.items() if not k.startswith("first_stage")}, file)
    with pytest.raises(ModelError, match="holds no autoencoder: set model.vae"):
        check_model(m)
    save_file(tensors | {"model.diffusion_model.more.weight": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="too many: 1 tensors, for example 'more.weight'"):
        check_model(m)


@pytest.mark.parametrize(
    ("family", "start", "part"),
    [
        ("sd15", "cond_stage_model.transformer.text_model.", "text_encoder"),
        ("sd2", "cond_stage_model.model.", "text_encoder"),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.", "text_encoder"),
        ("sdxl", "conditioner.embedders.1.model.", "text_encoder_2"),
    ],
)
def test_a_text_encoder_of_a_whole_file_is_whole_or_refused(
    family, start, part, pipe, tiny, tmp_path
):
    """diffusers draws what a file lacks at random, and passes over what it has too many."""
    file, folder = tmp_path / "model.safetensors", str(tiny(family))
    write_single_file(tiny(family), file)
    tensors, encoder = load_file(file), pipe(family).components[part]
    if family == "sd2":  # whose file names them as OpenCLIP does
        own = {f"{start}{k}": v for k, v in open_clip_to_original(encoder).items()}
        tensors = {k: v for k, v in tensors.items() if not k.startswith("cond")} | own
        save_file({k: v.contiguous() for k, v in tensors.items()}, file)

    def load(read=True):
        return encoders_in(str(file), folder, index_of(folder), torch.float32, read)[part]

    found = load().state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in encoder.state_dict().items())
    last = next(k for k in tensors if k.startswith(start) and "final" in k)
    less = {k: v for k, v in tensors.items() if k != last}
    more = tensors | {f"{last}.more": torch.ones(1)}  # those of OpenCLIP are passed over
    for changed in (less, more) if "text_model" in start else (less,):
        save_file(changed, file)
        for read in (False, True):
            with pytest.raises(ModelError, match=f"its {part} is not whole .*: fetch it again"):
                load(read)


def test_a_whole_file_without_a_text_encoders_weight_is_refused(tiny, tmp_path):
    file = write_single_file(tiny("sd15"), tmp_path / "model.safetensors")
    m = ModelConfig(str(file), config=str(tiny("sd15")))
    check_model(m)
    save_file({k: v for k, v in load_file(file).items() if "final_layer_norm" not in k}, file)
    for load in (check_model, load_pipeline):
        with pytest.raises(ModelError, match="its text_encoder is not whole .*: fetch it again"):
            load(m)


def test_what_of_a_whole_file_is_not_read_is_counted(tiny, tmp_path, caplog):
    """Strange parts; and all but the network, where that alone is taken."""
    folder = str(tiny("sd15"))
    file = write_single_file(tiny("sd15"), tmp_path / "model.safetensors")
    tensors, whole = load_file(file), ModelConfig(str(file), config=folder)
    idle = {"betas": torch.zeros(2), "model_ema.decay": torch.zeros(1)}
    strange = {"control_model.a": torch.zeros(1)}
    less = {k: v for k, v in tensors.items() if not k.startswith("cond_stage")}
    beside = sum(not k.startswith("model.diffusion_model.") for k in tensors)
    alone = ModelConfig(folder, network=str(file))
    of_vae = sum(k.startswith("first_stage") for k in tensors)
    for held, m, count in (
        (tensors | idle, whole, 0),
        (tensors | strange, whole, 1),
        (tensors, alone, beside),
        (less, whole, of_vae),
    ):
        save_file(held, file)
        caplog.clear()
        load_pipeline(m)
        told = [r.message for r in caplog.records if "tensors are not read, for" in r.message]
        assert [text.partition(f"{file}: ")[2].split()[0] for text in told] == [str(count)][:count]


def test_a_whole_file_in_a_wrapper_is_read_whole(pipe, tiny, tmp_path):
    """DDP's, around all parts: text encoders and autoencoder are its own."""
    file = write_single_file(tiny("sd15"), tmp_path / "model.safetensors")
    save_file({f"module.{k}": v + 1 for k, v in load_file(file).items()}, file)
    m = ModelConfig(str(file), config=str(tiny("sd15")))
    check_model(m)
    found = load_pipeline(m)
    for part in ("unet", "vae", "text_encoder"):
        theirs = pipe("sd15").components[part].state_dict()
        for name, tensor in found.components[part].state_dict().items():
            assert torch.equal(tensor, theirs[name] + (not name.endswith("position_ids"))), name


def test_another_pipeline_as_policy_takes_none_of_its_bases_settings(tiny, tmp_path):
    """A folder has its own autoencoder and variant, another family no chunks of CLIP's."""
    variant = tmp_path / "fp16"
    load_pipeline(ModelConfig(str(tiny("sd15")))).save_pretrained(variant, variant="fp16")
    how = ["model.variant=fp16", f"model.vae={tiny('sd2')}/vae", "model.prompt_chunks=2"]
    config = load_config(None, [f"model.path={variant}", *how])
    found = {name: side(config, str(tiny(name))).config.model for name in ("sd15", "flux")}
    assert {(m.variant, m.vae) for m in found.values()} == {(None, None)}
    assert (found["sd15"].prompt_chunks, found["flux"].prompt_chunks) == (2, 1)
    assert side(config, str(variant)).config.model.variant == "fp16"
    plain = load_config(None, [f"model.path={tiny('sd15')}"])
    assert side(plain, str(variant)).config.model.variant == "fp16"
    for m in found.values():
        check_model(m)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").write_text("<html>"), "config.json is no JSON.*fetch it"),
        (lambda f: reshaped(next(f.glob("*.safetensors"))), "has the shape .1, 1., and"),
    ],
    ids=["no configuration", "another shape"],
)
@pytest.mark.parametrize(("key", "part"), [("vae", "vae"), ("network", "unet")])
def test_a_part_with_one_fault_is_refused_at_once(key, part, spoil, message, tiny, tmp_path):
    folder = shutil.copytree(tiny("sd15") / part, tmp_path / "part")
    spoil(folder)
    with pytest.raises(ModelError, match=f"model.{key}={folder}: .*{message}"):
        check_model(ModelConfig(str(tiny("sd15")), **{key: str(folder)}))


def reshaped(file):
    """Give one weight another shape."""
    tensors = load_file(file)
    save_file(tensors | {min(tensors): torch.zeros(1, 1)}, file, {"format": "pt"})


def test_a_network_of_another_model_is_refused(tiny):
    other = str(tiny("sdxl") / "unet")
    with pytest.raises(ModelError, match="model.network=.*cross_attention_dim is 32.*16"):
        load_pipeline(ModelConfig(str(tiny("sd15")), network=other))


@pytest.fixture
def checked(tiny, tmp_path):
    """A Stable Diffusion 1 folder that names a safety checker, as the published one does."""
    folder = shutil.copytree(tiny("sd15"), tmp_path / "checked")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["requires_safety_checker"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/model.safetensors").write_bytes(b"not loaded")
    return folder


def test_a_safety_checker_is_never_loaded_and_never_lost(checked, tmp_path, caplog):
    """Its black pictures would be scored, or become losers; an export still has it."""
    pipeline = load_pipeline(ModelConfig(str(checked)))
    assert pipeline.safety_checker is None and pipeline.feature_extractor is None
    save_pipeline(pipeline, tmp_path / "saved")
    saved, origin = (
        json.loads((f / "model_index.json").read_text()) for f in (tmp_path / "saved", checked)
    )
    assert saved["safety_checker"] == origin["safety_checker"]
    assert saved["requires_safety_checker"] is True
    assert (tmp_path / "saved/safety_checker/model.safetensors").read_bytes() == b"not loaded"
    shutil.rmtree(checked / "safety_checker")
    assert load_pipeline(ModelConfig(str(checked))).safety_checker is None
    save_pipeline(load_pipeline(ModelConfig(str(checked))), tmp_path / "again")
    assert load_pipeline(ModelConfig(str(tmp_path / "again"))).unet is not None


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_weights_under_another_name_are_not_taken_for_whole(part, tiny, tmp_path):
    """The library looks for its own names alone, after everything was checked."""
    folder = shutil.copytree(tiny("sd15"), tmp_path / "model")
    file = next((folder / part).glob("*.safetensors"))
    file.rename(file.with_name("mine.safetensors"))
    with pytest.raises(ModelError, match=rf"{part} has no weights \(\w+\*.safetensors\): fetch"):
        check_model(ModelConfig(str(folder)))
    if part != "text_encoder":
        key = "network" if part == "unet" else part
        with pytest.raises(
            ModelError, match=r"no file named diffusion_pytorch_model\*.safetensors"
        ):
            check_model(ModelConfig(str(tiny("sd15")), **{key: str(folder / part)}))


@pytest.mark.parametrize(
    ("family", "part", "start", "other"),
    [
        ("sd15", "text_encoder", "encoder.layers.0.self_attn.q_proj", "mine"),
        ("sdxl", "text_encoder_2", "text_projection", "text_projection.0"),
        ("flux", "text_encoder_2", "", "t5."),
        ("qwen-image", "text_encoder", "", "mine."),
    ],
)
def test_a_text_encoder_under_other_names_is_refused(family, part, start, other, tiny, tmp_path):
    """The library draws what it does not find at random, at each load anew."""
    folder = shutil.copytree(tiny(family), tmp_path / "model")
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    renamed = {k.replace(start, other, 1) if start in k else k: v for k, v in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, {"format": "pt"})
    for load in (check_model, load_pipeline):
        with pytest.raises(
            ModelError, match=f"{part} lacks .* of the weights that .*: fetch it again"
        ):
            load(ModelConfig(str(folder)))


def only_half(folder, part):
    file = next((folder / part).glob("*.safetensors"))
    file.rename(file.with_suffix(".fp16.safetensors"))


def test_parts_in_another_variant(tiny, pipe, tmp_path):
    """What is there in fp16 only is read as it is, alone, in a pipeline and as --policy."""
    folder = shutil.copytree(tiny("sd2"), tmp_path / "model")
    only_half(folder, "vae")
    for name in (folder, folder / "vae"):
        found = load_pipeline(ModelConfig(str(tiny("sd15")), vae=str(name))).vae
        assert torch.equal(found.encoder.conv_in.weight, pipe("sd2").vae.encoder.conv_in.weight)
    for m in (ModelConfig(str(folder)), side(load_config(None, []), str(folder)).config.model):
        check_model(m)
        assert load_pipeline(m).vae.encoder.conv_in.weight.equal(found.encoder.conv_in.weight)


def truncated(folder, part):
    file = next((folder / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-50])


def pickled(folder, part):
    file = next((folder / part).glob("*.safetensors"))
    file.rename(file.with_suffix(".bin"))


def halved(folder, part):
    """Half of the weights in the one file that there is."""
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[::2]), file, {"format": "pt"})


def sharded(folder, part):
    """The second file of two was never fetched."""
    file = next((folder / part).glob("*.safetensors"))
    names = [f"{file.stem}-0000{k}-of-00002.safetensors" for k in (1, 2)]
    table = {"weight_map": {key: names[k % 2] for k, key in enumerate(load_file(file))}}
    file.with_suffix(".safetensors.index.json").write_text(json.dumps(table))
    file.rename(file.with_name(names[0]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder, part: shutil.rmtree(folder / part), "lacks {}, which model_index.json"),
        (truncated, "{}/.*safetensors is damaged or not complete: fetch it again"),
        (pickled, "Weights of {} are pickles.*convert them"),
        (sharded, "{0} lacks .*-00002-of-00002.safetensors, a part of {0}: fetch"),
    ],
    ids=["deleted", "truncated", "pickles", "a shard less"],
)
@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_damaged_folder_names_the_part_and_the_remedy(spoil, message, part, tiny, tmp_path):
    folder = shutil.copytree(tiny("sd15"), tmp_path / "model")
    spoil(folder, part)
    with pytest.raises(ModelError, match=message.format(part)) as caught:
        load_pipeline(ModelConfig(str(folder)))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=message.format(part)):  # before any work
        check_model(ModelConfig(str(folder)))
    with pytest.raises(ConfigError, match=message.format(part)):  # as --policy
        side(load_config(None, []), str(folder))


def in_few_bits(folder, part, scale):
    """Whole numbers, or fp8 with a scale, under the names of a folder."""
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = next(n for n, w in tensors.items() if w.ndim == 2)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn if scale else torch.int8)
    more = {f"{name.removesuffix('.weight')}.weight_scale": torch.ones(1)} if scale else {}
    save_file(tensors | more, file, {"format": "pt"})


@pytest.mark.parametrize("scale", [False, True], ids=["whole numbers", "scaled fp8"])
@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_weights_in_few_bits_in_a_folder_are_refused(part, scale, tiny, tmp_path):
    """The library takes the numbers as they are, without their scale."""
    folder = shutil.copytree(tiny("sd15"), tmp_path / "model")
    in_few_bits(folder, part, scale)
    for load in (check_model, load_pipeline):
        with pytest.raises(ModelError, match=f"{part}/.* is of weights in few bits, .* in bf16"):
            load(ModelConfig(str(folder)))
    if part != "text_encoder":
        key = "network" if part == "unet" else part
        with pytest.raises(ModelError, match=f"model.{key}=.* is of weights in few bits"):
            check_model(ModelConfig(str(tiny("sd15")), **{key: str(folder / part)}))


def test_a_variant_that_is_not_there_is_refused(tiny, tmp_path):
    """The plain files would be read in its place."""
    folder = shutil.copytree(tiny("sd2"), tmp_path / "model")
    for part in ("vae", None):
        if part:
            only_half(folder, part)
            check_model(ModelConfig(str(folder), variant="fp16"))
        with pytest.raises(ModelError, match=f"model.variant=ema has no effect: {folder} has no s"):
            check_model(ModelConfig(str(folder), variant="ema"))


@pytest.mark.parametrize(("key", "part"), [("vae", "vae"), ("network", "unet")])
def test_a_folder_without_the_part_that_is_given_asks_for_its_configuration(
    key, part, tiny, tmp_path
):
    folder = shutil.copytree(tiny("sd15"), tmp_path / "model")
    shutil.rmtree(folder / part)
    m = ModelConfig(str(folder), **{key: str(tiny("sd15") / part)})
    with pytest.raises(ModelError, match=f"{folder} has no {part}/config.json.*: fetch that file"):
        check_model(m)
    (folder / part).mkdir()
    shutil.copy(tiny("sd15") / part / "config.json", folder / part)
    check_model(m)
    load_pipeline(m)


@pytest.mark.parametrize(
    ("layer", "key", "channels"),
    [("conv_in", "in_channels", 9), ("conv_in", "in_channels", 8), ("conv_out", "out_channels", 8)],
    ids=["inpainting", "a source image", "a learned variance"],
)
def test_a_network_of_other_channels_is_refused(layer, key, channels, tiny, tmp_path):
    """It would take no latents, or make more than a prediction: an error of the first step."""
    folder = shutil.copytree(tiny("sd15"), tmp_path / "model")
    file = next((folder / "unet").glob("*.safetensors"))
    tensors, axis = load_file(file), int(layer == "conv_in")
    for name in [f"{layer}.weight", f"{layer}.bias"][: 2 - axis]:
        tensors[name] = tensors[name].repeat_interleave(3, axis).narrow(axis, 0, channels)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, {"format": "pt"})
    about = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(about | {key: channels}))
    with pytest.raises(ModelError, match=f"has {key}={channels}, and latents have 4 .*inpainting"):
        check_model(ModelConfig(str(folder), resolution=128))


def test_a_folder_without_t5_names_its_setting(tiny, tmp_path):
    folder = shutil.copytree(tiny("sd3"), tmp_path / "model")
    for part in ("text_encoder_3", "tokenizer_3", "transformer"):
        shutil.move(folder / part, tmp_path)
    assert folder_fault(folder).endswith("which model_index.json names: fetch it again")
    shutil.move(tmp_path / "transformer", folder)
    assert folder_fault(folder).endswith("names: fetch it again, or set model.t5=false")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_half_of_the_weights_is_refused(part, tiny, tmp_path):
    """The libraries draw the rest at random, or leave it without values."""
    folder = shutil.copytree(tiny("sd15"), tmp_path / "model")
    halved(folder, part)
    for load in (check_model, load_pipeline):
        with pytest.raises(ModelError, match=f"{part} holds .* of at least .* weights.*fetch it"):
            load(ModelConfig(str(folder)))


@pytest.mark.parametrize("layers", [[0, 1, 2], [2, 5], [1, 4, 7]])
def test_a_list_of_numbers_is_no_part(layers, tiny, tmp_path):
    """Krea 2's model_index.json names layers of its text encoder."""
    folder = shutil.copytree(tiny("krea2"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_select_layers"] = layers
    (folder / "model_index.json").write_text(json.dumps(index))
    assert folder_fault(folder) is None


@pytest.mark.parametrize(
    ("family", "part", "single"),
    [
        ("wan", "tokenizer", False),
        ("qwen-image-edit", "processor", False),
        ("sd15", "tokenizer", True),
    ],
)
def test_a_tokenizer_without_a_vocabulary_is_refused(family, part, single, tiny, tmp_path):
    """The library makes one that knows no word, for which all prompts are the same."""
    folder = shutil.copytree(tiny(family), tmp_path / "model")
    m = ModelConfig(str(folder))
    if single:
        file = write_single_file(folder, tmp_path / "x.safetensors")
        m = ModelConfig(str(file), config=str(folder))
    for file in (folder / part).iterdir():
        if family == "wan" or not file.name.endswith(("_config.json", ".jinja")):
            file.unlink()
    for load in (check_model, load_pipeline):
        with pytest.raises(ModelError, match=rf"{part} has no vocabulary \(tokenizer.json.*fetch"):
            load(m)


def test_an_autoencoder_in_one_file_is_said_to_be_taken_on_trust(pipe, tiny, tmp_path, caplog):
    """SDXL's has the shapes of Stable Diffusion 1's; a folder's configuration tells them apart."""
    save_file(pipe("sdxl").vae.state_dict(), tmp_path / "x.safetensors")
    m = ModelConfig(str(tiny("sd15")))
    with caplog.at_level(logging.INFO, "inversion_dpo"):
        load_pipeline(replace(m, vae=str(tiny("sd15") / "vae")))
        assert "says not whose latents" not in caplog.text
        load_pipeline(replace(m, vae=str(tmp_path / "x.safetensors")))
    assert "says not whose latents it makes, and is taken for this model's" in caplog.text


def test_a_pipeline_without_a_part_says_which(tiny, tmp_path):
    folder = shutil.copytree(tiny("sd15"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"tokenizer": [None, None]}))
    with pytest.raises(ModelError, match="names no tokenizer: take a whole pipeline"):
        check_model(ModelConfig(str(folder)))


def test_a_pipeline_that_was_saved_without_t5_is_taken(tiny, caplog):
    """As a model, and as --policy beside a model of another family."""
    given = side(load_config(None, [f"model.path={tiny('sdxl')}"]), str(tiny("sd3-no-t5")))
    for m in (ModelConfig(str(tiny("sd3-no-t5"))), given.config.model):
        check_model(m)
        assert load_pipeline(m).text_encoder_3 is None
        assert "has no T5 (text_encoder_3): CLIP alone reads its prompts" in caplog.text


@pytest.mark.parametrize(
    ("family", "file", "lost"),
    [
        ("sd15", "scheduler/scheduler_config.json", None),
        ("sd15", "scheduler/scheduler_config.json", "beta_start"),
        ("sd15", "unet/config.json", "attention_head_dim"),
        ("sd15", "text_encoder/config.json", None),
        ("sd3", "scheduler/scheduler_config.json", "shift"),
        ("sd3", "vae/config.json", "scaling_factor"),
    ],
)
def test_a_configuration_that_says_too_little_is_refused(family, file, lost, tiny, tmp_path):
    """The library would fill in another model's value, which no weight contradicts."""
    folder = shutil.copytree(tiny(family), tmp_path / "model")
    about = json.loads((folder / file).read_text())
    short = {k: v for k, v in about.items() if k != lost} if lost else {}
    (folder / file).write_text(json.dumps(short))
    part = file.partition("/")[0]
    with pytest.raises(ModelError, match=f"configuration of {part} does not say .*{lost or ''}"):
        check_model(ModelConfig(str(folder)))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_weights_that_are_no_numbers_are_refused(part, tiny, tmp_path):
    folder = shutil.copytree(tiny("sd15"), tmp_path / "model")
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"{part} has weights that are not finite .*: fetch the f"):
        load_pipeline(ModelConfig(str(folder)))


def test_weights_of_another_variant_are_warned_of(tiny, tmp_path, caplog):
    folder = shutil.copytree(tiny("sd15"), tmp_path / "model")
    file = next((folder / "unet").glob("*.safetensors"))
    save_file(load_file(file) | {"more.weight": torch.zeros(1)}, file, {"format": "pt"})
    load_pipeline(ModelConfig(str(folder)))
    assert "unet: 1 tensors have no place in the network" in caplog.text


def test_a_folder_that_is_no_pipeline_says_which_setting_takes_it(tiny, tmp_path):
    lora, run = tmp_path / "lora", tmp_path / "run"
    for folder in (lora, run / "adapter"):
        folder.mkdir(parents=True)
    save_file({"unet.a.lora_A.weight": torch.zeros(1)}, lora / "x.safetensors")
    unet = shutil.copytree(tiny("sd15") / "unet", tmp_path / "other" / "unet")
    for place, message in (
        (lora, "This is a LoRA: set model.lora to it"),
        (run, "This is a run: set model.path to its base, and model.lora to its adapter/"),
        (unet, "This is one network: set model.network to it"),
        (unet.parent, "This is one network: set model.network to it"),
    ):
        for load in (check_model, load_pipeline):
            with pytest.raises(ModelError, match=f"model.path={place}: .*{message}"):
                load(ModelConfig(str(place)))
    with pytest.raises(ModelError, match="This is a LoRA: set model.lora to it"):
        check_model(ModelConfig(str(tiny("sd15")), network=str(lora)))
    (run / "adapter" / "model_index.json").touch()
    with pytest.raises(ModelError, match="This is a run: set model.path to its adapter/"):
        check_model(ModelConfig(str(run)))


@pytest.mark.parametrize("key", ["vae", "network", "lora"])
def test_a_part_that_is_not_there_is_named_by_its_setting(key, tiny):
    with pytest.raises(ModelError, match=f"model.{key}=./none: nothing is there") as caught:
        load_pipeline(ModelConfig(str(tiny("sd15")), **{key: "./none"}))
    assert "model_index.json" not in str(caught.value)


@pytest.mark.parametrize("key", ["lora", "vae", "network", "config"])
def test_a_file_overwritten_under_its_name_is_another_model(key, tiny, tmp_path):
    """Else its samples would be taken from the memory of those before."""
    file = tmp_path / "x.safetensors"
    digests = set()
    for content in (b"0", b"10"):
        file.write_bytes(content)
        m = ModelConfig(str(tiny("sd15")), **{key: str(file)})
        digests.add(model_digest(replace(Config(), model=m), None))
        digests.add(model_digest(Config(), file))
    assert len(digests) == 4


@pytest.mark.parametrize("key", ["lora", "adapter"])
def test_pefts_settings_beside_a_loras_file_are_of_the_model(key, tiny, tmp_path):
    """Put there later, they scale it otherwise: samples of before are of another model."""
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"0")
    m = ModelConfig(str(tiny("sd15")), **({"lora": str(file)} if key == "lora" else {}))
    config, adapter = replace(Config(), model=m), file if key == "adapter" else None
    digests = {model_digest(config, adapter)}
    for alpha in (1, 22):
        (tmp_path / "adapter_config.json").write_text(f'{{"lora_alpha": {alpha}}}')
        digests.add(model_digest(config, adapter))
    assert len(digests) == 3
