"""Pictures made on demand: samples of reference and policy, and the path of an inversion.

Everything here runs in one thread at a time, under a lock: the machine has one accelerator.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

import numpy as np
import torch
from torch import Tensor

from inversion_dpo.data.images import decode_image, png, stack_pixels
from inversion_dpo.data.transforms import fit
from inversion_dpo.evaluation.reconstruction import psnr
from inversion_dpo.maths.inversion import invert, reconstruct, reconstruction_error, recovered_noise
from inversion_dpo.maths.records import Extent, Grid
from inversion_dpo.models.sampler import Sampler
from inversion_dpo.run.config import Config
from inversion_dpo.trajectories.fill import pair_noise, predictions

LoadSampler = Callable[[Config, Path | None], Sampler]  # (configuration, adapter)
MOST_IMAGES = 512  # kept in memory
MOST_FRAMES = 11  # of a film strip


class Pictures:
    """The latest images by SHA-256, PNG; the oldest are forgotten."""

    def __init__(self, most: int = MOST_IMAGES) -> None:
        self._most, self._kept, self._lock = most, OrderedDict[str, bytes](), RLock()

    def add(self, data: bytes) -> str:
        """Keep an image; its name."""
        name = hashlib.sha256(data).hexdigest()
        with self._lock:
            self._kept[name] = data
            self._kept.move_to_end(name)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> bytes | None:
        """An image by its name; None if it is not kept (any more)."""
        with self._lock:
            return self._kept.get(name)


@dataclass(frozen=True)
class Strip:
    """An inversion, seen: PNG images of the states from clean to noise, and of the way back.

    timesteps: of the frames. psnr: dB between the decoded latent and its reconstruction. error:
    relative, of the latents. variance: of x_T; sampling starts from 1.
    """

    original: bytes
    frames: list[bytes]
    timesteps: list[float]
    reconstruction: bytes
    psnr: float
    error: float
    variance: float


def shown(images: Tensor) -> list[bytes]:
    """Images [B, 3, H, W] in [-1, 1] as PNG."""
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [png(image) for image in pixels]


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices 0..count-1, evenly, both ends among them."""
    return sorted({round(float(k)) for k in np.linspace(0, count - 1, min(count, most))})


@torch.no_grad()
def strip(sampler: Sampler, data: bytes, caption: str, grid: Grid) -> Strip:
    """Invert one encoded image as the run inverts its pairs, and sample back.

    Without guidance, whatever ``inversion.guidance_scale`` says.

    Raises:
        DataError: the image cannot be read.
    """
    model, config = sampler.model, sampler.config
    i, side = config.inversion, config.model.resolution
    fitted = fit(decode_image(data, "the image"), (side, side), config.data.fit)
    pixels = stack_pixels([fitted.image])
    x_0 = model.encode(pixels)
    condition = model.condition([caption], [sampler.graph_of(caption)])
    predict, _ = predictions(model, condition | model.framing([fitted.framing]), 1.0, 1.0)
    noise = pair_noise(0, x_0.shape).to(x_0)
    extent = Extent(start=i.start, iterations=i.fixed_point_iterations)
    path = invert(x_0, grid, predict, model.schedule.kind, noise=noise, extent=extent)
    again = reconstruct(path.states[-1], grid, predict, model.schedule.kind)
    where = spread(grid.steps + 1, MOST_FRAMES)
    before, after = model.decode(x_0), model.decode(again)
    return Strip(
        original=shown(pixels)[0],
        frames=shown(torch.cat([model.decode(path.states[k]) for k in where])),
        timesteps=[float(grid.timesteps[k]) for k in where],
        reconstruction=shown(after)[0],
        psnr=float(psnr(before, after)[0]),
        error=float(reconstruction_error(x_0, again)),
        variance=float(recovered_noise(path).double().square().mean()),
    )


class Studio:
    """Pipelines, loaded when they are first needed; the latest policy replaces the one before."""

    def __init__(self, config: Config, load: LoadSampler) -> None:
        self.config, self.pictures = config, Pictures()
        self._load, self._lock = load, RLock()
        self._reference: Sampler | None = None
        self._policy: tuple[Path, Sampler] | None = None

    def sampler(self, folder: Path | None) -> Sampler:
        """The reference, or the policy saved in a folder."""
        if folder is None:
            self._reference = self._reference or self._load(self.config, None)
            return self._reference
        if self._policy is None or self._policy[0] != folder:
            self._policy = (folder, self._load(self.config, folder))
        return self._policy[1]

    def samples(
        self, folder: Path | None, prompts: list[str], seeds: list[int], steps: int, guidance: float
    ) -> list[str]:
        """Names of one sample for each prompt, from the seed beside it."""
        with self._lock:
            sampler = self.sampler(folder).under(sample_steps=steps, guidance_scale=guidance)
            images = sampler.draw(prompts, seeds, desc="page")
        return [self.pictures.add(png(image)) for image in images]

    def inversion(self, data: bytes, caption: str) -> Strip:
        """The film strip of an image under the reference."""
        with self._lock:
            sampler, i = self.sampler(None), self.config.inversion
            grid = sampler.model.schedule.grid(i.steps, i.spacing)
            return strip(sampler, data, caption, grid)
