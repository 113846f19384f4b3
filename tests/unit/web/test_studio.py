"""Samples, film strips and curves, without a browser."""

import json

import pytest
import torch

from inversion_dpo.data.images import decode_image
from inversion_dpo.evaluation.sides import sampler_of
from inversion_dpo.web.app import make_app
from inversion_dpo.web.comparing import compare_tab
from inversion_dpo.web.follow import curves, follow_tab, policies, status, thinned
from inversion_dpo.web.guard import hosts_for
from inversion_dpo.web.studio import Pictures, Studio, spread


@pytest.fixture
def config(tiny_config):
    return tiny_config()


@pytest.fixture
def studio(config):
    return Studio(config, sampler_of)


@pytest.fixture
def page(studio, store, serve, config, tmp_path):
    tabs = [compare_tab(studio, store, tmp_path), follow_tab(tmp_path, config)]
    return serve(make_app(store, "run", hosts_for("127.0.0.1", False), tabs))


ASKED = {"model": "reference", "prompts": ["a small red star"] * 2, "seed": 5, "steps": 2}


def test_the_same_seed_gives_the_same_image(page):
    status, first = page.post("/api/samples", ASKED)
    assert status == 200 and first["seeds"] == [5, 6]
    assert page.post("/api/samples", ASKED)[1] == first
    _, later = page.post("/api/samples", ASKED | {"seed": 6})
    assert later["images"][0] == first["images"][1] != first["images"][0]
    code, headers, data = page.get(f"/image/{first['images'][0]}")
    assert code == 200 and headers["content-type"] == "image/png"
    assert decode_image(data, "sample").size == (64, 64)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "adapter"},
        {"model": "../x"},
        {"prompts": []},
        {"prompts": ["x"] * 17},
        {"prompts": "x"},
        {"prompts": [""]},
        {"prompts": ["x" * 2001]},
        {"seed": -1},
        {"seed": 1.5},
        {"seed": True},
        {"steps": 0},
        {"steps": 201},
        {"guidance": -1},
        {"guidance": "4"},
        {"guidance": True},
    ],
)
def test_what_cannot_be_sampled_is_refused(page, change):
    assert page.post("/api/samples", ASKED | change)[0] == 400


def test_a_policy_that_cannot_be_loaded_says_why(page, tmp_path):
    (tmp_path / "snapshots" / "step-000004").mkdir(parents=True)
    code, body = page.post("/api/samples", ASKED | {"model": "step-000004"})
    assert code == 409 and b"train first" in body


def test_the_film_strip_is_the_runs_own_inversion(page, store, studio, config):
    pair = store.shown(3, 1)[0]
    code, film = page.post("/api/strip", {"image": pair.left, "caption": pair.caption})
    assert code == 200 and len(film["frames"]) == config.inversion.steps + 1
    times = [frame["timestep"] for frame in film["frames"]]
    assert times == sorted(times)
    for name in (film["original"], film["reconstruction"], film["frames"][-1]["image"]):
        assert page.get(f"/image/{name}")[0] == 200
    assert page.post("/api/strip", {"image": "0" * 64, "caption": "x"})[0] == 404
    strip = studio.inversion(store.image(pair.left), pair.caption)
    assert strip.error == pytest.approx(film["error"], abs=1e-4) and strip.error > 0
    exact = studio.inversion(store.image(pair.left), pair.caption)
    assert exact.frames == strip.frames


def test_the_film_strip_agrees_with_the_trajectory_cache(config, studio, store, tmp_path):
    """Both images of a pair, inverted one at a time here and together by the trainer's code."""
    from inversion_dpo.data.source import open_pairs
    from inversion_dpo.trajectories.fill import fill
    from inversion_dpo.trajectories.key import key_of
    from inversion_dpo.trajectories.sampling_back import sampled_back

    model = studio.sampler(None).model
    source = open_pairs(config.data)
    source.limit = 1
    cache = fill(tmp_path, model, source, key_of(config, source, model), device=torch.device("cpu"))
    (pair,), shard = source, cache.shard(0)
    errors = sampled_back(model, cache, config.inversion).shard(0).get_tensor("reconstruction")
    for k, data in enumerate((pair.winner, pair.loser)):
        strip = studio.inversion(data, pair.caption)
        variance = float(shard.get_tensor("x_T_variance")[k])
        assert strip.variance == pytest.approx(variance, rel=1e-4)
        assert strip.error == pytest.approx(float(errors[k]), rel=1e-3)


def test_pairs_by_number(page, store):
    assert json.loads(page.get("/api/pair?number=15")[2])["caption"]
    for number in ("16", "-1", "x", "", "1e3", "9" * 40):
        assert page.get(f"/api/pair?number={number}")[0] == 404


def test_pictures_forget_the_oldest():
    pictures = Pictures(2)
    names = [pictures.add(bytes([k])) for k in range(3)]
    assert pictures.get(names[0]) is None
    assert [pictures.get(name) for name in names[1:]] == [b"\1", b"\2"]


def test_spread_keeps_both_ends():
    assert spread(6, 11) == [0, 1, 2, 3, 4, 5] and spread(101, 3) == [0, 50, 100]


def test_a_running_and_a_finished_run(page, tmp_path, config):
    assert status(tmp_path, config)["step"] == 0
    rows = [{"step": k, "loss": 0.7 - k / 10, "accuracy": 0.5, "seconds": k} for k in range(3)]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    now = json.loads(page.get("/api/run")[2])
    assert now["step"] == 3 and now["steps"] == 8 and not now["finished"]
    assert [p["title"] for p in now["panels"]] == ["loss", "implicit accuracy"]
    log.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 8, "seconds": 9}]))
    assert status(tmp_path, config)["finished"]


def test_long_curves_are_thinned_and_keep_their_ends():
    points = [[k, k] for k in range(5000)]
    found = thinned(points)
    assert len(found) == 400 and found[0] == [0, 0] and found[-1] == [4999, 4999]
    assert curves([]) == []


def test_policies_are_in_the_order_of_the_run(tmp_path):
    for name in ("snapshots/step-000020", "snapshots/step-000010", "adapter"):
        (tmp_path / name).mkdir(parents=True)
    assert [n for n, _ in policies(tmp_path)] == ["step-000010", "step-000020", "adapter"]
