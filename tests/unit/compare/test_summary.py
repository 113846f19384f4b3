"""What a comparison computes from its runs, by hand."""

import itertools
import math

import numpy as np
import pytest

from inversion_dpo.compare.methods import (
    METHODS,
    TRIALS,
    overrides_of,
    parse_methods,
    parse_vary,
    variants,
)
from inversion_dpo.compare.page import title
from inversion_dpo.compare.runs import best_of_n
from inversion_dpo.compare.summary import (
    crossing,
    over_seeds,
    reach,
    share_over_seeds,
    traits_over_seeds,
    wins,
)
from inversion_dpo.run.config import ConfigError, load_config


def test_over_seeds_by_hand():
    # mean 2, deviation 1, n = 3: half width t(.975, 2) / sqrt(3) = 4.3027 / 1.7321
    row = over_seeds([1.0, 2.0, 3.0])
    assert row["mean"] == 2.0
    assert row["high"] - 2.0 == pytest.approx(4.302653 / 3**0.5)
    assert math.isnan(over_seeds([1.0])["low"])


def test_an_interval_of_shares_ends_at_one():
    # mean .995, deviation .00707, n = 2: half width 12.706 * .005 = .0635
    row = share_over_seeds([0.99, 1.0])
    assert row["low"] == pytest.approx(0.995 - 0.0635310)
    assert row["high"] == 1.0
    assert over_seeds([0.99, 1.0])["high"] > 1.0


def test_best_of_n_is_the_mean_over_all_choices():
    """Against a walk through the choices themselves; another score follows the chosen sample."""
    rng = np.random.default_rng(0)
    scores = {"preferred": rng.random((8, 3)), "other": rng.random((8, 3))}
    found = best_of_n(scores, "preferred")
    assert list(found) == ["1", "2", "4", "8"]
    for n, rows in found.items():
        for name, values in scores.items():
            each = [
                np.mean(
                    [
                        values[max(c, key=lambda k: scores["preferred"][k, p]), p]
                        for c in itertools.combinations(range(8), int(n))
                    ]
                )
                for p in range(3)
            ]
            expected = over_seeds(each)
            assert rows[name] == pytest.approx({k: expected[k] for k in ("mean", "low", "high")})


def test_crossing_interpolates():
    assert crossing([0, 10, 20], [0.0, 0.2, 0.6], 0.4) == pytest.approx(15.0)
    assert crossing([5, 10], [0.3, 0.4], 0.2) == 5
    assert crossing([0, 10], [0.0, 0.1], 0.2) is None


def test_wins_count_ties_half_prompt_by_prompt():
    table = wins({"a": [[1.0, 0.0, 2.0, 3.0]], "b": [[0.0, 0.0, 3.0, 1.0]]})
    assert table["a"]["b"]["mean"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert table["b"]["a"]["mean"] == pytest.approx(1 - table["a"]["b"]["mean"])


def test_traits_over_seeds_by_hand():
    one = {"traits": {"warmer": {"share": 0.8}, "sharper": {"share": 0.4}}}
    two = {"traits": {"warmer": {"share": 0.6}}}  # as sharp as the reference, image by image
    found = traits_over_seeds([one, two])
    assert found["warmer"]["mean"] == pytest.approx(0.7)
    assert found["sharper"]["mean"] == pytest.approx(0.45)
    assert found["brighter"]["mean"] == 0.5
    assert (found["warmer"]["low"], found["warmer"]["high"]) == (0.0, 1.0)  # of shares
    assert math.isnan(traits_over_seeds([one])["warmer"]["low"])
    assert traits_over_seeds([one, {"traits": {}}]) == traits_over_seeds([one, {}]) == {}


def test_reach_counts_the_inversion():
    curve = [{"step": s, "score": over_seeds([v, v])} for s, v in ((0, 0.0), (10, 0.5), (20, 1.0))]
    summary = {
        "curve": curve,
        "step_evaluations": 192.0,
        "step_seconds": 0.2,
        "inversion": {"evaluations": 1000.0, "seconds": 3.0},
    }
    found = reach(summary, "score", 0.75)
    assert found["steps"] == pytest.approx(15.0)
    assert found["evaluations_alone"] == pytest.approx(15 * 192)
    assert found["evaluations"] == pytest.approx(15 * 192 + 1000)
    assert found["seconds"] == pytest.approx(6.0)
    assert found["seeds_reaching"] == 2


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_as_many_trials_and_loads(name):
    trials = METHODS[name].trials()
    assert len(trials) == TRIALS == len(set(trials))
    for trial in trials:
        load_config("composition", [*trial, *METHODS[name].settings])


def test_methods_and_varied_keys_are_checked():
    assert parse_methods("x0, sft,x0") == ["x0", "sft"]
    with pytest.raises(ConfigError, match="did you mean 'diffusion_dpo'"):
        parse_methods("difusion_dpo")
    assert parse_vary("objective.beta=1, 2") == ("objective.beta", ["1", "2"])
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_vary("objective.beta")


def test_each_key_is_varied_alone():
    found = variants(["x0", "sft"], ["objective.beta=1,2", "policy.rank=4"])
    assert [v.name for v in found] == [
        "x0",
        "sft",
        "x0 beta=1",
        "x0 beta=2",
        "sft beta=1",
        "sft beta=2",
        "x0 rank=4",
        "sft rank=4",
    ]
    assert found[-1].settings[-1] == "policy.rank=4"
    assert not any("beta" in s for s in found[-1].settings)
    with pytest.raises(ConfigError, match="'x0 steps=5' twice"):
        variants(["x0"], ["inversion.steps=5", "training.steps=5,6"])


def test_what_the_user_gives_wins_over_what_was_tuned():
    tuned = {"x0": ["objective.beta=300", "training.learning_rate=1e-5"]}
    plain, varied = variants(["x0"], ["objective.beta=7"])
    assert plain.varied is None and varied.varied == ("objective.beta", "7")
    given = ["objective.beta=50"]
    config = load_config("composition", overrides_of(plain, tuned, given, 3))
    assert (config.objective.beta, config.training.learning_rate) == (50, 1e-5)
    assert config.training.seed == 3
    assert load_config("composition", overrides_of(varied, tuned, given, 3)).objective.beta == 7


def test_the_page_counts_methods_and_not_their_rounds():
    assert title({"config": "taste", "variants": {"x0": {}, "kto": {}}}) == "2 methods on taste"
    found = {"x0": {}, "x0 round 2": {}}
    rounds = {"x0": [{"round": 0}, {"round": 1}, {"round": 2}]}
    assert title({"config": "taste", "variants": found, "rounds": rounds}) == (
        "1 method on taste, 2 rounds"
    )
