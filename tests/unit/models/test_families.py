"""Each family against its own pipeline: what it encodes, reads, predicts and draws."""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from inversion_dpo.maths.inversion import invert, reconstruct
from inversion_dpo.models.base import joined, network_of
from inversion_dpo.models.loading import adapt, load_pipeline
from inversion_dpo.run.fields import ModelConfig
from inversion_dpo.trajectories.fill import predictions
from tests.sessions import conditional, under_guidance

PROMPTS = ["a small red star", "the large blue cross left of a green circle"]
SIDE = 64


def same(pipe: Any, x: Tensor) -> Tensor:
    """Leave latents as they are."""
    return x


def pack(pipe: Any, x: Tensor) -> Tensor:
    """Latents as FLUX.1 and its kin take them."""
    return pipe._pack_latents(x, *x.shape)


@dataclass(frozen=True)
class Oracle:
    """How a family's pipeline is asked, written apart from the adapter.

    scale: guidance, 1 being none; ``plain`` and ``guided``: its arguments to the pipeline.
    given: latents for the pipeline; result: ours from the pipeline's ``output_type="latent"``.
    """

    shape: tuple[int, ...]
    plain: dict[str, Any]
    guided: dict[str, Any]
    scale: float = 4.0
    given: Any = same
    result: Any = same
    both: dict[str, Any] = field(default_factory=dict)


ORACLES = {
    "z-image": Oracle((16, 8, 8), {"guidance_scale": 0.0}, {"guidance_scale": 3.0}),
}
each_family = pytest.mark.parametrize("family", ORACLES)


@pytest.fixture(scope="module")
def model_of(tiny):
    """family -> its adapter, loaded once."""
    loaded = {}

    def load(family):
        if family not in loaded:
            loaded[family] = adapt(load_pipeline(ModelConfig(str(tiny(family)))), SIDE)
        return loaded[family]

    return load


def noise(family, seed=1):
    shape = (len(PROMPTS), *ORACLES[family].shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(model, family, x_T, **settings):
    """The pipeline's own latents, in our layout, after two steps."""
    oracle, pipe = ORACLES[family], model.pipeline
    output = pipe(
        list(PROMPTS),
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
@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_sampling_equals_the_pipeline(family, guided, model_of):
    model, oracle, x_T = model_of(family), ORACLES[family], noise(family)
    scale = oracle.scale if guided else 1.0
    predict = under_guidance(model, model.condition(PROMPTS), scale)
    ours = reconstruct(x_T, model.schedule.grid(2, "sampler"), predict, model.schedule.kind)
    theirs = drawn(model, family, x_T, **(oracle.guided if guided else oracle.plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    asked = model.call(scale, len(PROMPTS))  # what users of our sampler get
    again = drawn(model, family, x_T, **{k: v for k, v in asked.items() if k not in oracle.both})
    torch.testing.assert_close(again, theirs, rtol=0, atol=0)
    assert asked.items() >= oracle.both.items()


@each_family
@torch.no_grad()
def test_decoding_equals_the_pipeline_and_encoding_undoes_its_scale(family, model_of):
    model, oracle, x_T = model_of(family), ORACLES[family], noise(family)
    latents = drawn(model, family, x_T, **oracle.plain)
    output = model.pipeline(
        list(PROMPTS),
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


@each_family
@torch.no_grad()
def test_inversion_then_sampling_returns(family, model_of):
    """Along the same predictions, found by fixed-point iterations."""
    model, x_0 = model_of(family), noise(family, 2)
    grid, kind = model.schedule.grid(4, "even"), model.schedule.kind
    predict = conditional(model, model.condition(PROMPTS))
    x_T = invert(x_0, grid, predict, kind, 8).states[-1]
    again = reconstruct(x_T, grid, predict, kind)
    assert (again - x_0).norm() / x_0.norm() < 0.05


@each_family
@pytest.mark.parametrize(("path", "wanted"), [(1.0, 4.0), (2.0, 4.0), (3.0, 1.0)])
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


def test_texts_of_several_lengths_are_joined():
    a, b = torch.ones(1, 2, 3), torch.ones(2, 4, 3)
    assert joined([a, b]).shape == (3, 4, 3) and not joined([a, b])[0, 2:].any()
    assert joined([torch.ones(1, 2), torch.ones(1, 2)]).shape == (2, 2)
