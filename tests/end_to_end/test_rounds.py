"""Rounds and comparisons on a tiny pipeline: whose samples, which reference, what it cost.

Every test here trains and samples several times. Fast are those of a chain of rounds, of rounds
that people label, and of one comparison with its page. Slow are further settings of the same ways.
"""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from inversion_dpo.cli.compare import run_all
from inversion_dpo.cli.label import fill, subject_of
from inversion_dpo.compare import beforehand
from inversion_dpo.compare import experiment as comparing
from inversion_dpo.compare import runs as comparing_runs
from inversion_dpo.compare.rounds import (
    Rounds,
    chain,
    drawn_with,
    later_rounds,
    make_samples,
    merge,
)
from inversion_dpo.compare.runs import inversion_evaluations
from inversion_dpo.data.images import decode_image
from inversion_dpo.evaluation.sides import load_policy_pipeline, sampler_of
from inversion_dpo.labels.questions import WebError
from inversion_dpo.labels.store import LabelStore
from inversion_dpo.making_pairs.candidates import encode_image
from inversion_dpo.models.base import ModelError
from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.run.disk import CHECKSUM
from inversion_dpo.run.faults import Waiting
from inversion_dpo.run.folder import BusyError, occupied, read_config

SCORER = """
import numpy as np
def brightness(images, prompts):
    return {"brightness": np.array([i.mean() / 255 for i in images])}
"""


@pytest.fixture
def settings(tiny_config, tmp_path, monkeypatch):
    for module in (comparing_runs, beforehand):
        monkeypatch.setattr(module, "DIVERSITY_PROMPTS", 2)
    (tmp_path / "own_scorer.py").write_text(SCORER)
    monkeypatch.syspath_prepend(tmp_path)
    prompts = tmp_path / "own.txt"
    prompts.write_text("\n".join(f"a red star number {k}" for k in range(6)) + "\n")

    def make(*overrides):
        return tiny_config(
            "training.steps=2",
            "evaluation.limit=2",
            "evaluation.scorer=own_scorer:brightness",
            "evaluation.preference=brightness",
            "evaluation.sample_steps=2",
            "training.learning_rate=0.05",
            *overrides,
        )

    return make, Rounds(2, str(prompts), 3)


@pytest.mark.slow
def test_a_round_trains_on_samples_of_the_round_before(settings, tmp_path):
    make, rounds = settings
    config, root = make(), tmp_path / "compare"
    found = chain(root, "x0", config, 0, rounds)
    assert list(found) == ["x0", "x0 round 2"]

    first, second = root / "runs" / "x0-0", root / "runs" / "x0-0-round2"
    now = read_config(second)
    assert now.model.path == str(first / "merged")
    assert now.data.pairs == str(second / "pairs" / "pairs.parquet")
    assert now.objective == config.objective and now.training == config.training

    row = pq.read_table(now.data.pairs).to_pylist()[0]
    stored = decode_image(row["jpg_0"], "")
    away = []
    for adapter in (first / "adapter", None):  # the merged weights sample what the adapter does
        image = sampler_of(config, adapter).draw([row["caption"]], [row["seed_0"]])[0]
        again = decode_image(encode_image(image, quality=95), "")
        away.append(np.abs(np.asarray(again, float) - np.asarray(stored, float)).mean())
    assert away[0] < 1 < 2 < away[1]  # of 255
    winner, loser = (0, 1) if row["label_0"] == 1 else (1, 0)
    bright = [json.loads(row[f"scores_{k}"])["brightness"] for k in (0, 1)]
    assert bright[winner] > bright[loser]

    # 6 prompts x 3 samples x 2 steps, two a step under guidance; each trained image 6 times
    pairs = found["x0 round 2"]["metrics"]["pairs"]
    trained = pairs - max(1, round(pairs * 0.25))
    assert found["x0 round 2"]["spent"]["evaluations"] == 6 * 3 * 2 * 2 + 2 * trained * 6


@pytest.mark.slow
def test_gains_are_over_the_first_reference_and_nothing_is_repeated(
    settings, tmp_path, monkeypatch
):
    make, rounds = settings
    config, root = make(), tmp_path / "compare"
    found = chain(root, "x0", config, 2, rounds)
    one, two = (r["metrics"]["preference"] for r in found.values())
    assert two["reference"] == one["reference"] and two["policy"] != one["policy"]
    assert two["gain"] == pytest.approx(two["policy"] - two["reference"])
    start = found["x0 round 2"]["curve"][0]["brightness"]  # of two prompts, as the policy before
    assert start == pytest.approx(found["x0"]["curve"][-1]["brightness"], abs=2 / 255)

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(comparing_runs, "train", never)
    assert chain(root, "x0", config, 2, rounds) == found

    owner = root / "runs" / "x0-0" / "config.yaml"  # a run from before a key was there
    lines = owner.read_text().splitlines(keepends=True)
    owner.write_text("".join(line for line in lines if "prompt_dropout" not in line))
    assert chain(root, "x0", config, 2, rounds) == found
    with pytest.raises(ConfigError, match=r"x0-0 .*data.prompt_dropout is 0.0 there and 0.1 here"):
        chain(root, "x0", make("data.prompt_dropout=0.1"), 2, rounds)
    with pytest.raises(ConfigError, match=r"settings \(its curve has 2 prompts, not 1\)"):
        chain(root, "x0", config, 1, rounds)
    with pytest.raises(ConfigError, match=r"settings \(its curve has 2 prompts, not 0\)"):
        chain(root, "x0", config, 0, rounds)
    kept = owner.with_name("result.json")  # a result from before it said so
    said = json.loads(kept.read_text())
    kept.write_text(
        json.dumps({k: v for k, v in said.items() if k not in ("curve_prompts", CHECKSUM)})
    )
    with pytest.raises(ConfigError, match="x0-0 .*its curve has None prompts, not 2"):
        chain(root, "x0", config, 2, rounds)


@pytest.mark.slow
def test_a_killed_round_goes_on(settings, tmp_path, monkeypatch):
    make, rounds = settings
    config, root = make(), tmp_path / "compare"
    with monkeypatch.context() as patch:
        patch.setattr("inversion_dpo.compare.rounds.build", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            chain(root, "x0", config, 0, rounds)
    weights = next((root / "runs" / "x0-0" / "merged").rglob("*.safetensors"))
    before = weights.stat().st_mtime_ns
    assert list(chain(root, "x0", config, 0, rounds)) == ["x0", "x0 round 2"]
    assert weights.stat().st_mtime_ns == before


def test_only_visited_pairs_count(settings, tmp_path):
    make, _ = settings
    config = make("training.steps=1", "training.batch_size=2", "inversion.fixed_point_iterations=1")
    prepared = comparing_runs.prepare(config, tmp_path)
    assert prepared.cache.pairs == 16
    assert inversion_evaluations(config, prepared) == 2 * 2 * (1 + 5 * 2)
    many = make("training.steps=100", "inversion.fixed_point_iterations=1")
    assert inversion_evaluations(many, prepared) == 2 * 12 * (1 + 5 * 2)  # 4 of 16 are held out


@pytest.mark.slow
def test_full_weights_need_no_merging_and_fresh_noise_no_inversion(settings, tmp_path):
    make, rounds = settings
    config = make("policy.kind=full", "objective.name=diffusion_dpo")
    found = chain(tmp_path, "full", config, 0, rounds)
    assert found["full round 2"]["spent"]["evaluations"] == 6 * 3 * 2 * 2
    merged = load_policy_pipeline(read_config(tmp_path / "runs" / "full-0-round2"), None)
    trained = load_policy_pipeline(config, tmp_path / "runs" / "full-0" / "adapter")
    for a, b in zip(merged.unet.parameters(), trained.unet.parameters(), strict=True):
        assert a.equal(b)
    with pytest.raises(ModelError, match="nothing is there"):
        merge(config, tmp_path / "nothing", tmp_path / "merged")


@pytest.mark.slow
def test_the_command_writes_a_page_of_rounds(settings, tmp_path, monkeypatch):
    from inversion_dpo.data import traits
    from inversion_dpo.run.config import to_yaml

    monkeypatch.setattr(traits, "LEAST_PAIRS", 1)
    make, rounds = settings
    (tmp_path / "tiny.yaml").write_text(to_yaml(make()))
    root = tmp_path / "compare"
    plan = comparing.Plan(str(tmp_path / "tiny.yaml"), ("x0",), 1, curve=0)
    comparing.compare(root, plan)
    again = comparing.Plan(plan.config, ("x0",), 2, curve=0, rounds=rounds)
    page = comparing.compare(root, again)  # rounds and seeds can be added
    found = json.loads((root / "results.json").read_text())
    assert [r["round"] for r in found["rounds"]["x0"]] == [0, 1, 2]
    last = found["rounds"]["x0"][2]["brightness"]
    gain = found["variants"]["x0 round 2"]["gains"]["brightness"]["mean"]
    before = found["rounds"]["x0"][0]["brightness"]["mean"]
    assert last["mean"] - before == pytest.approx(gain)
    assert "Round by round" in page.read_text() and len(last["values"]) == 2
    assert 'alt="x0 round 2: a ' in page.read_text() and "Methods and their" in page.read_text()
    assert "What else changed" in page.read_text()
    assert all(found["variants"][n]["traits"]["brighter"] for n in ("x0", "x0 round 2"))
    spent = found["variants"]["x0 round 2"]["inversion"]["evaluations"]
    assert spent > found["variants"]["x0"]["inversion"]["evaluations"]

    other = comparing.Plan(plan.config, ("x0",), 2, curve=0, rounds=Rounds(2, rounds.prompts, 5))
    with pytest.raises(ConfigError, match="rounds of .* 3 samples"):
        comparing.compare(root, other)
    with occupied(root, run=False), pytest.raises(BusyError, match="in use"):
        comparing.compare(root, again)


@pytest.mark.slow
def test_two_methods_with_curves_against_each_other(settings, tmp_path):
    """Every part of the page that one method without curves does not have."""
    from inversion_dpo.run.config import to_yaml

    make, _ = settings
    (tmp_path / "tiny.yaml").write_text(to_yaml(make()))
    root = tmp_path / "compare"
    plan = comparing.Plan(str(tmp_path / "tiny.yaml"), ("x0", "diffusion_dpo"), 1, curve=2)
    page = comparing.compare(root, plan).read_text()
    found = json.loads((root / "results.json").read_text())
    for name, v in found["variants"].items():
        first, last = v["curve"][0], v["curve"][-1]
        assert (first["step"], last["step"]) == (0, 2), name
        # all prompts are in the curve, which ends where the run does
        assert first["brightness"]["mean"] == pytest.approx(v["reference"]["brightness"])
        assert last["brightness"]["values"] == pytest.approx(v["scores"]["brightness"]["values"])
    goal = found["variants"]["diffusion_dpo"]["curve"][-1]["brightness"]["mean"]
    assert found["reach"]["goal"] == goal
    ours, theirs = found["wins"]["x0"]["diffusion_dpo"], found["wins"]["diffusion_dpo"]["x0"]
    assert ours["mean"] + theirs["mean"] == pytest.approx(1)
    for heading in (
        "Score against compute",
        "To the final score of diffusion_dpo",
        "One against another",
        "Best of n",
        "Errors and drift",
    ):
        assert f"{heading}</h2>" in page
    sampled = sum(pq.read_metadata(f).num_rows for f in (root / "samples").glob("*.parquet"))
    base = load_config(plan.config, [])
    assert sampled == beforehand.images_of(plan, base, 2)
    assert "| x0 | 1 | 1 |" in beforehand.foretold(root, plan, base)  # which is finished
    for picture in ("evaluations", "seconds", "errors", "drift", "gains"):
        assert (root / "figures" / f"{picture}.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_run_goes_on_in_rounds_and_is_measured_against_the_first_model(settings, tmp_path):
    make, rounds = settings
    config, root = make(), tmp_path / "demo"

    def work():
        run_all(config, root)
        for own, folder in later_rounds(config, root, rounds):
            run_all(own, folder, config)

    work()
    told = [json.loads((f / "metrics.json").read_text()) for f in (root, root / "round-2")]
    first, second = (m["brightness"] for m in told)
    assert second["reference"] == first["reference"] != second["policy"]
    assert read_config(root / "round-2").model.path == str(root / "merged")
    assert (root / "round-2" / "report.html").stat().st_size > 10_000
    grid = json.loads((root / "round-2" / "grid.json").read_text())  # pictures of the same two
    shown = np.mean([[r["reference"], r["policy"]] for r in grid], axis=0)
    assert shown == pytest.approx([second["reference"], second["policy"]])

    def done():  # the seconds of every step, and when the pairs were written
        rows = [
            json.loads(r) for r in (root / "round-2" / "metrics.jsonl").read_text().splitlines()
        ]
        pairs = root / "round-2" / "pairs" / "pairs.parquet"
        return [r for r in rows if "loss" in r], pairs.stat().st_mtime_ns

    before = done()
    work()
    assert done() == before and len(before[0]) == 2


@pytest.mark.slow
def test_a_round_that_people_label_waits_for_them(settings, tmp_path):
    make, rounds = settings
    config, root = make(), tmp_path / "demo"
    asked = Rounds(2, rounds.prompts, people=6)
    folder = root / "round-2" / "pairs"
    labels = folder / "labels.sqlite"

    def work():
        run_all(config, root)
        for own, where in later_rounds(config, root, asked):
            run_all(own, where, config)

    page = f"inversion-dpo web {folder}/samples.parquet --labels {labels}"
    with pytest.raises(Waiting, match=f"{page}\n.0 of 6 pairs"):
        work()
    drawn = (folder / "samples.parquet").stat().st_mtime_ns
    about = subject_of(str(folder / "samples.parquet"), "taste", [], labels)  # as the page does
    store = LabelStore(about.labels)
    with pytest.raises(Waiting, match="0 of 6 pairs"):  # a page that died before it had the pairs
        work()
    assert fill(store, about.config, 1000)[0] == 6
    preferred = {}
    first, *others, last = store.pairs()
    for k, pair in enumerate([first, *others]):
        store.label(f"{k}", "anna", pair.pair, ("first", "second", "bad", "second", "first")[k])
        one, other = pair.images
        preferred[pair.caption] = (one, other, None, other, one)[k]
    with pytest.raises(Waiting, match="5 of 6 pairs"):
        work()
    assert not (folder / "pairs.parquet").exists()
    store.label("tie", "ben", last.pair, "tie")
    store.label("bad", "anna", first.pair, "tie")  # 3 are left that prefer
    with pytest.raises(WebError, match=r"fewer than 4 pairs .*take labels back"):
        work()
    assert not (folder / "pairs.parquet").exists()
    store.undo("back", "anna")
    store.label("again", "anna", first.pair, "first")
    store.label("last", "ben", last.pair, "first")
    preferred[last.caption] = last.images[0]
    work()
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    winners = {r["caption"]: r[f"jpg_{1 - int(r['label_0'])}"] for r in rows}
    assert winners == {c: image for c, image in preferred.items() if image}
    assert (folder / "samples.parquet").stat().st_mtime_ns == drawn
    told = json.loads((root / "round-2" / "metrics.json").read_text())
    assert told["pairs"] == 5 and told["brightness"]["policy"] != told["brightness"]["reference"]

    row = pq.read_table(folder / "samples.parquet").to_pylist()[0]  # by the policy of round 1
    sampler = sampler_of(config, root / "adapter")
    image = sampler.draw([row["caption"]], [drawn_with(config, 2)])[0]
    away = np.asarray(image, float) - np.asarray(decode_image(row["jpg_0"], ""), float)
    assert np.abs(away).mean() < 1  # of 255: merged weights round otherwise
    # what is there costs what it cost: 6 prompts x 2 samples x 2 steps, two a step under guidance
    cost = make_samples(config, read_config(root / "round-2"), asked, 0, root / "round-2")
    assert cost == 6 * 2 * 2 * 2 and len(pq.read_table(folder / "pairs.parquet")) == 5


@pytest.mark.slow
def test_later_rounds_sample_as_build_says(settings, tmp_path):
    make, rounds = settings
    config = make("build.guidance_scales=[1,2]", "objective.name=diffusion_dpo")
    found = chain(tmp_path, "guided", config, 0, rounds)
    rows = pq.read_table(tmp_path / "runs" / "guided-0-round2" / "pairs" / "pairs.parquet")
    made_by = {s for k in (0, 1) for s in rows[f"source_{k}"].to_pylist()}
    assert made_by == {"reference, guidance 1", "reference, guidance 2"}
    # 6 prompts x 2 steps x samples at guidance 1, 2 and 1, of which the second costs double
    assert found["guided round 2"]["spent"]["evaluations"] == 6 * 2 * (1 + 2 + 1)


@pytest.mark.slow
def test_an_ablation_has_its_picture_and_strict_json(settings, tmp_path):
    from inversion_dpo.run.config import to_yaml

    make, _ = settings
    (tmp_path / "tiny.yaml").write_text(to_yaml(make()))
    root, vary = tmp_path / "compare", ("objective.beta=1,2", "policy.rank=2")
    plan = comparing.Plan(str(tmp_path / "tiny.yaml"), ("x0",), 1, vary=vary, curve=0)
    page = comparing.compare(root, plan).read_text()
    assert "One setting at a time" in page and "One against another" not in page

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    found = json.loads((root / "results.json").read_text(), parse_constant=refuse)
    varied = {n: v["varied"] for n, v in found["variants"].items()}
    assert varied == {
        "x0": None,
        "x0 beta=1": ["objective.beta", "1"],
        "x0 beta=2": ["objective.beta", "2"],
        "x0 rank=2": ["policy.rank", "2"],
    }
    assert found["variants"]["x0"]["gains"]["brightness"]["low"] is None  # of one seed
    gains = {n: v["gains"]["brightness"]["mean"] for n, v in found["variants"].items()}
    lines = (root / "results.md").read_text().splitlines()
    row = next(line for line in lines if "| policy.rank |" in line)
    gain, less = gains["x0 rank=2"], gains["x0 rank=2"] - gains["x0"]
    assert row.split(" | ")[1:5] == ["policy.rank", "2", f"{gain:+.3f}", f"{less:+.3f}"]
    head = next(line for line in lines if "| setting |" in line)
    told = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    rank = found["variants"]["x0 rank=2"]
    assert told["s / step"] == f"{rank['step_seconds']:.2f}"
    assert told["inversion, s"] == f"{rank['inversion']['seconds']:.0f}"
