"""Prepare images as the scorers' authors do, with Pillow and torch alone.

The image processors of transformers are not used. Their results differ in the last digits,
depending on whether torchvision is installed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, red, green, blue
STD = (0.26862954, 0.26130258, 0.27577711)
Pixels = NDArray[np.uint8]
Triple = Sequence[float]


def centre_crops(
    images: Sequence[Pixels], size: int, half_up: bool, mean: Triple = MEAN, std: Triple = STD
) -> Tensor:
    """Resize the shorter side (Pillow's bicubic), cut the centre square, normalise.

    Args:
        images: uint8 [H, W, 3], of any sizes.
        size: in pixels.
        half_up: where the odd pixel goes. True: torchvision's CenterCrop, for CLIP, ImageReward
            and the aesthetic predictor; it rounds half the rest to even. False: transformers' image
            processor, for PickScore; it rounds down. They differ where the rest is 3 modulo 4.
        mean: of each channel.
        std: of each channel.

    Returns:
        Pixels [B, 3, size, size].
    """
    cut = [_centre(Image.fromarray(image), size, half_up) for image in images]
    pixels = torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float() / 255
    return normalised(pixels, mean, std)


def whole_images(
    images: Sequence[Pixels], size: int, mean: Triple = MEAN, std: Triple = STD
) -> Tensor:
    """Resize the longer side to ``size``, pad with black, normalise: [B, 3, size, size].

    HPSv2 does this: torch's bicubic with antialiasing on [0, 1], neither rounded nor clamped, and
    zeros around it. Source: https://github.com/tgxs002/HPSv2, open_clip/transform.py, ResizeMaxSize
    (with torchvision 0.17 or later, whose resize antialiases tensors).
    """
    return normalised(torch.stack([_whole(image, size) for image in images]), mean, std)


def squares(images: Sequence[Pixels], side: int, mean: Triple, std: Triple) -> Tensor:
    """Resize both sides (Pillow's bicubic), whatever the shape, normalise: [B, 3, side, side].

    Args:
        images: uint8 [H, W, 3], of any sizes.
        side: in pixels.
        mean: of each channel.
        std: of each channel.
    """
    small = [Image.fromarray(i).resize((side, side), Image.Resampling.BICUBIC) for i in images]
    pixels = torch.from_numpy(np.stack([np.asarray(i) for i in small])).permute(0, 3, 1, 2)
    return normalised(pixels.float() / 255, mean, std)


def normalised(pixels: Tensor, mean: Triple, std: Triple) -> Tensor:
    """Compute (pixels [B, 3, H, W] - mean) / std of each channel."""
    means, stds = (torch.tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in (mean, std))
    return (pixels - means) / stds


def _centre(image: Image.Image, size: int, half_up: bool) -> Pixels:
    short, long = sorted(image.size)
    longer = int(size * long / short)
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (round(n / 2) if half_up else n // 2 for n in (width - size, height - size))
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _whole(image: Pixels, size: int) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    scale = size / max(image.shape[:2])
    height, width = (round(n * scale) for n in image.shape[:2])
    if scale != 1:
        pixels = functional.interpolate(
            pixels[None], (height, width), mode="bicubic", align_corners=False, antialias=True
        )[0]
    rest_y, rest_x = size - height, size - width
    bars = (rest_x // 2, rest_x - rest_x // 2, rest_y // 2, rest_y - rest_y // 2)
    return functional.pad(pixels, bars)
