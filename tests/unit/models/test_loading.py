"""Pipelines as people have them: in folders and the hub's cache, whole, partial and damaged."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import save_file

from inversion_dpo.models import parts
from inversion_dpo.models.base import ModelError
from inversion_dpo.models.loading import adapt, check_model, load_pipeline
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
    refused = {
        ("owner/name", "v3", None): "owner/name.*model.revision.*hf download owner/name",
        ("owner/none", None, None): "owner/none.*neither a folder here nor in the hub's cache",
        ("owner/name", None, "fp16"): "variant=fp16.*Set model.variant to one that is there",
        ("owner/name", "v2", None): "no file named.*Set model.variant if its files carry one",
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

    monkeypatch.setattr(parts, "hf_hub_download", gated)
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
    "an index that is none": (lambda f: (f / "model_index.json").write_text("[]"), "The folder"),
    "a pipeline nobody knows": (settings("model_index.json", _class_name="Mine"), "attribute Mine"),
    "code of its own": (settings("model_index.json", _class_name=["pipeline", "M"]), "must be str"),
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "nothing is there"),
        ("/nowhere/model.ckpt", "only .safetensors files are read"),
    ],
)
def test_a_file_that_is_none_is_one_line(name, message):
    with pytest.raises(ModelError, match=message):
        load_pipeline(ModelConfig(name))
