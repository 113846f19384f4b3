"""What the trainer asks of a model family: one small protocol."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from inversion_dpo.schedule import Schedule

Condition = dict[str, Tensor]  # every tensor has the batch as its first axis


class DiffusionModel(Protocol):
    """A frozen pipeline with the network that is to be trained.

    Images are float [B, 3, H, W] in [-1, 1]; latents (B, *) are scaled as the network sees them.
    """

    schedule: Schedule
    pipeline: Any  # the diffusers pipeline

    @property
    def network(self) -> nn.Module:
        """The denoiser."""

    def encode(self, images: Tensor) -> Tensor:
        """Images -> latents, deterministically (the posterior's mode)."""

    def condition(self, prompts: list[str]) -> Condition:
        """Prompts -> what the network is conditioned on, [B, ...] each."""

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """eps (B, *) at x_t (B, *) and integer timesteps [B], whatever the network predicts."""

    def identity(self) -> str:
        """A hash of every frozen weight that trajectories depend on."""
