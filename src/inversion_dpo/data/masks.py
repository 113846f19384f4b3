"""Which pixels count: the white ones of a mask, or those in which two images differ."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from inversion_dpo.data.images import FORMATS, DataError, decode_image
from inversion_dpo.data.transforms import Size, fit
from inversion_dpo.run.words import counted

DIFFER = 16  # of 255 levels in a channel, above which two pixels differ
WHITE = 128  # of 255: the level from which a pixel of a mask counts
ODD_MASKS = {
    "mask_whole": ("mask counts", "masks count", "everything: are black and white swapped?"),
    "mask_little": ("mask counts", "masks count", "a thousandth of the image or less"),
    "mask_grey": (
        "mask is",
        "masks are",
        f"grey in over 5% of the pixels: a pixel counts from level {WHITE} of 255 on; save masks "
        "in black and white",
    ),
}


def decode_mask(data: bytes, size: Size, where: str) -> Image.Image:
    """Decode the mask of an image of (height, width): of its size, opaque, and white somewhere.

    DataError, which calls it ``where``, is for any other one: transparency could mean either part.
    A pixel counts from the level ``WHITE`` on: :func:`counting`.
    """
    mask = decode_image(data, where)
    if mask.size != size[::-1]:
        sizes = f"{mask.width}x{mask.height} and {size[1]}x{size[0]}"
        raise DataError(
            f"{where}: mask and image are {sizes} pixels; save the mask at the image's size"
        )
    opacity = Image.open(io.BytesIO(data), formats=FORMATS).convert("RGBA").getchannel("A")
    if opacity.getextrema() != (255, 255):
        raise DataError(
            f"{where}: the mask is transparent in places; save it in black and white, white "
            "where errors shall count"
        )
    mask = mask.convert("L")
    if not counting(mask).any():
        raise DataError(
            f"{where}: nothing in the mask is white; paint white what counts, or drop the row"
        )
    return mask


def counting(mask: Image.Image) -> NDArray[np.bool_]:
    """Tell which pixels [height, width] of a grey mask count."""
    return np.asarray(mask) >= WHITE


def mask_oddities(mask: Image.Image) -> list[str]:
    """List the kinds of ``ODD_MASKS`` that a grey mask is."""
    levels, share = np.asarray(mask), counting(mask).mean()
    grey = ((levels >= 32) & (levels < 224)).mean()  # JPEG's rings beside an edge are fainter
    odd = {"mask_whole": share >= 0.99, "mask_little": share <= 0.001, "mask_grey": grey > 0.05}
    return [kind for kind, found in odd.items() if found]


def odd_masks_text(counts: Mapping[str, int]) -> list[str]:
    """Write a line for each kind of odd masks that there are."""
    return [
        f"{counted(counts[kind], one, many)} {words}"
        for kind, (one, many, words) in ODD_MASKS.items()
        if counts[kind]
    ]


def region(
    images: Sequence[Image.Image], mask: Image.Image | None, size: Size, mode: str, where: str
) -> NDArray[np.bool_]:
    """Tell which pixels [height, width] of a pair count at its training size.

    Args:
        images: winner and loser, looked at where there is no mask: what differs counts.
        mask: grey, at the images' size.
        size: (height, width) in pixels.
        mode: how images come to that size, of ``FITS``.
        where: the row.

    Raises:
        DataError: none counts.
    """
    if mask is None:
        a, b = (np.asarray(fit(image, size, mode).image, np.int16) for image in images)
        found = np.asarray((abs(a - b) > DIFFER).any(2))
        why = f"its images nowhere differ by more than {DIFFER} of 255 levels"
    else:  # white first: resizing blurs no level but an edge
        white = Image.fromarray(counting(mask))
        found = counting(fit(white, size, mode).image.convert("L"))
        why = "its mask is cut off with the edge of the image"
    if not found.any():
        raise DataError(f"{where}: {why}; drop the row, or set data.mask=none")
    return found
