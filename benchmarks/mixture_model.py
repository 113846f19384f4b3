"""A setting in closed form: a Gaussian mixture, a Bradley-Terry preference, a known optimum.

The reference is the exact noise prediction of a mixture p on the line. Of two draws the larger x
wins with probability sigmoid(x_w - x_l), so the reward is x, and DPO with beta = 1/lambda
(Rafailov et al., 2023, https://arxiv.org/abs/2305.18290) has the optimum p*(x) proportional to
p(x) exp(lambda x), which is a mixture again. A policy is the exact reference plus a small network
that starts at zero. Its samples are the reference's noise carried by DDIM, which on a line is a
monotone map, so quantiles, KL divergence and distance to the optimum carry no sampling noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray
from scipy import optimize, special, stats
from torch import Tensor, nn

from inversion_dpo.maths.beta import BETA_DECAY, adapted_beta, gap_weighted
from inversion_dpo.maths.inversion import invert, recovered_noise
from inversion_dpo.maths.losses import (
    LOSSES,
    as_pair_errors,
    residual_overlap,
    safeguarded,
    squared_error,
)
from inversion_dpo.maths.methods import method_of
from inversion_dpo.maths.records import Grid, Levels, LossOutput, LossSettings
from inversion_dpo.maths.schedule import Schedule, add_noise, posterior_std, step, step_back
from inversion_dpo.maths.targets import target_prediction
from inversion_dpo.models.schedules import discrete_schedule

QUANTILES, SAMPLE_STEPS = 2001, 200
Eps = Callable[[Tensor, Tensor], Tensor]  # noise at x [B, 1] and index in the schedule [B]


@dataclass(frozen=True)
class Mixture:
    """Gaussians on the line with one standard deviation; weights sum to 1."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    std: float

    def tilted(self, strength: float) -> Mixture:
        """Return the mixture proportional to p(x) exp(strength x)."""
        w, m = np.array(self.weights), np.array(self.means)
        logit = np.log(w) + strength * m
        tilted = np.exp(logit - logit.max())
        shift = strength * self.std**2
        return Mixture(tuple(tilted / tilted.sum()), tuple(m + shift), self.std)

    def mean(self) -> float:
        """E[x]."""
        return float(np.dot(self.weights, self.means))

    def log_density(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """log p(x)."""
        parts = stats.norm.logpdf(x[:, None], self.means, self.std)
        return np.asarray(special.logsumexp(parts, axis=1, b=self.weights))

    def quantiles(self, u: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the inverse of the distribution function, at u in (0, 1)."""
        low, high = min(self.means) - 9 * self.std, max(self.means) + 9 * self.std
        x = np.linspace(low, high, 40_001)
        cdf = (stats.norm.cdf(x[:, None], self.means, self.std) * np.array(self.weights)).sum(1)
        return np.interp(u, cdf, x)

    def draw(self, count: int, seed: int) -> Tensor:
        """Draw samples [count, 1]."""
        rng = np.random.default_rng(seed)
        which = rng.choice(len(self.means), count, p=self.weights)
        return torch.tensor(rng.normal(np.array(self.means)[which], self.std)[:, None])

    def eps(self, x: Tensor, level: Levels) -> Tensor:
        """Return the exact noise prediction -sigma d/dx log p_t(x) at x [B, 1] and levels [B]."""
        a, s = level.alpha[:, None], level.sigma[:, None]
        variance = a**2 * self.std**2 + s**2
        off = x - a * torch.tensor(self.means)
        share = (torch.tensor(self.weights).log() - off**2 / (2 * variance)).softmax(1)
        return s * (share * off).sum(1, keepdim=True) / variance


REFERENCE = Mixture((0.5, 0.5), (-1.5, 1.5), 0.5)
SCHEDULE = discrete_schedule(DDIMScheduler(beta_schedule="scaled_linear"))


def preference_pairs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(x [2P, 1], winners first; p [P], how probably the winner is the better one)."""
    a, b = REFERENCE.draw(2 * count, seed).chunk(2)
    p = torch.sigmoid(a - b)
    first = torch.rand(p.shape, generator=torch.Generator().manual_seed(seed)) < p
    winner, loser = torch.where(first, a, b), torch.where(first, b, a)
    return torch.cat([winner, loser]), torch.where(first, p, 1 - p)[:, 0]


class MixturePolicy(nn.Module):
    """The exact reference plus a network that is zero at the start, but for ``jitter``; float64.

    jitter: deviation of the last layer's weights, as rounding would leave them.
    """

    def __init__(self, seed: int, jitter: float = 0.0, width: int = 64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            last = nn.Linear(width, 1)
            self.correction = nn.Sequential(
                nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last
            ).double()
            nn.init.normal_(last.weight, std=jitter)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        """Return the noise at x [B, 1] and indices i [B] of the schedule."""
        level = SCHEDULE.levels[i]
        features = torch.cat([x, level.alpha[:, None], level.sigma[:, None], x**2 / 4], 1)
        return REFERENCE.eps(x, level) + self.correction(features)


def reference_eps(x: Tensor, i: Tensor) -> Tensor:
    """Build the exact reference."""
    return REFERENCE.eps(x, SCHEDULE.levels[i])


def index_grid(grid: Grid) -> Tensor:
    """Find a grid's levels in the schedule (its timesteps are the schedule's own)."""
    return grid.timesteps.long()


def carry(predict: Eps, steps: int = SAMPLE_STEPS) -> NDArray[np.float64]:
    """Where DDIM takes the quantiles of the noise: quantiles of the samples."""
    grid = SCHEDULE.grid(steps)
    index = index_grid(grid)
    u = (np.arange(QUANTILES) + 0.5) / QUANTILES
    level = grid.levels[-1]
    # the reference's own x_T, so that the reference's samples are the mixture's to the last digit
    means = tuple(float(level.alpha) * m for m in REFERENCE.means)
    spread = float((level.alpha**2 * REFERENCE.std**2 + level.sigma**2).sqrt())
    x = torch.tensor(Mixture(REFERENCE.weights, means, spread).quantiles(u))[:, None]
    with torch.no_grad():
        for i in range(steps, 0, -1):
            eps = predict(x, index[i].expand(QUANTILES))
            x = step(x, eps, grid.levels[i], grid.levels[i - 1], "epsilon")
    return np.sort(x[:, 0].numpy())


def divergence(x: NDArray[np.float64]) -> float:
    """KL divergence from the reference of the distribution with these quantiles."""
    gap, middle = np.diff(x).clip(1e-12), (x[1:] + x[:-1]) / 2
    log_q = -np.log(QUANTILES * gap)
    return float(np.mean(log_q - REFERENCE.log_density(middle)))


def least_divergence(reward: float) -> float:
    """Return the least KL divergence for a mean reward: that of a tilted mixture."""

    def mean(strength: float) -> float:
        return REFERENCE.tilted(strength).mean()

    if abs(mean(50.0)) <= abs(reward):  # no tilt that can be computed goes there
        return float("nan")
    strength = optimize.brentq(lambda k: mean(k) - reward, -50.0, 50.0)
    w, m = np.array(REFERENCE.weights), np.array(REFERENCE.means)
    log_z = np.log(np.sum(w * np.exp(strength * m))) + (strength * REFERENCE.std) ** 2 / 2
    return float(strength * reward - log_z)


def outcome(predict: Eps, strength: float = 1.0) -> dict[str, float]:
    """Where a policy ended.

    reward: E[x]. kl: divergence from the reference. excess_kl: the part of it that the optimum with
    the same reward does without. distance: Wasserstein-1 to the optimum of that strength.
    """
    x = carry(predict)
    if not np.isfinite(x).all():
        return dict.fromkeys(("reward", "kl", "excess_kl", "distance"), float("inf"))
    u = (np.arange(QUANTILES) + 0.5) / QUANTILES
    reward, kl = float(x.mean()), divergence(x)
    best = REFERENCE.tilted(strength).quantiles(u)
    return {
        "reward": reward,
        "kl": kl,
        "excess_kl": kl - least_divergence(reward),
        "distance": float(np.abs(x - best).mean()),
    }


@dataclass(frozen=True)
class Setting:
    """What a method is made of: an objective, with another loss or path, target and modifiers.

    coupling: share of an image's own noise on the paths line and known. auto: the gradient factor
    of a beta that adapts from the one that is tuned. gap: beta follows each pair's own p.
    reference_every: steps after which the policy becomes the reference.
    """

    objective: str = "inversion_dpo"
    target: str = "x0"
    link: str = "sigmoid"
    label_smoothing: float = 0.0
    soft_labels: bool = False
    safeguard: bool = False
    loss: str | None = None
    path: str | None = None
    coupling: float = 1.0
    auto: float | None = None
    gap: bool = False
    reference_every: int | None = None


METHODS: dict[str, Setting] = {
    "x0": Setting(),
    "transition": Setting(target="transition"),
    "reference": Setting(target="reference"),
    "released": Setting("inversion_dpo_released", "reference"),
    "diffusion_dpo": Setting("diffusion_dpo"),
    "inpo": Setting("inpo"),
    "smpo": Setting("smpo", soft_labels=True),
    "dspo": Setting("dspo"),
    "mapo": Setting("mapo"),
    "dmpo": Setting("dmpo"),
    "nft": Setting("nft"),
    "kto": Setting("kto"),
    "sft": Setting("sft"),
    "x0_ipo": Setting(link="ipo"),
    "x0_hinge": Setting(link="hinge"),
    "x0_smoothed": Setting(label_smoothing=0.1),
    "x0_soft": Setting(soft_labels=True),
    "x0_safeguard": Setting(safeguard=True),
    "x0_bounded": Setting(loss="dpo_bounded"),
    "x0_auto": Setting(auto=0.2),
    "x0_gap": Setting(gap=True),
    "dpo_moving": Setting("diffusion_dpo", reference_every=100),
    "kto_inverted": Setting("kto", path="trajectory"),
    "stepped": Setting("diffusion_dpo", path="stepped"),
    "line": Setting("diffusion_dpo", path="line"),
    "line_half": Setting("diffusion_dpo", path="line", coupling=0.7),
    "known": Setting("diffusion_dpo", path="known"),
}

Points = tuple[Tensor, Tensor, Tensor]  # x_t [2B, 1], index in the schedule [2B], target


def noise_points(
    x_0: Tensor, schedule: Schedule, generator: torch.Generator, own: Tensor | None, rho: float
) -> Points:
    """Fresh noise and level, shared by the pair; where images have noise of their own, mixed."""
    half = len(x_0) // 2
    i = torch.randint(1, len(schedule.timesteps), (half,), generator=generator).repeat(2)
    eps = torch.randn(half, 1, generator=generator, dtype=x_0.dtype).repeat(2, 1)
    if own is not None:
        eps = rho * own + (1 - rho**2) ** 0.5 * eps
    return add_noise(x_0, eps, schedule.levels[i]), i, eps


def policy_points(
    x_0: Tensor, grid: Grid, predict: Eps, renoise: bool, generator: torch.Generator
) -> Points:
    """Draw a state of the policy's inversion: with a little noise, or along averaged steps."""
    index, levels = index_grid(grid), grid.levels
    i = torch.randint(1, grid.steps + 1, (len(x_0) // 2,), generator=generator).repeat(2)
    x = x_0
    with torch.no_grad():
        for j in range(int(i.max())):
            t, low, high = index[j].expand(len(x)), levels[j], levels[j + 1]
            eps = predict(x, t)
            if renoise:
                eps = (eps + predict(step(x, eps, low, high, "epsilon"), t)) / 2
            there = step(x, eps, low, high, "epsilon")
            if not renoise:
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
                there = there + 0.1 * posterior_std(low, high) * noise
            x = torch.where((i > j)[:, None], there, x)
    return x, index[i], target_prediction("x0", i, (x_0, x_0, x), x, levels, "epsilon")


def stepped_points(x_0: Tensor, grid: Grid, generator: torch.Generator) -> Points:
    """Draw fresh noise one level below, and go one refined inversion step up from there."""
    index, levels, half = index_grid(grid), grid.levels, len(x_0) // 2
    i = torch.randint(1, grid.steps + 1, (half,), generator=generator).repeat(2)
    eps = torch.randn(half, 1, generator=generator, dtype=x_0.dtype).repeat(2, 1)
    low, high = levels[i - 1], levels[i]
    x = add_noise(x_0, eps, low)
    up = step(x, reference_eps(x, index[i - 1]), low, high, "epsilon")
    up = step_back(x, reference_eps(up, index[i]), high, low, "epsilon")
    return up, index[i], target_prediction("x0", i, (x_0, x, up), up, levels, "epsilon")


@dataclass(frozen=True)
class Budget:
    """The same for every method: pairs, steps, batch (pairs), inversion steps."""

    pairs: int = 2048
    steps: int = 300
    batch: int = 256
    grid: int = 20
    jitter: float = 0.0


class Problem:
    """The pairs of a seed, with their inverted trajectories, and the batches drawn from them."""

    def __init__(self, setting: Setting, seed: int, budget: Budget) -> None:
        self.setting, self.budget = setting, budget
        self.method = method_of(setting.objective, loss=setting.loss, path=setting.path)
        known = self.method.path == "known"  # where the sampler's own way leads
        self.grid = SCHEDULE.grid(SAMPLE_STEPS if known else budget.grid)
        self.x, self.p = preference_pairs(budget.pairs, seed)
        self.reference: Eps = reference_eps
        self.path = invert(self.x, self.grid, lambda x, t: reference_eps(x, t.long()), "epsilon")
        self.noise = recovered_noise(self.path)
        self.generator = torch.Generator().manual_seed(seed)

    def points(self, both: Tensor, policy: MixturePolicy) -> Points:
        """Draw a state of each of these images, and its target."""
        x_0, source = self.x[both], self.method.path
        if source in ("noise", "line", "known"):
            own = None if source == "noise" else self.noise[both]
            return noise_points(x_0, SCHEDULE, self.generator, own, self.setting.coupling)
        if source == "stepped":
            return stepped_points(x_0, self.grid, self.generator)
        if not self.method.inverts:
            return policy_points(x_0, self.grid, policy, source == "renoise", self.generator)
        steps = self.grid.steps
        i = torch.randint(1, steps + 1, (len(both) // 2,), generator=self.generator).repeat(2)
        x_t, path = self.path.states[i, both], self.path
        states, reference = (x_0, path.states[i - 1, both], x_t), path.reference[i, both]
        levels = self.grid.levels
        star = target_prediction(self.setting.target, i, states, reference, levels, "epsilon")
        return x_t, index_grid(self.grid)[i], star

    def loss(self, policy: MixturePolicy, settings: LossSettings) -> LossOutput:
        """Losses of a fresh batch."""
        count = self.budget.pairs
        chosen = torch.randint(count, (self.budget.batch,), generator=self.generator)
        x_t, index, star = self.points(torch.cat([chosen, chosen + count]), policy)
        found = policy(x_t, index)
        with torch.no_grad():
            ref = self.reference(x_t, index)
        ours, theirs = squared_error(star, found), squared_error(star, ref)
        errors = as_pair_errors(
            ours,
            theirs,
            moved=squared_error(ref, found),
            overlap=residual_overlap(star, found.detach()),
            baseline=(theirs - ours).detach().mean(),
            **({"preference": self.p[chosen].float()} if self.setting.soft_labels else {}),
        )
        if self.setting.gap:
            told = replace(errors, preference=self.p[chosen].float())
            errors = gap_weighted(told, float((2 * self.p - 1).abs().mean()))
        errors = safeguarded(errors) if self.setting.safeguard else errors
        return LOSSES[self.method.loss].function(errors, settings)


def train_mixture(
    setting: Setting,
    rate: float,
    beta: float,
    seed: int,
    budget: Budget | None = None,
    watch: Callable[[int, MixturePolicy], None] = lambda step, policy: None,
) -> MixturePolicy:
    """Train one policy with Adam and return it; ``watch`` is called before every step."""
    budget = budget or Budget()
    policy, problem = MixturePolicy(seed, budget.jitter), Problem(setting, seed, budget)
    settings, logit = LossSettings(beta, setting.link, setting.label_smoothing), 0.0
    optimizer = torch.optim.Adam(policy.parameters(), rate)
    for number in range(budget.steps):
        watch(number, policy)
        optimizer.zero_grad()
        output = problem.loss(policy, settings)
        output.loss.mean().backward()
        optimizer.step()
        if setting.auto:
            g = torch.sigmoid(-output.margin).mean().item()
            now = beta / settings.beta * math.log((1 - g) / g)
            logit = BETA_DECAY * logit + (1 - BETA_DECAY) * now
            settings = replace(settings, beta=adapted_beta(logit, setting.auto, beta))
        if setting.reference_every and (number + 1) % setting.reference_every == 0:
            problem.reference = copy.deepcopy(policy)
    return policy


def tune_and_run(
    name: str, trials: Sequence[tuple[float, float]], seeds: int, budget: Budget | None = None
) -> dict[str, Any]:
    """Choose the (rate, beta) nearest to the optimum with seed 100, then run all seeds from 0."""
    setting = METHODS[name]
    ends = [outcome(train_mixture(setting, r, b, 100, budget))["distance"] for r, b in trials]
    rate, beta = trials[int(np.argmin(ends))]
    found = [outcome(train_mixture(setting, rate, beta, s, budget)) for s in range(seeds)]
    return {"rate": rate, "beta": beta, "seeds": found}
