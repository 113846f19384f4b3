"""A diffusers scheduler's configuration as a :class:`Schedule`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from inversion_dpo.maths.records import Grid, Levels
from inversion_dpo.maths.schedule import Schedule
from inversion_dpo.models.base import ModelError


def discrete_schedule(scheduler: Any) -> Schedule:
    """The schedule of a diffusion model, eps- or v-prediction, whatever its sampler is.

    The sampler grid is that of DDIM with the same configuration: same timesteps (leading, trailing
    or linspace spacing), betas (also rescaled to zero terminal SNR) and final level. A step leads
    from one timestep to the next; diffusers' own DDIM steps by T // N, which is not where it looks
    next under linspace, nor under trailing where N does not divide T.

    Raises:
        ModelError: a scheduler without betas or of betas that DDIM does not know, another
            prediction type, or eps-prediction with zero terminal SNR, where the prediction says
            nothing about the image.
    """
    ddim = _ddim(scheduler)
    kind = ddim.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"the scheduler's prediction_type is {kind!r}; supported: epsilon, v_prediction"
        )
    alpha_bar = ddim.alphas_cumprod.double()
    if kind == "epsilon" and alpha_bar[-1] < 1e-6:
        raise ModelError(
            "at the scheduler's last timestep nothing is left of the image (zero terminal SNR, by "
            "rescale_betas_zero_snr or by the betas), from where prediction_type epsilon cannot be "
            "sampled: set rescale_betas_zero_snr=false if the model was trained without it"
        )
    levels = _levels(alpha_bar)

    def sampler(steps: int) -> Grid:
        ddim.set_timesteps(steps)
        chosen = ddim.timesteps.flip(0).long()
        final = torch.as_tensor(ddim.final_alpha_cumprod, dtype=torch.float64).reshape(1)
        alpha_bar_chosen = torch.cat([final, alpha_bar[chosen]])
        return Grid(torch.cat([torch.zeros(1).long(), chosen]), _levels(alpha_bar_chosen))

    return Schedule(kind, torch.arange(len(alpha_bar)), levels, sampler)


def _ddim(scheduler: Any) -> Any:
    """DDIM with the configuration of another scheduler of the same betas."""
    name = type(scheduler).__name__
    remedy = "give the pipeline a DDIMScheduler with the betas that the model was trained with"
    if "beta_schedule" not in scheduler.config:
        raise ModelError(f"{name} has no betas, so that its noise levels are not known; {remedy}")
    try:
        return DDIMScheduler.from_config(scheduler.config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(f"the betas of {name} are not known ({error}); {remedy}") from error


def _levels(alpha_bar: torch.Tensor) -> Levels:
    return Levels(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def flow_schedule(scheduler: Any, mu: float | None = None, flux_sigmas: bool = False) -> Schedule:
    """The schedule of a flow-matching model with its shift.

    Args:
        scheduler: a FlowMatchEulerDiscreteScheduler.
        mu: the shift for this image size, where the configuration shifts dynamically.
        flux_sigmas: start from linspace(1, 1/N, N) as FLUX's pipeline does.

    Raises:
        ModelError: another scheduler, or noise that does not rise from data to noise.
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
    if not (0 < table[0] and (table.diff() > 0).all()):
        raise ModelError("the scheduler's noise levels do not rise: set invert_sigmas=false")
    return Schedule("flow_prediction", table * total, Levels(1 - table, table), sampler)
