"""benchmarks/questions.py: its arms, what they cost, and how the best trial is chosen."""

import sys

import pytest
import questions as script
from questions import Arm, arms, config_of, evaluations

from inversion_dpo.training.effects import check_effects
from tests.slow import slow_but


def trained(config):
    """Evaluations of inversion and training."""
    return evaluations(config)["inversion"] + evaluations(config)["training"]


def first(one):
    return next(one.trials())


@pytest.mark.parametrize("question", slow_but(["c"], "abcd"))
def test_every_setting_of_an_arm_has_an_effect(question):
    for name, one in arms(question).items():
        config = config_of(one, first(one), ["training.seed=3"])
        given = {text.partition("=")[0] for text in (*one.settings, *first(one))}
        check_effects([config], given)
        assert config.training.seed == 3 and name.startswith(config.objective.loss)


def test_a_quarter_is_a_quarter_with_everything_in():
    found = arms("c")
    sizes = {  # of each length that tuning may choose
        name: [trained(config_of(one, trial, [])) for trial in list(one.trials())[:2]]
        for name, one in found.items()
    }
    full = sizes.pop("dpo, fresh noise, full budget")
    assert full == [720 * 16 * 2 * 4] * 2
    for name, each in sizes.items():
        assert all(0.9 * full[0] / 4 < spent <= full[0] / 4 for spent in each), (name, each)


def test_pairs_of_the_models_own_samples_are_made_once_under_the_guidance(tmp_path, monkeypatch):
    made = []

    def build(config, folder):
        made.append((config.evaluation.guidance_scale, config.build.prompts, config.build.samples))
        folder.mkdir()
        (folder / "composition.parquet").touch()

    monkeypatch.setattr(script, "build", build)
    found = arms("d", 3.0, tmp_path)
    own = {name: one for name, one in found.items() if name.endswith("own pairs")}
    assert len(own) == 4 and len(found) == 12 and not made
    for _ in range(2):
        file = script.own_pairs(tmp_path, 3.0, make=True)
    assert made == [(3.0, "1500", 4)] and script.own_cost(3.0) == 1500 * 4 * 10 * 2
    for one in own.values():
        config = config_of(one, first(one), [])
        assert (config.data.pairs, config.evaluation.guidance_scale) == (str(file), 3.0)


def test_questions_share_the_trials_of_equal_arms():
    a, b = arms("a"), arms("b")
    assert a["kto, fresh noise"] == b["kto, fresh noise"]
    assert len(a.keys() & b.keys()) == 4


def test_untuned_arms_have_the_settings_that_the_help_names():
    found = arms("a")
    settings = ["training.learning_rate=0.0003", "training.batch_size=16", "training.steps=360"]
    for loss, beta in {"dpo": 1000, "kto": 100, "dpo_bounded": 100, "nft": 0.3}.items():
        (trial,) = found[f"{loss}, fresh noise"].chosen(untuned=True)
        assert set(trial) == {*settings, f"objective.beta={beta}"}
        assert trial in found[f"{loss}, fresh noise"].chosen(untuned=False)


def test_a_given_setting_stands_in_the_place_of_the_trials():
    one = script.arm("kto", "fresh noise")
    assert one.chosen(untuned=True, more=["training.steps=180"]) == [
        ("training.learning_rate=0.0003", "objective.beta=100")
        + ("training.batch_size=16", "training.steps=180")
    ]
    assert len(one.chosen(untuned=False, more=["objective.beta=7"])) == 4  # was 12


def test_evaluations_by_hand():
    one = arms("b")["dpo, inverted, one iteration"]
    given = ["training.batch_size=16", "training.steps=5", "evaluation.limit=7"]
    # 80 pairs visited; levels 1 to 9 and one more from 2 on; 3 of a step; 10 sampling steps
    assert evaluations(config_of(one, (), given)) == {
        "inversion": 2 * 80 * (9 + 8),
        "training": 2 * 80 * 3,
        "sampling": 7 * 10,
    }
    stepped = config_of(arms("b")["kto, noise, then one step"], (), given)
    assert evaluations(stepped)["training"] == 2 * 80 * 6  # two of the step, the reference, policy
    guided = config_of(one, (), [*given, "objective.path=noise", "objective.guidance_scale=2"])
    assert evaluations(guided)["training"] == 2 * 80 * 2 * 4


@pytest.mark.parametrize("question", slow_but(["e"], "abcde"))
def test_a_dry_run_says_what_a_question_costs(question, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["questions.py", question, "--dry-run", "--seeds", "0"])
    script.main()
    assert f"question {question}: " in (said := capsys.readouterr().out) and "hours" in said


def test_the_best_trial_is_trained_with_every_seed(tmp_path, monkeypatch):
    """Results are made up: the second beta is best on validation prompts."""
    ran = []

    def run(root, name, config, curve):
        ran.append((config.evaluation.prompts, config.objective.beta, config.training.seed))
        gain = config.objective.beta / 1000 - abs(config.objective.beta - 300) / 100
        metrics = {n: {"gain": gain + config.training.seed} for n in ("composition", "exact")}
        history = [{"loss": 1.0, "evaluations": 64.0, "heldout_drift": 0.5}]
        return {
            "metrics": metrics | {"warmth": {"gain": 0.0}},
            "history": history,
            "step_seconds": 0.25,
        }

    monkeypatch.setattr(script, "run", run)
    one = Arm(("objective.loss=dpo", "objective.path=noise"), (100, 300), ((4, 10),))
    given = type("Given", (), {"more": [], "seeds": [0, 2], "untuned": False})
    found = script.answer(tmp_path, {"mine": one}, given)
    assert len(ran) == 2 * 2 + 2 and all("validation" in p for p, _, s in ran if s == 100)
    assert [r[1:] for r in ran if r[2] != 100] == [(300.0, 0), (300.0, 2)]
    assert "| mine | +1.300 [" in found and "| 640 | 2 | learning_rate=0.0001, beta=300" in found
    assert "beside" not in found
    low = Arm(one.settings, (100,), one.lengths)  # .1 - 2 instead of .3, and the same seeds
    both = script.answer(tmp_path, {"mine": one, "low": low}, given).splitlines()[-3:]
    assert both[0] == "| beside mine | composition | exact | warmth |"
    assert (
        both[2].startswith("| low | -2.200 [-2.200, -2.200] | -2.200 [") and "| +0.000 [" in both[2]
    )
    ran.clear()
    given.untuned = True
    assert "learning_rate=0.0003, beta=300" in script.answer(tmp_path, {"mine": one}, given)
    assert [r[1:] for r in ran] == [(300.0, 0), (300.0, 2)]  # and no trial before
