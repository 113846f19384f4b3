"""Preference objectives: pure functions from per-pair errors to per-pair losses.

An error is the mean over a latent's elements of ||target - prediction||^2, of eps in diffusion
models and of the velocity in flow models (``schedule.error_scale``). What the target is, and where
x_t comes from, a cached inversion trajectory or fresh noise, is decided before:
``target_prediction`` and ``OBJECTIVES``. Losses are per pair; nothing is averaged inside the
sigmoid. Equations and sources: docs/explanation/objectives.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from inversion_dpo.maths.records import Levels, LossOutput, LossSettings, PairErrors
from inversion_dpo.maths.schedule import prediction_between, step_coefficients

TARGETS = ("transition", "x0", "reference")
LINKS = ("sigmoid", "hinge", "ipo")
WEIGHTS = ("uniform", "min_snr", "transition", "velocity")


def squared_error(target: Tensor, prediction: Tensor) -> Tensor:
    """||target - prediction||^2, mean over elements, in float32 at least: (B, *) -> [B]."""
    return (target.float() - prediction.float()).square().flatten(1).mean(1)


def residual_overlap(target: Tensor, prediction: Tensor) -> Tensor:
    """Inner product of winners' and losers' residuals, mean over elements: (2P, *) -> [P]."""
    winner, loser = torch.chunk(target.float() - prediction.float(), 2)
    return (winner * loser).flatten(1).mean(1)


def target_prediction(
    target: str,
    i: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    reference: Tensor,
    levels: Levels,
    kind: str,
) -> Tensor:
    """What the policy should predict at a state x_t = x_{t_i} of a trajectory; (B, *).

    Args:
        target: transition: the prediction that leads back to x_{t_{i-1}}, the observed transition.
            x0: the prediction that leads straight to the clean image.
            reference: the reference's own, whose gradient is exactly zero at the reference.
        i: index on the grid [B], from 1 on.
        states: the clean x_0, x_{t_{i-1}} and x_t.
        reference: the reference's prediction at x_t.
        levels: of the grid.
        kind: what the network predicts.
    """
    x_0, x_before, x_t = states
    if target == "transition":
        return prediction_between(x_before, levels[i - 1], x_t, levels[i], kind)
    if target == "x0":
        return prediction_between(x_0, levels[0], x_t, levels[i], kind)
    if target == "reference":
        return reference
    raise ValueError(f"unknown target {target!r}; one of {', '.join(TARGETS)}")


def step_weights(levels: Levels, kind: str, name: str) -> Tensor:
    """k of every level but the first, [n-1], before it is scaled to mean 1.

    uniform: 1.
    min_snr: min(SNR, 5) on errors of x_0 (Hang et al., 2023, https://arxiv.org/abs/2303.09556).
    velocity: 1 / alpha^2, which makes errors of eps errors of v: the high noise where the layout
        of a picture is decided counts in full (Salimans & Ho, 2022,
        https://arxiv.org/abs/2202.00512).
    transition: how far an error of the prediction moves the state one step below, squared: the
        exact k of Gaussian transitions that all have one variance.
    """
    flow, here = kind == "flow_prediction", levels[slice(1, None)]
    if name == "uniform":
        return torch.ones_like(here.alpha)
    if name == "min_snr":
        snr = (here.alpha / here.sigma).square()
        return snr.clamp(max=5) * here.sigma.square() if flow else (5 / snr).clamp(max=1)
    if name == "velocity":
        return torch.ones_like(here.alpha) if flow else here.alpha.pow(-2).nan_to_num(posinf=0.0)
    if name == "transition":
        _, c_p = step_coefficients(here, levels[slice(None, -1)], kind if flow else "epsilon")
        return c_p.square().nan_to_num(posinf=0.0)  # where alpha = 0 errors of eps count nothing
    raise ValueError(f"unknown weighting {name!r}; one of {', '.join(WEIGHTS)}")


def dpo_logit(errors: PairErrors, beta: float) -> Tensor:
    """-(beta / 2) k (s_w - s_l) with s = error - reference error; [P]."""
    s_w, s_l = errors.winner - errors.winner_ref, errors.loser - errors.loser_ref
    return -(beta / 2) * errors.weight * (s_w - s_l)


def link_loss(logit: Tensor, p: Tensor, link: str) -> Tensor:
    """Loss of a logit [P] whose winner is the better image with probability p [P].

    sigmoid: -p log s(z) - (1-p) log s(-z); p < 1 is conservative DPO (Mitchell, 2023,
        https://ericmitchell.ai/cdpo.pdf).
    hinge: p max(0, 1-z) + (1-p) max(0, 1+z) (SLiC: Zhao et al., 2023,
        https://arxiv.org/abs/2305.10425).
    ipo: p (z - 1/2)^2 + (1-p) (z + 1/2)^2, beta^2 times the loss of Azar et al., 2023,
        https://arxiv.org/abs/2310.12036.
    """
    if link == "sigmoid":
        return -p * F.logsigmoid(logit) - (1 - p) * F.logsigmoid(-logit)
    if link == "hinge":
        return p * F.relu(1 - logit) + (1 - p) * F.relu(1 + logit)
    if link == "ipo":
        return p * (logit - 0.5).square() + (1 - p) * (logit + 0.5).square()
    raise ValueError(f"unknown link {link!r}; one of {', '.join(LINKS)}")


def _linked(logit: Tensor, errors: PairErrors, s: LossSettings) -> LossOutput:
    p = s.label_smoothing + (1 - 2 * s.label_smoothing) * errors.preference
    return LossOutput(link_loss(logit, p, s.link), logit.detach())


def dpo(errors: PairErrors, s: LossSettings) -> LossOutput:
    """-log sigmoid of :func:`dpo_logit`, or another link; log 2 where the policy is the reference.

    On an inverted trajectory this is Inversion-DPO (2025, https://arxiv.org/abs/2507.11554); on
    fresh noise shared by the two images it is Diffusion-DPO (Wallace et al., 2023,
    https://arxiv.org/abs/2311.12908); on the policy's own inversion it is DDIM-InPO (2025,
    https://arxiv.org/abs/2503.18454).
    """
    return _linked(dpo_logit(errors, s.beta), errors, s)


def released_sign(errors: PairErrors, s: LossSettings) -> LossOutput:
    """:func:`dpo` with the sign of the authors' released script: for reproduction only.

    With target ``reference`` it pushes the policy away from the reference on winners.
    """
    return _linked(-dpo_logit(errors, s.beta), errors, s)


def smpo(errors: PairErrors, s: LossSettings) -> LossOutput:
    """-log sigmoid(10 (2p - 1) logit): the softer the preference p, the smaller the logit.

    Source: SmPO-Diffusion (2025, https://arxiv.org/abs/2506.02698).
    """
    logit = 10 * (2 * errors.preference - 1) * dpo_logit(errors, s.beta)
    return LossOutput(-F.logsigmoid(logit), logit.detach())


def dspo(errors: PairErrors, s: LossSettings) -> LossOutput:
    """||(eps_theta - eps*) - c (eps_theta - eps_ref)||^2 on winners, c = beta (1 - sigmoid(logit)).

    Expanded into errors: with a = eps_theta - eps* and b = eps_theta - eps_ref, |a - b|^2 is the
    reference's error, so 2 a.b = |a|^2 + |b|^2 - |a - b|^2. At the reference it is the winner's
    error. Source: Zhu et al., DSPO, ICLR 2025, https://github.com/huaishengzhu/DSPO.
    """
    logit = dpo_logit(errors, s.beta)
    c = s.beta * torch.sigmoid(-logit)
    twice_ab = errors.winner + errors.winner_moved - errors.winner_ref
    loss = errors.winner - c * twice_ab + c.square() * errors.winner_moved
    return LossOutput(errors.weight * loss, logit.detach())


MAPO_SCALE, MAPO_STEPS = 0.5, 1000  # c and T of the authors


def mapo(errors: PairErrors, s: LossSettings) -> LossOutput:
    """error_w - beta log sigmoid(T (phi(c error_w) - phi(c error_l))), phi(u) = u / (e^u - 1).

    There is no reference; beta is the weight of the preference beside denoising. Source: Hong et
    al., Margin-aware Preference Optimization, 2024, https://arxiv.org/abs/2406.06424.
    """
    phi_w, phi_l = (
        u / torch.expm1(u)
        for u in (MAPO_SCALE * e.clamp(min=1e-12) for e in (errors.winner, errors.loser))
    )
    logit = errors.weight * MAPO_STEPS * (phi_w - phi_l)
    return LossOutput(errors.winner - s.beta * F.logsigmoid(logit), logit.detach())


def kto(errors: PairErrors, s: LossSettings) -> LossOutput:
    """1 - sigmoid(+-beta (g - baseline)), g = reference error - error; + on winners, - on losers.

    The mean of an image's two losses, so 1/2 at the reference. The baseline is clamped to be >= 0.
    Source: Li et al., Diffusion-KTO, 2024, https://arxiv.org/abs/2404.04465.
    """
    g_w, g_l = errors.winner_ref - errors.winner, errors.loser_ref - errors.loser
    beta, g_bar = s.beta * errors.weight, errors.baseline.clamp(min=0)
    loss = (torch.sigmoid(-beta * (g_w - g_bar)) + torch.sigmoid(beta * (g_l - g_bar))) / 2
    return LossOutput(loss, (beta * (g_w - g_l)).detach())


def sft(errors: PairErrors, s: LossSettings) -> LossOutput:
    """Denoising loss on the winners alone; the baseline that any preference method must beat.

    The settings have no part in it, and there is no margin: it is zero.
    """
    return LossOutput(errors.weight * errors.winner, torch.zeros_like(errors.winner).detach())


def denoising(errors: PairErrors, s: LossSettings) -> LossOutput:
    """Denoising loss on both images of a pair, whose preference has no part in it.

    :func:`sft` takes the winners alone; this is for pairs that are two pictures of one caption.
    """
    loss = errors.weight * (errors.winner + errors.loser) / 2
    return LossOutput(loss, torch.zeros_like(loss).detach())


def safeguarded(errors: PairErrors, mu: float = 0.0) -> PairErrors:
    """The same errors, the loser's gradient scaled so that the winner's error does not rise.

    lambda = (1 - mu) |r_w|^2 / <r_w, r_l>, at most 1, where the residuals of winner and loser
    overlap, else 1; per pair (the authors' code takes one for the whole batch). To first order, and
    taking the network's Jacobian to be the same at both. Source: Fu et al., Diffusion-SDPO, 2025,
    https://arxiv.org/abs/2511.03317.
    """
    overlap, held = errors.overlap, errors.loser.detach()
    cap = (1 - mu) * errors.winner.detach() / overlap.clamp(min=1e-12)
    scale = torch.where(overlap > 0, cap.clamp(max=1.0), torch.ones_like(cap))
    return replace(errors, loser=held + scale * (errors.loser - held))


@dataclass(frozen=True)
class Objective:
    """A loss, where its x_t come from, and what it needs.

    source: ``trajectory`` (cached inversion under the reference), ``noise`` (fresh, shared by the
        pair), ``policy`` (inverted under the policy as it is, at every step) or ``renoise`` (the
        same, each step along the mean of two predictions).
    reference: whether the loss compares with the reference.
    linked: whether ``link`` and ``label_smoothing`` have a part in it.
    """

    loss: Callable[[PairErrors, LossSettings], LossOutput]
    source: str
    reference: bool = True
    linked: bool = False


OBJECTIVES: dict[str, Objective] = {
    "inversion_dpo": Objective(dpo, "trajectory", linked=True),
    "inversion_dpo_released": Objective(released_sign, "trajectory", linked=True),
    "diffusion_dpo": Objective(dpo, "noise", linked=True),
    "inpo": Objective(dpo, "policy", linked=True),
    "smpo": Objective(smpo, "renoise"),
    "dspo": Objective(dspo, "noise"),
    "mapo": Objective(mapo, "noise", reference=False),
    "kto": Objective(kto, "noise"),
    "sft": Objective(sft, "noise", reference=False),
    "denoising": Objective(denoising, "noise", reference=False),
}


def implicit_accuracy(margin: Tensor) -> Tensor:
    """Share of pairs with a positive margin; exact ties count half."""
    return ((margin > 0).float() + 0.5 * (margin == 0).float()).mean()


def as_pair_errors(
    policy: Tensor,
    reference: Tensor,
    moved: Tensor | None = None,
    overlap: Tensor | None = None,
    weight: Tensor | None = None,
    preference: Tensor | None = None,
    baseline: Tensor | None = None,
) -> PairErrors:
    """Split errors [2P], winners first, into halves [P]; the last four are [P] already.

    By default nothing moved or overlaps, levels and labels count 1, and the baseline is 0.
    """
    if policy.shape != reference.shape or policy.shape[0] % 2:
        raise ValueError(f"need two equal [2P] tensors, got {policy.shape} and {reference.shape}")
    (w, l), (w_ref, l_ref) = torch.chunk(policy, 2), torch.chunk(reference, 2)
    w_moved, l_moved = torch.chunk(torch.zeros_like(policy) if moved is None else moved, 2)
    zero, one = torch.zeros_like(w_ref), torch.ones_like(w_ref)
    return PairErrors(
        w,
        l,
        w_ref,
        l_ref,
        w_moved,
        l_moved,
        zero if overlap is None else overlap,
        one if weight is None else weight,
        one if preference is None else preference,
        zero if baseline is None else baseline,
    )
