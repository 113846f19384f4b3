"""The film strip of an inversion: an image, its states on the way to noise, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inversion_dpo.data.buckets import buckets, place
from inversion_dpo.data.images import decode_image, png, stack_pixels
from inversion_dpo.data.transforms import fit
from inversion_dpo.evaluation.reconstruction import psnr
from inversion_dpo.maths.inversion import invert, reconstruct, reconstruction_error, recovered_noise
from inversion_dpo.maths.records import Extent
from inversion_dpo.models.sampler import Sampler
from inversion_dpo.run.fields import Config
from inversion_dpo.trajectories.fill import pair_noise, predictions
from inversion_dpo.web.pictures import spread

MOST_FRAMES = 11


def shown(images: Tensor) -> list[bytes]:
    """Encode images [B, 3, H, W] in [-1, 1] as PNG."""
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [png(image) for image in pixels]


@torch.no_grad()
def film(
    sampler: Sampler, config: Config, asked: tuple[bytes, str], keep: Callable[[bytes], str]
) -> dict[str, Any]:
    """Invert an encoded image under the reference as the run does, and sample back.

    Without guidance, whatever ``inversion.guidance_scale`` says.

    Args:
        sampler: of the reference.
        config: of the run.
        asked: the encoded image, and its caption.
        keep: takes a PNG and returns its name.

    Returns:
        Names of images: original, frames (each with its timestep, from clean to noise),
        reconstruction. psnr: dB between the decoded latent and its reconstruction. error:
        relative, of the latents. variance: of x_T; sampling starts from 1.

    Raises:
        DataError: the image cannot be read.
    """
    data, caption = asked
    model, i, image = sampler.model, config.inversion, decode_image(data, "the image")
    found = place(buckets(config.model.resolution), [(image.height, image.width)], config.data.fit)
    grid = model.schedule_at(found.size).grid(i.steps, i.spacing)
    fitted = fit(image, found.size, found.fit or "pad")
    pixels = stack_pixels([fitted.image])
    x_0 = model.encode(pixels)
    more: dict[str, Any] = {"graphs": [sampler.graph_of(caption)]} if sampler.takes_graphs else {}
    condition = model.condition([caption], **more)
    predict, _ = predictions(model, condition | model.framing([fitted.framing]), 1.0, 1.0)
    noise, kind = pair_noise([0], x_0.shape).to(x_0), model.schedule.kind
    extent = Extent(start=i.start, iterations=i.fixed_point_iterations)
    path = invert(x_0, grid, predict, kind, noise=noise, extent=extent)
    again = reconstruct(path.states[-1], grid, predict, kind)
    where = spread(grid.steps + 1, MOST_FRAMES)
    before, after = model.decode(x_0), model.decode(again)
    frames = shown(torch.cat([model.decode(path.states[k]) for k in where]))
    return {
        "original": keep(shown(pixels)[0]),
        "frames": [
            {"image": keep(frame), "timestep": round(float(grid.timesteps[k]), 1)}
            for k, frame in zip(where, frames, strict=True)
        ],
        "reconstruction": keep(shown(after)[0]),
        "psnr": float(psnr(before, after)[0]),
        "error": float(reconstruction_error(x_0, again)),
        "variance": float(recovered_noise(path).double().square().mean()),
    }
