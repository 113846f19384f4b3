"""Intervals of shares."""

from __future__ import annotations

from statistics import NormalDist

LEAST_PROMPTS = 6  # fewer all gain, or all lose, by chance in over 5% of cases: 2 / 2**n
TAIL = (1 - 0.95) / 2  # outside of each end of a 95% interval


def wilson(p: float, n: float, outside: float = TAIL) -> tuple[float, float, float]:
    """Return a share p of n trials with the ends of Wilson's score interval, in [0, 1].

    Args:
        p: the share.
        n: trials.
        outside: the chance beyond each end, 2.5% by default.

    Source: Wilson, JASA 22, 1927; Brown, Cai and DasGupta, Statistical Science 16(2), 2001.
    """
    z = NormalDist().inv_cdf(1 - outside)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    return p, max(0.0, centre - half), min(1.0, centre + half)
