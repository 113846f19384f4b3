"""Check, before the first image is drawn, what would stop a command later."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from inversion_dpo.data.buckets import square
from inversion_dpo.data.transforms import Size
from inversion_dpo.models.loading import check_model
from inversion_dpo.models.sampler import check_guidance, check_sizes, check_sources
from inversion_dpo.models.schedules import grid_for
from inversion_dpo.run.config import Config
from inversion_dpo.run.disk import check_room, check_writable

BYTES = 2  # of a pixel in a PNG, roughly


def check_sampling(
    config: Config,
    folder: Path,
    images: int,
    fewer: str,
    sources: Sequence[object] = (),
    sizes: Iterable[Size] = (),
) -> None:
    """Refuse a folder, a disk, a model, steps or guidance by which images cannot be drawn.

    Nothing is written, and no weight is read.

    Args:
        config: ``model`` and ``evaluation`` say what is drawn.
        folder: where the images go; it need not be there yet.
        images: how many there will be.
        fewer: the setting that asks for fewer of them.
        sources: the image that each prompt edits, None for none.
        sizes: (height, width) of images that have a size of their own.

    Raises:
        ConfigError, ModelError, DiskError: the first fault and what to do.
    """
    check_writable(folder)
    pixels = math.prod(square(config.model.resolution))
    check_room(folder, images * BYTES * pixels, "samples", f"lower {fewer}")
    model = check_model(config.model)
    check_sources(model, sources or [None])
    check_sizes(model, sizes)
    check_guidance(model, config.evaluation.guidance_scale, "evaluation.guidance_scale")
    for scale in config.build.guidance_scales:
        check_guidance(model, scale, "build.guidance_scales")
    grid_for(model.schedule, "evaluation.sample_steps", config.evaluation.sample_steps)
