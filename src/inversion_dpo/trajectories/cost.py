"""Work out, before pairs are inverted, what that takes in time and on the disk."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from inversion_dpo.data.transforms import Framing, Size
from inversion_dpo.maths.inversion import evaluations_per_image
from inversion_dpo.models.base import Condition, DiffusionModel, network_of, plain_guidance
from inversion_dpo.run.disk import check_room
from inversion_dpo.run.words import counted
from inversion_dpo.trajectories.jobs import Inverter, lots, sizes_ahead, sources
from inversion_dpo.trajectories.reading import SHARD
from inversion_dpo.trajectories.writing import is_of

if TYPE_CHECKING:
    from inversion_dpo.data.source import PairSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Missing:
    """What of a cache is still to be made, as its own entries and those of caches beside it say.

    sizes: of the pictures of the pairs that no cache has; None if nothing is there, or if looking
    would take as long as the work. total: pairs in all. held: bytes that may be of these pairs.
    """

    sizes: Counter[Size] | None = None
    total: int = 0
    held: int = 0


def missing(how: Inverter, pairs: PairSource, folder: Path, caches: Sequence[Path]) -> Missing:
    """Find the pairs that no cache has; they are read for it, and no image is decoded.

    Args:
        how: model and key.
        pairs: of the cache.
        folder: of the cache.
        caches: whose shards are linked where they are the same.
    """
    places = folder, *caches
    held = sum(file.stat().st_size for place in places for file in place.glob("shard-*"))
    if not held or not pairs.quick:
        return Missing(held=held)
    sizes, total = Counter[Size](), 0
    for lot in lots(pairs.read(), how, {}):
        total += len(lot.jobs)
        name = SHARD.format(lot.number)
        if not any(is_of(place / name, lot.digests, lot.made_of) for place in places):
            sizes.update(job.place.size for job in lot.jobs)
    return Missing(sizes, total)


def announce(
    how: Inverter, pairs: PairSource, folder: Path, processes: int, absent: Missing
) -> None:
    """Log, before the work begins, size and time of the cache; DiskError if it does not fit.

    Both are foretold from the sizes of the first pairs, or of those that are missing, and grow with
    the number of pixels.

    Args:
        how: model, key and device; one step is timed, of pictures of the most frequent size.
        pairs: their number counts, which a stream may not know.
        folder: where the cache will lie.
        processes: that share the shards among them.
        absent: what is still to be made, if a part of it is there.
    """
    known, key, which, share = pairs.expected(), how.key, " pairs", 1.0
    if (sizes := absent.sizes) is None:
        sizes, share = sizes_ahead(pairs, key.resolution, key.fit)
    elif not sizes:
        logger.info("caches have all of %s already", counted(absent.total, "pair"))
        return
    else:
        known = sizes.total()
        which = f" {known} of {absent.total} pairs (caches have the others)"
    ((side, _),) = sizes.most_common(1)
    pixels = sum(h * w * n for (h, w), n in sizes.items()) / sizes.total() / math.prod(side)
    model, how = how.model, how.at(side)
    per, count = ("", known) if known else ("for every 1,000 pairs, ", 1000)
    count = max(1, round(count * share))
    x_0 = model.encode(torch.zeros(1, 3, *side)).to(how.device)
    condition = example(model, side, edited=pairs.edits)
    latent, text = round(x_0.numel() * pixels), sum(v.nbytes for v in condition.values())
    size = count * key.pair_size(latent, text)
    if known:
        fewer = "set inversion.keep, or lower inversion.steps or data.limit"
        fewer = fewer if key.extent.last else "lower data.limit"
        check_room(folder, size - absent.held, "trajectories", fewer, whole=False)
    if absent.held and absent.sizes is None:
        logger.info("pairs that a cache has already take neither room nor time, yet count here:")
    if not key.extent.last:
        logger.info("encoding%s, none is inverted: %sabout %.0f MB on disk", which, per, size / 1e6)
        return
    every = condition | model.framing([Framing(side, (0, 0), side)])
    minutes = pixels * minutes_of(how, x_0, every, count, processes)
    told = f"{per}about {size / 1e6:.0f} MB on disk and {minutes:.1f} min"
    logger.info("inverting%s in %d steps: %s", which, key.steps, told)
    for setting, other in key.smaller().items() if absent == Missing() else ():
        less = count * other.pair_size(latent, text) / 1e6
        if less < 0.95 * size / 1e6:
            logger.info("%s would need %sabout %.0f MB on disk", setting, per, less)


def minutes_of(how: Inverter, x_0: Tensor, condition: Condition, count: int, among: int) -> float:
    """Foretell how long it takes to invert pairs, from the time of one evaluation.

    Args:
        how: model, key, grid and device.
        x_0: a latent (1, *).
        condition: of its image, [1, ...] each.
        count: of pairs.
        among: processes that share them.
    """
    key, scales = how.key, (how.key.guidance_scale, how.key.reference_guidance)
    batch, again = min(key.pairs_per_shard, count), evaluations_again(how.model, *scales)
    seconds = seconds_of_batch(how, x_0, condition, batch)
    evaluations = evaluations_per_image(key.extent, *scales, again)
    return seconds * evaluations * -(-count // (batch * among)) / 60


def example(model: DiffusionModel, size: Size, *, edited: bool) -> Condition:
    """Make the condition of a picture, and of a source if it is edited, [1, ...] each.

    Args:
        model: encodes them.
        size: (height, width) of the picture.
        edited: whether it has a source.
    """
    if not edited:
        return model.condition(["a picture"])
    given = [Image.new("RGB", model.source_size(size)[::-1])]
    more: dict[str, Any] = {"sources": given} if model.edits == "reads" else {}
    return model.condition(["a picture"], **more) | {"source": sources(model, [given])}


def seconds_of_batch(how: Inverter, x_0: Tensor, condition: Condition, pairs: int) -> float:
    """Time one evaluation of the network on so many pairs, in as many parts as memory asks for.

    On a GPU a first one is not counted, which chooses and compiles kernels.

    Args:
        how: model, grid and device; learns how many pairs fit.
        x_0: a latent (1, *).
        condition: of its image, [1, ...] each.
        pairs: of the batch, two images each.
    """

    @torch.no_grad()
    def evaluate(part: slice) -> None:
        images = how.key.sides * (part.stop - part.start)
        many = {k: v.repeat_interleave(images, 0) for k, v in condition.items()}
        t = how.grid.timesteps[1].to(how.device).expand(images)
        x = x_0.repeat_interleave(images, 0)
        how.model.predict(network_of(how.model), x, t, many)[0].cpu()  # waits for the device

    if how.device.type == "cuda":
        how.inverted.of(pairs, evaluate)
    begun = time.time()
    how.inverted.of(pairs, evaluate)
    return time.time() - begun


def evaluations_again(model: DiffusionModel, along: float, stored: float) -> int:
    """Count the evaluations of a stored prediction beside the path's, see :func:`predictions`.

    Args:
        model: whose family may rescale the guided prediction.
        along: guidance of the path.
        stored: guidance of the stored predictions.
    """
    return 1 + (model.combine is not plain_guidance and 1.0 not in (along, stored))
