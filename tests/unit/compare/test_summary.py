"""What a comparison computes from its runs, by hand."""

import itertools
import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from inversion_dpo.compare import curves, experiment, runs, tuning
from inversion_dpo.compare.methods import METHODS, overrides_of, parse_methods, parse_vary, variants
from inversion_dpo.compare.page import setting_part, title
from inversion_dpo.compare.runs import best_of_n
from inversion_dpo.compare.summary import (
    crossing,
    over_seeds,
    reach,
    share_over_seeds,
    traits_over_seeds,
    wins,
)
from inversion_dpo.compare.tuning import VALIDATION, split_prompts
from inversion_dpo.evaluation.defaults import settled
from inversion_dpo.evaluation.evaluate import check as check_evaluation
from inversion_dpo.evaluation.page import inlined
from inversion_dpo.evaluation.prompt_sets import read_prompt_set
from inversion_dpo.evaluation.samples import write_samples
from inversion_dpo.evaluation.scorers.checkpoint import ScorerError
from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.run.disk import DiskError, read_json
from inversion_dpo.run.fields import EvaluationConfig


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
    assert len(trials) == 6 == len(set(trials))
    for trial in trials:
        load_config("composition", [*trial, *METHODS[name].settings])


def test_methods_and_varied_keys_are_checked():
    assert parse_methods("x0, sft,") == ["x0", "sft"]
    with pytest.raises(ConfigError, match="--methods names x0 twice: give each method once"):
        parse_methods("x0, sft,x0")
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


def test_trials_of_methods_that_are_added_later_join_the_earlier_ones(tmp_path, monkeypatch):
    """A trial's utility is its rate, so that the higher rate is chosen."""

    def run(root, name, config, curve):
        gain = {"gain": config.training.learning_rate}
        return {"metrics": {"preference": gain, "warmth": gain}}

    monkeypatch.setattr(tuning, "run", run)
    for methods in (["x0", "sft"], ["kto", "sft"]):
        best = tuning.tune(tmp_path, "taste", methods, (), "warmth")
        assert list(best) == methods
        assert all(trial[0] == "training.learning_rate=0.0003" for trial in best.values())
    rows = read_json(tmp_path / "tuning.json", list)
    trials = {name: len(METHODS[name].trials()) for name in ("x0", "kto", "sft")}
    assert Counter(row["method"] for row in rows) == trials


def test_what_the_user_gives_wins_over_what_was_tuned():
    tuned = {"x0": ["objective.beta=300", "training.learning_rate=1e-5"]}
    plain, varied = variants(["x0"], ["objective.beta=7"])
    assert plain.varied is None and varied.varied == ("objective.beta", "7")
    given = ["objective.beta=50"]
    config = load_config("composition", overrides_of(plain, tuned, given, 3))
    assert (config.objective.beta, config.training.learning_rate) == (50, 1e-5)
    assert config.training.seed == 3
    assert load_config("composition", overrides_of(varied, tuned, given, 3)).objective.beta == 7


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("evaluation.prompts=/no/prompts.txt", "no file /no/prompts.txt"),
        ("evaluation.preference=beauty", "evaluation.preference='beauty' is not a score"),
        ("evaluation.scorer=pikscore", "did you mean 'pickscore'"),
        ("evaluation.scorer=clip", "evaluation.checkpoints.clip=/no/where"),
        ("evaluation.scorer=no_module:score", "no_module"),
        ("evaluation.scorer=math:sqrt", "math:sqrt fails on a grey 64x64 image"),
        ("evaluation.scorer=null", "compare needs evaluation.scorer"),
        ("inversion.cache=all", "inversion.cache has no effect in `compare`"),
        ("evaluation.prompts=hf:x", "hf:OWNER/NAME:COLUMN"),
        ("data.pairs=/no/pairs.parquet", "/no/pairs.parquet"),
        ("model.resolution=1600", "MB are free"),
        ("training.steps=0", "training.steps"),
    ],
)
def test_a_comparison_is_checked_before_it_begins(tmp_path, monkeypatch, given, told):
    for name in ("prepare", "chain", "tune"):
        monkeypatch.setattr(experiment, name, lambda *_: pytest.fail("work has begun"))
    if "free" in told:
        monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10))
    extra = (given, *(["evaluation.checkpoints.clip=/no/where"] if "=clip" in given else []))
    with pytest.raises((ValueError, DiskError), match=re.escape(told)):
        experiment.compare(tmp_path / "new", experiment.Plan("taste", ("x0",), 1, extra))
    assert not (tmp_path / "new").exists()


def test_held_out_prompts_and_the_only_score_need_no_setting(tmp_path, tiny_config):
    config = tiny_config("evaluation.prompts=heldout", "evaluation.preference=auto")
    with pytest.raises(ConfigError, match="'auto' is not a score of scenes: choose one of"):
        check_evaluation(config, tmp_path)
    alone = replace(config.evaluation, scorer="evaluation_scorer:brightness")
    config = replace(config, evaluation=alone)
    module = ModuleType("evaluation_scorer")
    module.brightness = lambda images, prompts: [float(i.mean()) for i in images]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "evaluation_scorer", module)
        check_evaluation(config, tmp_path)
        assert not list(tmp_path.iterdir())
        assert settled(config, tmp_path).evaluation.preference == "brightness"


def test_scores_of_scenes_need_prompts_of_its_world(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red star above a small blue star\na horse\n")
    config = load_config("taste", [f"evaluation.prompts={prompts}"])
    with pytest.raises(ScorerError, match="'a horse'"):
        check_evaluation(config, tmp_path)


def test_best_of_n_does_not_squeeze_the_curves():
    """The axis is that of the curves; a line beyond it is named and not drawn."""
    curve = [{"step": s, "score": over_seeds([0.5 + s / 1000] * 2)} for s in (0, 10)]
    variant = {"curve": curve, "varied": None, "step_seconds": 1.0}
    variant |= {"inversion": {"seconds": 0.0}}
    summary = {"variants": {"x0": variant}, "prompts": 4, "curve_prompts": 4}
    summary["best_of"] = {n: {"score": {"mean": m}} for n, m in (("1", 0.505), ("8", 3.0))}
    axes = curves.score_curves(summary, "score", "seconds").axes[0]
    assert axes.get_ylim()[1] < 0.52
    words = [text.get_text() for text in axes.texts]
    assert words == ["best of 1", "above this plot: best of 8 (3)"]


def test_pictures_are_a_column_a_method_from_the_same_noise(tmp_path, tiny_config, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\na cross\na ring\n")
    config = tiny_config(f"evaluation.prompts={prompts}", "evaluation.seeds=2")
    files, shades = {}, {"reference": 10, "x0": 100, "kto": 200}
    for name, shade in shades.items():
        files[name] = tmp_path / f"{name}.parquet"
        images = [np.full((8, 8, 3), shade + k, np.uint8) for k in range(6)]
        write_samples(files[name], ["a"] * 6, list(range(6)), images, {})

    def sampled_file(config, adapter, *_):
        return files[adapter.parent.name if adapter else "reference"]

    monkeypatch.setattr(runs, "sampled_file", sampled_file)
    monkeypatch.setattr(runs, "read_config", lambda folder: config)
    cards = runs.pictured(config, tmp_path, {n: tmp_path / n for n in ("x0", "kto")})
    assert [caption for caption, _ in cards] == ["a star", "a cross", "a ring"]
    for k, (_, pictures) in enumerate(cards):
        assert [p.name for p in pictures] == list(shades)
        wanted = [np.full((8, 8, 3), shade + 2 * k, np.uint8) for shade in shades.values()]
        assert [p.image for p in pictures] == list(map(inlined, wanted))


def test_the_page_lists_each_methods_settings():
    given = {"x0": ["objective.target=x0", "training.seed=a|b"], "kto": ["objective.name=kto"]}
    summary = {"variants": {n: {"settings": settings} for n, settings in given.items()}}
    assert setting_part(summary)[2] == [
        {
            "method": "x0",
            "objective.target": "x0",
            "training.seed": "a|b",
            "objective.name": "",
        },
        {"method": "kto", "objective.target": "", "training.seed": "", "objective.name": "kto"},
    ]


def test_the_page_counts_methods_and_not_their_rounds():
    assert title({"config": "taste", "variants": {"x0": {}, "kto": {}}}) == "2 methods on taste"
    assert title({"config": "/home/me/own.yaml", "variants": {"x0": {}}}) == "1 method on own.yaml"
    found = {"x0": {}, "x0 round 2": {}}
    rounds = {"x0": [{"round": 0}, {"round": 1}, {"round": 2}]}
    assert title({"config": "taste", "variants": found, "rounds": rounds}) == (
        "1 method on taste, 2 rounds"
    )


def test_tuning_and_measuring_share_no_prompt(tmp_path):
    file = tmp_path / "mine.jsonl"
    graph = {"items": [{"item_id": 0, "label": "cat", "attributes": []}], "relations": []}
    rows = [{"prompt": f"p{k}", "category": f"c{k}", "scene_graph": graph} for k in range(5)]
    rows[1]["size"] = "96x64"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    sides = split_prompts(tmp_path, EvaluationConfig(prompts=str(file), limit=4))
    sets = [read_prompt_set(side[0].partition("=")[2], None) for side in sides]
    assert [s.prompts for s in sets] == [["p1", "p3"], ["p0", "p2"]]
    assert [s.categories for s in sets] == [["c1", "c3"], ["c0", "c2"]]
    assert [s.sizes for s in sets] == [[(64, 96), None], [None, None]]
    assert all(graph.items[0].label == "cat" for s in sets for graph in s.graphs)
    with pytest.raises(ConfigError, match="--tune needs two prompts or more"):
        split_prompts(tmp_path, EvaluationConfig(prompts=str(file), limit=1))
    assert split_prompts(tmp_path, EvaluationConfig()) == (VALIDATION, ())
