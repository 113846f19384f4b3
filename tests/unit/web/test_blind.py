"""The blind comparison: what is judged, and what the run keeps of it."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from inversion_dpo.evaluation.people import read_people
from inversion_dpo.labels.store import swapped
from inversion_dpo.models.sampler import Sampler
from inversion_dpo.web.app import label_tab, make_app
from inversion_dpo.web.blind import Blind
from inversion_dpo.web.guard import hosts_for
from inversion_dpo.web.labelling import Asking
from inversion_dpo.web.studio import Studio


class Painter(Sampler):
    """A sampler whose policy paints 200 and whose reference paints 50, plus the seed."""

    def draw(self, prompts, seeds, sizes=None, sources=()):
        return [np.full((4, 4, 3), self.pipeline + seed, np.uint8) for seed in seeds]


@pytest.fixture
def studio(tiny_config, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"a hat, number {k}\n" for k in range(12)))
    prompts = f"evaluation.prompts={tmp_path / 'prompts.txt'}"
    settings = ("evaluation.seed=3", "evaluation.batch_size=5", "evaluation.limit=12")
    config = tiny_config(prompts, *settings)
    return Studio(config, tmp_path, lambda config, adapter: Painter(200 if adapter else 50, config))


@pytest.fixture
def page(studio, serve, tmp_path):
    blind = Blind(studio, tmp_path)
    asking = Asking("blind", "Which?", "report", blind.ready, blind.verdict)
    yield serve(make_app([label_tab(asking, "Blind", blind.image)], "run", hosts_for("::1", False)))
    for _, store in blind.opened.values():
        store.close()


def ahead(page):
    """The next state that has a pair, or the end."""
    for _ in range(200):
        status, _, body = page.get("/api/blind/next?labeller=anna")
        state = json.loads(body)
        if status != 200 or state["pair"] or state["done"] == state["total"]:
            return state
        time.sleep(0.02)
    raise AssertionError("no pair was sampled")


def level(page, sha256):
    from inversion_dpo.data.images import decode_image

    return decode_image(page.get(f"/image/{sha256}")[2], "sample").getpixel((0, 0))[0]


def test_people_judge_the_images_of_evaluate_and_their_win_rate_is_kept(page, tmp_path):
    (tmp_path / "adapter").mkdir()
    seen = set()
    for number in range(12):
        state = ahead(page)
        assert state["total"] == 12 and state["done"] == number
        pair = state["pair"]
        levels = {side: level(page, pair[side]) for side in ("left", "right")}
        policy = max(levels, key=levels.get)
        assert max(levels.values()) - min(levels.values()) == 150  # the same seed
        seen.add((pair["caption"], min(levels.values()) - 50))
        assert (policy == "right") == swapped("anna", pair["pair"])
        choice = policy if number < 9 else "tie"
        sent = {"request": f"{number}", "labeller": "anna", "pair": pair["pair"], "choice": choice}
        assert page.post("/api/blind/choose", sent)[0] == 200
    assert ahead(page)["pair"] is None
    assert seen == {(f"a hat, number {k}", 3 + k) for k in range(12)}  # the seeds of evaluate
    found = read_people(tmp_path)
    assert (found["wins"], found["even"], found["people"]) == (9, 3, 1)
    assert found["win_rate"] == pytest.approx(10.5 / 12)
    assert json.loads(page.get("/api/blind/team?labeller=anna")[2])["verdict"] == found
    page.post("/api/blind/undo", {"request": "u", "labeller": "anna"})
    assert read_people(tmp_path)["pairs"] == 11


def judge(page, number):
    pair = ahead(page)["pair"]
    sent = {"request": number, "labeller": "anna", "pair": pair["pair"], "choice": "left"}
    assert page.post("/api/blind/choose", sent)[0] == 200


def test_a_look_at_another_comparison_keeps_what_people_judged(page, studio, tmp_path):
    (tmp_path / "adapter").mkdir()
    judge(page, "a")
    found = read_people(tmp_path)
    e = studio.config.evaluation
    assert found["pairs"] == 1 and found["guidance_scale"] == e.guidance_scale
    e = replace(e, guidance_scale=3.0)
    other = Blind(Studio(replace(studio.config, evaluation=e), tmp_path), tmp_path)
    assert other.verdict()["pairs"] == 0
    other.current()[1].close()
    assert read_people(tmp_path) == found
    page.post("/api/blind/undo", {"request": "u", "labeller": "anna"})
    assert read_people(tmp_path) is None


def test_a_policy_that_is_trained_further_is_judged_anew(page, studio, tmp_path):
    (tmp_path / "adapter").mkdir()
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(b"first")
    judge(page, "a")
    before = read_people(tmp_path)["policy"]
    weights.write_bytes(b"second")
    assert ahead(page)["done"] == 0
    judge(page, "b")
    found = read_people(tmp_path)
    assert found["policy"] != before and found["pairs"] == 1


def test_a_person_sees_what_is_edited(page, studio, tmp_path):
    (tmp_path / "adapter").mkdir()
    Image.new("RGB", (8, 4), "red").save(tmp_path / "day.png")
    studio.sources = {"a hat, number 0": tmp_path / "day.png"}
    found = {}
    for number in range(12):
        pair = ahead(page)["pair"]
        found[pair["caption"]] = pair["source"] and page.get(f"/image/{pair['source']}")[2]
        sent = {"request": f"{number}", "labeller": "anna", "pair": pair["pair"], "choice": "tie"}
        page.post("/api/blind/choose", sent)
    assert found.pop("a hat, number 0") == (tmp_path / "day.png").read_bytes()
    assert set(found.values()) == {None} and len(found) == 11


def test_a_run_without_a_policy_says_so(page):
    status, _, body = page.get("/api/blind/next")
    assert status == 409 and b"no policy yet" in body
