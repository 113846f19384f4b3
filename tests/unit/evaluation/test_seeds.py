"""Several images a prompt: prompts, not images, are what is drawn."""

import numpy as np
import pytest

from inversion_dpo.evaluation.metrics import compare, paired_bootstrap, win_rate

RNG = np.random.default_rng(1)
BASE = RNG.normal(size=(40, 5))
GAIN = RNG.normal(0.3, 1.0, size=(40, 1)) + RNG.normal(0, 0.1, size=(40, 5))


def test_the_gain_is_that_of_the_prompts_means():
    ours = paired_bootstrap(BASE, BASE + GAIN)
    means = paired_bootstrap(BASE.mean(1), (BASE + GAIN).mean(1))
    assert ours.value == pytest.approx(means.value)
    assert (ours.low, ours.high) == pytest.approx((means.low, means.high))


def test_images_of_one_prompt_are_not_independent():
    """Treated as 200 prompts the interval would be about sqrt(5) too narrow here."""
    ours = paired_bootstrap(BASE, BASE + GAIN)
    naive = paired_bootstrap(BASE.ravel(), (BASE + GAIN).ravel())
    assert 1.9 < (ours.high - ours.low) / (naive.high - naive.low) < 2.6


def test_one_image_a_prompt_is_as_before():
    flat = paired_bootstrap(BASE[:, 0], BASE[:, 1])
    assert flat == paired_bootstrap(BASE[:, :1], BASE[:, 1:2])
    assert win_rate(BASE[:, 0], BASE[:, 1]) == win_rate(BASE[:, :1], BASE[:, 1:2])


def test_wins_are_counted_by_image_and_their_interval_by_prompt():
    reference, policy = np.zeros((2, 4)), np.array([[1, 1, 1, 0.0], [-1, -1, 1, 1]])
    won = win_rate(reference, policy)  # 5.5 of 8, a tie counts half; n = 2 prompts
    assert won.value == 5.5 / 8
    p, n, z = 5.5 / 8, 2, 1.959963984540054
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    assert (won.low, won.high) == pytest.approx((centre - half, min(1, centre + half)))


def test_compare_counts_prompts():
    found = compare({"a": BASE}, {"a": BASE + GAIN}, "a")
    assert found["n_prompts"] == 40
    with pytest.raises(ValueError, match="different numbers"):
        compare({"a": BASE, "b": BASE[:3]}, {"a": BASE, "b": BASE[:3]}, "a")
