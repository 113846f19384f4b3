"""diffusers' scheduler configurations, read as schedules."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from inversion_dpo.maths.schedule import step
from inversion_dpo.models.base import ModelError
from inversion_dpo.models.schedules import (
    discrete_schedule,
    few_steps,
    flow_schedule,
    flux_schedules,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


SPACINGS, KINDS = ["leading", "trailing", "linspace"], ["epsilon", "v_prediction"]
BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def wild(x, t):
    """Some network: bounded, and other at every state and timestep."""
    return torch.tanh(3 * x) + torch.sin(torch.as_tensor(t) / 100).float()


def ours(schedule, x, steps):
    """Every state of a descent of the sampler grid."""
    grid, states = schedule.grid(steps, "sampler"), []
    for i in range(grid.steps, 0, -1):
        output = wild(x, grid.timesteps[i])
        x = step(x, output, grid.levels[i], grid.levels[i - 1], schedule.kind)
        states.append(x)
    return states


def to_the_next(scheduler, t, after):
    """Make DDIM, which steps by T // N, arrive at the timestep where it looks next."""
    scheduler.num_inference_steps = 1
    scheduler.register_to_config(num_train_timesteps=int(t) - int(after))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_sampler_grid_is_ddims_step_for_step(spacing, kind, betas, zero_snr):
    config = {
        **SD,
        "beta_schedule": betas,
        "rescale_betas_zero_snr": zero_snr,
        "timestep_spacing": spacing,
        "prediction_type": kind,
        "clip_sample": False,
    }
    for to_one, offset, steps in itertools.product((True, False), (0, 1), (7, 20)):
        scheduler = DDIMScheduler(**config, set_alpha_to_one=to_one, steps_offset=offset)
        if scheduler.alphas_cumprod[-1] < 1e-6 and kind == "epsilon":
            with pytest.raises(ModelError, match="zero terminal SNR"):
                discrete_schedule(scheduler)
            continue
        schedule = discrete_schedule(scheduler)
        x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        found = ours(schedule, x, steps)
        scheduler.set_timesteps(steps)
        told = scheduler.timesteps.tolist()
        assert schedule.grid(steps, "sampler").timesteps.flip(0)[:-1].tolist() == told
        for state, t, after in zip(found, told, [*told[1:], -1], strict=True):
            if spacing == "linspace" or (spacing == "trailing" and 1000 % steps):
                to_the_next(scheduler, t, after)
            x = scheduler.step(wild(x, t), t, x).prev_sample
            torch.testing.assert_close(state, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_euler_goes_the_same_way_in_its_own_coordinates(spacing, kind):
    """EulerDiscrete's linspace leads from each timestep to the next; its x is sqrt(1 + s^2) x_t."""
    euler = EulerDiscreteScheduler(
        **SD, timestep_spacing=spacing, prediction_type=kind, steps_offset=int(spacing == "leading")
    )
    schedule = discrete_schedule(euler)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    found = ours(schedule, x, 10)  # 999 / 9: Euler's timesteps are whole numbers as well
    euler.set_timesteps(10)
    scale = (1 + euler.sigmas**2) ** 0.5
    y = x * scale[0]
    for k, t in enumerate(euler.timesteps):
        y = euler.step(wild(y / scale[k], t), t, y).prev_sample
        torch.testing.assert_close(found[k], y / scale[k + 1], rtol=1e-4, atol=1e-4)


def test_zero_terminal_snr_with_eps_prediction_is_refused():
    with pytest.raises(ModelError, match="zero terminal SNR"):
        discrete_schedule(DDIMScheduler(**SD, rescale_betas_zero_snr=True))


def test_sample_prediction_is_refused():
    with pytest.raises(ModelError, match="epsilon, v_prediction"):
        discrete_schedule(DDIMScheduler(**SD, prediction_type="sample"))


@pytest.mark.parametrize(
    "sampler",
    [
        PNDMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        DDPMScheduler,
        UniPCMultistepScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        HeunDiscreteScheduler,
        LMSDiscreteScheduler,
        KDPM2DiscreteScheduler,
        DEISMultistepScheduler,
        LCMScheduler,
    ],
)
def test_any_samplers_configuration_gives_its_betas(sampler):
    theirs = sampler(**SD)
    alpha = discrete_schedule(theirs).levels.alpha
    torch.testing.assert_close(alpha.float() ** 2, theirs.alphas_cumprod, rtol=1e-6, atol=0)


def test_grid_of_sd15_by_hand():
    scheduler = PNDMScheduler(**SD, steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True)
    grid = discrete_schedule(scheduler).grid(10, "sampler")
    assert grid.timesteps.tolist() == [0, 1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    assert float(grid.levels.alpha[0] ** 2) == pytest.approx(1 - 0.00085, rel=1e-5)


def test_shifted_flow_grid_by_hand():
    grid = flow_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0)).grid(4, "sampler")
    assert grid.levels.sigma[0] == 0 and grid.levels.sigma[-1] == 1
    assert torch.equal(grid.timesteps, grid.levels.sigma * 1000)
    torch.testing.assert_close(grid.levels.alpha + grid.levels.sigma, torch.ones(5).double())
    # sigma = 3 s / (1 + 2 s); the last but one of four starts at s = (2 * sigma_min' + 1) / 3
    low = 3 * 0.001 / 1.002
    s = (low + 2 * 1.0) / 3
    assert float(grid.levels.sigma[-2]) == pytest.approx(3 * s / (1 + 2 * s), rel=1e-4)


def test_dynamic_shift_equals_the_flux_recipe():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    grid = flow_schedule(scheduler, mu=0.8, flux_sigmas=True).grid(5, "sampler")
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 5, 5), mu=0.8)
    torch.testing.assert_close(grid.levels.sigma.flip(0).float(), scheduler.sigmas)
    torch.testing.assert_close(grid.timesteps.flip(0)[:-1].float(), scheduler.timesteps)


def test_a_flow_table_is_ascending_and_shifted():
    schedule = flow_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert len(schedule.timesteps) == 1000 and (schedule.levels.sigma.diff() > 0).all()
    grid = schedule.grid(10, "even")
    assert grid.levels.sigma[0] == 0 and grid.levels.sigma[-1] == 1


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EDMEulerScheduler(), "EDMEulerScheduler has no betas.*give the pipeline a DDIMScheduler"),
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler has no betas"),
        (DDPMScheduler(beta_schedule="sigmoid"), "the betas of DDPMScheduler are not known"),
        (
            DPMSolverMultistepScheduler(
                **SD, prediction_type="flow_prediction", use_flow_sigmas=True
            ),
            "'flow_prediction'; supported: epsilon, v_prediction",
        ),
        (EDMEulerScheduler.from_config(DDIMScheduler(**SD).config), "EDMEulerScheduler has no"),
        (
            FlowMatchEulerDiscreteScheduler.from_config(PNDMScheduler(**SD).config),
            "FlowMatchEulerDiscreteScheduler has no betas: .* or for flow matching, is not",
        ),
        (
            EulerDiscreteScheduler(
                **SD, prediction_type="v_prediction", timestep_type="continuous"
            ),
            "EulerDiscreteScheduler of continuous timesteps has no betas.*CosXL",
        ),
        (DDIMScheduler(trained_betas=[0.01] * 10), "make no noise that rises over 1000 timesteps"),
        (DDIMScheduler(trained_betas=[1.5] * 1000), "make no noise that rises over 1000"),
        (DDIMScheduler(trained_betas=[float("nan")] * 1000), "make no noise that rises over 1000"),
        (DDIMScheduler(beta_start=0, beta_end=0), "make no noise that rises over 1000 timesteps"),
        (DDIMScheduler(**SD, timestep_spacing="even"), "timestep_spacing is 'even'; supported: le"),
    ],
)
def test_a_scheduler_that_says_nothing_of_the_noise_is_refused(scheduler, message):
    with pytest.raises(ModelError, match=message):
        discrete_schedule(scheduler)


FLOWS = [
    {"shift": 1.0},
    {"shift": 3.0},
    {"shift": 3.0, "use_karras_sigmas": True},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
]


@pytest.mark.parametrize("settings", FLOWS, ids=str)
@pytest.mark.parametrize("flux_sigmas", [False, True])
@pytest.mark.parametrize("steps", [4, 28])
def test_a_flow_grid_is_eulers_step_for_step(settings, flux_sigmas, steps):
    """Down as FlowMatchEuler goes, and up again through the same levels."""
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    mu = 0.8 if settings.get("use_dynamic_shifting") else None
    schedule = flow_schedule(scheduler, mu, flux_sigmas)
    x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    found = ours(schedule, x, steps)
    start = np.linspace(1.0, 1 / steps, steps) if flux_sigmas else None
    scheduler.set_timesteps(None if flux_sigmas else steps, sigmas=start, mu=mu)
    told = schedule.grid(steps, "sampler").timesteps.flip(0)[:-1].float()
    torch.testing.assert_close(told, scheduler.timesteps)
    for state, t in zip(found, scheduler.timesteps, strict=True):
        x = scheduler.step(wild(x, t), t, x).prev_sample
        torch.testing.assert_close(state, x, rtol=1e-4, atol=1e-4)


def test_levels_that_fall_are_refused():
    with pytest.raises(ModelError, match="invert_sigmas=false"):
        flow_schedule(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction_type": "epsilon"}, "needs prediction_type=flow_prediction"),
        ({"use_dynamic_shifting": True}, "needs .* use_dynamic_shifting=false"),
        ({"final_sigmas_type": "sigma_min"}, "leaves noise in the image: .*final_sigmas_type=zero"),
    ],
)
def test_a_solver_that_contradicts_flow_matching_is_refused(settings, message):
    """As eps it would sample something else; and the image has to be at the level 0."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    flow_schedule(UniPCMultistepScheduler(**flow))
    with pytest.raises(ModelError, match=message):
        flow_schedule(UniPCMultistepScheduler(**flow | settings))


def test_flow_needs_its_scheduler():
    """Also by the recipe that asks the scheduler how it shifts."""
    for make in (flow_schedule, lambda scheduler: flux_schedules(scheduler, 16)((64, 64))):
        with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler"):
            make(DDIMScheduler(**SD))


V = "v_prediction"  # with zero terminal SNR it also starts from the last timestep


@pytest.mark.parametrize(
    ("scheduler", "distilled"),
    [
        (LCMScheduler(), True),
        (TCDScheduler(), True),
        (SCMScheduler(), True),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), True),
        (EulerAncestralDiscreteScheduler(timestep_spacing="trailing"), True),
        (EulerDiscreteScheduler(timestep_spacing="leading"), False),
        (EulerDiscreteScheduler(timestep_spacing="trailing", prediction_type=V), False),
        (FlowMatchEulerDiscreteScheduler(), False),
        (DDIMScheduler(timestep_spacing="trailing"), False),
    ],
)
def test_samplers_of_few_steps_are_known(scheduler, distilled):
    assert bool(few_steps(scheduler)) == distilled


def test_a_shift_that_depends_on_the_steps_has_no_levels_for_one_step():
    """Stretched to end at 0.02, a single level would have to be at both ends."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    schedule = flow_schedule(scheduler, lambda steps: 0.8, flux_sigmas=True)
    few, many = (schedule.grid(n, "sampler").levels.sigma for n in (2, 50))
    assert few[-1] == many[-1] == 1
    assert [float(few[1]), float(many[1])] == pytest.approx([0.02, 0.02], abs=1e-5)
    with pytest.raises(ModelError, match="no levels for 1 steps"):
        schedule.grid(1, "sampler")


@pytest.mark.parametrize("solver", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_a_flow_grid_of_another_solver_is_its_own(solver):
    theirs = solver(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    grid = flow_schedule(theirs).grid(5, "sampler")
    theirs.set_timesteps(5)
    assert grid.timesteps.flip(0)[:-1].tolist() == theirs.timesteps.tolist()
    torch.testing.assert_close(grid.levels.sigma.flip(0).float(), theirs.sigmas)
    # 3 s / (1 + 2 s) of s = 0.4
    assert float(grid.levels.sigma[2]) == pytest.approx(1.2 / 1.8, abs=2e-3)
