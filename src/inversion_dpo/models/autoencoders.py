"""Pixels to latents and back, each kind of scaling as the pipelines undo it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inversion_dpo.models.base import ModelError


@dataclass(frozen=True)
class Autoencoder:
    """A pipeline's autoencoder: the network sees ``(z - mean) * scale``.

    vae: of diffusers; the posterior's mode is taken, so that encoding is deterministic.
    mean, scale: numbers, or tensors [1, C, 1, 1].
    video: it takes a time axis, on which an image is one frame.
    """

    vae: Any
    mean: Tensor | float
    scale: Tensor | float
    video: bool = False

    @property
    def both(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Its ways there and back, which are a family's own."""
        return self.encode, self.decode

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents (B, *), float32, as the network sees them."""
        pixels = images.to(self.vae.device, self.vae.dtype)
        output = self.vae.encode(pixels.unsqueeze(2) if self.video else pixels)
        z = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latent
        z = (z.squeeze(2) if self.video else z).float()
        latents: Tensor = (z - _on(self.mean, z)) * _on(self.scale, z)
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images [B, 3, H, W] in [-1, 1]."""
        z = latents / _on(self.scale, latents) + _on(self.mean, latents)
        z = z.to(self.vae.device, self.vae.dtype)
        images: Tensor = self.vae.decode(z.unsqueeze(2) if self.video else z).sample
        return (images.squeeze(2) if self.video else images).float().clamp(-1, 1)


def _on(value: Tensor | float, z: Tensor) -> Tensor | float:
    return value.to(z.device) if isinstance(value, Tensor) else value


def scaled(vae: Any) -> Autoencoder:
    """Latents times ``scaling_factor``."""
    return Autoencoder(vae, 0.0, _numbers(vae, "scaling_factor")[0])


def shifted(vae: Any) -> Autoencoder:
    """Latents less ``shift_factor``, times ``scaling_factor``."""
    shift = 0.0
    if vae.config.shift_factor is not None:
        shift = _numbers(vae, "shift_factor", least=-math.inf)[0]
    return Autoencoder(vae, shift, _numbers(vae, "scaling_factor")[0])


def normalised(vae: Any, factor: Tensor | float = 1.0, video: bool = False) -> Autoencoder:
    """Latents less ``latents_mean``, over ``latents_std``, times a factor.

    Args:
        vae: of diffusers; its configuration has mean and deviation of each channel.
        factor: of the latents as the network sees them.
        video: whether latents and images have an axis of time.
    """
    deviations = _numbers(vae, "latents_std")
    means = _numbers(vae, "latents_mean", least=-math.inf, count=len(deviations))
    mean, std = (
        torch.tensor(v, dtype=torch.float32).reshape(1, -1, 1, 1) for v in (means, deviations)
    )
    return Autoencoder(vae, mean, factor / std, video)


def _numbers(vae: Any, name: str, least: float = 0, count: int = 0) -> list[float]:
    """Read a setting by which latents are scaled; ModelError unless its numbers are above least.

    count: how many there must be; 0 takes any.
    """
    given = getattr(vae.config, name)
    numbers = list(given) if isinstance(given, list | tuple) else [given]
    fit = all(isinstance(n, int | float) and least < n < math.inf for n in numbers)
    if not fit or len(numbers) != (count or len(numbers)):
        raise ModelError(
            f"{name} of the autoencoder is {given!r}, and must be finite numbers, as many as "
            "its latents have channels: fetch its config.json again"
        )
    return numbers
