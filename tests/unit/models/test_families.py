"""Each family against its own pipeline: what it encodes, reads, predicts and draws."""

import re
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaSprintPipeline
from safetensors.torch import save_file
from torch import Tensor

from inversion_dpo.maths.inversion import Extent, invert, reconstruct
from inversion_dpo.maths.records import Grid
from inversion_dpo.models.base import ModelError, joined, network_of
from inversion_dpo.models.loading import (
    adapt,
    check_model,
    few_steps_text,
    load_pipeline,
    name_of_few_steps,
)
from inversion_dpo.models.prompts import overlong
from inversion_dpo.models.sampler import Sampler
from inversion_dpo.run.config import load_config
from inversion_dpo.run.fields import ModelConfig
from inversion_dpo.training.beforehand import check_training
from inversion_dpo.training.states import with_dropout
from inversion_dpo.trajectories.fill import predictions
from tests.sessions import conditional, under_guidance
from tests.slow import slow_but

PROMPTS = ["a small red star", "the large blue cross left of a green circle"]
SIDE = 64


def same(pipe: Any, x: Tensor) -> Tensor:
    """Leave latents as they are."""
    return x


def pack(pipe: Any, x: Tensor) -> Tensor:
    """Latents as FLUX.1 and its kin take them."""
    return pipe._pack_latents(x, *x.shape)


def unpack(pipe: Any, x: Tensor) -> Tensor:
    """2x2 patches of 16 channels, one after another, row by row."""
    grid = x.reshape(len(x), SIDE // 16, SIDE // 16, 16, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(x), 16, SIDE // 8, SIDE // 8)


def from_klein(pipe: Any, x: Tensor) -> Tensor:
    """Klein gives latents back as its autoencoder takes them."""
    patches = x.reshape(len(x), 32, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(-1, 128, 4, 4)
    std = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
    return (patches - pipe.vae.bn.running_mean[:, None, None]) / std[:, None, None]


def one_frame(pipe: Any, x: Tensor) -> Tensor:
    """A video of one frame."""
    return x.unsqueeze(2)


def of_one_frame(pipe: Any, x: Tensor) -> Tensor:
    """The frame of a video."""
    return x.squeeze(2)


def from_dev(pipe: Any, x: Tensor) -> Tensor:
    """Dev gives rows of patches back."""
    return x.transpose(1, 2).reshape(len(x), 128, 4, 4)


@dataclass(frozen=True)
class Oracle:
    """How a family's pipeline is asked, written apart from the adapter.

    scale: guidance, 1 being none; ``plain`` and ``guided``: its arguments to the pipeline. Where
        the network is told its guidance there is no other, and ``plain`` has it.
    given: latents for the pipeline; result: ours from the pipeline's ``output_type="latent"``.
    """

    shape: tuple[int, ...]
    plain: dict[str, Any]
    guided: dict[str, Any] = field(default_factory=dict)
    scale: float = 4.0
    given: Any = same
    result: Any = same
    both: dict[str, Any] = field(default_factory=dict)
    embed: float = 1.0


WAN = Oracle(
    (),
    {"guidance_scale": 1.0},
    {"guidance_scale": 4.0},
    given=one_frame,
    result=of_one_frame,
    both={"num_frames": 1},
)
ORACLES = {
    "z-image": Oracle((16, 8, 8), {"guidance_scale": 0.0}, {"guidance_scale": 3.0}),
    "flux2-klein": Oracle(
        (128, 4, 4), {"guidance_scale": 1.0}, {"guidance_scale": 4.0}, result=from_klein
    ),
    "flux2-dev": Oracle((128, 4, 4), {"guidance_scale": 3.0}, result=from_dev, embed=3.0),
    "qwen-image": Oracle(
        (16, 8, 8),
        {"true_cfg_scale": 1.0},
        {"true_cfg_scale": 4.0, "negative_prompt": ["", ""]},
        given=pack,
        result=unpack,
    ),
    "chroma": Oracle(
        (16, 8, 8), {"guidance_scale": 1.0}, {"guidance_scale": 4.0}, given=pack, result=unpack
    ),
    "krea2": Oracle(
        (16, 8, 8), {"guidance_scale": 0.0}, {"guidance_scale": 3.0}, given=pack, result=unpack
    ),
    "wan": replace(WAN, shape=(16, 8, 8)),
    "wan-5b": replace(WAN, shape=(48, 4, 4)),
    "sana": Oracle(
        (32, 2, 2),
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.0},
        both={"use_resolution_binning": False},
    ),
    "lumina2": Oracle((16, 8, 8), {"guidance_scale": 1.0}, {"guidance_scale": 4.0}),
}
FIRST_ORDER = {"solver_order": 1, "disable_corrector": list(range(9))}  # then they are Euler's
each_family = pytest.mark.parametrize("family", ORACLES)


@pytest.fixture(scope="module")
def model_of(tiny):
    """family -> its adapter, loaded once."""
    loaded = {}

    def load(family):
        if family not in loaded:
            pipe = load_pipeline(ModelConfig(str(tiny(family))))
            if "solver_order" in pipe.scheduler.config:
                pipe.scheduler = type(pipe.scheduler).from_config(
                    pipe.scheduler.config, **FIRST_ORDER
                )
            loaded[family] = adapt(pipe, SIDE, ORACLES[family].embed)
        return loaded[family]

    return load


def noise(family, seed=1):
    shape = (len(PROMPTS), *ORACLES[family].shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(model, family, x_T, **settings):
    """The pipeline's own latents, in our layout, after two steps."""
    oracle, pipe = ORACLES[family], model.pipeline
    output = pipe(
        prompt=list(PROMPTS),
        latents=oracle.given(pipe, x_T),
        num_inference_steps=2,
        height=SIDE,
        width=SIDE,
        output_type="latent",
        **settings,
        **oracle.both,
    )
    return oracle.result(pipe, output.images if hasattr(output, "images") else output.frames)


@each_family
@pytest.mark.parametrize("guided", slow_but([True], [False, True]))
@torch.no_grad()
def test_sampling_equals_the_pipeline(family, guided, model_of):
    oracle, x_T = ORACLES[family], noise(family)
    if guided and not oracle.guided:
        return
    model, scale = model_of(family), oracle.scale if guided else 1.0
    predict = under_guidance(model, model.condition(PROMPTS), scale)
    ours = reconstruct(x_T, model.schedule.grid(2, "sampler"), predict, model.schedule.kind)
    theirs = drawn(model, family, x_T, **(oracle.guided if guided else oracle.plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    asked = model.call(scale * oracle.embed, len(PROMPTS))  # what users of our sampler get
    again = drawn(model, family, x_T, **{k: v for k, v in asked.items() if k not in oracle.both})
    torch.testing.assert_close(again, theirs, rtol=0, atol=0)
    assert asked.items() >= oracle.both.items()


# Some pipelines divide a timestep by 1000, others by the schedule's length.
@pytest.mark.parametrize("family", slow_but(["krea2", "lumina2"], ORACLES))
@torch.no_grad()
def test_a_schedule_of_another_length_is_told_as_by_the_pipeline(family, tiny):
    pipe = load_pipeline(ModelConfig(str(tiny(family))))
    more = FIRST_ORDER if "solver_order" in pipe.scheduler.config else {}
    config = {**pipe.scheduler.config, "num_train_timesteps": 500, **more}
    pipe.scheduler = type(pipe.scheduler).from_config(config)
    model, x_T = adapt(pipe, SIDE, ORACLES[family].embed), noise(family)
    predict = under_guidance(model, model.condition(PROMPTS), 1.0)
    ours = reconstruct(x_T, model.schedule.grid(2, "sampler"), predict, model.schedule.kind)
    theirs = drawn(model, family, x_T, **ORACLES[family].plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# In `make test`: a shift that goes by the tokens, and one that does not.
@pytest.mark.parametrize("family", slow_but(["flux2-klein", "z-image"], ORACLES))
@torch.no_grad()
def test_another_shape_has_the_pipelines_schedule(family, model_of):
    """Of 96 x 64 pixels; the square's schedule is another where the shift goes by the tokens."""
    model, oracle = model_of(family), ORACLES[family]
    channels, high, wide = oracle.shape
    x_T = torch.randn(2, channels, high * 3 // 2, wide, generator=torch.Generator().manual_seed(1))
    output = model.pipeline(
        prompt=list(PROMPTS),
        latents=oracle.given(model.pipeline, x_T),
        num_inference_steps=2,
        height=SIDE * 3 // 2,
        width=SIDE,
        output_type="latent",
        **oracle.plain,
        **oracle.both,
    )
    grid = model.schedule_at((SIDE * 3 // 2, SIDE)).grid(2, "sampler")
    torch.testing.assert_close(
        grid.levels.sigma.flip(0), model.pipeline.scheduler.sigmas.double(), rtol=1e-6, atol=1e-7
    )
    if oracle.result is same:
        predict = under_guidance(model, model.condition(PROMPTS), 1.0)
        ours = reconstruct(x_T, grid, predict, model.schedule.kind)
        torch.testing.assert_close(ours, output.images, rtol=1e-4, atol=1e-4)


@each_family
@torch.no_grad()
def test_decoding_equals_the_pipeline_and_encoding_undoes_its_scale(family, model_of):
    model, oracle, x_T = model_of(family), ORACLES[family], noise(family)
    latents = drawn(model, family, x_T, **oracle.plain)
    output = model.pipeline(
        prompt=list(PROMPTS),
        latents=oracle.given(model.pipeline, x_T),
        num_inference_steps=2,
        height=SIDE,
        width=SIDE,
        output_type="pt",
        **oracle.plain,
        **oracle.both,
    )
    images = output.images if hasattr(output, "images") else output.frames[:, 0]
    torch.testing.assert_close(model.decode(latents), 2 * images - 1, rtol=1e-4, atol=1e-4)
    z, vae = model.encode(2 * images - 1), model.pipeline.vae
    assert z.shape == x_T.shape and z.dtype == torch.float32
    video = type(vae).__name__ in ("AutoencoderKLQwenImage", "AutoencoderKLWan")
    raw = vae.encode((2 * images - 1).unsqueeze(2) if video else 2 * images - 1)
    raw = raw.latent_dist.mode() if hasattr(raw, "latent_dist") else raw.latent
    again = vae.decode(raw).sample.clamp(-1, 1)
    again = again.squeeze(2) if video else again
    torch.testing.assert_close(model.decode(z), again, rtol=1e-3, atol=1e-3)


@each_family
@torch.no_grad()
def test_a_prompt_in_a_batch_is_the_prompt_alone(family, model_of):
    """Padding is masked, or zeros that the network reads in any case."""
    model, x, t = model_of(family), noise(family), torch.tensor([300.0, 800.0])
    network = network_of(model)
    both = model.predict(network, x, t, model.condition(PROMPTS))
    longer = model.condition([*PROMPTS, "a small red star " * 6])
    for k in range(2):
        alone = model.predict(network, x[k : k + 1], t[k : k + 1], model.condition(PROMPTS[k:][:1]))
        padded = model.predict(
            network, x[k : k + 1], t[k : k + 1], {n: v[k : k + 1] for n, v in longer.items()}
        )
        torch.testing.assert_close(both[k : k + 1], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-3


# Nothing of a family but its prediction, which the tests above compare for all.
@pytest.mark.parametrize("family", slow_but(["sana", "wan"], ORACLES))
@torch.no_grad()
def test_inversion_then_sampling_returns(family, model_of):
    """Along the same predictions, found by fixed-point iterations."""
    model, x_0 = model_of(family), noise(family, 2)
    whole, kind = model.schedule.grid(12, "even"), model.schedule.kind
    grid = Grid(whole.timesteps[:5], whole.levels[:5])
    predict = conditional(model, model.condition(PROMPTS))
    x_T = invert(x_0, grid, predict, kind, extent=Extent(iterations=8)).states[-1]
    again = reconstruct(x_T, grid, predict, kind)
    assert (again - x_0).norm() / x_0.norm() < 0.05


# Nor here: the formula is one for all, but for a mask of what is padded.
@pytest.mark.parametrize("family", slow_but(["qwen-image", "sana"], ORACLES))
@pytest.mark.parametrize(
    ("path", "wanted"), slow_but([(2.0, 4.0)], [(1.0, 4.0), (2.0, 4.0), (3.0, 1.0)])
)
@torch.no_grad()
def test_one_guidance_gives_another(family, path, wanted, model_of):
    model, x, condition = model_of(family), noise(family), model_of(family).condition(PROMPTS)
    t = model.schedule.timesteps[500].expand(2)
    along, expected = (under_guidance(model, condition, s)(x, t) for s in (path, wanted))
    found = predictions(model, condition, path, wanted)[1](x, t, along)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@each_family
def test_the_loss_reaches_all_but_what_is_named(family, model_of):
    model, x = model_of(family), noise(family)
    network, t = network_of(model), torch.tensor([300.0, 800.0])
    network.requires_grad_(True)
    try:
        model.predict(network, x, t, model.condition(PROMPTS)).square().sum().backward()
        dead = {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    finally:
        network.requires_grad_(False).zero_grad()
    named = re.compile(model.unreached or "$.")
    assert dead == {n for n, _ in network.named_parameters() if named.match(n)}


@pytest.mark.parametrize("family", slow_but(["krea2"], ORACLES))
def test_checkpointing_changes_no_prediction(family, model_of):
    model, x = model_of(family), noise(family)
    network, t, condition = network_of(model), torch.tensor([300.0, 800.0]), {}
    condition = model.condition(PROMPTS)
    plain = model.predict(network, x, t, condition).detach()
    network.requires_grad_(True).train().enable_gradient_checkpointing()
    try:
        again = model.predict(network, x, t, condition).detach()
    finally:
        network.requires_grad_(False).eval().disable_gradient_checkpointing()
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)


@each_family
def test_a_prompt_that_is_cut_is_counted(family, model_of):
    """From one token more than is left for it beside the template."""
    model = model_of(family)
    (read,), tokenizer = model.reads.values(), model.pipeline.tokenizer
    marks = len(tokenizer("z" * 9, add_special_tokens=False).input_ids) - 9
    words = "z" * (read - marks)
    assert 64 < read <= 512 and overlong(model, [words, words + "z"]) == {"tokenizer": 1}


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        ("flux", "objective.guidance_scale=3.5", "model.guidance_embed"),
        ("flux2-dev", "objective.guidance_scale=0.5", "model.guidance_embed"),
        ("sd15", "objective.guidance_scale=0.5", "StableDiffusionPipeline draws every"),
        ("z-image", "evaluation.guidance_scale=0", "ZImagePipeline draws every"),
    ],
)
def test_guidance_that_no_sample_will_have_is_refused(family, setting, message, tiny, tmp_path):
    given = [f"model.path={tiny(family)}", "model.resolution=128", "data.limit=64", setting]
    config = load_config(None, given)
    with pytest.raises(ModelError, match=rf"^{setting} .*{message}"):
        check_training(config, check_model(config.model), tmp_path)


@pytest.mark.parametrize(
    ("family", "named", "why"),
    [
        ("flux-schnell", "plain", "it takes no guidance, as FLUX.1 schnell"),
        ("sd15", "Some-Turbo", "so says the name in model.path"),
        ("sd15", "plain", None),
    ],
)
def test_a_model_of_few_steps_is_warned_of(family, named, why, tiny, tmp_path, caplog):
    """Before any weight is read."""
    (tmp_path / named).symlink_to(tiny(family))
    settings = [f"model.path={tmp_path / named}", "model.resolution=128", "data.limit=64"]
    config = load_config(None, settings)
    check_training(config, check_model(config.model), tmp_path)
    assert (f"{named} seems to be distilled to few steps ({why})" in caplog.text) == bool(why)
    assert ("Train its base" in caplog.text) == bool(why)


@pytest.mark.parametrize("base", ["sd_xl_turbo_1.0.safetensors", "sd_xl_base_1.0.safetensors"])
def test_a_lora_of_a_model_of_few_steps_is_warned_of(base, tiny, tmp_path):
    """By the name of its base, which kohya's programs write into the file."""
    file = tmp_path / "style.safetensors"
    save_file({"x": torch.zeros(1)}, file, {"ss_sd_model_name": base})
    m = ModelConfig(str(tiny("sd15")), resolution=128)
    found = few_steps_text(check_model(m), replace(m, lora=str(file)))
    assert ("model.lora was trained on sd_xl_turbo" in (found or "")) == ("turbo" in base)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"path": "stabilityai/sdxl-turbo"}, "path"),
        ({"path": "/cache/models--ByteDance--SDXL-Lightning/snapshots/c0ffee"}, "path"),
        ({"path": "Tongyi-MAI/Z-Image-Turbo"}, "path"),
        ({"path": "black-forest-labs/FLUX.1-schnell"}, "path"),
        ({"path": "SimianLuo/LCM_Dreamshaper_v7"}, "path"),
        ({"path": "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers"}, "path"),
        ({"path": "lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill"}, "path"),
        ({"path": "lodestones/Chroma1-Flash"}, "path"),
        ({"network": "files/sdxl_4step_unet.safetensors"}, "network"),
        ({"network": "SDXL-DMD2/unet"}, "network"),
        ({"lora": "latent-consistency/lcm-lora-sdxl"}, "lora"),
        ({"lora": "Hyper-SD15-8steps-CFG-lora.safetensors"}, "lora"),
        ({"path": "/turbo/lightning/sd15"}, None),
        ({"path": "stabilityai/stable-diffusion-xl-base-1.0", "network": "mhdang/dpo-sdxl"}, None),
        ({"path": "runs/v1-steps", "lora": "mine-step-1000/adapter"}, None),
        ({"path": "nelcmodel/base-50-steps"}, None),
    ],
)
def test_names_of_few_steps(given, key):
    assert name_of_few_steps(ModelConfig(**given)) == (key and f"so says the name in model.{key}")


def test_distilled_variants_are_known_by_their_configuration(tiny):
    """Z-Image-Turbo by its shift, LCM by an input; SANA-Sprint and such a Qwen are refused."""
    turbo = load_pipeline(ModelConfig(str(tiny("z-image"))))
    assert adapt(turbo, SIDE).distilled is None
    turbo.scheduler = type(turbo.scheduler).from_config(turbo.scheduler.config, shift=3.0)
    assert "shift of Z-Image-Turbo" in adapt(turbo, SIDE).distilled
    lcm = load_pipeline(ModelConfig(str(tiny("sd15"))))
    assert adapt(lcm, SIDE).distilled is None
    lcm.unet.register_to_config(time_cond_proj_dim=256)
    assert "as LCM's" in adapt(lcm, SIDE).distilled
    qwen = load_pipeline(ModelConfig(str(tiny("qwen-image"))))
    qwen.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ModelError, match="is told its guidance"):
        adapt(qwen, SIDE)
    sprint = load_pipeline(ModelConfig(str(tiny("sana"))))
    sprint.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ModelError, match="SANA-Sprint, distilled to few steps"):
        adapt(sprint, SIDE)
    sprint.__class__ = SanaSprintPipeline
    with pytest.raises(ModelError, match="SanaSprintPipeline is not.*few steps: train its base"):
        adapt(sprint, SIDE)


@pytest.mark.parametrize("family", ["flux2-klein", "krea2"])
def test_a_distilled_pipeline_says_so(family, tiny):
    pipe = load_pipeline(ModelConfig(str(tiny(family))))
    assert adapt(pipe, SIDE).distilled is None
    pipe.register_to_config(is_distilled=True)
    assert "is_distilled" in adapt(pipe, SIDE).distilled


def test_two_transformers_are_refused(tiny):
    pipe = load_pipeline(ModelConfig(str(tiny("wan"))))
    pipe.register_to_config(boundary_ratio=0.875)
    with pytest.raises(ModelError, match="boundary_ratio.*use Wan 2.1"):
        adapt(pipe, SIDE)


def test_texts_of_several_lengths_are_joined():
    a, b = torch.ones(1, 2, 3), torch.ones(2, 4, 3)
    assert joined([a, b]).shape == (3, 4, 3) and not joined([a, b])[0, 2:].any()
    assert joined([torch.ones(1, 2), torch.ones(1, 2)]).shape == (2, 2)


def test_a_longer_empty_prompt_takes_the_place_of_a_dropped_one():
    """And a pair that keeps its prompt is only padded."""
    plan = SimpleNamespace(seed=0, prompt_dropout=0.5, graph_dropout=0.0, caption_dropout=0.0)
    cache = SimpleNamespace(empty={"text": torch.full((1, 5, 2), 7.0)}, digests=list("abcdefgh"))
    condition = {"text": torch.ones(16, 3, 2)}
    with_dropout(SimpleNamespace(plan=plan, cache=cache), [(k, 0) for k in range(8)], condition)
    text = condition["text"]
    dropped = (text == 7).all(-1).all(-1)
    kept = torch.tensor([1.0, 1, 1, 0, 0])[:, None].expand(5, 2)
    assert text.shape == (16, 5, 2) and 0 < dropped.sum() < 16
    assert all(torch.equal(row, kept) for row in text[~dropped])
    assert torch.equal(dropped[:8], dropped[8:])


@pytest.mark.parametrize("family", ["wan", "qwen-image"])
def test_our_sampler_draws_what_the_pipeline_draws(family, tiny):
    """Of a video the one frame, and an empty prompt beside each where there is no guidance else."""
    pipe = load_pipeline(ModelConfig(str(tiny(family))))
    given = ["evaluation.sample_steps=2", "evaluation.guidance_scale=4", "evaluation.batch_size=2"]
    ours = Sampler(pipe, load_config(None, given)).draw(PROMPTS, [1, 2])
    oracle = ORACLES[family]
    output = pipe(
        prompt=list(PROMPTS),
        generator=[torch.Generator().manual_seed(k) for k in (1, 2)],
        num_inference_steps=2,
        height=SIDE,
        width=SIDE,
        output_type="np",
        **oracle.guided,
        **oracle.both,
    )
    theirs = output.images if hasattr(output, "images") else output.frames[:, 0]
    assert [i.shape for i in ours] == [(SIDE, SIDE, 3)] * 2
    assert np.abs(np.stack(ours) - 255 * theirs).max() <= 0.5 + 1e-3
