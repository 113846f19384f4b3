"""Work out beforehand what a run takes: forward passes of the network, and with a card its hours.

``--dry-run`` and ``benchmarks/job_cost.py`` count alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from inversion_dpo.data.source import open_pairs
from inversion_dpo.data.transforms import Framing, Size
from inversion_dpo.maths.inversion import evaluations_per_image, passes
from inversion_dpo.maths.losses import LOSSES
from inversion_dpo.maths.methods import STORED
from inversion_dpo.models.base import DiffusionModel, network_of
from inversion_dpo.run.fields import Config
from inversion_dpo.trajectories.cost import evaluations_again, example
from inversion_dpo.trajectories.jobs import sizes_ahead
from inversion_dpo.trajectories.key import extent_of, window
from inversion_dpo.trajectories.method import chosen_method, takes_images

TRAINED = {"lora": 2, "scene_graph": 2, "full": 3}  # forward passes that a trained image costs


@dataclass(frozen=True)
class Card:
    """What a card was measured to do.

    flops: operations a second of a large bf16 product. shares: of that rate, in inversion and in
    training, by the kind of policy. source: where it was measured; an assumption is named.
    """

    name: str
    flops: float
    shares: dict[str, float]
    source: str


SHORT = 1e-3  # hours that nobody plans for
# 216 TFLOP in .824 s were 33% of the rate. No inversion was timed: it is given LoRA's share.
H200 = Card(
    "H200",
    7.94e14,
    {"inversion": 0.23, "lora": 0.23, "scene_graph": 0.23, "full": 0.33},
    "one H200, SDXL at 1024 pixels, 2026-11-27, docs/results/costs.md; inversion is assumed",
)


@dataclass(frozen=True)
class Job:
    """Forward passes of the network, by image: in the inversion of all pairs, and in training.

    kind: of the policy. A backward pass counts as one or two forward passes.
    """

    inversion: float
    training: float
    kind: str

    def hours(self, forward: float, card: Card, cards: int = 1) -> tuple[float, float]:
        """Compute the hours of inversion and of training, if nothing is lost between cards.

        Args:
            forward: operations of one image's forward pass.
            card: what one card does.
            cards: how many share the work.
        """
        a_second = card.flops / forward * 3600 * cards
        shares = card.shares["inversion"], card.shares[self.kind]
        return self.inversion / shares[0] / a_second, self.training / shares[1] / a_second


def job_of(config: Config, pairs: int, again: int = 1) -> Job:
    """Count what a run computes; measuring held-out pairs and encoding are left out.

    Args:
        config: the run's settings.
        pairs: that are inverted, two images each.
        again: see :func:`~inversion_dpo.trajectories.cost.evaluations_again`.
    """
    o, t, d, method = config.objective, config.training, config.data, chosen_method(config)
    low, high = window(config)
    inverted, along, stored = 0, config.inversion.guidance_scale, method.path in STORED
    if method.inverts:
        scales = along, o.guidance_scale if stored else along
        inverted = evaluations_per_image(extent_of(config), *scales, again)
    each: float = TRAINED[config.policy.kind] + t.gradient_checkpointing
    dropped = max(d.prompt_dropout, d.graph_dropout, d.caption_dropout) > 0
    each += LOSSES[method.loss].reference and (dropped or not stored)
    if method.path == "stepped":
        each += 1 + config.inversion.fixed_point_iterations
    if method.path in ("policy", "renoise"):  # up to a level that is drawn
        each += (low + high) / 2 * (2 if method.path == "renoise" else 1)
    states = high if method.path == "released" else o.states
    trained = 2.0 * t.steps * t.batch_size * states * each * passes(o.guidance_scale)
    return Job(2.0 * pairs * inverted, trained, config.policy.kind)


def forward_flops(model: DiffusionModel, size: Size, *, edited: bool = False) -> float | None:
    """Count the operations of one image's forward pass, on a model without weights.

    Args:
        model: from ``check_model``.
        size: (height, width) of the image.
        edited: whether it edits a source.

    Returns:
        None where shapes depend on the text itself, as in families that leave out its padding.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            x = model.encode(torch.zeros(1, 3, *size))
            every = example(model, size, edited=edited)
            every |= model.framing([Framing(size, (0, 0), size)])
            condition = {k: v.to("meta") for k, v in every.items()}
            t = model.schedule.timesteps[1].to("meta").expand(1)
            before = counter.get_total_flops()
            model.predict(network_of(model), x, t, condition)
        except (RuntimeError, NotImplementedError):
            return None
    return float(counter.get_total_flops() - before)


def estimate(config: Config, model: DiffusionModel) -> list[str]:
    """Say what a run takes: passes, and hours on the one card that was measured.

    Args:
        config: the run's settings.
        model: without weights, from ``check_model``.
    """
    pairs = open_pairs(config.data, alone=takes_images(config))
    count = pairs.expected()
    scales = config.inversion.guidance_scale, config.objective.guidance_scale
    job = job_of(config, count or 1000, evaluations_again(model, *scales))
    of = f"{count:,} pairs" if count else "every 1,000 pairs"
    lines = [
        f"forward passes, by image: {job.inversion:,.0f} for the inversion of {of}, "
        f"{job.training:,.0f} in training"
    ]
    t = config.training
    visits = t.steps * t.batch_size / ((count or 1) * (1 - config.data.holdout))
    lines += [f"training sees each pair {visits:,.1f} times"] if count else []
    sizes, _ = sizes_ahead(pairs, config.model.resolution, config.data.fit)
    ((size, _),) = sizes.most_common(1)
    forward = forward_flops(model, size, edited=pairs.edits)
    if forward is None:
        return [*lines, "one of them is not counted beforehand for this family: `invert` times it"]
    hours = job.hours(forward, H200)
    if max(hours) < SHORT:
        return lines
    lines.append(
        f"of {forward / 1e12:.2g} TFLOP each: about {hours[0]:.2g} h and {hours[1]:.2g} h on an "
        f"{H200.name}"
    )
    return [*lines, f"({H200.source})"]
