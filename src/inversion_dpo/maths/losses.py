"""Compute preference losses: pure functions from per-pair errors to per-pair losses.

An error is the mean over a latent's elements of ||target - prediction||^2, of eps in diffusion
models and of the velocity in flow models (``schedule.error_scale``). A method is a loss, a path and
a target, see ``methods.METHODS``. Losses are per pair; nothing is averaged inside the sigmoid.
Equations and sources: docs/explanation/objectives.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from inversion_dpo.maths.methods import USES
from inversion_dpo.maths.records import LossOutput, LossSettings, PairErrors

LINKS = ("sigmoid", "hinge", "ipo")


def squared_error(target: Tensor, prediction: Tensor, region: Tensor | None = None) -> Tensor:
    """Compute ||target - prediction||^2, mean over elements, in float32: (B, *) -> [B].

    Args:
        target: (B, *).
        prediction: (B, *).
        region: weights of the elements, to broadcast, of mean 1; None for equal ones.
    """
    squares = (target.float() - prediction.float()).square()
    return (squares if region is None else squares * region).flatten(1).mean(1)


def residual_overlap(target: Tensor, prediction: Tensor, region: Tensor | None = None) -> Tensor:
    """Compute the inner product of winners' and losers' residuals, as a mean: (2P, *) -> [P].

    Args:
        target: (2P, *), winners before losers.
        prediction: (2P, *).
        region: weights of a pair's elements, to broadcast, of mean 1; None for equal ones.
    """
    winner, loser = torch.chunk(target.float() - prediction.float(), 2)
    both = winner * loser
    return (both if region is None else both * region).flatten(1).mean(1)


def dpo_logit(errors: PairErrors, beta: float) -> Tensor:
    """Compute -(beta / 2) k (s_w - s_l), [P], with s = error - reference error."""
    s_w, s_l = errors.winner - errors.winner_ref, errors.loser - errors.loser_ref
    return -(beta / 2) * errors.weight * (s_w - s_l)


def link_loss(logit: Tensor, p: Tensor, link: str) -> Tensor:
    """Compute the loss of a logit whose winner is the better image with probability p.

    Args:
        logit: of each pair, [P].
        p: [P], 1 for a hard label.
        link: one of LINKS.

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


def dpo(errors: PairErrors, s: LossSettings) -> LossOutput:
    """Compute -log sigmoid of :func:`dpo_logit`, or another link; log 2 at the reference.

    On an inverted trajectory this is Inversion-DPO (2025, https://arxiv.org/abs/2507.11554); on
    fresh noise shared by the two images it is Diffusion-DPO (Wallace et al., 2023,
    https://arxiv.org/abs/2311.12908); on the policy's own inversion it is DDIM-InPO (2025,
    https://arxiv.org/abs/2503.18454).
    """
    return of_logit(dpo_logit(errors, s.beta), errors, s)


def of_logit(logit: Tensor, errors: PairErrors, s: LossSettings) -> LossOutput:
    """Compute the linked loss of a logit, under the pairs' own and smoothed labels.

    Args:
        logit: of each pair, [P].
        errors: have the pairs' labels.
        s: link and smoothing.
    """
    p = s.label_smoothing + (1 - 2 * s.label_smoothing) * errors.preference
    return LossOutput(link_loss(logit, p, s.link), logit.detach())


def dpo_bounded(errors: PairErrors, s: LossSettings) -> LossOutput:
    """Compute :func:`dpo` of log-ratios that saturate image by image: tanh r_w - tanh r_l.

    Here r = (beta / 2) k (reference error - error), so a loser that is far off is pushed no
    further, as in :func:`kto`: the logit is 2 - 4 times that loss without its baseline.
    """
    half = s.beta / 2 * errors.weight
    winner = torch.tanh(half * (errors.winner_ref - errors.winner))
    loser = torch.tanh(half * (errors.loser_ref - errors.loser))
    return of_logit(winner - loser, errors, s)


def released_sign(errors: PairErrors, s: LossSettings) -> LossOutput:
    """Compute :func:`dpo` with the sign of the authors' released script: for reproduction only.

    With target ``reference`` it pushes the policy away from the reference on winners.
    """
    return dpo(errors, replace(s, beta=-s.beta))


def smpo(errors: PairErrors, s: LossSettings) -> LossOutput:
    """Compute -log sigmoid(10 (2p - 1) logit): the softer the preference p, the smaller the logit.

    Source: SmPO-Diffusion (2025, https://arxiv.org/abs/2506.02698).
    """
    logit = 10 * (2 * errors.preference - 1) * dpo_logit(errors, s.beta)
    return LossOutput(-F.logsigmoid(logit), logit.detach())


def dspo(errors: PairErrors, s: LossSettings) -> LossOutput:
    """Compute ||(eps_theta - eps*) - c (eps_theta - eps_ref)||^2 on winners.

    Here c = beta (1 - sigmoid(logit)). Expanded into errors: with a = eps_theta - eps* and
    b = eps_theta - eps_ref, |a - b|^2 is the reference's error, so
    2 a.b = |a|^2 + |b|^2 - |a - b|^2. At the reference it is the winner's error.
    Source: Zhu et al., DSPO, ICLR 2025, https://github.com/huaishengzhu/DSPO.
    """
    logit = dpo_logit(errors, s.beta)
    c = s.beta * torch.sigmoid(-logit)
    twice_ab = errors.winner + errors.winner_moved - errors.winner_ref
    loss = errors.winner - c * twice_ab + c.square() * errors.winner_moved
    return LossOutput(errors.weight * loss, logit.detach())


DMPO_ALPHA = 0.01  # of the authors of Diffusion-SDPO, whose script has the loss


def dmpo(errors: PairErrors, s: LossSettings) -> LossOutput:
    """Compute KL(p || q), p = sigmoid(logit) and q the label, smoothed by at least 0.01.

    The reversed divergence: its gradient vanishes where the policy is wrong beyond doubt, and
    pushes the margin back above log(q / (1 - q)). Source: Diffusion-DMPO, 2025,
    https://arxiv.org/abs/2507.07510.
    """
    logit, a = dpo_logit(errors, s.beta), max(s.label_smoothing, DMPO_ALPHA)
    p, q = torch.sigmoid(logit), a + (1 - 2 * a) * errors.preference
    loss = p * (F.logsigmoid(logit) - q.log()) + (1 - p) * (F.logsigmoid(-logit) - (1 - q).log())
    return LossOutput(loss, logit.detach())


def nft(errors: PairErrors, s: LossSettings) -> LossOutput:
    """Compute r |v+ - v*|^2 + (1 - r) |v- - v*|^2, the mean over the images of a row.

    Here v+ = (1 - beta) v_ref + beta v_theta, v- = (1 + beta) v_ref - beta v_theta, and r is the
    probability that the image is the better one. Expanded into errors e and the squared distance m
    of the two predictions: |v+ - v*|^2 = (1 - beta) e_ref + beta e - beta (1 - beta) m, and
    |v- - v*|^2 = (1 + beta) e_ref - beta e + beta (1 + beta) m.
    Source: DiffusionNFT, 2025, https://arxiv.org/abs/2509.16117, here on given pairs.
    """
    b, p = s.beta, errors.preference

    def of_image(r: Tensor, e: Tensor, e_ref: Tensor, m: Tensor) -> Tensor:
        better = (1 - b) * e_ref + b * e - b * (1 - b) * m
        worse = (1 + b) * e_ref - b * e + b * (1 + b) * m
        return r * better + (1 - r) * worse

    winner = of_image(p, errors.winner, errors.winner_ref, errors.winner_moved)
    loser = of_image(1 - p, errors.loser, errors.loser_ref, errors.loser_moved)
    gain = (errors.winner_ref - errors.winner) - (errors.loser_ref - errors.loser)
    loss = errors.winner_share * winner + errors.loser_share * loser
    return LossOutput(errors.weight * loss, (b * errors.weight * gain).detach())


MAPO_SCALE, MAPO_STEPS = 0.5, 1000  # c and T of the authors


def mapo(errors: PairErrors, s: LossSettings) -> LossOutput:
    """Compute error_w - beta log sigmoid(T (phi(c error_w) - phi(c error_l))).

    Here phi(u) = u / (e^u - 1). There is no reference; beta is the weight of the preference beside
    denoising. Source: Hong et al., Margin-aware Preference Optimization, 2024,
    https://arxiv.org/abs/2406.06424.
    """
    phi_w, phi_l = (
        u / torch.expm1(u)
        for u in (MAPO_SCALE * e.clamp(min=1e-12) for e in (errors.winner, errors.loser))
    )
    logit = errors.weight * MAPO_STEPS * (phi_w - phi_l)
    return LossOutput(errors.winner - s.beta * F.logsigmoid(logit), logit.detach())


def kto(errors: PairErrors, s: LossSettings) -> LossOutput:
    """Compute 1 - sigmoid(+-beta (g - baseline)), g = reference error - error; + on winners.

    The loss is the weighted mean over the images of a row, 1/2 at the reference. The baseline is
    clamped to be >= 0. Source: Li et al., Diffusion-KTO, 2024, https://arxiv.org/abs/2404.04465.
    """
    g_w, g_l = errors.winner_ref - errors.winner, errors.loser_ref - errors.loser
    beta, g_bar = s.beta * errors.weight, errors.baseline.clamp(min=0)
    liked, disliked = torch.sigmoid(-beta * (g_w - g_bar)), torch.sigmoid(beta * (g_l - g_bar))
    loss = s.liked * errors.winner_share * liked + s.disliked * errors.loser_share * disliked
    return LossOutput(loss, (beta * (g_w - g_l)).detach())


def balance(share: float, liked: int, disliked: int) -> tuple[float, float]:
    """Compute the weights with which liked images have this share of a mean over all images.

    They are lambda_D and lambda_U of KTO (Ethayarajh et al., 2024,
    https://arxiv.org/abs/2402.01306), which takes lambda_D n_D / lambda_U n_U from 1 to 4/3: a
    share of 0.5 to 0.57. In expectation they are Diffusion-KTO's ``positive_ratio``.

    Args:
        share: of the liked images, in (0, 1).
        liked: their number, at least 1.
        disliked: that of the others, at least 1.
    """
    total = liked + disliked
    return share * total / liked, (1 - share) * total / disliked


def sft(errors: PairErrors, s: LossSettings) -> LossOutput:
    """Compute the denoising loss on winners alone, the baseline of every preference method."""
    return LossOutput(errors.weight * errors.winner, torch.zeros_like(errors.winner).detach())


def denoising(errors: PairErrors, s: LossSettings) -> LossOutput:
    """Compute the denoising loss on all images of a row; the preference has no effect.

    :func:`sft` takes the winners alone; this is for pairs that are two pictures of one caption.
    """
    mean = errors.winner_share * errors.winner + errors.loser_share * errors.loser
    return LossOutput(errors.weight * mean, torch.zeros_like(mean).detach())


def safeguarded(errors: PairErrors, mu: float = 0.0) -> PairErrors:
    """Scale the loser's gradient so that the winner's error does not rise; errors stay the same.

    lambda = (1 - mu) |r_w|^2 / <r_w, r_l>, at most 1, where the residuals of winner and loser
    overlap, else 1; per pair (the authors' code takes one for the whole batch). It holds to first
    order, if the network's Jacobian is the same at both. Source: Fu et al., Diffusion-SDPO, 2025,
    https://arxiv.org/abs/2511.03317.
    """
    overlap, held = errors.overlap, errors.loser.detach()
    cap = (1 - mu) * errors.winner.detach() / overlap.clamp(min=1e-12)
    scale = torch.where(overlap > 0, cap.clamp(max=1.0), torch.ones_like(cap))
    return replace(errors, loser=held + scale * (errors.loser - held))


def pooled(errors: PairErrors, states: int) -> PairErrors:
    """Average the weighted errors of a pair's states, so that the loss sees one error an image.

    Args:
        errors: [P * states], the states of a pair one after the other.
        states: of each pair.

    Returns:
        As many errors, those of one pair equal, and weights of 1: the mean loss over all is the
        mean over pairs. Inversion-DPO's script averages inside the sigmoid like this.
    """
    names = ("winner", "loser", "winner_ref", "loser_ref", "winner_moved", "loser_moved")
    weighted = {name: errors.weight * getattr(errors, name) for name in names}
    means = {k: v.reshape(-1, states).mean(1) for k, v in weighted.items()}
    each = {k: v.repeat_interleave(states) for k, v in means.items()}
    return replace(errors, weight=torch.ones_like(errors.weight), **each)


def with_terms(output: LossOutput, errors: PairErrors, s: LossSettings) -> LossOutput:
    """Add anchor (m_w + m_l) / 2 + sft_weight error_w, times k, to a loss.

    Here m is the squared distance between the predictions of policy and reference. As in the
    Flow-DPO of https://github.com/bghira/SimpleTuner, commit bc8e6ab.

    Args:
        output: of a loss, [P].
        errors: that it was computed from.
        s: has the two weights; 0 adds nothing.
    """
    moved = errors.winner_share * errors.winner_moved + errors.loser_share * errors.loser_moved
    denoising = 2 * errors.winner_share * errors.winner
    terms = errors.weight * (s.anchor * moved + s.sft_weight * denoising)
    return replace(output, loss=output.loss + terms)


@dataclass(frozen=True)
class Loss:
    """A loss function and its requirements.

    function: pure, from errors [P] to losses [P]. uses: the labels and the settings of
    ``objective`` that affect it. baseline: whether it needs the mean over the whole batch, summed
    over processes.
    """

    function: Callable[[PairErrors, LossSettings], LossOutput]
    uses: frozenset[str]
    baseline: bool = False

    @property
    def reference(self) -> bool:
        """Whether it compares with the reference."""
        return "reference" in self.uses


LOSSES: dict[str, Loss] = {
    "dpo": Loss(dpo, USES["dpo"]),
    "dpo_bounded": Loss(dpo_bounded, USES["dpo_bounded"]),
    "dpo_released": Loss(released_sign, USES["dpo_released"]),
    "smpo": Loss(smpo, USES["smpo"]),
    "dspo": Loss(dspo, USES["dspo"]),
    "mapo": Loss(mapo, USES["mapo"]),
    "dmpo": Loss(dmpo, USES["dmpo"]),
    "nft": Loss(nft, USES["nft"]),
    "kto": Loss(kto, USES["kto"], baseline=True),
    "sft": Loss(sft, USES["sft"]),
    "denoising": Loss(denoising, USES["denoising"]),
}


def as_pair_errors(
    policy: Tensor,
    reference: Tensor,
    *,
    moved: Tensor | None = None,
    liked: Tensor | None = None,
    **of_pairs: Tensor,
) -> PairErrors:
    """Split errors of images into those of winners and losers.

    Args:
        policy: squared errors [2P] of the policy, winners first; [P] of single images.
        reference: the same of the reference.
        moved: squared distances between their predictions; none by default.
        liked: [P], of each single image whether it is a winner; None for pairs.
        of_pairs: other fields of PairErrors, [P]. By default levels and labels count 1, nothing
            overlaps, and the baseline is 0.

    Raises:
        ValueError: the two have other shapes, or pairs an odd number of images.
    """
    if policy.shape != reference.shape or (liked is None and policy.shape[0] % 2):
        raise ValueError(f"need two equal [2P] tensors, got {policy.shape} and {reference.shape}")

    def sides(of_images: Tensor) -> tuple[Tensor, Tensor]:
        if liked is None:
            return of_images.tensor_split(2)[0], of_images.tensor_split(2)[1]
        return torch.where(liked, of_images, 0.0), torch.where(liked, 0.0, of_images)

    (winner, loser), (winner_ref, loser_ref) = sides(policy), sides(reference)
    winner_moved, loser_moved = sides(torch.zeros_like(policy) if moved is None else moved)
    winner_share, loser_share = sides(torch.full_like(reference, 0.5 if liked is None else 1.0))
    zero, one = torch.zeros_like(winner_ref), torch.ones_like(winner_ref)
    default = {"overlap": zero, "weight": one, "preference": one, "baseline": zero}
    return PairErrors(
        winner=winner,
        loser=loser,
        winner_ref=winner_ref,
        loser_ref=loser_ref,
        winner_moved=winner_moved,
        loser_moved=loser_moved,
        winner_share=winner_share,
        loser_share=loser_share,
        **default | of_pairs,
    )
