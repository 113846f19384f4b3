"""The tiny folders are whole pipelines: they load, draw, and read their prompts."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from inversion_dpo.models.prompts import ImagesAndText
from tests.slow import slow_but
from tools.tiny.pipelines import FAMILIES, write_tiny

CLASSES = {
    "sd15": diffusers.StableDiffusionPipeline,
    "sd2": diffusers.StableDiffusionPipeline,
    "sd2-zsnr": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "sd3-no-t5": diffusers.StableDiffusion3Pipeline,
    "flux": diffusers.FluxPipeline,
    "flux-schnell": diffusers.FluxPipeline,
}
NEWER = {
    "flux-kontext": diffusers.FluxKontextPipeline,
    "qwen-image-edit": diffusers.QwenImageEditPipeline,
    "qwen-image-edit-plus": diffusers.QwenImageEditPlusPipeline,
    "z-image": diffusers.ZImagePipeline,
    "flux2-klein": diffusers.Flux2KleinPipeline,
    "flux2-dev": diffusers.Flux2Pipeline,
    "qwen-image": diffusers.QwenImagePipeline,
    "chroma": diffusers.ChromaPipeline,
    "krea2": diffusers.Krea2Pipeline,
    "wan": diffusers.WanPipeline,
    "wan-5b": diffusers.WanPipeline,
    "sana": diffusers.SanaPipeline,
    "lumina2": diffusers.Lumina2Pipeline,
}  # what they draw is tested by test_families.py and test_edits.py
# Of what diffusers cannot leave out by itself: see build_sd3_without_t5.
LEFT_OUT = {"sd3-no-t5": {"text_encoder_3": None, "tokenizer_3": None}}


@pytest.fixture(scope="session")
def pipeline(tiny):
    """family -> its loaded pipeline, loaded once."""
    loaded = {}

    def load(family):
        if family not in loaded:
            left_out = LEFT_OUT.get(family, {})
            if (processor := tiny(family) / "processor").is_dir():  # of videos, by torchvision
                left_out = {"processor": ImagesAndText.from_pretrained(processor)}
            loaded[family] = DiffusionPipeline.from_pretrained(
                tiny(family), use_safetensors=True, **left_out
            )
            loaded[family].set_progress_bar_config(disable=True)
        return loaded[family]

    return load


def draw(pipe, prompt):
    """A 64x64 image from two steps and a fixed seed."""
    return pipe(
        prompt,
        height=64,
        width=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]


def files(folder):
    """Relative path -> bytes of every file."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def parameters(folder):
    """Relative path and tensor name -> tensor of every weight."""
    from safetensors.torch import load_file

    return {
        (path.relative_to(folder).as_posix(), name): tensor
        for path in folder.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


each_family = pytest.mark.parametrize("family", CLASSES)
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("family", slow_but(["sd15", "flux", "qwen-image-edit"], FAMILIES))
def test_it_loads_as_the_family_it_is(pipeline, family):
    assert type(pipeline(family)) is (CLASSES | NEWER)[family]


@every_family
def test_the_folder_is_small_and_holds_no_pickle(tiny, family):
    found = files(tiny(family))
    assert {name.rpartition(".")[2] for name in found} <= {"safetensors", "json", "txt", "jinja"}
    assert sum(map(len, found.values())) <= 4e6


@pytest.mark.parametrize("family", slow_but(["sd2", "sd3"], CLASSES))
def test_it_draws_what_depends_on_the_prompt(pipeline, family):
    one, same, other = (
        draw(pipeline(family), prompt)
        for prompt in ("a large red square", "a large red square", "a small green circle")
    )
    assert one.shape == (64, 64, 3)
    assert np.isfinite(one).all()
    assert one.std() > 0.1
    assert np.array_equal(one, same)
    assert np.abs(one - other).max() > 1 / 255  # more than a rounding of the stored picture


@each_family
def test_encoded_latents_are_scaled_as_the_networks_expect(pipeline, family):
    vae = pipeline(family).vae
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    assert posterior.mode().shape == (2, vae.config.latent_channels, 8, 8)
    assert 0.5 < (posterior.mode() * vae.config.scaling_factor).std() < 2
    assert posterior.std.max() < 0.1


@pytest.mark.parametrize("family", slow_but(["sdxl", "sd3", "z-image"], FAMILIES))
def test_the_seed_decides_the_weights(tiny, tmp_path, family):
    first = parameters(tiny(family))
    again = parameters(write_tiny(family, tmp_path / "again"))
    other = parameters(write_tiny(family, tmp_path / "other", seed=1))
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first if k[1].endswith("to_q.weight"))


def test_the_random_state_is_left_as_it_was(tmp_path):
    before = torch.random.get_rng_state()
    write_tiny("sd15", tmp_path / "new")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "sd15",
            {"_class_name": "PNDMScheduler", "steps_offset": 1, "timestep_spacing": "leading"},
        ),
        ("sd2", {"prediction_type": "v_prediction", "timestep_spacing": "leading"}),
        ("sd2-zsnr", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        ("sdxl", {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}),
        ("sd3", {"shift": 3.0, "use_dynamic_shifting": False}),
        ("flux", {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.15}),
        ("flux-schnell", {"shift": 1.0, "use_dynamic_shifting": False}),
    ],
)
def test_the_scheduler_is_the_published_one(tiny, family, expected):
    config = json.loads((tiny(family) / "scheduler" / "scheduler_config.json").read_text())
    assert expected.items() <= config.items()


def test_zero_signal_is_left_at_the_last_step(pipeline):
    assert pipeline("sd2").scheduler.alphas_cumprod[-1] > 1e-3
    # diffusers computes the betas from the rescaled products and these again from the betas
    assert pipeline("sd2-zsnr").scheduler.alphas_cumprod[-1] < 1e-6


@pytest.mark.parametrize(
    ("family", "scaling", "shift", "channels"),
    [
        ("sd15", 0.18215, None, 4),
        ("sdxl", 0.13025, None, 4),
        ("sd3", 1.5305, 0.0609, 16),
        ("flux", 0.3611, 0.1159, 16),
    ],
)
def test_the_autoencoder_scales_as_the_published_one(pipeline, family, scaling, shift, channels):
    config = pipeline(family).vae.config
    assert (config.scaling_factor, config.shift_factor) == (scaling, shift)
    assert config.latent_channels == channels
    assert config.use_quant_conv is (shift is None)


def test_only_dev_takes_guidance(pipeline):
    assert pipeline("flux").transformer.config.guidance_embeds
    assert not pipeline("flux-schnell").transformer.config.guidance_embeds


@pytest.mark.parametrize(("family", "name"), [("sd3", "tokenizer_3"), ("flux", "tokenizer_2")])
def test_t5_gives_its_text_back(pipeline, family, name):
    tokenizer = getattr(pipeline(family), name)
    text = "a large red square left of a Zebra, 42!"
    ids = tokenizer(text).input_ids
    assert tokenizer.model_max_length == 512
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("a red square").input_ids) == 4  # the scenes' words are whole


def test_clip_pads_as_published(pipeline):
    sdxl = pipeline("sdxl")
    assert sdxl.tokenizer.model_max_length == sdxl.tokenizer_2.model_max_length == 77
    assert (sdxl.tokenizer.pad_token, sdxl.tokenizer_2.pad_token) == ("<|endoftext|>", "!")


def test_an_unknown_family_and_a_full_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="sd15, sd2"):
        write_tiny("sd16", tmp_path)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        write_tiny("sd15", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
