"""Draw the noise again that our own samples were made from, and check that it is theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inversion_dpo.data.images import DataError
from inversion_dpo.data.source import Pair
from inversion_dpo.data.transforms import Size
from inversion_dpo.maths.losses import squared_error
from inversion_dpo.maths.schedule import add_noise, prediction_of
from inversion_dpo.models.base import Condition, network_of
from inversion_dpo.trajectories.jobs import Inverter, Job

KNOWN_LEVEL, KNOWN_SHARE = 0.8, 0.75  # where known noise is checked, and in how many images


_LINE = "set objective.path=line, which recovers the noise"


def check_known(pair: Pair, size: Size, sides: int) -> None:
    """Refuse images whose noise cannot be drawn again.

    Args:
        pair: or one image, given twice.
        size: of training, (height, width) in pixels.
        sides: how many of its images count.

    Raises:
        DataError: an image has no seed, or another size.
    """
    if len(pair.seeds) < sides:
        raise DataError(
            f"{pair.where}: objective.path=known needs the columns seed_0 and seed_1 with whole "
            f"numbers from 0 on, which `pairs build` and `pairs sample` write; {_LINE}"
        )
    if set(pair.sizes) != {size}:
        raise DataError(
            f"{pair.where}: objective.path=known needs images at the size of training: set "
            f"model.resolution to theirs, or {_LINE}"
        )


def known_noise(
    how: Inverter, x_0: Tensor, condition: Condition, jobs: Sequence[Job]
) -> dict[str, Tensor]:
    """Draw again, from the recorded seeds, the noise [2P, *] that images were sampled from.

    The model predicts an image's own noise better than its negative, which is chance for any other.

    Args:
        how: model, key and device.
        x_0: latents [2P, *], winner and loser in turn.
        condition: of every image, [2P, ...] each.
        jobs: the P pairs.

    Raises:
        DataError: an image has no seed or another size, or the noise is not the images' own.
    """
    sides, model, schedule = how.key.sides, how.model, how.model.schedule_at(jobs[0].place.size)
    for job in jobs:
        check_known(job.pair, jobs[0].place.size, sides)
    draws = [torch.Generator().manual_seed(seed) for job in jobs for seed in job.pair.seeds[:sides]]
    dtype = model.pipeline.dtype  # the pipeline draws in it
    noise = torch.stack([torch.randn(x_0.shape[1:], generator=g, dtype=dtype) for g in draws])
    k = round(KNOWN_LEVEL * (len(schedule.timesteps) - 1))
    level, t = schedule.levels[k], schedule.timesteps[k].to(how.device).expand(len(x_0))
    network = network_of(model)
    with torch.no_grad():
        own, other = (
            squared_error(
                prediction_of(x_0, e, level, schedule.kind),
                model.predict(network, x_t, t, condition),
            )
            for e in (noise.to(x_0), -noise.to(x_0))
            for x_t in [add_noise(x_0, e, level)]
        )
    if (hits := int((own < other).sum())) < KNOWN_SHARE * len(x_0):
        raise DataError(
            f"{jobs[0].pair.where} and the next: only {hits} of {len(x_0)} images fit the noise of "
            f"their seeds, so this model (model.path, model.dtype) did not sample them; {_LINE}"
        )
    return {"endpoint": noise.float()}
