"""Every family on a tiny random folder of its genuine classes: oracles, then whole trainings."""

import json
import math
import shutil
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from safetensors.torch import load_file

from inversion_dpo.evaluation.sides import load_policy_pipeline
from inversion_dpo.maths.inversion import invert, reconstruct
from inversion_dpo.maths.methods import METHODS
from inversion_dpo.models.base import Framing, ModelError, network_of
from inversion_dpo.models.loading import adapt, load_model, load_pipeline
from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.run.fields import ModelConfig
from inversion_dpo.run.folder import claim
from inversion_dpo.training import step as training
from inversion_dpo.training.generators import generator_for
from inversion_dpo.training.plan import make_plan
from inversion_dpo.training.recipe import train
from inversion_dpo.training.run_files import read_rows
from inversion_dpo.training.states import STATES
from inversion_dpo.trajectories.fill import predictions
from tests.sessions import conditional, sampled, set_up, under_guidance
from tests.slow import slow_but
from tools.tiny import flow as tiny_flow
from tools.tiny.pipelines import SD_BETAS

DIFFUSION = ["sd15", "sd2", "sd2-zsnr", "sdxl"]
FLOW = ["sd3", "sd3-no-t5", "flux", "flux-schnell"]
FAMILIES = DIFFUSION + FLOW
NEWER = list(tiny_flow.FLOW)  # their oracles: tests/unit/models/test_families.py
BLOCKS = ("BasicTransformerBlock",)
DRAWS = {"wan": {"num_frames": 1}, "sana": {"use_resolution_binning": False}}  # to the pipeline
WIDE = ("sana", "wan-5b")
PROMPTS = ["a small red star", "a large blue cross"]
ATTENTION = {"sd3": "to_q,to_k,to_v,to_out.0,add_q_proj", "flux": "to_q,to_k,to_v,to_out.0"}


def sized(family, side):
    """The square of a side; one size where a family's steps of 32 pixels allow no others."""
    return f"model.resolution={side}x{side}" if family in WIDE else f"model.resolution={side}"


def config_for(family, tiny, pair_file, *overrides):
    """A run of seconds on a tiny folder."""
    # not to_q: at 64 px a tiny UNet's innermost attention has one token, whose query is idle
    targets = next((t for f, t in ATTENTION.items() if family.startswith(f)), "to_v,to_out.0")
    targets = "null" if family in NEWER else f"[{targets}]"
    return load_config(
        None,
        [
            f"model.path={tiny(family)}",
            sized(family, 64),
            f"data.pairs={pair_file}",
            "data.holdout=0.25",
            "data.limit=8",
            "inversion.steps=5",
            "inversion.batch_size=8",
            "policy.rank=4",
            "policy.alpha=4",
            f"policy.target_modules={targets}",
            "training.steps=3",
            "training.batch_size=4",
            "training.learning_rate=1e-2",
            "training.warmup=0",
            "evaluation.limit=4",
            *(["model.t5=false"] if family == "sd3-no-t5" else []),
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A folder of caches: those that train a family alike share one."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps one precision per process: forget it before and after."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def plain(folder, family):
    """The folder in diffusers, without us."""
    without = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3-no-t5" else {}
    return DiffusionPipeline.from_pretrained(folder, **without)


def model_of(family, tiny):
    """The adapter, and a condition of two prompts as training would make it."""
    pipeline = load_pipeline(ModelConfig(str(tiny(family)), t5=family != "sd3-no-t5"))
    model = adapt(pipeline, 64, guidance_embed=3.5)
    framing = model.framing([Framing((64, 64), (0, 0), (64, 64))] * 2)
    return model, model.condition(PROMPTS) | framing


def recorded(predict, seen):
    """The same prediction, which also notes the states it is asked at."""

    def inner(x, t):
        seen.append(x)
        return predict(x, t)

    return inner


def pipeline_states(pipe, x_T, steps, **settings):
    """Latents after every step of the pipeline's own loop from the given noise."""
    states = []

    def note(pipe, i, t, kwargs):
        states.append(kwargs["latents"].clone())
        return {}

    pipe.set_progress_bar_config(disable=True)
    pipe(
        PROMPTS,
        latents=x_T,
        num_inference_steps=steps,
        height=64,
        width=64,
        output_type="latent",
        callback_on_step_end=note,
        **settings,
    )
    return states


@pytest.mark.parametrize("family", slow_but(["sd2-zsnr"], DIFFUSION))
def test_inversion_then_sampling_equals_the_pipeline(family, tiny):
    model, condition = model_of(family, tiny)
    grid, kind = model.schedule.grid(10, "sampler"), model.schedule.kind
    x_0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    predict = conditional(model, condition)
    with torch.no_grad():
        x_T = invert(x_0, grid, predict, kind).states[-1]
        seen = []
        final = reconstruct(x_T, grid, recorded(predict, seen), kind)
    pipe = plain(tiny(family), family)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    theirs = pipeline_states(pipe, x_T, 10, guidance_scale=1.0)
    assert len(theirs) == len(seen) == 10
    for ours, their in zip([*seen[1:], final], theirs, strict=True):
        torch.testing.assert_close(ours, their, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", slow_but(["sdxl", "sd3"], ["sd15", "sd2-zsnr", "sdxl", "sd3"]))
def test_sampling_under_guidance_equals_the_pipeline(family, tiny):
    """SDXL's base takes zeros for the empty prompt, and its framing is the images' own."""
    model, condition = model_of(family, tiny)
    grid, kind = model.schedule.grid(10, "sampler"), model.schedule.kind
    channels = 16 if family in FLOW else 4
    x_T = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    predict = under_guidance(model, condition, 4.5)
    with torch.no_grad():
        ours = reconstruct(x_T, grid, predict, kind)
    pipe = plain(tiny(family), family)
    if family in DIFFUSION:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    theirs = pipeline_states(pipe, x_T, 10, guidance_scale=4.5)[-1]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


GUIDANCES = [(1.0, 4.5), (2.0, 4.5), (3.0, 1.0)]
GUIDED = [(f, *g) for f, g in product(["sd15", "sdxl", "sd3"], GUIDANCES)]


@pytest.mark.parametrize(
    ("family", "path", "wanted"),
    slow_but([("sd15", 3.0, 1.0), ("sdxl", 2.0, 4.5), ("sd3", 1.0, 4.5)], GUIDED),
)
def test_one_guidance_gives_another(family, path, wanted, tiny):
    model, condition = model_of(family, tiny)
    shape = 2, 16 if family in FLOW else 4, 8, 8
    x, t = torch.randn(shape), model.schedule.timesteps[500].expand(2)
    with torch.no_grad():
        along, expected = (under_guidance(model, condition, s)(x, t) for s in (path, wanted))
        found = predictions(model, condition, path, wanted)[1](x, t, along)
    assert not torch.allclose(along, expected, rtol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "inverted"),
    slow_but([("sd15", 2.0)], product(["sd15", "sdxl", "sd3"], [1.0, 2.0])),
)
def test_what_is_trained_is_the_guided_prediction(family, inverted, tiny, pair_file, caches):
    """Errors, reference and cost of a step, each worked out by hand from plain predictions."""
    config = config_for(
        family,
        tiny,
        pair_file,
        "objective.guidance_scale=3",
        f"inversion.guidance_scale={inverted}",
        "inversion.steps=3",
    )
    session = set_up(config, caches)
    model, pairs = session.model, session.train_pairs[:2]
    condition = session.cache.condition(pairs)
    for parameter in session.policy.trainable().values():  # no longer the reference
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    generators = [generator_for(0, 0, 0, k) for k in range(2)]
    _, errors, spent = training.losses(session, [(p, 0) for p in pairs], generators)
    generators = [generator_for(0, 0, 0, k) for k in range(2)]
    points = STATES["trajectory"](session, pairs, condition, generators)
    alone = {k: v.repeat_interleave(4, 0) for k, v in model.condition([""]).items()}
    empty = alone | {k: v for k, v in condition.items() if k not in session.cache.empty}

    def by_hand(network):
        c, u = (model.predict(network, points.x_t, points.timesteps, d) for d in (condition, empty))
        return u + 3 * (c - u)

    with torch.no_grad():
        policy = by_hand(session.network)
        with session.policy.reference(session.network) as network:
            torch.testing.assert_close(points.reference, by_hand(network), rtol=1e-4, atol=1e-4)
    error = points.scale * (points.target - policy).square().flatten(1).mean(1)
    found = torch.cat([errors.winner, errors.loser])
    torch.testing.assert_close(found, error, rtol=1e-3, atol=1e-5)
    assert (errors.winner - errors.winner_ref).abs().min() > 1e-5
    assert spent == 6


SCHEDULERS = {
    "leading": (DDIMScheduler, {"timestep_spacing": "leading"}),
    "trailing": (DDIMScheduler, {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
    "linspace": (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "linear betas": (DDIMScheduler, {"beta_schedule": "linear", "steps_offset": 0}),
    "zero SNR": (
        DDIMScheduler,
        {
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
        },
    ),
    "cosine betas": (
        DDIMScheduler,
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    ),
    "DPM++ of first order": (
        DPMSolverMultistepScheduler,
        {"solver_order": 1, "timestep_spacing": "trailing"},
    ),
}


@pytest.mark.parametrize("name", slow_but(["linspace", "zero SNR"], SCHEDULERS))
def test_a_folder_of_another_scheduler(name, tiny, tmp_path):
    """The pipeline, loaded plainly from a folder that names this scheduler, goes our way."""
    kind, settings = SCHEDULERS[name]
    pipe = DiffusionPipeline.from_pretrained(tiny("sd15"))
    settings = SD_BETAS | settings | ({"clip_sample": False} if kind is DDIMScheduler else {})
    pipe.scheduler = kind(**settings)
    pipe.save_pretrained(tmp_path)
    model = adapt(load_pipeline(ModelConfig(str(tmp_path))), 64)
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    seen = []
    with torch.no_grad():
        predict = recorded(conditional(model, model.condition(PROMPTS)), seen)
        grid = model.schedule.grid(10, "sampler")
        # under linspace Euler starts from pure noise, without its share of the image
        start = x_T * grid.levels.sigma[-1].float() if name == "linspace" else x_T
        final = reconstruct(start, grid, predict, model.schedule.kind)
    theirs = pipeline_states(plain(tmp_path, "sd15"), x_T, 10, guidance_scale=1.0)
    torch.testing.assert_close(final, theirs[-1], rtol=1e-4, atol=1e-4)
    if kind is DDIMScheduler:  # the others' states are scaled otherwise on the way
        for ours, their in zip(seen[1:], theirs, strict=False):
            torch.testing.assert_close(ours, their, rtol=1e-4, atol=1e-4)


def test_a_first_state_without_noise_is_refused(tiny, pair_file):
    """Timestep 0 is as noisy as the clean end of a scheduler whose alpha is not set to one."""
    pipe = DiffusionPipeline.from_pretrained(tiny("sd2"))
    linspace = {"timestep_spacing": "linspace"}  # begins at timestep 0
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **linspace)
    schedule = adapt(pipe, 64).schedule
    plan = lambda *overrides: make_plan(  # noqa: E731
        config_for("sd2", tiny, pair_file, *overrides),
        lambda size: (schedule, schedule.grid(5, "sampler")),
        (64, 64),
    )
    with pytest.raises(ConfigError, match="as noisy as its clean end.*objective.t_min=0.3, or"):
        plan()
    assert plan("objective.t_min=0.3").low == 2


def test_sdxl_with_its_own_euler_sampler(tiny):
    """EulerDiscrete in leading spacing goes the same way, in variance-exploding coordinates."""
    model, condition = model_of("sdxl", tiny)
    grid = model.schedule.grid(10, "sampler")
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        final = reconstruct(x_T, grid, conditional(model, condition), "epsilon")
    pipe = DiffusionPipeline.from_pretrained(tiny("sdxl"))
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    theirs = pipeline_states(pipe, x_T, 10, guidance_scale=1.0)[-1]
    torch.testing.assert_close(final, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("total", [1000, 500])  # FLUX's pipeline divides by 1000 always
@pytest.mark.parametrize("family", slow_but(["sd3", "flux"], FLOW))
def test_euler_on_the_velocity_equals_the_pipeline(family, total, tiny, tmp_path):
    folder = shutil.copytree(tiny(family), tmp_path / family)
    about = folder / "scheduler" / "scheduler_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "num_train_timesteps": total}))
    model, condition = model_of(family, lambda _: folder)
    grid, kind = model.schedule.grid(6, "sampler"), model.schedule.kind
    x_T = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    seen = []
    with torch.no_grad():
        final = reconstruct(x_T, grid, recorded(conditional(model, condition), seen), kind)
    pipe = plain(folder, family)
    given, guidance = x_T, 1.0
    if family.startswith("flux"):
        given, guidance = pipe._pack_latents(x_T, 2, 16, 8, 8), 3.5
    theirs = pipeline_states(pipe, given, 6, guidance_scale=guidance)
    for ours, their in zip([*seen[1:], final], theirs, strict=True):
        if family.startswith("flux"):
            ours = pipe._pack_latents(ours, 2, 16, 8, 8)
        torch.testing.assert_close(ours, their, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FLOW)
def test_forward_euler_from_data_to_noise(family, tiny):
    """x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v(x_i, sigma_i), by hand from the scheduler."""
    model, condition = model_of(family, tiny)
    grid = model.schedule.grid(4, "sampler")
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    predict = conditional(model, condition)
    with torch.no_grad():
        trajectory = invert(x, grid, predict, "flow_prediction")
        for i in range(4):
            sigma, after = grid.levels.sigma[i], grid.levels.sigma[i + 1]
            x = x + (after - sigma).float() * predict(x, (sigma * 1000).expand(2))
            torch.testing.assert_close(trajectory.states[i + 1], x, rtol=1e-4, atol=1e-4)


def image_of(pipe, **settings):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    output = pipe(
        prompt=PROMPTS[0],
        num_inference_steps=2,
        generator=generator,
        height=64,
        width=64,
        output_type="np",
        **settings,
    )
    return output.images if hasattr(output, "images") else output.frames


# In `make test`: a UNet with LoRA, a transformer whole. The other families differ by their
# schedule or a text encoder, whose oracles are fast for all of them.
WAYS = [("lora", "sdxl"), ("full", "sd3")]
EVERY = product(["lora", "full"], FAMILIES + NEWER)


@pytest.mark.parametrize(("kind", "family"), slow_but(WAYS, EVERY))
def test_pairs_to_a_changed_image(family, kind, tiny, pair_file, tmp_path, caches, caplog):
    """invert, train three steps, save, load in plain diffusers: the image is another one.

    The trainer's own start-up checks stand in the way of anything that is not the reference at
    step 0, has no gradient, or does not move.
    """
    rate = "1e-2" if kind == "lora" else "1e-3"
    size = "64" if kind == "lora" else "128"  # all weights: more than one token everywhere
    config = config_for(
        family,
        tiny,
        pair_file,
        f"policy.kind={kind}",
        f"training.learning_rate={rate}",
        sized(family, size),
        *["inversion.steps=3"] * (kind == "full"),
    )
    claim(tmp_path, config)
    train(config, tmp_path, caches)
    load_policy_pipeline(config, tmp_path / "adapter")
    assert "trained on other weights" not in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and rows[0]["grad_norm"] > 0
    base, settings = plain(tiny(family), family), DRAWS.get(family.split("-")[0], {})
    before = image_of(base, **settings)
    if kind == "lora":
        base.load_lora_weights(tmp_path / "adapter")
        after = image_of(base, **settings)
    else:
        after = image_of(plain(tmp_path / "adapter", family), **settings)
    assert np.isfinite(after).all() and np.abs(after - before).max() > 1e-4


@pytest.mark.slow  # tracing costs a minute
@pytest.mark.parametrize(
    "more",
    [
        ["policy.kind=lora", "training.gradient_checkpointing=true"],
        ["policy.kind=full", "objective.name=diffusion_dpo"],
        ["model.quantize=int8", "policy.dora=true"],
        ["model.quantize=nf4"],
        ["model.quantize=fp8"],
        ["model.dtype=bfloat16", "policy.adapter_dtype=model"],
        ["model.offload=true"],
    ],
    ids=" ".join,
)
def test_compiling_changes_no_number(more, tiny, pair_file, tmp_path, monkeypatch):
    """Traced as torch.compile does it, run without a compiler; names stay, a kill is resumed."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ran, names = {}, {}
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        session = train(
            config_for(
                "sd15",
                tiny,
                pair_file,
                *more,
                "model.resolution=128",
                f"training.compile={compiled}",
            ),
            folder,
            tmp_path / compiled / "cache",
        )
        blocks = [m for m in session.network.modules() if type(m).__name__ in BLOCKS]
        assert {m._compiled_call_impl is not None for m in blocks} == {compiled == "true"}
        assert ("compile_seconds" in read_rows(folder / "metrics.jsonl")[-1]) == bool(
            compiled == "true"
        )
        ran[compiled] = [json.loads(r) for r in (folder / "metrics.jsonl").open()]
        saved = sorted((folder / "adapter").rglob("*.safetensors"))
        names[compiled] = [sorted(load_file(file)) for file in saved]
    for plain_row, row in zip(ran["false"], ran["true"], strict=True):
        for name in {"loss", "heldout_margin", "drift", "grad_norm"} & set(plain_row):
            assert row[name] == pytest.approx(plain_row[name], rel=1e-3, abs=1e-6)
    assert names["true"] == names["false"] != []
    checkpoint = sorted((tmp_path / "true" / "checkpoints").iterdir())[-1]
    plain = sorted((tmp_path / "false" / "checkpoints").iterdir())[-1]
    for file in ("policy.safetensors", "optimizer.safetensors"):
        assert load_file(checkpoint / file).keys() == load_file(plain / file).keys()


# In `make test`: one UNet and one transformer.
@pytest.mark.parametrize("family", slow_but(["sd3"], ["sd15", "sdxl", "sd3", "flux"]))
def test_checkpointing_changes_no_gradient(family, tiny, pair_file, caches):
    gradients = []
    for checkpointing in ("false", "true"):
        setting = f"training.gradient_checkpointing={checkpointing}"
        session = set_up(config_for(family, tiny, pair_file, setting), caches)
        assert any(
            getattr(m, "gradient_checkpointing", False) for m in session.network.modules()
        ) == (checkpointing == "true")
        training.backward(session, 0)
        gradients.append({n: p.grad for n, p in session.policy.trainable().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)
    assert any(gradient.any() for gradient in gradients[0].values())


def test_only_the_network_stays_on_the_device(tiny, pair_file, caches, monkeypatch):
    """Once all outputs are cached, autoencoder and text encoders go; `to` is watched."""
    left = []
    to = torch.nn.Module.to

    def watched(module, *args, **kwargs):
        if args == ("cpu",):
            left.append(module)
        return to(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    model = set_up(config_for("sdxl", tiny, pair_file), caches).model
    p = model.pipeline
    assert all(any(m is part for m in left) for part in (p.vae, p.text_encoder, p.text_encoder_2))
    assert not any(m is network_of(model) for m in left)


# In `make test`: a UNet with adapter, a transformer whole.
HALF = [("sdxl", "lora"), ("sd3", "full")]


@pytest.mark.parametrize(
    ("family", "kind"),
    slow_but(HALF[:1], product(["sd15", "sdxl", "sd3", "flux"], ["lora", "full"])),
)
def test_half_precision_policy_is_exactly_the_reference(
    family, kind, tiny, pair_file, tmp_path, caches
):
    """Same kernels, same batch: not a bit of difference, in the frozen weights' bfloat16."""
    settings = ["model.dtype=bfloat16", f"policy.kind={kind}", "training.learning_rate=1e-3"]
    few = ["inversion.steps=3", "training.steps=2"]
    config = config_for(family, tiny, pair_file, *settings, *few)
    session = set_up(config, caches)
    pairs = session.train_pairs[:4]
    condition = session.cache.condition(pairs)
    first, _ = session.cache.positions(2, 3)
    points = session.cache.states(pairs, [first] * 4, "x0")
    assert points.x_t.dtype == torch.float32
    with torch.no_grad():
        policy = training.predict(session, session.network, points.x_t, points.timesteps, condition)
    reference = training.with_reference(session, points, condition).reference
    assert policy.dtype == torch.float32 and torch.equal(policy, reference)
    if kind == "lora":  # all weights of a tiny UNet hold an attention of one token: an idle query
        train(config, tmp_path / "run", caches)


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_batch_of_two_is_two_batches_of_one(family, tiny):
    model, condition = model_of(family, tiny)
    channels = 4 if family == "sdxl" else 16
    x, t = torch.randn(2, channels, 8, 8), model.schedule.timesteps[[100, 700]]
    with torch.no_grad():
        both = model.predict(network_of(model), x, t, condition)
        for k in (0, 1):
            alone = {n: v[k : k + 1] for n, v in condition.items()}
            one = model.predict(network_of(model), x[k : k + 1], t[k : k + 1], alone)
            torch.testing.assert_close(both[k : k + 1], one, rtol=1e-4, atol=1e-5)


def test_sdxl_is_told_each_images_own_size(tiny):
    model, _ = model_of("sdxl", tiny)
    ids = model.framing([Framing((768, 512), (0, 16), (64, 64))])["time_ids"]
    assert ids.tolist() == [[768, 512, 0, 16, 64, 64]]


def test_sdxl_no_prompt_is_zeros_as_in_the_pipeline(tiny):
    model, _ = model_of("sdxl", tiny)
    empty = model.condition([""])
    assert not empty["encoder_hidden_states"].any() and not empty["text_embeds"].any()
    assert model.condition(["a"])["encoder_hidden_states"].any()


def test_flux_is_told_the_guidance(tiny):
    x = torch.randn(1, 16, 8, 8)
    found = []
    for guidance in (1.0, 3.5):
        model = adapt(load_pipeline(ModelConfig(str(tiny("flux")))), 64, guidance)
        condition, t = model.condition(PROMPTS[:1]), model.schedule.timesteps[[500]]
        with torch.no_grad():
            found.append(model.predict(network_of(model), x, t, condition))
    assert not torch.allclose(*found)


@pytest.mark.parametrize("resolution", [60, 72])
def test_a_resolution_that_does_not_fit_is_refused(resolution, tiny):
    with pytest.raises(ModelError, match="multiple of 16"):
        adapt(load_pipeline(ModelConfig(str(tiny("flux")))), resolution)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_samples_have_the_size_that_is_trained(family, tiny, pair_file, tmp_path):
    """FLUX's own default is 1024 pixels, whatever the preset says."""
    config = config_for(
        family,
        tiny,
        pair_file,
        "model.resolution=128",
        "evaluation.scorer=null",
        "evaluation.sample_steps=2",
        "evaluation.batch_size=2",
    )
    images, _ = sampled(config, None, tmp_path, PROMPTS, "reference")
    assert [image.shape for image in images] == [(128, 128, 3)] * 2


# ---- policies


@pytest.mark.slow
def test_dora_loads_with_plain_diffusers(tiny, pair_file, tmp_path):
    config = config_for("sd15", tiny, pair_file, "policy.dora=true")
    session = train(config, tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tiny("sd15"))
    pipe.load_lora_weights(tmp_path / "adapter")
    np.testing.assert_allclose(image_of(pipe), image_of(session.model.pipeline), atol=1e-5)


def test_a_pattern_chooses_layers(tiny, pair_file, caches):
    pattern = r"policy.target_modules=['^mid_block.*to_[qk]$']"
    session = set_up(config_for("sd15", tiny, pair_file, pattern), caches)
    names = list(session.policy.trainable())
    assert names and all(n.startswith("mid_block") for n in names)


def test_layers_that_do_not_exist_are_refused(tiny, pair_file, caches):
    with pytest.raises(ModelError, match="policy.target_modules: no layer.*nonsense"):
        set_up(config_for("sd15", tiny, pair_file, "policy.target_modules=[nonsense]"), caches)


@pytest.mark.slow
def test_start_from_a_lora_and_merge(tiny, pair_file, tmp_path):
    """The second run's reference is base plus first LoRA; merged, it needs no adapter."""
    train(config_for("sdxl", tiny, pair_file), tmp_path / "first")
    first = f"model.lora={tmp_path / 'first/adapter'}"
    config = config_for("sdxl", tiny, pair_file, first, "policy.merge=true", "training.seed=5")
    base = DiffusionPipeline.from_pretrained(tiny("sdxl"))
    base.load_lora_weights(tmp_path / "first/adapter")
    started = image_of(base)
    reference = load_model(config, torch.device("cpu")).pipeline
    np.testing.assert_allclose(image_of(reference), started, atol=1e-4)
    train(config, tmp_path / "second")
    merged = image_of(DiffusionPipeline.from_pretrained(tmp_path / "second/merged"))
    reference.load_lora_weights(tmp_path / "second/adapter")
    np.testing.assert_allclose(merged, image_of(reference), atol=1e-4)
    assert np.abs(merged - started).max() > 1e-4


@pytest.mark.slow
def test_adafactor_trains_and_resumes(tiny, pair_file, tmp_path):
    config = config_for("sd15", tiny, pair_file, "training.optimizer=adafactor")
    train(config, tmp_path)
    longer = config_for("sd15", tiny, pair_file, "training.optimizer=adafactor", "training.steps=5")
    train(longer, tmp_path)
    assert (tmp_path / "checkpoints/step-000005").exists()


def test_another_autoencoder(tiny, pair_file, tmp_path):
    other = f"model.vae={tiny('sd2')}/vae"
    plain, fixed = (
        load_model(config_for("sd15", tiny, pair_file, *o), torch.device("cpu"))
        for o in ([], [other])
    )
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    assert not torch.allclose(*(m.encode(image) for m in (plain, fixed)))


@pytest.mark.parametrize(
    ("key", "missing"), [("model.vae", "no/such/vae"), ("model.lora", "no/such/lora")]
)
def test_a_missing_part_is_named(key, missing, tiny, pair_file):
    with pytest.raises(ModelError, match=missing):
        load_model(config_for("sd15", tiny, pair_file, f"{key}={missing}"), torch.device("cpu"))


PRESETS = [("sd15", "sd15"), ("sdxl", "sdxl"), ("sd35", "sd3"), ("flux", "flux")]
NEW_PRESETS = ["z-image", "flux2-klein", "qwen-image", "chroma", "krea2", "wan", "sana", "lumina2"]


@pytest.mark.parametrize(
    ("preset", "family"), slow_but(PRESETS[:1], PRESETS + [(p, p) for p in NEW_PRESETS])
)
def test_presets_train_their_family(preset, family, tiny, pair_file, tmp_path, fresh_accelerator):
    """Each preset as it is, but for the weights, the image size and the number of steps."""
    config = load_config(
        preset,
        [
            f"model.path={tiny(family)}",
            "model.vae=null",
            sized(family, 128),
            f"data.pairs={pair_file}",
            "data.holdout=0.25",
            "data.limit=6",
            "inversion.steps=3",
            "inversion.batch_size=8",
            "training.steps=3",
            "training.batch_size=2",
            "training.gradient_accumulation=1",
            "training.warmup=0",
        ],
    )
    train(config, tmp_path)
    assert (tmp_path / "adapter/pytorch_lora_weights.safetensors").exists()


# In `make test`: eps and flow; the policy's own inversion and stored states. test_training.py
# resumes objectives on eps.
METHOD_ONCE = [("sdxl", "smpo"), ("z-image", "kto")]
LOG_2 = math.log(2)
START = {"dpo": LOG_2, "dpo_released": LOG_2, "smpo": LOG_2, "dmpo": 1.6144, "kto": 0.5}


@pytest.mark.parametrize(
    ("family", "name"), slow_but(METHOD_ONCE, product(FAMILIES + NEWER, METHODS))
)
def test_every_method_on_every_family(family, name, tiny, soft_pair_file, tmp_path, caches):
    """Two steps: the loss starts where it must, and moves every tensor that is trained.

    The released form starts on a saddle, where rounding noise decides.
    """
    method = METHODS[name]
    config = config_for(
        family,
        tiny,
        soft_pair_file,
        f"objective.name={name}",
        *["objective.soft_labels=true"] * (method.loss == "smpo"),
        *["objective.weighting=min_snr"] * (method.path in ("noise", "policy", "renoise")),
        "training.steps=2",
    )
    session = train(config, tmp_path, caches)
    first = read_rows(tmp_path / "metrics.jsonl")[0]
    if method.loss in START:
        assert first["loss"] == pytest.approx(START[method.loss], abs=1e-3)
    before, after = session.initial, session.policy.trainable()
    still = [n for n, p in after.items() if torch.equal(p.detach(), before[n])]
    assert before and (session.plan.target == "reference" or not still)


# In `make test`: a transformer.
@pytest.mark.parametrize("family", slow_but(["sd3"], ["sd2", "sdxl", "sd3", "flux"]))
@pytest.mark.parametrize("target", slow_but(["transition"], ["transition", "reference"]))
def test_other_targets_of_a_trajectory(family, target, tiny, pair_file, tmp_path, caches):
    train(config_for(family, tiny, pair_file, f"objective.target={target}"), tmp_path, caches)
    assert (tmp_path / "adapter/pytorch_lora_weights.safetensors").exists()
