"""Families that edit an image, each against its own pipeline: source, condition and every step."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from torch import Tensor

from inversion_dpo.data.images import stack_pixels
from inversion_dpo.data.transforms import fit
from inversion_dpo.maths.inversion import reconstruct
from inversion_dpo.models.base import ModelError, network_of, without_prompt
from inversion_dpo.models.loading import adapt, load_pipeline
from inversion_dpo.models.qwen_image import QwenImage
from inversion_dpo.models.sampler import Sampler
from inversion_dpo.run.config import load_config
from inversion_dpo.run.fields import ModelConfig
from tests.sessions import small_sources, under_guidance
from tests.slow import slow_but

PROMPT = "make the star blue"
KONTEXT = {"_auto_resize": False, "max_area": 64 * 96}
TRUE = {"true_cfg_scale": 1.0}
GUIDED = {"true_cfg_scale": 3.0, "negative_prompt": [""]}
# family -> arguments without guidance, with it (3), and for the size
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "flux-kontext": (
        {"guidance_scale": 2.5},
        {"guidance_scale": 2.5, "true_cfg_scale": 3.0, "negative_prompt": [""]},
        KONTEXT,
    ),
    "flux2-klein": ({"guidance_scale": 1.0}, {"guidance_scale": 3.0}, {}),
    "flux2-dev": ({"guidance_scale": 2.5}, None, {}),
    "qwen-image-edit": (TRUE, GUIDED, {}),
    "qwen-image-edit-plus": (TRUE, GUIDED, {}),
}
PACKED = ("flux-kontext", "qwen-image-edit", "qwen-image-edit-plus")
WHOLE = pipeline_qwenimage_edit.calculate_dimensions
each_family = pytest.mark.parametrize(
    "family", slow_but(["flux-kontext", "flux2-klein", "qwen-image-edit"], CALLS)
)


@pytest.fixture(scope="module")
def model_of(tiny):
    """family -> its adapter, loaded once."""
    loaded: dict[str, Any] = {}

    def load(family: str) -> Any:
        if family not in loaded:
            loaded[family] = adapt(load_pipeline(ModelConfig(str(tiny(family)))), 64, 2.5)
        return loaded[family]

    patch = small_sources()
    yield load
    patch.undo()


def picture(height: int = 96, width: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def conditions(model: Any, images: list[Image.Image], prompts: list[str]) -> dict[str, Tensor]:
    """What training has of images at the size of a source, and of instructions."""
    more = {"sources": images} if model.edits == "reads" else {}
    return model.condition(prompts, **more) | {"source": model.encode(stack_pixels(images))}


def states(model: Any, **settings: Any) -> tuple[list[Tensor], Tensor]:
    """The pipeline's packed latents after each step, and what its network saw of the source."""
    pipe = model.pipeline
    seen, tokens = list[Tensor](), list[Tensor]()

    def note(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(kwargs["latents"].clone())
        return {}

    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["hidden_states"]), with_kwargs=True
    )
    pipe(
        prompt=[PROMPT],
        image=fit(picture(), model.source_size((96, 64)), "crop").image,
        height=96,
        width=64,
        num_inference_steps=3,
        output_type="latent",
        callback_on_step_end=note,
        **settings,
    )
    hook.remove()
    return seen, tokens[0][:, seen[0].shape[1] :]


def packed(model: Any, x: Tensor) -> Tensor:
    if hasattr(model.pipeline, "_pack_latents") and x.shape[1] == 16:
        return model.pipeline._pack_latents(x, *x.shape)
    return x.flatten(2).transpose(1, 2)


@each_family
@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_every_step_equals_the_pipelines(family, guided, model_of):
    """The source's latents too; and without the source the steps are others."""
    plain, with_guidance, size = CALLS[family]
    settings = with_guidance if guided else plain
    if settings is None:
        return
    model = model_of(family)
    channels, cell = (16, 8) if family in PACKED else (128, 16)
    x_T = torch.randn(
        1, channels, 96 // cell, 64 // cell, generator=torch.Generator().manual_seed(1)
    )
    given = packed(model, x_T) if family in PACKED else x_T
    seen, source = states(model, latents=given, **settings, **size)
    fitted = fit(picture(), model.source_size((96, 64)), "crop").image
    condition = conditions(model, [fitted], [PROMPT])
    torch.testing.assert_close(packed(model, condition["source"]), source, rtol=1e-5, atol=1e-5)
    grid, ours = model.schedule_at((96, 64)).grid(3, "sampler"), []
    predict = under_guidance(model, condition, 3.0 if guided else 1.0)
    for k in (2, 1, 0):
        part = type(grid)(grid.timesteps[k : k + 2], grid.levels[k : k + 2])
        x = ours[-1] if ours else x_T
        ours.append(reconstruct(x, part, lambda x, t: predict(x, t), model.schedule.kind))
    for mine, theirs in zip(ours, seen, strict=True):
        torch.testing.assert_close(packed(model, mine), theirs, rtol=1e-4, atol=1e-4)
    alone = under_guidance(model, {k: v for k, v in condition.items() if k != "source"}, 1.0)
    t = grid.timesteps[3:]
    assert (alone(x_T, t) - under_guidance(model, condition, 1.0)(x_T, t)).abs().max() > 1e-3


@each_family
@torch.no_grad()
def test_two_edits_at_once_are_each_alone(family, model_of):
    model = model_of(family)
    pictures, prompts = [picture(), picture().rotate(180)], [PROMPT, "a large blue cross and more"]
    condition = conditions(model, pictures, prompts)
    x = torch.randn(condition["source"].shape, generator=torch.Generator().manual_seed(1))
    t, network = torch.tensor([300.0, 800.0]), network_of(model)
    both = model.predict(network, x, t, condition)
    for k in range(2):
        row = conditions(model, pictures[k : k + 1], prompts[k : k + 1])
        alone = model.predict(network, x[k : k + 1], t[k : k + 1], row)
        torch.testing.assert_close(both[k : k + 1], alone, rtol=1e-4, atol=1e-5)


def sampler(model: Any, family: str, folder: Any) -> Sampler:
    given = ["model.resolution=64", "model.guidance_embed=2.5", "evaluation.sample_steps=2"]
    if not family.startswith("flux-") and family != "flux2-dev":
        given.remove("model.guidance_embed=2.5")
    given += ["evaluation.guidance_scale=2.5", f"model.path={folder}"]
    return Sampler(model.pipeline, load_config(None, given))


@each_family
def test_the_sampler_gives_each_prompt_its_source(family, model_of, tiny):
    """At the source's shape, as the pipeline draws it alone; the pipeline changes no size."""
    model = model_of(family)
    draw = sampler(model, family, tiny(family)).draw
    sources = [picture(128, 128), picture(256, 256).rotate(90)]
    images = draw([PROMPT, PROMPT], [5, 5], sources=sources)
    again = draw([PROMPT], [5], sources=sources[1:])
    assert [image.shape for image in images] == [(64, 64, 3)] * 2
    assert (images[1] == again[0]).all() and (images[0] != images[1]).any()
    if family.startswith("flux2"):  # which refuses a source below 64 pixels
        return
    assert draw([PROMPT], [5], sources=[picture(150, 90)])[0].shape == (80, 48, 3)
    with pytest.raises(ModelError, match="Pipeline edits images: give each prompt its"):
        draw([PROMPT, PROMPT], [5, 5], sources=[picture(), None])


def test_a_model_that_draws_from_text_takes_no_source(model_of, tiny):
    pipe = load_pipeline(ModelConfig(str(tiny("flux"))))
    drawn = Sampler(pipe, load_config(None, [f"model.path={tiny('flux')}", "model.resolution=64"]))
    with pytest.raises(ModelError, match="FluxPipeline draws from text alone: leave the source"):
        drawn.draw([PROMPT], [1], sources=[picture()])


def test_a_large_source_is_shrunk_as_flux_2_does(model_of):
    """And one of a square of 1024 pixels, or of any of its buckets, is not."""
    model = model_of("flux2-klein")
    for height, width in itertools.product((64, 800, 1024, 1536), (640, 1024, 2048)):
        image = Image.new("RGB", (width, height))
        if width * height > 1024 * 1024:
            image = model.pipeline.image_processor._resize_to_target_area(image, 1024 * 1024)
        expected = (image.height // 16 * 16, image.width // 16 * 16)
        assert model.source_size((height, width)) == expected


def test_a_source_keeps_its_size_in_qwens_pipeline(monkeypatch):
    """It brings each source to about a square of 1024 pixels, also one that comes from there."""
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", WHOLE)
    for size in itertools.product((256, 512, 800, 1024, 1536), (640, 848, 1024, 2048)):
        height, width = QwenImage.source_size(size)
        assert WHOLE(1024 * 1024, width / height)[:2] == (width, height)
        assert abs(width * height / 1024**2 - 1) < 0.06


@torch.no_grad()
def test_without_an_instruction_qwen_reads_the_source_alone(model_of):
    """What a pair has in place of its prompt is that of the empty prompt and its own source."""
    model, image = model_of("qwen-image-edit"), picture()
    condition, empty = (conditions(model, [image], [p]) for p in (PROMPT, ""))
    x, t = torch.randn(condition["source"].shape), torch.tensor([500.0])
    alone = without_prompt(condition, model.empty())
    found, expected, other = (
        model.predict(network_of(model), x, t, c) for c in (alone, empty, condition)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (other - expected).abs().max() > 1e-3
