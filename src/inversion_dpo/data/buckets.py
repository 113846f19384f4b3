"""Shapes that pictures are trained at: buckets of nearly one area, as SDXL and kohya have them.

A bucket is a size (height, width) in pixels. Podell et al., 2023, https://arxiv.org/abs/2307.01952
(appendix I) lists those of SDXL; ``buckets(1024)`` is the same list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from inversion_dpo.data.transforms import Size

Resolution = int | str  # the side of a square, whose area all buckets have; or WIDTHxHEIGHT alone
WIDEST = 4.0  # ratio of the sides of the longest bucket
MOST_CUT = 1 / 8  # share of a picture that may be cut off so that it fills its bucket
STEPS = (64, 32, 16)  # between sides; every model needs multiples of 16, some of 32
LEFT_OUT = ("mixed_shapes", "odd_shapes")


def square(resolution: Resolution) -> Size:
    """Return the one size of WIDTHxHEIGHT, or the square of a side."""
    found = (resolution, resolution) if isinstance(resolution, int) else read_size(resolution)
    assert found is not None  # the setting's own pattern
    return found


def read_size(text: object) -> Size | None:
    """Read WIDTHxHEIGHT; None if it is something else."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", str(text))
    return (int(found[2]), int(found[1])) if found else None


@cache
def buckets(resolution: Resolution) -> tuple[Size, ...]:
    """List the sizes that pictures come to, the square first; WIDTHxHEIGHT is the only one.

    Widths rise by a step, and so do heights; the area is the square's or a little less. The step
    is the largest of ``STEPS`` that divides the side, up to a 16th of it where one is so small.
    """
    side, _ = size = square(resolution)
    steps = [step for step in STEPS if side % step == 0]
    if isinstance(resolution, str) or not steps:
        return (size,)
    step = next((step for step in steps if step <= side / 16), steps[-1])
    found = {(side, side)}
    for width in range(side + step, 2 * side + 1, step):
        height = side * side // width // step * step
        if height and width / height <= WIDEST:
            found |= {(height, width), (width, height)}
    return tuple(sorted(found, key=lambda size: (round(abs(_ratio(size)), 9), size)))


def nearest(sizes: Sequence[Size], *pictures: Size) -> Size:
    """Find the size whose ratio of sides is nearest to that of the pictures, in logarithms.

    Of several pictures the geometric mean counts, so that their order does not matter.
    """
    wanted = sum(map(_ratio, pictures)) / len(pictures)
    return min(sizes, key=lambda size: round(abs(_ratio(size) - wanted), 9))


def share_cut(picture: Size, size: Size) -> float:
    """Compute which share of a picture is cut off if it covers the size."""
    return 1 - math.exp(-abs(_ratio(picture) - _ratio(size)))


@dataclass(frozen=True)
class Place:
    """Where a pair goes. fit: see :func:`.transforms.fit`; empty: the pair is left out.

    odd: one of ``LEFT_OUT`` if a picture has another shape than its bucket, else empty.
    """

    size: Size
    fit: str
    odd: str = ""


def place(sizes: Sequence[Size], pictures: Sequence[Size], fit: str) -> Place:
    """Choose one bucket for a pair: that of the nearest ratio of sides.

    ``crop`` cuts what does not fit, and ``pad`` cuts nothing. ``drop`` cuts at most ``MOST_CUT`` of
    a picture, and leaves a pair out that would lose more.

    Args:
        sizes: the buckets, (height, width) each.
        pictures: sizes of the images of one pair.
        fit: ``data.fit``: drop, or a mode of :func:`.transforms.fit`.
    """
    size, odd = nearest(sizes, *pictures), ""
    if max(share_cut(picture, size) for picture in pictures) > MOST_CUT:
        mixed = len({nearest(sizes, picture) for picture in pictures}) > 1
        odd = LEFT_OUT[0] if mixed else LEFT_OUT[1]
    return Place(size, ("" if odd else "crop") if fit == "drop" else fit, odd)


def left_out_text(left: int, total: int) -> str:
    """Say how many pairs fit no size, and what to do about it."""
    return (
        f"{left} of {total} pairs are left out: their images differ in shape, or have a shape that "
        f"no training size is near to, and more than an eighth would be cut; set data.fit=crop or "
        "pad, or another model.resolution"
    )


def named(size: Size) -> str:
    """Write a size as WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"


def _ratio(size: Size) -> float:
    return math.log(size[1] / size[0])
