"""Pictures by emoji and hand, what is done to them while a network learns, and a small encoder."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.drawn.fetch import Emoji
from tools.drawn.groups import base_hands, judge_hands

SHIFT = 3  # pixels by which a picture is moved


@dataclass(frozen=True)
class Pictures:
    """The pictures that a stage may see: pixels [N, 3, 64, 64] in [-1, 1], and emoji and hand."""

    pixels: Tensor
    emoji: tuple[Emoji, ...]
    hands: tuple[int, ...]

    @property
    def captions(self) -> tuple[list[str], list[str]]:
        """Both captions of every picture: the name, and the category and the name."""
        plain = [e.name for e in self.emoji]
        return plain, [f"{e.category}: {e.name}" for e in self.emoji]


def seen_by_base(images: Tensor, emoji: list[Emoji]) -> Pictures:
    """Select what the base model and the labellers may see."""
    return select(images, [(e, hand) for e in emoji for hand in base_hands(e)])


def seen_by_judges(images: Tensor, emoji: list[Emoji]) -> Pictures:
    """Select what the judges may see: no picture of :func:`seen_by_base`."""
    return select(images, [(e, hand) for e in emoji for hand in judge_hands(e)])


def select(images: Tensor, chosen: list[tuple[Emoji, int]]) -> Pictures:
    """Select pictures by emoji and hand."""
    picked = torch.stack([images[e.row, hand] for e, hand in chosen])
    pixels = picked.permute(0, 3, 1, 2).float() / 127.5 - 1
    return Pictures(pixels, tuple(e for e, _ in chosen), tuple(hand for _, hand in chosen))


def moved(pixels: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """Move every picture by up to SHIFT pixels on white; ``flip`` also mirrors every other one."""
    padded = F.pad(pixels, (SHIFT,) * 4, value=1.0)
    size, out = pixels.shape[-1], []
    for picture, (x, y, mirror) in zip(
        padded,
        torch.randint(2 * SHIFT + 1, (len(pixels), 3), generator=generator).tolist(),
        strict=True,
    ):
        part = picture[:, y : y + size, x : x + size]
        out.append(part.flip(-1) if flip and mirror % 2 else part)
    return torch.stack(out)


def worn(pixels: Tensor, generator: torch.Generator, tint: float = 0.1) -> Tensor:
    """Move, mirror, tint, blur and roughen pictures, as a model's samples may be.

    ``tint``: most relative change of a colour's three parts.
    """
    x, count = moved(pixels, generator, flip=True), len(pixels)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    x = (x - 1) * (1 + tint * (2 * drawn(3, 1, 1) - 1)) + 1  # the white ground stays white
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear", align_corners=False)
    x = torch.lerp(x, soft, drawn(1, 1, 1))
    return x + 0.1 * drawn(1, 1, 1) * torch.randn(x.shape, generator=generator)


class PictureEncoder(nn.Module):
    """Pictures [B, 3, 64, 64] -> [B, ``out``]; the first layer halves the size, to be fast."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.layers, self.head = halving((3, 32, 64, 96, 128, 128), 4), nn.Linear(128 * 16, out)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode the pictures."""
        encoded: Tensor = self.head(self.layers(pixels).flatten(1))
        return encoded


class HandNetwork(nn.Module):
    """Pictures [B, 3, 64, 64] -> logits [B] of one hand.

    Mean and maximum over the picture leave out where something is. With places it learned the
    emoji by heart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = halving((3, 32, 64, 96), 3), nn.Linear(2 * 96, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute the logits."""
        places = self.layers(pixels)
        pooled = torch.cat([places.mean((2, 3)), places.amax((2, 3))], 1)
        logits: Tensor = self.head(pooled)[:, 0]
        return logits


def halving(widths: tuple[int, ...], halvings: int) -> nn.Sequential:
    """Convolutions from width to width; the first ``halvings`` of them halve the size."""
    layers: list[nn.Module] = []
    for k, (before, after) in enumerate(itertools.pairwise(widths)):
        stride = 2 if k < halvings else 1
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU()]
    return nn.Sequential(*layers)
