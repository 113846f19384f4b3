"""A diffusers scheduler's configuration as a :class:`Schedule`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from inversion_dpo.models.base import ModelError
from inversion_dpo.schedule import Schedule
from inversion_dpo.types import Grid, Levels


def discrete_schedule(scheduler: Any) -> Schedule:
    """The schedule of a diffusion model, eps- or v-prediction, whatever its sampler is.

    The sampler grid is that of DDIM with the same configuration: same timesteps (leading, trailing
    or linspace spacing), betas (also rescaled to zero terminal SNR) and final level.

    Raises:
        ModelError: another prediction type, or eps-prediction with zero terminal SNR, where the
            prediction says nothing about the image.
    """
    ddim: Any = DDIMScheduler.from_config(scheduler.config)
    kind = ddim.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"the scheduler's prediction_type is {kind!r}; supported: epsilon, v_prediction"
        )
    alpha_bar = ddim.alphas_cumprod.double()
    if kind == "epsilon" and alpha_bar[-1] < 1e-6:
        raise ModelError(
            "the scheduler rescales betas to zero terminal SNR with prediction_type epsilon, which "
            "cannot be sampled from its last timestep: set rescale_betas_zero_snr=false"
        )
    levels = _levels(alpha_bar)
    timesteps = torch.arange(len(alpha_bar))
    even = Schedule(kind, timesteps, levels, lambda steps: even.grid(steps))

    def sampler(steps: int) -> Grid:
        if ddim.config.timestep_spacing == "linspace":  # from timestep 0 to the last
            return even.grid(steps)
        ddim.set_timesteps(steps)
        chosen = ddim.timesteps.flip(0).long()
        final = torch.as_tensor(ddim.final_alpha_cumprod, dtype=torch.float64).reshape(1)
        alpha_bar_chosen = torch.cat([final, alpha_bar[chosen]])
        return Grid(torch.cat([torch.zeros(1).long(), chosen]), _levels(alpha_bar_chosen))

    return Schedule(kind, timesteps, levels, sampler)


def _levels(alpha_bar: torch.Tensor) -> Levels:
    return Levels(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def flow_schedule(scheduler: Any, mu: float | None = None, flux_sigmas: bool = False) -> Schedule:
    """The schedule of a flow-matching model with its shift.

    Args:
        scheduler: a FlowMatchEulerDiscreteScheduler.
        mu: the shift for this image size, where the configuration shifts dynamically.
        flux_sigmas: start from linspace(1, 1/N, N) as FLUX's pipeline does.

    Raises:
        ModelError: another scheduler.
    """
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ModelError(
            f"{type(scheduler).__name__} is not supported for this model; give it a "
            "FlowMatchEulerDiscreteScheduler"
        )

    def sigmas(steps: int) -> torch.Tensor:
        euler: Any = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        start = np.linspace(1.0, 1 / steps, steps) if flux_sigmas else None
        euler.set_timesteps(None if flux_sigmas else steps, sigmas=start, mu=mu)
        return euler.sigmas.double().flip(0)  # ascending from 0

    total = scheduler.config.num_train_timesteps

    def sampler(steps: int) -> Grid:
        sigma = sigmas(steps)
        return Grid(sigma * total, Levels(1 - sigma, sigma))

    table = sigmas(total)[1:]
    return Schedule("flow_prediction", table * total, Levels(1 - table, table), sampler)
