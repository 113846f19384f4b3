"""Gains, win rates and their intervals, held against mathematics."""

from __future__ import annotations

import numpy as np
import pytest

from inversion_dpo.evaluation.metrics import (
    compare,
    decimals,
    interval_text,
    metric_rows,
    paired_bootstrap,
    verdict,
    win_rate,
)


def test_constant_shift_has_no_width() -> None:
    reference = np.random.default_rng(0).normal(size=40)
    gain = paired_bootstrap(reference, reference + 0.5)
    assert [gain.value, gain.low, gain.high] == pytest.approx([0.5] * 3, abs=1e-12)


def test_pairing_cancels_the_difficulty_of_prompts() -> None:
    rng = np.random.default_rng(1)
    difficulty, noise = rng.normal(0, 100, 200), rng.normal(0, 0.1, (2, 200))
    gain = paired_bootstrap(difficulty + noise[0], difficulty + noise[1] + 0.2)
    assert gain.low > 0.1 and gain.high < 0.3


def test_width_is_that_of_the_normal_approximation() -> None:
    policy = np.random.default_rng(2).normal(size=400)
    gain = paired_bootstrap(np.zeros(400), policy)
    standard_error = policy.std() / 20
    assert (gain.high - gain.low) / (2 * 1.96 * standard_error) == pytest.approx(1, abs=0.05)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(3).normal(0.3, 1.0, (300, 60))
    found = [paired_bootstrap(np.zeros(60), d, samples=400, seed=k) for k, d in enumerate(draws)]
    assert 0.90 <= np.mean([i.low <= 0.3 <= i.high for i in found]) <= 0.98


def test_swapping_the_models_negates_the_gain() -> None:
    a, b = np.random.default_rng(4).normal(size=(2, 70))
    there, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert [there.value, there.low, there.high] == pytest.approx(
        [-back.value, -back.high, -back.low]
    )


def test_chunks_do_not_change_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.random.default_rng(5).normal(size=(2, 30))
    whole = paired_bootstrap(a, b, samples=500)
    monkeypatch.setattr("inversion_dpo.evaluation.metrics._CHUNK", 100)
    assert paired_bootstrap(a, b, samples=500) == whole


def test_win_rate_by_hand() -> None:
    # two wins, one tie, one loss: (2 + 0.5) / 4; Wilson's bounds pi solve
    # (p - pi)^2 = z^2 pi (1 - pi) / n, here 0.563764 -+ 0.344337
    rate = win_rate([1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 3.0, 0.0])
    assert rate.value == 0.625
    assert (rate.low, rate.high) == pytest.approx((0.219427, 0.908101), abs=2e-6)
    for bound in (rate.low, rate.high):
        assert (0.625 - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / 4)


@pytest.mark.parametrize(("policy", "share"), [(1.0, 1.0), (0.0, 0.5), (-1.0, 0.0)])
def test_win_rate_at_its_ends_keeps_a_width(policy: float, share: float) -> None:
    rate = win_rate(np.zeros(50), np.full(50, policy))
    assert rate.value == share
    assert 0 <= rate.low <= share <= rate.high <= 1 and rate.high - rate.low > 0.05


def test_win_rates_of_both_sides_sum_to_one() -> None:
    a, b = np.random.default_rng(6).integers(0, 4, (2, 90)).astype(float)
    there, back = win_rate(a, b), win_rate(b, a)
    assert there.value + back.value == pytest.approx(1)
    assert there.low + back.high == pytest.approx(1)


def test_compare_gathers_every_metric() -> None:
    reference = {"warmth": np.array([0.1, 0.2, 0.3]), "sg_iou": np.array([1.0, 0.0, 1.0])}
    policy = {"warmth": np.array([0.4, 0.5, 0.2]), "sg_iou": np.array([1.0, 0.0, 0.0])}
    result = compare(reference, policy, "warmth")
    assert list(metric_rows(result)) == ["warmth", "sg_iou"]
    assert result["preference"] == result["warmth"]
    assert result["n_prompts"] == 3 and result["win_rate"] == pytest.approx(2 / 3)
    assert result["sg_iou"]["reference"] == pytest.approx(2 / 3)
    assert result["sg_iou"]["gain"] == pytest.approx(-1 / 3)
    assert result["sg_iou"]["gain_low"] <= result["sg_iou"]["gain"] <= result["sg_iou"]["gain_high"]


def test_rows_ignore_what_a_caller_adds() -> None:
    one = {"warmth": np.zeros(3)}
    result = compare(one, one, "warmth") | {"seconds": {"train": 1.0}, "steps": 7}
    assert list(metric_rows(result)) == ["warmth"]


@pytest.mark.parametrize(
    ("reference", "policy", "preference", "message"),
    [
        ({"a": [1.0]}, {"b": [1.0]}, "a", "only one model was scored by a, b"),
        ({"a": [1.0]}, {"a": [1.0]}, "b", "no metric 'b'; one of a"),
        ({"a": [1.0]}, {"a": [1.0, 2.0]}, "a", "metric 'a'"),
        ({"a": [np.nan]}, {"a": [1.0]}, "a", "1 of 1 prompts"),
        ({"a": []}, {"a": []}, "a", "non-empty"),
        ({"a": [1.0], "b": [1.0, 2.0]}, {"a": [1.0], "b": [1.0, 2.0]}, "a", "numbers of prompts"),
        ({"win_rate": [1.0]}, {"win_rate": [1.0]}, "win_rate", "cannot be called win_rate"),
    ],
)
def test_compare_refuses(
    reference: dict[str, list[float]],
    policy: dict[str, list[float]],
    preference: str,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(
            {k: np.array(v) for k, v in reference.items()},
            {k: np.array(v) for k, v in policy.items()},
            preference,
        )


def test_verdict_needs_the_whole_interval() -> None:
    assert [verdict(0.1, 0.2), verdict(-0.2, -0.1), verdict(-0.1, 0.2)] == ["gain", "loss", "none"]
    assert verdict(0.0, 0.2) == verdict(-0.2, 0.0) == "none"
    assert verdict(0.4, 0.6, null=0.5) == "none" and verdict(0.51, 0.6, null=0.5) == "gain"


@pytest.mark.parametrize(
    ("uncertainty", "places"),
    [(0.011, 3), (0.0354, 3), (0.036, 2), (0.0949, 2), (0.0099, 3), (1.7, 1), (40.0, 0), (0.0, 3)],
)
def test_decimals_follow_the_uncertainty(uncertainty: float, places: int) -> None:
    assert decimals(uncertainty) == places


def test_interval_text_never_hides_an_excluded_zero() -> None:
    assert interval_text(0.05, 0.0004, 0.0996) == "+0.0500 [+0.0004, +0.0996]"
    assert interval_text(0.01, -0.0004, 0.0204) == "+0.010 [-0.000, +0.020]"
    assert interval_text(-0.0, 0.0, 0.0) == "+0.000 [+0.000, +0.000]"
