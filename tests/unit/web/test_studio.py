"""Samples, film strips and curves, without a browser."""

import json
import os
import shutil
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from inversion_dpo.data.images import decode_image
from inversion_dpo.data.source import open_pairs
from inversion_dpo.models.base import ModelError
from inversion_dpo.web.app import make_app
from inversion_dpo.web.comparing import compare_tab
from inversion_dpo.web.follow import curves, follow_tab, phase, policies
from inversion_dpo.web.guard import hosts_for
from inversion_dpo.web.pictures import Pictures, spread
from inversion_dpo.web.studio import How, Studio
from tests.pair_files import write_edits


@pytest.fixture
def config(tiny_config):
    return tiny_config()


@pytest.fixture
def studio(config, tmp_path):
    return Studio(config, tmp_path)


@pytest.fixture
def page(studio, serve, tmp_path):
    tabs = [compare_tab(studio), follow_tab(tmp_path, studio)]
    return serve(make_app(tabs, "run", hosts_for("127.0.0.1", False)))


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
        {"side": 20},
        {"side": 0},
    ],
)
def test_what_cannot_be_sampled_is_refused(page, change):
    assert page.post("/api/samples", ASKED | change)[0] == 400


def test_a_policy_that_cannot_be_loaded_says_why(page, tmp_path):
    (tmp_path / "snapshots" / "step-000004").mkdir(parents=True)
    code, body = page.post("/api/samples", ASKED | {"model": "step-000004"})
    assert code == 409 and b"step-000004 holds no" in body


def test_a_policy_that_is_trained_further_is_loaded_again(config, tmp_path):
    weights, loads = tmp_path / "adapter" / "adapter_model.safetensors", []
    studio = Studio(config, tmp_path, lambda config, adapter: loads.append(adapter) or object())
    weights.parent.mkdir()
    weights.write_bytes(b"first")
    first = studio.sampler(weights.parent)
    assert studio.sampler(weights.parent) is first
    weights.write_bytes(b"trained further")
    assert studio.sampler(weights.parent) is not first and loads == [weights.parent] * 2


def test_another_size_is_sampled(page):
    _, asked = page.post("/api/samples", ASKED | {"side": 96})
    assert decode_image(page.get(f"/image/{asked['images'][0]}")[2], "sample").size == (96, 96)


def test_the_film_strip_is_the_runs_own_inversion(page, studio, config):
    pair = json.loads(page.get("/api/pair?number=3")[2])
    image, caption = pair["images"][0], pair["caption"]
    code, film = page.post("/api/strip", {"image": image, "caption": caption})
    assert code == 200 and len(film["frames"]) == config.inversion.steps + 1
    times = [frame["timestep"] for frame in film["frames"]]
    assert times == sorted(times)
    for name in (film["original"], film["reconstruction"], film["frames"][-1]["image"]):
        assert page.get(f"/image/{name}")[0] == 200
    assert page.post("/api/strip", {"image": "0" * 64, "caption": "x"})[0] == 404
    assert studio.inversion(studio.pictures.get(image), caption) == film and film["error"] > 0


def test_no_film_strip_is_shown_without_the_source_that_an_edit_has(page, studio, monkeypatch):
    caption, (image, *_) = studio.pair(0)
    monkeypatch.setattr(studio.sampler(None).model, "edits", "must", raising=False)
    code, told = page.post("/api/strip", {"image": image, "caption": caption})
    assert code == 409 and "source image" in str(told)


def test_pairs_of_edits_are_neither_inverted_nor_drawn_without_their_source(
    studio, config, tmp_path
):
    """Under a model that edits where there is a source, such as FLUX.2, and draws otherwise."""
    pairs = str(write_edits(tmp_path / "edits.parquet", 2))
    edits = Studio(replace(config, data=replace(config.data, pairs=pairs, limit=None)))
    edits.sampler = studio.sampler
    with pytest.raises(ModelError, match="it would lack the source image"):
        edits.inversion(next(iter(open_pairs(edits.config.data))).winner, "x")
    with pytest.raises(ModelError, match="these prompts edit images"):  # not drawn from text
        edits.draw(None, ["edit 1"], [0], How(1, 1.0))
    assert len(edits.draw(None, ["a small red star"], [0], How(1, 1.0))) == 1


def test_the_film_strip_agrees_with_the_trajectory_cache(config, studio, tmp_path):
    """Both images of a pair, inverted one at a time here and together by the trainer's code."""
    from inversion_dpo.trajectories.fill import fill
    from inversion_dpo.trajectories.key import key_of
    from inversion_dpo.trajectories.sampling_back import sampled_back

    model = studio.sampler(None).model
    source = open_pairs(config.data)
    source.limit = 1
    cache = fill(tmp_path, model, source, key_of(config, source, model))
    (pair,), shard = source, cache.shard(0)
    errors = sampled_back(model, cache, config.inversion).shard(0).get_tensor("reconstruction")
    for k, data in enumerate((pair.winner, pair.loser)):
        strip = studio.inversion(data, pair.caption)
        variance = float(shard.get_tensor("x_T_variance")[k])
        assert strip["variance"] == pytest.approx(variance, rel=1e-4)
        assert strip["error"] == pytest.approx(float(errors[k]), rel=1e-3)


def test_pairs_by_number(page):
    assert json.loads(page.get("/api/pair?number=15")[2])["caption"]
    for number in ("16", "-1", "x", "", "1e3", "9" * 40):
        assert page.get(f"/api/pair?number={number}")[0] == 404


def test_prompts_are_the_runs_own_or_else_captions_of_the_data(config, tmp_path):
    captions = [pair.caption for pair in islice(open_pairs(config.data), 6)]
    (tmp_path / "prompts.txt").write_text("a hat\na cat\n")
    e = replace(config.evaluation, prompts=str(tmp_path / "prompts.txt"))
    own = replace(config, evaluation=e)
    assert Studio(own, tmp_path).prompts == ["a hat", "a cat"]
    lost = replace(config, evaluation=replace(e, prompts="nowhere.txt"))
    for without in (Studio(own), Studio(lost, tmp_path)):
        assert without.prompts == list(dict.fromkeys(captions))


def test_the_page_names_the_model_that_it_samples(config, serve):
    """Data sampled by one model are else compared with the default one unawares."""
    tabs = [compare_tab(Studio(config))]
    words = serve(make_app(tabs, "data", hosts_for("127.0.0.1", False))).get("/compare")[2]
    assert f"The reference is <code>{config.model.path}</code>" in words.decode()
    assert b"<code>--config</code>" in words


def test_pictures_forget_the_oldest():
    pictures = Pictures(2)
    names = [pictures.add(bytes([k])) for k in range(3)]
    assert pictures.get(names[0]) is None
    assert [pictures.get(name) for name in names[1:]] == [b"\1", b"\2"]


def test_spread_keeps_both_ends():
    assert spread(6, 11) == [0, 1, 2, 3, 4, 5] and spread(101, 3) == [0, 50, 100]


def put(path, text="", at=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (at, at))


def test_a_run_from_its_start_to_its_end(page, tmp_path, config):
    """Every phase is found from the files alone."""

    def now():
        return json.loads(page.get("/api/run")[2])

    assert now()["name"] == "waiting"
    shard, other = tmp_path / "cache/new/shard-0000", tmp_path / "cache/old/shard-00000.json"
    begun = time.time() - 30
    put(other, at=begun - 1000)
    for k in range(3):
        put(Path(f"{shard}{k}.json"), at=begun + 10 * k)
    half = now()  # 4 pairs a shard, 10 seconds each, 4 of 16 pairs left
    assert (half["name"], half["done"], half["total"]) == ("inverting", 12, 16)
    assert half["left"] == pytest.approx(10) and half["silent"] == pytest.approx(10, abs=5)
    encoded = replace(config, objective=replace(config.objective, name="diffusion_dpo"))
    assert phase(tmp_path, encoded, [], 16).name == "encoding"

    rows = [{"step": k, "loss": 0.7 - k / 10, "accuracy": 0.5, "seconds": 2 * k} for k in range(3)]
    log, lines = tmp_path / "metrics.jsonl", [json.dumps(row) + "\n" for row in rows]
    log.write_text("".join(lines) + '{"step": 3, "lo')
    half = now()
    assert (half["name"], half["done"], half["total"], half["left"]) == ("training", 3, 8, 10)
    assert half["curves"]["accuracy"] == [[0, 0.5], [1, 0.5], [2, 0.5]]
    log.write_text("".join(lines) + '{"step": 8, "seconds": 9}\n')
    assert now()["name"] == "trained"
    put(tmp_path / "samples/policy-1/00000000-4.parquet")
    put(tmp_path / "samples/policy-1/00000004-4.parquet")
    assert (now()["name"], now()["done"]) == ("sampling", 8)
    shutil.rmtree(tmp_path / "samples")
    put(tmp_path / "metrics.json")
    assert now()["name"] == "evaluated"


def test_long_curves_are_thinned_and_keep_their_ends():
    found = curves([{"step": k, "loss": k} for k in range(5000)])["loss"]
    assert len(found) == 400 and found[0] == [0, 0] and found[-1] == [4999, 4999]
    assert curves([]) == {}


def test_policies_are_in_the_order_of_the_run(tmp_path):
    """Without what a kill left half written, or somebody put beside them."""
    steps = ["step-000010", "step-999999", "step-1000000"]
    for name in (*steps, "step-000020.partial", "step-000010-mine"):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
    (tmp_path / "adapter").mkdir()
    assert list(policies(tmp_path)) == [*steps, "adapter"]
