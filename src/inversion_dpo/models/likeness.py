"""Whether a UNet predicts what its scheduler says, noise or v, which no weight's name shows."""

from __future__ import annotations

import torch

from inversion_dpo.data.transforms import Framing, Size
from inversion_dpo.models.base import DiffusionModel, network_of

OTHER = {"epsilon": "v_prediction", "v_prediction": "epsilon"}
LEAST, MOST = 0.5, 0.9  # of noise predicted as noise at least, and of v at most


def likeness(model: DiffusionModel, size: Size) -> float:
    """Compute the cosine between pure noise and the prediction from it at the last timestep.

    There x_t is nearly eps, so that a network that predicts eps gives back what it is given. v is
    nearly -x_0 (Salimans & Ho, 2022, https://arxiv.org/abs/2202.00512), which is not like it.

    Args:
        model: Stable Diffusion 1, 2 or XL.
        size: (height, width) in pixels.
    """
    unet, scale = network_of(model), model.pipeline.vae_scale_factor
    shape = 1, unet.config.in_channels, *(side // scale for side in size)  # type: ignore[union-attr]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    condition = model.empty() | model.framing([Framing(size, (0, 0), size)])
    with torch.no_grad():
        device = next(unet.parameters()).device
        last = model.schedule.timesteps[-1:].to(device)
        found = model.predict(unet, noise.to(device), last, condition)
    return float(torch.cosine_similarity(found.cpu().flatten(), noise.flatten(), 0))


def misread_text(model: DiffusionModel, size: Size) -> str | None:
    """Say that a UNet seems to predict another thing than its scheduler says; None if it fits."""
    kind = model.schedule.kind
    if kind not in OTHER:
        return None
    alike = likeness(model, size)
    if (alike >= LEAST) if kind == "epsilon" else (alike <= MOST):
        return None
    return (
        f"the scheduler says prediction_type={kind}, but from pure noise the network predicts what "
        f"is {100 * alike:.0f} % like it: eps is nearly 100 %, v nearly 0. If its pictures are "
        f"broken, set prediction_type={OTHER[kind]} in scheduler/scheduler_config.json"
    )
