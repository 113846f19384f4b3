"""Transforms that keep pairs honest: both images of a pair are treated alike.

Sizes are (height, width) throughout, as SDXL is conditioned on them (Podell et al., 2023,
https://arxiv.org/abs/2307.01952). Random decisions are a hash of seed, pair and epoch: they do
not depend on the order in which pairs are visited, nor on the number of processes.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from PIL import Image, ImageOps

FITS = ("pad", "crop")  # of data.fit; the other leaves pairs out
GREY = (127, 127, 127)
_SIDES = re.compile(r"\b(?:left|right)", re.IGNORECASE)

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Framing:
    """How an image came to its size; (height, width) in pixels.

    original: as stored. crop: (top, left) corner of what is seen, in pixels of the resized image;
    (0, 0) unless it was cropped. target: what the network sees.
    """

    original: Size
    crop: Size
    target: Size


@dataclass(frozen=True)
class Fitted:
    """An image of the target size, and how it came there."""

    image: Image.Image
    framing: Framing


def fit(image: Image.Image, size: Size, mode: str) -> Fitted:
    """Bring an image to ``size`` without distorting it; one of that size is not resampled.

    ``pad`` shows all of it: resized until it fits, the rest mid-grey. ``crop`` fills the canvas:
    the largest rectangle of the target's shape at the centre, resized. Both use Lanczos.

    Args:
        image: of any size and mode.
        size: (height, width) in pixels.
        mode: ``pad`` or ``crop``.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in FITS:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(FITS)}")
    (height, width), original = size, (image.height, image.width)
    ratios, image = (height / image.height, width / image.width), image.convert("RGB")
    if mode == "pad":
        scale = min(ratios)
        wide = min(width, max(1, round(image.width * scale)))
        high = min(height, max(1, round(image.height * scale)))
        canvas = Image.new("RGB", (width, height), GREY)
        whole = image.resize((wide, high), Image.Resampling.LANCZOS)
        canvas.paste(whole, ((width - wide) // 2, (height - high) // 2))
        return Fitted(canvas, Framing(original, (0, 0), size))
    scale = max(ratios)
    # cut first: a long strip is not blown up; Pillow copies where the size stays the same
    wide = min(image.width, max(1, round(width / scale)))
    high = min(image.height, max(1, round(height / scale)))
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    cut = image.crop((left, top, left + wide, top + high))
    corner = (round(top * scale), round(left * scale))
    resized = cut.resize((width, height), Image.Resampling.LANCZOS)
    return Fitted(resized, Framing(original, corner, size))


def flip(*images: Image.Image) -> tuple[Image.Image, ...]:
    """Mirror all images of a pair, left to right: never one alone."""
    return tuple(map(ImageOps.mirror, images))


def flips(caption: str, seed: int, digest: str) -> bool:
    """Whether a pair is mirrored: half of them, by chance.

    Never if a word of the caption begins with left or right.

    Args:
        caption: of the pair.
        seed: of the run.
        digest: of the pair.
    """
    return not _SIDES.search(caption) and chance("flip", seed, digest, 0) < 0.5


def chance(what: str, seed: int, digest: str, epoch: int) -> float:
    """Draw a number in [0, 1) for a pair and an epoch, the same everywhere.

    Args:
        what: the decision; ``prompt``, ``graph`` and ``caption`` are drawn apart from each other.
        seed: of the run.
        digest: of the pair.
        epoch: counted from 0.
    """
    name = f"{what} {seed} {epoch} {digest}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
