"""Compare scores prompt by prompt: mean gains and win rates, with intervals.

Both models answer the same prompts from the same noise, so every statistic is taken over
prompts: position k of both arrays must be the same prompt. Higher is better throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inversion_dpo.maths.intervals import LEAST_PROMPTS, TAIL, wilson
from inversion_dpo.run.disk import CHECKSUM
from inversion_dpo.run.judged import WEIGHTS

OTHER_GUIDANCE = "at_training_guidance"  # the comparison at the guidance of training
PAIRS_AGREE = "pairs_agree"  # the share of pairs whose winner has the higher preference
AGREEMENT = "agreement"  # how often each score prefers the same side as the preference
RESERVED = frozenset(
    "preference win_rate win_rate_low win_rate_high n_prompts sizes categories seeds models pairs "
    "steps training seconds structure scoring one_colour traits distance pairwise diversity "
    f"samples {CHECKSUM} {OTHER_GUIDANCE} {PAIRS_AGREE} {AGREEMENT} {WEIGHTS}".split()
)
_CHUNK = 1 << 20  # resampled indices held at once


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval, all in the unit of the score."""

    value: float
    low: float
    high: float


def paired_bootstrap(
    reference: ArrayLike,
    policy: ArrayLike,
    samples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Estimate the mean of policy - reference over prompts, with a 95% percentile bootstrap.

    A prompt is drawn with both of its scores, so what makes a prompt easy for both models
    cancels. The same ``seed`` and n draw the same prompts for every metric.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13.

    Args:
        reference: scores [n], or [n, s] with s images per prompt. Images of one prompt are not
            independent, so a drawn prompt brings all of its images.
        policy: scores of the same shape.
        samples: number of bootstrap samples.
        seed: of the drawing.

    Raises:
        ValueError: the arrays differ in shape, are empty or hold a score that is not finite.
    """
    difference = np.subtract(*_paired(policy, reference)).mean(axis=1)
    low, high = np.quantile(_means(difference, samples, seed), [TAIL, 1 - TAIL])
    return Interval(float(difference.mean()), float(low), float(high))


def mean_of_groups(
    reference: ArrayLike, policy: ArrayLike, groups: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Compute :func:`gain_row` for the mean over groups of prompts, each of the same weight.

    Prompts are drawn within their group. groups: places of each group's prompts.
    """
    ours, theirs = (side.mean(axis=1) for side in _paired(policy, reference))
    p, r = (float(np.mean([side[list(k)].mean() for k in groups])) for side in (ours, theirs))
    drawn = [_means((ours - theirs)[list(k)], 10_000, seed) for seed, k in enumerate(groups)]
    low, high = np.quantile(np.mean(drawn, axis=0), [TAIL, 1 - TAIL])
    row = {"reference": r, "policy": p, "gain": p - r}
    return row | {"gain_low": float(low), "gain_high": float(high)}


def win_rate(reference: ArrayLike, policy: ArrayLike) -> Interval:
    """Compute the share of prompts on which policy > reference, in [0, 1]; a tie counts half.

    The interval is :func:`intervals.wilson`'s. Unlike a bootstrap it keeps a width when every
    prompt is won. With ties it is a little too wide, since half a win varies less than a coin.
    For scores [n, s] the share is over images and the interval is for n prompts. It is as wide as
    if all images of a prompt were won or lost together, so it is never too narrow.
    Arguments and errors are those of :func:`paired_bootstrap`.
    """
    ours, theirs = _paired(policy, reference)
    share = float(np.mean((ours > theirs) + 0.5 * (ours == theirs)))
    return Interval(*wilson(share, len(ours)))


def compare(
    reference: Mapping[str, NDArray[Any]], policy: Mapping[str, NDArray[Any]], preference: str
) -> dict[str, Any]:
    """Compute every metric's means and gain, and the win rate by the metric ``preference``.

    Args:
        reference: metric name -> scores of the reference [n], or [n, s] with s images per prompt.
        policy: the same names -> scores of the policy, in the same order of prompts.
        preference: the metric that ordered the training pairs.

    Returns:
        Plain numbers, ready for JSON: for every metric {"reference", "policy", "gain",
        "gain_low", "gain_high", "win_rate", "win_rate_low", "win_rate_high"}, win rates in [0, 1];
        the same under "preference" for the preferred one, whose win rate also stands by itself;
        "n_prompts".

    Raises:
        ValueError: names or lengths differ, ``preference`` is no metric, a name is reserved,
            or a score is not finite.
    """
    _check_names(set(reference), set(policy), preference)
    lengths = {name: np.shape(scores) for name, scores in reference.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"metrics cover different numbers of prompts: {lengths}")
    rows = {
        name: gain_row(name, reference[name], policy[name]) | wins(reference[name], policy[name])
        for name in reference
    }
    return {
        **rows,
        "preference": dict(rows[preference]),
        **wins(reference[preference], policy[preference]),
        "n_prompts": len(reference[preference]),
    }


def wins(reference: ArrayLike, policy: ArrayLike) -> dict[str, float]:
    """Write :func:`win_rate` with its interval as plain numbers."""
    share = win_rate(reference, policy)
    return {"win_rate": share.value, "win_rate_low": share.low, "win_rate_high": share.high}


def metric_rows(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Select the metrics from :func:`compare`'s result, in their order."""
    return {
        name: row
        for name, row in metrics.items()
        if name not in RESERVED and isinstance(row, dict) and "gain_low" in row
    }


def verdict(low: float, high: float, null: float = 0.0) -> str:
    """Return ``gain`` or ``loss`` if the interval lies on one side of ``null``, else ``none``."""
    return "gain" if low > null else "loss" if high < null else "none"


def outcome(row: Mapping[str, float], prompts: int) -> str:
    """Return :func:`verdict` on a gain; ``none`` of so few prompts that chance explains any."""
    return "none" if prompts < LEAST_PROMPTS else verdict(row["gain_low"], row["gain_high"])


def win_verdict(metrics: Mapping[str, Any]) -> str:
    """Return :func:`verdict` on the win rate; ``none`` of so few prompts as :func:`outcome`."""
    few = metrics["n_prompts"] < LEAST_PROMPTS
    return "none" if few else verdict(metrics["win_rate_low"], metrics["win_rate_high"], null=0.5)


def interval_text(
    value: float, low: float, high: float, *, digits: int | None = None, sign: str = "+"
) -> str:
    """Write an estimate as ``+0.31 [+0.29, +0.33]``, or its value alone without an interval.

    Args:
        value: the estimate.
        low: lower bound; not finite if there is no interval, as for a single seed.
        high: upper bound.
        digits: after the point. By default the half-width decides (:func:`decimals`), with enough
            digits to show that an interval excludes 0.
        sign: "+" writes the sign of positive values too, "" does not.

    >>> interval_text(0.3124, 0.2911, 0.3333), interval_text(0.0501, 0.0004, 0.0998)
    ('+0.312 [+0.291, +0.333]', '+0.0501 [+0.0004, +0.0998]')
    """
    if digits is None:
        digits = decimals((high - low) / 2)
        while low * high > 0 and digits < 6 and not round(min(abs(low), abs(high)), digits):
            digits += 1
    words = [f"{x + 0.0:{sign}.{digits}f}" for x in (value, low, high)]
    return f"{words[0]} [{words[1]}, {words[2]}]" if isfinite(low) else words[0]


def gain_text(row: Mapping[str, float], digits: int | None = None) -> str:
    """Write a metric's gain with its interval, see :func:`interval_text`."""
    return interval_text(row["gain"], row["gain_low"], row["gain_high"], digits=digits)


def win_text(metrics: Mapping[str, Any], digits: int = 4) -> str:
    """Write the win rate with its interval, between 0 and 1."""
    bounds = (metrics[name] for name in ("win_rate", "win_rate_low", "win_rate_high"))
    return interval_text(*bounds, digits=digits, sign="")


def share_text(metrics: Mapping[str, Any]) -> str:
    """Write the win rate in percent, with its interval."""
    value, low, high = (100 * metrics[k] for k in ("win_rate", "win_rate_low", "win_rate_high"))
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def decimals(uncertainty: float) -> int:
    """Count the decimal places that an uncertainty justifies: 0 to 6, and 3 if it is 0.

    The rule of the Particle Data Group (Review of Particle Physics, section 5.3): two
    significant digits if they are below 36, one if they are below 95, else the next power of ten.
    """
    if uncertainty < 1e-9:
        return 3
    exponent = floor(log10(uncertainty))
    return min(6, max(0, (uncertainty / 10.0**exponent < 3.55) - exponent))


def gain_row(name: str, reference: NDArray[Any], policy: NDArray[Any]) -> dict[str, float]:
    """Compute both means, the gain and its interval of one metric, as :func:`compare` returns them.

    ValueError names the metric; its causes are those of :func:`paired_bootstrap`.

    Args:
        name: of the metric.
        reference: its values [n], one a prompt.
        policy: its values [n], of the same prompts.
    """
    try:
        gain = paired_bootstrap(reference, policy)
    except ValueError as error:
        raise ValueError(f"metric {name!r}: {error}") from error
    return {
        "reference": float(np.mean(reference)),
        "policy": float(np.mean(policy)),
        "gain": gain.value,
        "gain_low": gain.low,
        "gain_high": gain.high,
    }


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.ndim not in (1, 2) or x.shape != y.shape or not x.size:
        raise ValueError(f"need two equal, non-empty lists of scores, got {x.shape} and {y.shape}")
    if bad := int((~np.isfinite(x) | ~np.isfinite(y)).sum()):
        raise ValueError(f"{bad} of {x.size} prompts have a score that is not finite")
    return x.reshape(len(x), -1), y.reshape(len(y), -1)


def _means(values: NDArray[Any], samples: int, seed: int) -> NDArray[np.float64]:
    """Compute the mean [samples] of each bootstrap sample of values [n]."""
    return np.concatenate([values[k].mean(axis=1) for k in _draws(len(values), samples, seed)])


def _draws(n: int, samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield indices of resampled prompts, ``samples`` rows of n, in chunks that fit the cache."""
    rng, rows = np.random.default_rng(seed), max(1, _CHUNK // n)
    for done in range(0, samples, rows):
        yield rng.integers(n, size=(min(rows, samples - done), n))


def _check_names(reference: set[str], policy: set[str], preference: str) -> None:
    if differing := sorted(reference ^ policy):
        raise ValueError(f"only one model was scored by {', '.join(differing)}")
    if reserved := sorted(reference & RESERVED):
        raise ValueError(f"a metric cannot be called {', '.join(reserved)}")
    if preference not in reference:
        raise ValueError(f"no metric {preference!r}; one of {', '.join(sorted(reference))}")
