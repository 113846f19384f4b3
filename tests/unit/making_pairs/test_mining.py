"""Which images become pairs, by hand."""

import math

import pytest

from inversion_dpo.data.images import DataError
from inversion_dpo.making_pairs.mining import (
    MINERS,
    Mined,
    best_worst,
    disjoint,
    every,
    majority,
    margin,
    pareto,
    preference,
)

A, B = (
    {"pickscore": 21.5, "clip": 30.0, "aesthetic": 5.0},
    {"pickscore": 21.0, "clip": 31.0, "aesthetic": 5.0},
)
ONE = [{"s": 3.0}, {"s": 9.0}, {"s": 1.0}, {"s": 5.0}]
TWO = [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 0.0}]


def places(pairs):
    return [(p.winner, p.loser) for p in pairs]


def odds(gap):
    return pytest.approx(1 / (1 + math.exp(-gap)))


def test_preference_by_hand():
    assert preference(A, B, ["clip"]) == 0 and preference(B, A, ["clip"]) == 1
    assert preference(A, B, ["aesthetic"]) == 0.5
    softmax = math.exp(21.5) / (math.exp(21.5) + math.exp(21.0))
    assert preference(A, B, ["pickscore"]) == pytest.approx(softmax)
    votes = preference(A, B, ["pickscore", "clip", "aesthetic"])
    assert votes == pytest.approx((softmax + 0 + 0.5) / 3)
    assert preference(B, A, []) == pytest.approx(1 - votes)


def test_hpsv2_and_imagereward_are_their_own_probabilities():
    a, b = {"hpsv2": 0.28, "imagereward": 1.0}, {"hpsv2": 0.27, "imagereward": 0.0}
    assert preference(a, b, ["hpsv2"]) == pytest.approx(math.e / (1 + math.e))
    reward = 1.0333394966054072  # before normalisation
    assert preference(a, b, ["imagereward"]) == pytest.approx(1 / (1 + math.exp(-reward)))


def test_large_differences_do_not_overflow():
    a, b = {"pickscore": 5000.0}, {"pickscore": -5000.0}
    assert preference(a, b, []) == 1 and preference(b, a, []) == 0


def test_best_against_worst():
    assert best_worst(ONE, ["s"], 0.0) == [Mined(1, 2, odds(8))]
    assert best_worst(ONE, ["s"], 8.0) and not best_worst(ONE, ["s"], 8.1)
    assert places(best_worst(TWO, ["a"], 0.0)) == [(0, 1)]  # at equal scores the earlier one
    assert places(best_worst(TWO, ["a", "b"], 0.0)) == [(2, 3)]
    assert best_worst(TWO, ["a", "b"], 0.0)[0].preference == odds(1)  # of the means, 1 and 0


def test_by_margin_the_widest_come_first():
    assert places(margin(ONE, ["s"], 3.0)) == [(1, 2), (1, 0), (1, 3), (3, 2)]
    assert places(margin(ONE, ["s"], 4.5)) == [(1, 2), (1, 0)]
    assert margin(ONE, ["s"], 9.0) == []


def test_all_pairs_that_differ():
    found = every(ONE, ["s"], 100.0)
    assert places(found) == [(1, 2), (1, 0), (1, 3), (3, 2), (0, 2), (3, 0)]
    assert found[-1].preference == odds(2)
    assert len(every(TWO, ["a"], 0.0)) == 4  # two against two


def test_pareto_wants_no_score_to_be_worse():
    found = pareto(TWO, ["a", "b"], 0.0)
    assert places(found) == [(2, 3), (0, 3), (1, 3), (2, 0), (2, 1)]  # not 0 against 1
    assert [p.preference for p in found] == [1.0, 0.75, 0.75, 0.75, 0.75]
    assert places(pareto(TWO, ["a", "b"], 0.6)) == [(2, 3)]
    assert pareto([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 9.0}], [], 0.0) == []


def test_the_majority_wins_over_one_loud_voter():
    group = [{"a": 1.0, "b": 1.0, "c": 0.0}, {"a": 0.0, "b": 0.0, "c": 1000.0}]
    assert majority(group, ["a", "b", "c"], 0.0) == [Mined(0, 1, 2 / 3)]
    assert majority(group, ["a", "b", "c"], 0.7) == []
    assert majority(ONE, ["s"], 0.0) == [Mined(1, 2, 1.0)]
    assert majority([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}], [], 0.0) == []


@pytest.mark.parametrize("name", sorted(MINERS))
def test_no_pair_of_equals_of_one_or_of_none(name):
    for group in ([{"s": 1.0}, {"s": 1.0}], [{"s": 1.0}], []):
        assert MINERS[name](group, ["s"], 0.0) == []


@pytest.mark.parametrize("name", sorted(MINERS))
def test_an_absent_score_is_named(name):
    with pytest.raises(DataError, match="no score 'beauty' to go by; there are s"):
        MINERS[name](ONE, ["beauty"], 0.0)


@pytest.mark.parametrize("name", sorted(MINERS))
def test_winners_are_more_likely_than_not(name):
    for p in MINERS[name](TWO, ["a", "b"], 0.0):
        assert 0.5 < p.preference <= 1 and p.winner != p.loser


def test_disjoint_pairs_share_no_image():
    assert places(disjoint(margin(ONE, ["s"], 0.0))) == [(1, 2), (3, 0)]
    assert disjoint([]) == []
