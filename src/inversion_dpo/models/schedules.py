"""A diffusers scheduler's configuration as a :class:`Schedule`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from inversion_dpo.data.transforms import Size
from inversion_dpo.maths.records import Grid, Levels
from inversion_dpo.maths.schedule import Schedule
from inversion_dpo.models.base import ModelError
from inversion_dpo.run.fields import ConfigError

FLOW = "flow_prediction"
SPACINGS = ("leading", "linspace", "trailing")
Shift = Callable[[int], float] | float | None  # a function of the number of steps, or a number


def discrete_schedule(scheduler: Any) -> Schedule:
    """Make the schedule of a diffusion model, eps- or v-prediction, whatever its sampler is.

    The sampler grid is that of DDIM with the same configuration: same timesteps (leading, trailing
    or linspace spacing), betas (also rescaled to zero terminal SNR) and final level. A step leads
    from one timestep to the next; diffusers' own DDIM steps by T // N, which is not where it looks
    next under linspace, nor under trailing where N does not divide T.

    Raises:
        ModelError: a scheduler without betas or of betas that DDIM does not know, noise that does
            not rise, another prediction type, or eps-prediction with zero terminal SNR, where the
            prediction says nothing about the image.
    """
    name, config = type(scheduler).__name__, scheduler.config
    remedy = "give the pipeline a DDIMScheduler with the betas that the model was trained with"
    own = inspect.signature(type(scheduler)).parameters  # others' settings may be left over
    if "beta_schedule" not in own or config.get("timestep_type") == "continuous":
        raise ModelError(
            f"{name}{' of continuous timesteps' * ('beta_schedule' in own)} has no betas: a model "
            "that was trained for it, as Playground v2.5 and CosXL for EDM, or for flow matching, "
            f"is not supported. If yours was trained with betas, {remedy}"
        )
    try:
        ddim: Any = DDIMScheduler.from_config(config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(f"the betas of {name} are not known ({error}); {remedy}") from error
    kind = ddim.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"the scheduler's prediction_type is {kind!r}; supported: epsilon, v_prediction"
        )
    alpha_bar, total = ddim.alphas_cumprod.double(), ddim.config.num_train_timesteps
    if len(alpha_bar) != total or not (alpha_bar[0] < 1 and (alpha_bar.diff() < 0).all()):
        raise ModelError(
            f"the scheduler's betas make no noise that rises over {total} timesteps: fetch its "
            "scheduler_config.json again"
        )
    if (spacing := ddim.config.timestep_spacing) not in SPACINGS:
        raise ModelError(
            f"the scheduler's timestep_spacing is {spacing!r}; supported: {', '.join(SPACINGS)}"
        )
    if kind == "epsilon" and alpha_bar[-1] < 1e-6:
        raise ModelError(
            "at the scheduler's last timestep nothing is left of the image (zero terminal SNR, by "
            "rescale_betas_zero_snr or by the betas), from where prediction_type epsilon cannot be "
            "sampled: set rescale_betas_zero_snr=false if the model was trained without it"
        )

    def sampler(steps: int) -> Grid:
        ddim.set_timesteps(steps)
        chosen = ddim.timesteps.flip(0).long()
        final = torch.as_tensor(ddim.final_alpha_cumprod, dtype=torch.float64).reshape(1)
        kept = torch.cat([final, alpha_bar[chosen]])
        levels = Levels(kept.sqrt(), (1 - kept).sqrt())
        return Grid(torch.cat([torch.zeros(1).long(), chosen]), levels)

    levels = Levels(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    return Schedule(kind, torch.arange(len(alpha_bar)), levels, sampler)


def grid_for(schedule: Schedule, key: str, steps: int, spacing: str = "sampler") -> Grid:
    """Return the grid of so many steps; ConfigError names the setting that asks for too many.

    Args:
        schedule: of the model.
        key: the setting that gives the steps, for the error.
        steps: of inversion or sampling.
        spacing: sampler, even or released, see :meth:`Schedule.grid`.
    """
    try:
        return schedule.grid(steps, spacing)
    except ValueError as error:
        raise ConfigError(f"{key}={steps}: {error}") from error


def dynamic_shift(scheduler: Any, image_tokens: int, default: float) -> float | None:
    """Compute mu; None where the scheduler does not shift by resolution.

    Args:
        scheduler: its configuration has the shifts.
        image_tokens: of one image, as the pipeline counts them.
        default: the pipeline's own largest shift, for a configuration that names none.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    mu: float = calculate_shift(
        image_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", default),
    )
    return mu


def flow_schedules(
    scheduler: Any, patch: int, mu: Callable[[int], Shift], *, flux_sigmas: bool = False
) -> Callable[[Size], Schedule]:
    """Make the schedule of each size, whose shift follows from the number of image tokens.

    Args:
        scheduler: see :func:`flow_schedule`.
        patch: side of a token's square in pixels.
        mu: number of image tokens -> the shift.
        flux_sigmas: see :func:`flow_schedule`.
    """

    @cache
    def of_tokens(count: int) -> Schedule:
        return flow_schedule(scheduler, mu(count), flux_sigmas)

    return lambda size: of_tokens(size[0] // patch * (size[1] // patch))


def flux_schedules(scheduler: Any, patch: int) -> Callable[[Size], Schedule]:
    """Make the schedule of each size by the recipe of FLUX, which other pipelines took over."""
    mu = partial(dynamic_shift, scheduler, default=1.15)
    return flow_schedules(scheduler, patch, mu, flux_sigmas=True)


FEW_STEPS = {"LCMScheduler", "TCDScheduler", "SCMScheduler", "FlowMatchLCMScheduler"}


def few_steps(scheduler: Any) -> str | None:
    """Tell from the sampler, as published with the model, that it is distilled to few steps."""
    name, config = type(scheduler).__name__, scheduler.config
    kind = config.get("prediction_type"), config.get("timestep_spacing")
    if name in FEW_STEPS or config.get("stochastic_sampling"):
        return f"it is sampled by {name}, with new noise in every step"
    if name.startswith("Euler") and kind == ("epsilon", "trailing"):
        return "it is sampled by Euler steps from the last timestep, as SDXL Turbo and Lightning"
    return None


def flow_schedule(
    scheduler: Any,
    mu: Shift = None,
    flux_sigmas: bool = False,
) -> Schedule:
    """Make the schedule of a flow-matching model with its shift.

    Args:
        scheduler: a FlowMatchEulerDiscreteScheduler, or one with ``use_flow_sigmas``, such as
            UniPC and DPM-Solver, whose levels are then taken.
        mu: the shift for this image size, where the configuration shifts dynamically; a function
            of the number of steps where it depends on that too.
        flux_sigmas: start from linspace(1, 1/N, N) as FLUX's pipeline does.

    Raises:
        ModelError: another scheduler, one that contradicts itself, or noise that does not rise
            from data to noise.
    """
    euler, config = isinstance(scheduler, FlowMatchEulerDiscreteScheduler), scheduler.config
    if not (euler or config.get("use_flow_sigmas")):
        raise ModelError(
            f"{type(scheduler).__name__} is not supported for this model; give it a "
            "FlowMatchEulerDiscreteScheduler"
        )
    other = config.get("prediction_type") != FLOW or config.get("use_dynamic_shifting")
    if not euler and other:
        raise ModelError(
            f"{type(scheduler).__name__} with use_flow_sigmas needs prediction_type={FLOW} and "
            "use_dynamic_shifting=false; its scheduler_config.json says otherwise"
        )
    total = config.num_train_timesteps

    def sampler(steps: int) -> Grid:
        own: Any = type(scheduler).from_config(config)
        if euler:
            start = np.linspace(1.0, 1 / steps, steps) if flux_sigmas else None
            shift = mu(steps) if callable(mu) else mu
            own.set_timesteps(None if flux_sigmas else steps, sigmas=start, mu=shift)
        else:
            own.set_timesteps(steps)
        sigma = own.sigmas.double().flip(0)  # ascending from 0
        if not sigma.isfinite().all():
            raise ModelError(f"the scheduler has no levels for {steps} steps: take more")
        told = sigma * total
        if not euler:  # whole numbers
            told = torch.cat([told[:1], own.timesteps.double().flip(0)])
        return Grid(told, Levels(1 - sigma, sigma))

    final, table = sampler(total).levels.sigma[:1], sampler(total).levels.sigma[1:]
    if not (0 < table[0] and (table.diff() > 0).all()):
        raise ModelError("the scheduler's noise levels do not rise: set invert_sigmas=false")
    if final:
        raise ModelError("the scheduler leaves noise in the image: set final_sigmas_type=zero")
    return Schedule(FLOW, table * total, Levels(1 - table, table), sampler)
