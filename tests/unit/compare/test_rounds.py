"""Rounds of training without a model: what they cost, their table, what is refused."""

import pytest

from inversion_dpo.compare.rounds import Rounds, check_rounds, round_scores, spent_before
from inversion_dpo.run.config import ConfigError, load_config


@pytest.fixture
def settings(tmp_path):
    """A maker of configurations with a scorer, and two rounds on other prompts."""
    held, own = tmp_path / "held.txt", tmp_path / "own.txt"
    held.write_text("a blue star\na blue cross\n")
    own.write_text("\n".join(f"a red star number {k}" for k in range(6)) + "\n")

    def make(*overrides):
        return load_config(
            None,
            [
                "model.path=model",
                "data.pairs=pairs.parquet",
                f"evaluation.prompts={held}",
                "evaluation.scorer=own_scorer:brightness",
                *overrides,
            ],
        )

    return make, Rounds(2, str(own), 3)


def test_costs_add_up_over_rounds():
    def result(spent, evaluations, seconds):
        row = {"metrics": {"steps": 10}, "history": [{"loss": 1.0, "evaluations": evaluations}]}
        more = {"spent": {"evaluations": spent, "seconds": 5.0}} if spent else {}
        return row | {"step_seconds": seconds} | more

    rounds = {
        "a": [result(0, 12.0, 0.5), result(0, 12.0, 1.5)],
        "a round 2": [result(100, 12.0, 1.0), result(200, 12.0, 1.0)],
        "a round 3": [result(7, 12.0, 1.0), result(7, 12.0, 1.0)],
    }
    found = spent_before(rounds, {"evaluations": 1000.0, "seconds": 2.0})
    assert found["a"] == {"evaluations": 1000.0, "seconds": 2.0}
    assert found["a round 2"] == {"evaluations": 1000 + 120 + 150, "seconds": 2 + 10 + 5}
    assert found["a round 3"] == {"evaluations": 1270 + 120 + 7, "seconds": 17 + 10 + 5}


def test_scores_by_round_have_intervals_and_the_reference_none():
    def result(score):
        return {"metrics": {"s": {"policy": score, "gain": 0.0, "gain_low": 0.0, "reference": 0.5}}}

    rows = round_scores([[result(1.0), result(3.0)]])
    assert [(r["round"], r["s"]["mean"]) for r in rows] == [(0, 0.5), (1, 2.0)]
    assert rows[0]["s"]["low"] == rows[0]["s"]["high"] == 0.5
    assert rows[1]["s"]["high"] == pytest.approx(2 + 12.7062 * 2**0.5 / 2**0.5)  # t(.975, 1)


def test_rounds_that_cannot_be_are_refused(settings):
    make, rounds = settings
    check_rounds(rounds, make())
    with pytest.raises(ConfigError, match=r"needs evaluation\.scorer"):
        check_rounds(rounds, make("evaluation.scorer=null"))
    check_rounds(Rounds(2, rounds.prompts, people=4), make("evaluation.scorer=null"))
    with pytest.raises(ConfigError, match="at least 4 prompts"):
        check_rounds(Rounds(2, rounds.prompts, people=3), make())
    with pytest.raises(ConfigError, match="give --rounds 2"):
        check_rounds(Rounds(1, rounds.prompts, people=3), make())
    with pytest.raises(ConfigError, match="give a file"):
        check_rounds(Rounds(2, "100"), make())
    with pytest.raises(ConfigError, match="give a file"):
        check_rounds(Rounds(2, "0"), load_config("composition", []))
    held = make().evaluation.prompts
    with pytest.raises(ConfigError, match=r"2 of its prompts are in evaluation\.prompts"):
        check_rounds(Rounds(2, held), make())
