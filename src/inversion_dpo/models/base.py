"""What the trainer asks of a model family: one small protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from inversion_dpo.data.transforms import Framing as Framing
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.maths.schedule import Schedule

Condition = dict[str, Tensor]  # every tensor has the batch as its first axis
GRAPH_KEYS = ("graph_rows", "graph_links")  # of a condition: the scene graph's


class ModelError(ValueError):
    """A model that cannot be loaded or is of no supported family; names the remedy."""


class DiffusionModel(Protocol):
    """A frozen pipeline with the network that is to be trained.

    Images are float [B, 3, H, W] in [-1, 1]; latents (B, *) are scaled as the network sees them.
    """

    schedule: Schedule
    pipeline: Any  # the diffusers pipeline
    component: str  # the name in the pipeline of the network that is trained: unet, transformer
    unreached: str | None  # pattern of module names that the output does not depend on

    def condition(
        self, prompts: list[str], graphs: Sequence[SceneGraph | None] | None = None
    ) -> Condition:
        """Prompts -> what the network is conditioned on, [B, ...] each.

        Scene graphs, None for the empty one, count where an encoder of them is installed.
        """

    def framing(self, framings: list[Framing]) -> Condition:
        """What the network is told of the images themselves, [B, ...] each; often nothing."""

    def predict(
        self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: Condition
    ) -> Tensor:
        """The prediction (B, *) at x_t (B, *) and timesteps [B], float32; see schedule.kind."""


def no_framing(framings: list[Framing]) -> Condition:
    """Say nothing of the images: most models are not told their size."""
    return {}


def guided(
    predict: Callable[[Tensor, Tensor, Condition], Tensor],
    x_t: Tensor,
    timesteps: Tensor,
    condition: Condition,
    *,
    empty: Condition,
    scale: float,
) -> Tensor:
    """Predict under classifier-free guidance: p_u + scale (p_c - p_u), in one pass.

    The pass is of twice the batch; at scale 1 it is p_c alone, of the batch.
    Source: Ho & Salimans, 2022, https://arxiv.org/abs/2207.12598.

    Args:
        predict: of a model with its network, see :meth:`DiffusionModel.predict`.
        x_t: noisy latents (B, *).
        timesteps: [B].
        condition: of the prompts, [B, ...] each.
        empty: of the empty prompt, [1, ...] each.
        scale: the guidance.

    Returns:
        The prediction (B, *).
    """
    if scale == 1:
        return predict(x_t, timesteps, condition)
    alone = without_prompt(condition, empty)
    both = {k: torch.cat([alone[k], v]) for k, v in condition.items()}
    p = predict(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), both)
    p_u, p_c = p.chunk(2)
    return p_u + scale * (p_c - p_u)


def without_prompt(condition: Condition, empty: Condition) -> Condition:
    """The condition [B, ...] with the empty prompt's, [1, ...], in place of its own.

    What ``empty`` does not have, the images' framing, stays.
    """
    return {k: empty[k].to(v).expand_as(v) if k in empty else v for k, v in condition.items()}


def network_of(model: DiffusionModel) -> nn.Module:
    """Find the network that is trained."""
    network: nn.Module = getattr(model.pipeline, model.component)
    return network


def frozen_parts(pipeline: Any) -> dict[str, nn.Module]:
    """List every network of a pipeline by name."""
    return {n: m for n, m in sorted(pipeline.components.items()) if isinstance(m, nn.Module)}


def identity(modules: Iterable[nn.Module]) -> str:
    """SHA-256 over every weight and every module's configuration: what trajectories depend on."""
    digest = hashlib.sha256()
    for module in modules:
        about = getattr(module, "config", {})
        config = about.to_dict() if hasattr(about, "to_dict") else dict(about)
        about_file = {"transformers_version"} | {
            k for k in config if k.startswith("_")
        }  # by whom, where
        settings = {k: v for k, v in config.items() if k not in about_file}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def encode(vae: nn.Module, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> latents (B, *), float32, as pipelines scale them.

    Deterministic: the posterior's mode.
    """
    part: Any = vae
    mode = part.encode(images.to(part.device, part.dtype)).latent_dist.mode().float()
    shift = getattr(part.config, "shift_factor", None) or 0.0
    latents: Tensor = (mode - shift) * part.config.scaling_factor
    return latents


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents -> images [B, 3, H, W] in [-1, 1]; the inverse of :func:`encode`'s scaling."""
    part: Any = vae
    shift = getattr(part.config, "shift_factor", None) or 0.0
    unscaled = latents / part.config.scaling_factor + shift
    images: Tensor = part.decode(unscaled.to(part.device, part.dtype)).sample
    return images.float().clamp(-1, 1)
