"""Pipelines as people have them: in folders and the hub's cache, whole, partial and damaged."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from inversion_dpo.models import folders
from inversion_dpo.models.base import ModelError, frozen_parts
from inversion_dpo.models.likeness import likeness, misread_text
from inversion_dpo.models.loading import adapt, check_model, load_model, load_pipeline
from inversion_dpo.models.parts import skeleton
from inversion_dpo.run.config import load_config, resolve
from inversion_dpo.run.fields import ModelConfig


@pytest.fixture(scope="session")
def half(tiny, tmp_path_factory):
    """A folder whose weights come in float16 only, under the variant's names."""
    folder = tmp_path_factory.mktemp("half")
    pipe = DiffusionPipeline.from_pretrained(tiny("sd15"), torch_dtype=torch.float16)
    pipe.save_pretrained(folder, variant="fp16")
    return folder


def test_a_hub_id_from_the_cache_offline(tiny, half, hub_cache):
    hub_cache("models", "owner/name", tiny("sd15"))
    hub_cache("models", "owner/name", half, "v2", "b" * 40)
    check_model(ModelConfig("owner/name"))
    whole = load_pipeline(ModelConfig("owner/name"))
    assert whole.unet.dtype == torch.float32
    part = load_pipeline(
        ModelConfig("owner/name", "v2", "fp16", "float16", vae=str(tiny("sd2") / "vae"))
    )
    assert part.unet.dtype == part.vae.dtype == torch.float16
    by_commit = load_pipeline(ModelConfig("owner/name", "b" * 40, "fp16"))
    assert torch.equal(by_commit.unet.conv_in.weight, part.unet.conv_in.weight.float())
    unnamed = load_pipeline(ModelConfig("owner/name", "v2"))  # there in fp16 alone
    assert torch.equal(unnamed.unet.conv_in.weight, part.unet.conv_in.weight.float())
    refused = {
        ("owner/name", "v3", None): "owner/name.*model.revision.*hf download owner/name",
        ("owner/none", None, None): "owner/none.*neither a folder here nor in the hub's cache",
        ("owner/name", None, "fp16"): "variant=fp16.*Set model.variant to one that is there",
    }
    for (name, revision, variant), message in refused.items():
        with pytest.raises(ModelError, match=message) as caught:
            load_pipeline(ModelConfig(name, revision, variant))
        assert "\n" not in str(caught.value)


def test_a_lora_and_an_autoencoder_from_the_cache(tiny, hub_cache, tmp_path):
    """The file's name, which offline nobody can look up, is diffusers' own."""
    pipe = DiffusionPipeline.from_pretrained(tiny("sd15"))
    before = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    down, up = torch.ones(2, before.shape[1]), torch.ones(before.shape[0], 2)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    weights = {f"{name}.down.weight": down, f"{name}.up.weight": up}
    (tmp_path / "lora").mkdir()
    save_file(weights, tmp_path / "lora/pytorch_lora_weights.safetensors")
    hub_cache("models", "owner/lora", tmp_path / "lora")
    hub_cache("models", "owner/vae", tiny("sd2") / "vae")
    found = load_pipeline(ModelConfig(str(tiny("sd15")), vae="owner/vae", lora="owner/lora"))
    after = found.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    torch.testing.assert_close(after, before + up @ down)
    for part in ({"vae": "owner/none"}, {"lora": "owner/none"}):
        with pytest.raises(ModelError, match="owner/none"):
            load_pipeline(ModelConfig(str(tiny("sd15")), **part))


def test_a_gated_model_says_what_to_do(monkeypatch):
    def gated(*_, **__):
        raise GatedRepoError.__new__(GatedRepoError, "gated")

    monkeypatch.setattr(folders, "hf_hub_download", gated)
    with pytest.raises(ModelError, match="Accept its licence on the hub and log in"):
        load_pipeline(ModelConfig("owner/gated"))


def cut(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:500])


def settings(file, **changes):
    def change(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def pickled(folder):
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


SPOILED = {
    "only pickles": (pickled, "are pickles, which can run code: convert them to safetensors"),
    "weights cut short": (cut("unet/diffusion_pytorch_model.safetensors"), "Unable to load"),
    "a text encoder cut short": (cut("text_encoder/model.safetensors"), "deserializing header"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "no file named model_index.json"),
    "an index that is none": (lambda f: (f / "model_index.json").write_text("[]"), "names no pipe"),
    "a pipeline nobody knows": (settings("model_index.json", _class_name="Mine"), "Mine is not s"),
    "code of its own": (settings("model_index.json", _class_name=["p", "M"]), "'M'. is not supp"),
    "another pipeline": (
        settings("model_index.json", _class_name="StableDiffusionInpaintPipeline"),
        "StableDiffusionInpaintPipeline is not supported; supported: StableDiffusionPipeline",
    ),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "no file named config.json"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "no file named scheduler_config"),
    "another width": (settings("unet/config.json", block_out_channels=[8, 8, 16, 32]), "shape"),
    "another text width": (settings("text_encoder/config.json", hidden_size=32), "mismatched"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_a_spoiled_folder_is_one_line(spoil, message, tiny, tmp_path):
    folder = shutil.copytree(tiny("sd15"), tmp_path / "model")
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        adapt(load_pipeline(ModelConfig(str(folder))), 64)
    assert "\n" not in str(caught.value)


def text(file, content):
    return lambda folder: (folder / file).write_text(content)


def without(file, key):
    def change(folder):
        path = folder / file
        about = json.loads(path.read_text())
        del about[key]
        path.write_text(json.dumps(about))

    return change


def with_a_word(folder):
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<cat>"])
    tokenizer.save_pretrained(folder / "tokenizer")


def preview(folder):
    """Of a demonstration that was made fast."""
    shutil.rmtree(folder / "vae")
    widths = {f"{half}_block_out_channels": (8,) * 4 for half in ("encoder", "decoder")}
    AutoencoderTiny(**widths).save_pretrained(folder / "vae")


def twice(folder):
    """The network was saved anew in parts, beside the former file."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="20KB")


POINTER = "version https://git-lfs.github.com/spec/v1"  # what git clone leaves without git-lfs
NAMED = {
    "no scheduler named": (without("model_index.json", "scheduler"), "names no scheduler: take a"),
    "a class of a newer version": (
        settings("model_index.json", scheduler=["diffusers", "New"]),
        "asks for diffusers.New as scheduler, which is not there",
    ),
    "another class of network": (
        settings("model_index.json", unet=["diffusers", "UNet2DModel"]),
        "says that unet is UNet2DModel, and its config.json UNet2DConditionModel",
    ),
    "a pipeline with more parts": (
        settings("model_index.json", _class_name="StableDiffusionXLPipeline"),
        "names no text_encoder_2, tokenizer_2: take a whole pipeline",
    ),
    "no configuration": (
        lambda f: (f / "text_encoder/config.json").unlink(),
        "text_encoder lacks config.json: fetch it again",
    ),
    "no scheduler's": (
        lambda f: (f / "scheduler/scheduler_config.json").unlink(),
        "scheduler lacks scheduler_config.json: fetch",
    ),
    "no weights": (
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(),
        "vae has no weights",
    ),
    "a pointer for weights": (
        text("unet/diffusion_pytorch_model.safetensors", POINTER),
        "unet/diffusion_pytorch_model.safetensors is damaged",
    ),
    "a pointer for a vocabulary": (
        text("tokenizer/tokenizer.json", POINTER),
        "tokenizer.json is no JSON",
    ),
    "an empty index": (text("model_index.json", ""), "model_index.json is no JSON"),
    "an index of shards": (
        text("unet/diffusion_pytorch_model.safetensors.index.json", "<html>"),
        "safetensors.index.json is no JSON",
    ),
    "another width": (settings("unet/config.json", in_channels=9), "has the shape .*, and .* by c"),
    "no scale": (settings("vae/config.json", scaling_factor=None), "does not say scaling_factor"),
    "no lengths": (
        without("tokenizer/tokenizer_config.json", "model_max_length"),
        "tokenizer_config.json lacks model_max_length",
    ),
    "no settings of a tokenizer": (
        lambda f: (f / "tokenizer/tokenizer_config.json").unlink(),
        "tokenizer_config.json is lost",
    ),
    "a word too many": (
        with_a_word,
        "tokenizer gives '<cat>' the number .*, and text_encoder has embeddings .* below .*: fetch",
    ),
    "whole and in parts": (
        twice,
        "unet holds its weights twice: in diffusion_pytorch_model.safetensors, and in the parts",
    ),
    "an autoencoder for previews": (
        lambda f: [
            preview(f),
            settings("model_index.json", vae=["diffusers", "AutoencoderTiny"])(f),
        ],
        "its AutoencoderTiny is no autoencoder to train with",
    ),
    "a UNet told a class": (
        settings("unet/config.json", class_embed_type="identity"),
        "UNet2DConditionModel has class_embed_type='identity': it is told a class of images",
    ),
    "no filling": (without("tokenizer/tokenizer_config.json", "pad_token"), "lacks .*or pad_token"),
    "in few bits": (
        settings("unet/config.json", quantization_config={"load_in_4bit": True}),
        "unet is held in few bits .*: give it in bf16, and set model.quantize",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), NAMED.values(), ids=NAMED.keys())
def test_a_folder_with_one_fault_is_refused_before_any_work(spoil, message, tiny, tmp_path):
    """By the name of the file or part, and with what to do."""
    folder = shutil.copytree(tiny("sd15"), tmp_path / "model")
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        check_model(ModelConfig(str(folder)))
    assert "\n" not in str(caught.value)


def test_an_index_may_name_the_one_file_that_is_whole(tiny, tmp_path):
    """As some tools save a model that needs no parts."""
    folder = shutil.copytree(tiny("sd15"), tmp_path / "model")
    name = "diffusion_pytorch_model.safetensors"
    keys = load_file(folder / "unet" / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
    (folder / "unet" / f"{name}.index.json").write_text(json.dumps(index))
    check_model(ModelConfig(str(folder)))


def test_a_chat_without_a_template_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny("z-image"), tmp_path / "model")
    for file in (folder / "tokenizer").glob("*.jinja"):
        file.unlink()
    settings("tokenizer/tokenizer_config.json", chat_template=None)(folder)
    with pytest.raises(ModelError, match="it has no chat template"):
        check_model(ModelConfig(str(folder)))


def test_layers_of_clip_that_are_not_used_are_warned_of(tiny, tmp_path, caplog):
    folder = shutil.copytree(tiny("sdxl"), tmp_path / "model")
    about = json.loads((folder / "text_encoder_2/config.json").read_text())
    count = about["num_hidden_layers"]
    settings("text_encoder_2/config.json", num_hidden_layers=count - 1)(folder)
    load_pipeline(ModelConfig(str(folder)))
    assert f"the file has {count} layers, and config.json asks for {count - 1}" in caplog.text


def test_sdxls_scale_that_is_not_said_is_refused(tiny, tmp_path):
    """The library takes Stable Diffusion 1's."""
    folder = shutil.copytree(tiny("sdxl"), tmp_path / "model")
    settings("vae/config.json", force_upcast=True)(folder)
    without("vae/config.json", "scaling_factor")(folder)
    with pytest.raises(ModelError, match="vae does not say scaling_factor"):
        check_model(ModelConfig(str(folder)))


def test_a_shift_that_is_not_said_is_refused(tiny, tmp_path):
    """The library takes none, and FLUX and Stable Diffusion 3 have one."""
    folder = shutil.copytree(tiny("sd3"), tmp_path / "model")
    without("vae/config.json", "shift_factor")(folder)
    with pytest.raises(ModelError, match="vae does not say shift_factor"):
        check_model(ModelConfig(str(folder)))


def test_the_models_that_ship_are_taken():
    """The drawn one has 16 latent channels, and says that nothing shifts them."""
    root = Path(__file__).parents[3]
    for folder in ("tools/drawn/model/pipeline", "src/inversion_dpo/assets/pipeline"):
        check_model(ModelConfig(str(root / folder)))


def test_a_tokenizer_of_sentencepiece_says_what_to_install(tiny, tmp_path, monkeypatch):
    """As Chroma's: without these packages transformers takes the file for one of tiktoken."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    folder = shutil.copytree(tiny("chroma"), tmp_path / "model")
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/spiece.model").write_bytes(b"no words")
    with pytest.raises(ModelError, match="pip install sentencepiece protobuf$"):
        check_model(ModelConfig(str(folder)))


def test_what_is_checked_beforehand_has_no_weights(tiny, tmp_path):
    """Wan's transformers too, which its pipeline could do without: each is tens of gigabytes."""
    folder = shutil.copytree(tiny("wan"), tmp_path / "model")
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    second = ["diffusers", "WanTransformer3DModel"]
    settings("model_index.json", transformer_2=second)(folder)
    made = skeleton(ModelConfig(str(folder)))
    assert made.transformer_2 is None
    for part, network in frozen_parts(made).items():
        assert all(weight.is_meta for weight in network.parameters()), part


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_a_scheduler_of_another_prediction_is_warned_of(kind, tmp_path, caplog):
    """The embedded model predicts v: as eps, every picture and every error is wrong."""
    folder = shutil.copytree(resolve("asset:pipeline"), tmp_path / "model")
    settings("scheduler/scheduler_config.json", prediction_type=kind)(folder)
    load_model(load_config(None, [f"model.path={folder}"]), torch.device("cpu"))
    assert ("set prediction_type=v_prediction in" in caplog.text) == (kind == "epsilon")


def test_eps_from_pure_noise_is_that_noise(tiny, monkeypatch):
    model = adapt(load_pipeline(ModelConfig(str(tiny("sdxl")))), 64)
    monkeypatch.setattr(model, "predict", lambda unet, x, t, condition: x * 2)
    assert likeness(model, (64, 32)) == pytest.approx(1)
    assert misread_text(model, (64, 32)) is None
    model.schedule = replace(model.schedule, kind="v_prediction")
    assert "100 % like it" in misread_text(model, (64, 32))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "nothing is there"),
        ("/nowhere/model.ckpt", "only .safetensors files are read"),
        ("https://huggingface.co/owner/name", "nothing is there: give a folder.*OWNER/NAME"),
        ("models/of/mine", "nothing is there: give a folder.*OWNER/NAME"),
    ],
)
def test_a_file_that_is_none_is_one_line(name, message):
    with pytest.raises(ModelError, match=message):
        load_pipeline(ModelConfig(name))
