"""Latents are scaled as each pipeline undoes it, whatever its autoencoder's configuration says."""

import math
from types import SimpleNamespace

import pytest
import torch

from inversion_dpo.models.autoencoders import normalised, scaled, shifted
from inversion_dpo.models.base import ModelError
from inversion_dpo.models.loading import adapt
from tests.slow import slow_but

NORMALISED = {"latents_mean": [0.5, -1.0, 0.2, 0.0], "latents_std": [2.0, 0.5, 1.0, 3.0]}


@pytest.mark.parametrize(
    ("family", "config"),
    slow_but(
        [("sd15", NORMALISED), ("sdxl", NORMALISED), ("sd3", {}), ("flux", {})],
        [
            ("sd15", {}),
            ("sd15", {"shift_factor": 0.3}),  # StableDiffusionPipeline reads neither
            ("sd15", NORMALISED),
            ("sdxl", {}),
            ("sdxl", {"shift_factor": 0.3}),
            ("sdxl", NORMALISED),
            ("sd3", {}),
            ("flux", {}),
        ],
    ),
)
def test_latents_are_decoded_as_the_pipeline_decodes_them(family, config, fresh):
    pipe = fresh(family)
    pipe.vae.register_to_config(**config)
    model, seen = adapt(pipe, 64), []

    def decoded(callback_pipe, i, t, given):
        seen.append(given["latents"].clone())
        return {}

    image = pipe(
        "a star",
        num_inference_steps=1,
        guidance_scale=1.0,
        height=64,
        width=64,
        output_type="pt",
        callback_on_step_end=decoded,
    ).images
    latents = pipe._unpack_latents(seen[-1], 64, 64, 8) if family == "flux" else seen[-1]
    torch.testing.assert_close(model.decode(latents), 2 * image - 1, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "config"), [("sdxl", NORMALISED), ("sdxl", {}), ("sd3", {})])
def test_encoding_undoes_the_scale_of_decoding(family, config, fresh):
    pipe = fresh(family)
    pipe.vae.register_to_config(**config)
    model, images = adapt(pipe, 64), torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        mode = pipe.vae.encode(images).latent_dist.mode()
        wanted = pipe.vae.decode(mode).sample.clamp(-1, 1)
    torch.testing.assert_close(model.decode(model.encode(images)), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "config", "named"),
    [
        (scaled, {"scaling_factor": 0.0}, "scaling_factor of the autoencoder is 0.0"),
        (shifted, {"scaling_factor": math.nan}, "is nan"),
        (shifted, {"scaling_factor": "0.18"}, "is '0.18'"),
        (normalised, {"latents_mean": [0.0, 0.0], "latents_std": [1.0, 0.0]}, r"\[1.0, 0.0\]"),
        (normalised, {"latents_mean": [0.0], "latents_std": [math.inf]}, "latents_std"),
        (shifted, {"scaling_factor": 1.0, "shift_factor": math.nan}, "shift_factor .* is nan"),
        (shifted, {"scaling_factor": 1.0, "shift_factor": "0.1"}, "shift_factor .* is '0.1'"),
        (normalised, {"latents_mean": None, "latents_std": [1.0]}, "latents_mean .* is None"),
        (normalised, {"latents_mean": [0.0], "latents_std": [1.0] * 2}, "latents_mean .*0.0"),
    ],
)
def test_a_scale_that_no_latents_can_be_brought_to_is_refused(make, config, named):
    vae = SimpleNamespace(config=SimpleNamespace(**{"shift_factor": 0.0} | config))
    with pytest.raises(ModelError, match=named):
        make(vae)
