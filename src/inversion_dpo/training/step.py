"""One training step: states, predictions, errors, loss, gradient, update.

A step on a trajectory is a policy forward and backward and nothing else: the state, its target
and the reference's prediction come from the cache.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from inversion_dpo.maths.beta import BETA_DECAY, adapted_beta, gap_weighted
from inversion_dpo.maths.inversion import passes
from inversion_dpo.maths.losses import (
    as_pair_errors,
    pooled,
    residual_overlap,
    safeguarded,
    squared_error,
    with_terms,
)
from inversion_dpo.maths.methods import STORED
from inversion_dpo.maths.records import LossOutput, LossSettings, NoisyStates, PairErrors
from inversion_dpo.run.processes import share
from inversion_dpo.run.sharded import settle, total, whole
from inversion_dpo.training.checks import is_finite, leave_out
from inversion_dpo.training.generators import Generators, generator_for
from inversion_dpo.training.policy import assign
from inversion_dpo.training.session import Session, batch_of_step, split_by
from inversion_dpo.training.states import (
    STATES,
    predict,
    stored_positions,
    with_dropout,
    with_reference,
)

logger = logging.getLogger(__name__)
Row = dict[str, float]
Measured = dict[str, Tensor]  # means of a part, still on the device


def step(session: Session, number: int, learning_rate: float) -> Row:
    """Take one step: backward, clip, update; the measurements are averaged over processes.

    A step whose loss or gradient is not finite is left out; the one after ``training.max_skipped``
    such is a NotFiniteError.

    Args:
        session: everything that is alive.
        number: of the step, from 0; with the seed it decides pairs, states and noise.
        learning_rate: of this step.
    """
    accelerator, optimizer = session.accelerator, session.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    rows, own = backward(session, number)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = whole(accelerator.clip_grad_norm_(trained, session.clip))
    row = total(rows, accelerator.device, session.team, same={"grad_norm": norm})
    row = of_sides(row) if session.cache.single else row
    if is_finite(row) or accelerator.scaler is not None:
        optimizer.step()  # a scaler of fp16 leaves the step out itself, and learns from it
    if not is_finite(row) and (accelerator.scaler is None or not math.isfinite(row["loss"])):
        losses_of = [(p, x) for part, loss in own for p, x in zip(part, loss.tolist(), strict=True)]
        leave_out(session, number, row, [p for p, x in losses_of if not math.isfinite(x)])
    if session.plan.gradient_factor is not None:
        adapt(session, row, session.plan.gradient_factor)
    if session.moved and (number + 1) % (session.plan.reference_every or 1) == 0:
        assign(session.moved, session.policy.trainable())
    return row


def settings_now(session: Session) -> LossSettings:
    """Return the loss's settings, with the beta that has adapted so far."""
    settings = session.plan.settings
    if session.plan.gradient_factor is None:
        return settings
    return replace(settings, beta=session.coefficients.get("beta", settings.beta))


def adapt(session: Session, row: Row, factor: float) -> None:
    """Let beta follow the mean gradient factor, which is to be at least ``factor``; log it."""
    coefficients, first = session.coefficients, session.plan.settings.beta
    row["beta"] = settings_now(session).beta
    g = min(max(row["gradient_factor"], 1e-6), 1 - 1e-6)
    if is_finite(row):
        logit, before = first / row["beta"] * math.log((1 - g) / g), coefficients.get("logit", 0.0)
        coefficients["logit"] = BETA_DECAY * before + (1 - BETA_DECAY) * logit
        coefficients["beta"] = adapted_beta(coefficients["logit"], factor, first)


def backward(
    session: Session, number: int
) -> tuple[list[tuple[float, Measured]], list[tuple[list[int], Tensor]]]:
    """Backward on this process's share of the step's pairs.

    Any number of processes and parts has the same gradient, but for rounding: DDP and FSDP average
    over processes, and every pair weighs the same.

    Returns:
        The measurements of this process's parts, each with its share of the batch; and the pairs
        of each part with their losses. The device is not waited for.
    """
    accelerator, plan, team = session.accelerator, session.plan, session.team
    cache = session.cache
    parts, items = plan.accumulation, plan.batch_size * plan.states
    drop = max(plan.prompt_dropout, plan.graph_dropout, plan.caption_dropout) > 0
    rows, own = [], []
    for part in range(parts):
        with nullcontext() if part == parts - 1 else accelerator.no_sync(session.network):
            here, generators = part_of_step(session, number, part)
            after, drawn = part_of_step(session, *divmod(number * parts + part + 1, parts))
            cache.read_ahead([pair for pair, _ in after], stored_positions(session, drawn))
            output, errors, evaluations = losses(session, here, generators, drop=drop)
            accelerator.backward(output.loss.sum() * (team.size / items))
        row = measurements(output, errors, compared=plan.loss.reference, single=cache.single)
        images = 1.0 if cache.single else 2.0
        spent = images * evaluations * items  # parts and processes add up
        row["evaluations"] = row["loss"].new_full((), spent)
        rows.append((len(here) / items, row))
        own.append(([pair for pair, _ in here], output.loss.detach()))
    return rows, own


def part_of_step(
    session: Session, number: int, part: int
) -> tuple[list[tuple[int, int]], Generators]:
    """List the (pair, epoch)s of one part of this process's share, and the generator of each."""
    plan, team = session.plan, session.team
    mine = share(range(plan.batch_size), team.size, team.rank)
    batch = batch_of_step(session.buckets, plan.batch_size, plan.seed, number)
    share_of = share(mine, plan.accumulation, part)
    places = [(k, s) for k in share_of for s in range(plan.states)]
    generators = [generator_for(0, plan.seed, number, *place) for place in places]
    return [batch[k] for k, _ in places], generators


def losses(
    session: Session,
    batch: list[tuple[int, int]],
    generators: Generators,
    *,
    drop: bool = False,
    compare: bool = False,
) -> tuple[LossOutput, PairErrors, int]:
    """Compute losses and errors of (pair, epoch)s, and the network evaluations per image.

    Args:
        session: everything that is alive.
        batch: numbers of pairs, each with its epoch.
        generators: one for each pair.
        drop: drop some prompts or scene graphs; the cached predictions of the reference, which knew
            them, are then replaced.
        compare: evaluate the first reference, whatever the loss.
    """
    plan, device, pairs = session.plan, session.accelerator.device, [pair for pair, _ in batch]
    condition = session.cache.condition(pairs)
    if drop:
        with_dropout(session, batch, condition)
    condition = {k: v.to(device, non_blocking=True) for k, v in condition.items()}
    states = STATES[plan.path](session, pairs, condition, generators)
    if session.cache.single:  # its second half is the first
        states = states.first(len(pairs))
        condition = {k: v[: len(pairs)] for k, v in condition.items()}
    if (plan.loss.reference or compare) and (drop or plan.path not in STORED):
        states = with_reference(session, states, condition, first=compare)
    states = states.to(device)
    prediction = predict(session, session.network, states.x_t, states.timesteps, condition)
    errors = pair_errors(session, states, prediction, pairs)
    if plan.path == "released":
        errors = pooled(errors, plan.states)
    if plan.safeguard:
        errors = safeguarded(errors, plan.safeguard_margin)
    evaluations = passes(plan.guidance_scale) * (states.evaluations + 3)
    settings = settings_now(session)
    weighed = gap_weighted(errors, plan.gap) if plan.gap else errors
    output = plan.loss.function(weighed, settings)
    if settings.anchor or settings.sft_weight:
        output = with_terms(output, errors, settings)
    return output, errors, evaluations


def pair_errors(
    session: Session, states: NoisyStates, prediction: Tensor, pairs: list[int]
) -> PairErrors:
    """Compare predictions (2P, *) with their targets and the reference: what the loss needs.

    Of single images, predictions are (P, *); a loss without labels takes all for liked.
    """
    plan, count, device = session.plan, len(pairs), prediction.device
    weights = plan.weights(session.cache.size(pairs[0])).to(device, non_blocking=True)
    region = session.cache.region(pairs)
    if region is not None:
        region = region.to(device, non_blocking=True)
    every = region  # of all images
    if region is not None and len(prediction) > count:
        every = torch.cat([region, region])
    policy = states.scale * squared_error(states.target, prediction, every)
    reference = states.scale * squared_error(states.target, states.reference, every)
    moved = states.scale * squared_error(states.reference, prediction, every)
    more = {"weight": weights[states.level[:count]]}
    if plan.soft_labels:
        p = session.cache.preference(pairs).to(device, policy.dtype, non_blocking=True)
        more["preference"] = torch.maximum(p, 1 - p) if session.cache.single else p
    if plan.loss.baseline:
        more["baseline"] = mean_gain(session, (reference - policy).detach())
    if plan.safeguard:
        overlap = residual_overlap(states.target, prediction.detach(), region)
        more["overlap"] = states.scale[:count] * overlap
    liked = None
    if session.cache.single:
        liked = session.cache.liked(pairs).to(device, non_blocking=True)
        liked = liked | ("labels" not in plan.loss.uses)
    return as_pair_errors(policy, reference, moved=moved, liked=liked, **more)


def mean_gain(session: Session, gain: Tensor) -> Tensor:
    """Average the gains [2P] over all images that are computed at once, on all processes."""
    if session.accelerator.num_processes == 1:
        return gain.mean()
    sums = torch.stack([gain.sum(), gain.new_tensor(len(gain))])
    summed = session.accelerator.reduce(sums, "sum")  # shares may be uneven
    return summed[0] / summed[1]


def measurements(
    output: LossOutput, errors: PairErrors, *, compared: bool, single: bool = False
) -> Measured:
    """Measure what is always logged: winner and loser errors, accuracy, margin, drift.

    The gradient factor is what sigmoid's gradient leaves of a pair: 1/2 at the reference, near 0
    where the winner is far ahead. The gap is that of the reference's errors on a pair.
    """
    row = {"loss": output.loss, "winner_error": errors.winner, "loser_error": errors.loser}
    if compared:
        row |= {
            "winner_error_ref": errors.winner_ref,
            "loser_error_ref": errors.loser_ref,
            "accuracy": (output.margin.sign() + 1) / 2,  # exact ties count half
            "margin": output.margin,
            "gradient_factor": torch.sigmoid(-output.margin),
            "drift": errors.winner_share * errors.winner_moved
            + errors.loser_share * errors.loser_moved,
        }
    if single:
        shares = {"winners": errors.winner_share, "losers": errors.loser_share}
        right = {f"{k[:-1]}_right": v * row["accuracy"] for k, v in shares.items() if compared}
        row |= shares | right
    elif compared:
        furthest = torch.maximum(errors.winner_ref, errors.loser_ref).clamp(min=1e-12)
        row["pair_gap"] = (errors.winner_ref - errors.loser_ref).abs() / furthest
    return {k: v.detach().float().mean() for k, v in row.items()}


def of_sides(row: Row) -> Row:
    """Average errors of single images over those that are liked, and over those that are not.

    The accuracy is then the mean of both kinds', so that chance is 1/2 however many of each.
    """
    shares = {"winner_": row.pop("winners", 1.0), "loser_": row.pop("losers", 1.0)}
    parts = {k: share for k in row for side, share in shares.items() if k.startswith(side)}
    row = {k: v / parts.get(k, 1.0) for k, v in row.items() if parts.get(k, 1.0)}
    right = [row.pop(f"{side}right") for side in shares if f"{side}right" in row]
    return row | ({"accuracy": sum(right) / len(right)} if right else {})


@torch.no_grad()
def heldout(session: Session, limit: int = 128, draws: int = 2) -> Row:
    """Measure pairs never trained on, at the same states every time, over all processes.

    Args:
        session: everything that is alive.
        limit: pairs that are measured, at most.
        draws: states of each pair.
    """
    plan, team, pairs = session.plan, session.team, session.heldout_pairs[:limit]
    items = [(draw, place) for draw in range(draws) for place in range(len(pairs))]
    size = -(-plan.batch_size // (team.size * plan.accumulation))
    if plan.path == "released":
        items = [(state, place) for place in range(len(pairs)) for state in range(plan.states)]
        size *= plan.states
    groups = split_by(items, lambda item: session.cache.size(pairs[item[1]]))
    chunks = [group[k : k + size] for group in groups for k in range(0, len(group), size)]

    def drawn(number: int) -> tuple[list[tuple[int, int]], Generators]:
        chunk = chunks[number % len(chunks)]
        return [(pairs[place], 0) for _, place in chunk], [generator_for(1, *i) for i in chunk]

    rows = []
    for first in range(0, len(chunks), team.size):  # as many forwards on every process: FSDP waits
        number = first + team.rank
        chunk, (batch, generators) = chunks[number % len(chunks)], drawn(number)
        after, later = drawn(number + team.size)
        session.cache.read_ahead([pair for pair, _ in after], stored_positions(session, later))
        output, errors, _ = losses(session, batch, generators, compare=True)
        row = measurements(output, errors, compared=True, single=session.cache.single)
        rows.append((len(chunk) / len(items) if number < len(chunks) else 0.0, row))
    settle(session.network)
    mean = total(rows, session.accelerator.device, team)
    mean["pairs"] = float(len(pairs))
    if session.cache.single:
        liked = session.cache.liked(pairs) | ("labels" not in plan.loss.uses)
        mean = of_sides(mean) | {"liked": float(liked.sum())}
    return {f"heldout_{k}": v for k, v in mean.items() if k != "loss"}
