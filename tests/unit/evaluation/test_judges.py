"""Which scores labelled the pairs, how scores agree, and what speaks against a gain."""

import numpy as np
import pytest

from inversion_dpo.evaluation.evaluate import judged
from inversion_dpo.evaluation.judges import (
    agreement,
    doubts,
    independent,
    labellers,
    most_worsened,
    order_of_pairs,
)
from inversion_dpo.evaluation.metrics import PAIRS_AGREE
from inversion_dpo.evaluation.prompt_sets import PromptSet
from inversion_dpo.run.config import load_config


def of_pairs(**shares):
    """Scores of 64 pairs; each score is higher for the winner in so many of them."""
    values = {}
    for name, right in shares.items():
        values[name] = np.array(
            [[1.0, 0.0] if k < right else [0.0, 1.0] for k in range(64)]
        ).ravel()
    return values


def test_a_score_that_orders_the_pairs_as_their_labels_do_is_a_labeller():
    found = order_of_pairs(of_pairs(own=64, near=58, human=46, other=32), "human")
    assert found["share"] == 46 / 64 and found["n"] == 64
    assert found["by_score"]["own"]["share"] == 1.0
    assert labellers({PAIRS_AGREE: found}) == ["own", "near"]
    assert labellers({}) == [] and labellers({PAIRS_AGREE: {}}) == []
    few = order_of_pairs({k: v[:8] for k, v in of_pairs(own=4).items()}, "own")
    assert labellers({PAIRS_AGREE: few}) == []  # four of four may be chance


def test_agreement_is_the_share_of_prompts_on_which_both_prefer_one_side():
    zero = {k: np.zeros((4, 2)) for k in ("p", "same", "odd", "tie")}
    gain = np.array([[1, 2], [1, -3], [2, 1], [-1, 0]], float)  # by prompt: + - + -
    policy = {"p": gain, "same": 5 * gain, "odd": -gain, "tie": np.zeros((4, 2))}
    found = agreement(zero, policy, "p")
    assert {k: v["win_rate"] for k, v in found.items()} == {"same": 1.0, "odd": 0.0, "tie": 0.5}


def test_the_worst_images_are_found_whatever_the_scores_units():
    zero = {"a": np.zeros(5), "b": np.zeros(5), "flat": np.zeros(5)}
    policy = {"a": np.array([1, -1, 0, 2, 3.0]), "b": 1000 * np.array([1, -1, -2, 2, 3.0])}
    policy["flat"] = np.ones(5)
    assert most_worsened(zero, policy, ["a", "b", "flat"], 3) == [1, 2]
    assert most_worsened(zero, policy, ["flat"], 3) == []
    assert most_worsened(zero, {"a": np.array([1.0, 2, 3, 4, 5])} | zero, ["b"], 3) == []


def metrics_of(gains, labelled):
    """Metrics of 200 prompts: score -> mean gain in standard deviations."""
    noise = np.random.default_rng(0).normal(size=200)
    config = load_config(None, [f"evaluation.preference={next(iter(gains))}"])
    texts = PromptSet([f"p{k}" for k in range(200)], [""] * 200, [None] * 200)
    zero = {name: np.zeros(200) for name in gains}
    found = judged(texts, zero, {n: noise + g for n, g in gains.items()}, config)
    by_score = {n: {"share": 1.0, "low": 0.94 if n in labelled else 0.4, "high": 1} for n in gains}
    traits = {"more colourful": {"share": 0.98, "low": 0.94, "high": 1.0}}
    return found | {PAIRS_AGREE: {"by_score": by_score}, "traits": traits}


@pytest.mark.parametrize(
    ("gains", "labelled", "words"),
    [
        (
            {"own": 1.0, "other": -1.0},
            ["own"],
            ["Only the labeller", "`other` a loss", "colourful"],
        ),
        ({"own": 1.0, "other": 0.0}, ["own"], ["no other scorer does", "98% [94%, 100%]"]),
        ({"own": 1.0}, ["own"], ["Every scorer asked", "it judges what it taught", "colourful"]),
        ({"own": 1.0, "other": 1.0}, ["own"], ["one look on most images", "98% [94%, 100%]"]),
        ({"own": -1.0, "other": -1.0}, ["own"], []),
        ({"own": 1.0, "other": -1.0}, [], []),
    ],
)
def test_what_speaks_against_a_gain(gains, labelled, words):
    found = metrics_of(gains, labelled)
    texts = doubts(found)
    assert len(texts) == bool(words) and all(word in texts[0] for word in words)
    found["traits"]["more colourful"] |= {"low": 0.6}  # on many images, not on most
    confirmed = list(gains.values()) == [1.0, 1.0]
    assert len(doubts(found)) == (bool(words) and not confirmed)
    assert independent(found) == [n for n in gains if n not in labelled] or len(gains) == 1


def test_the_advice_names_the_run_and_leaves_the_scores_their_names():
    text = doubts(metrics_of({"RUN": 1.0}, ["RUN"]), "runs/my own")[0]
    assert "(`RUN`)" in text and "`inversion-dpo web 'runs/my own'`" in text
