"""VQAScore and UnifiedReward 2.0: their questions, formulas, spoiled answers and kept replies."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from safetensors.torch import save_file

from inversion_dpo.evaluation import pairwise
from inversion_dpo.evaluation.evaluate import reach_servers
from inversion_dpo.evaluation.pairwise import in_pairs, pairwise_text
from inversion_dpo.evaluation.samples import write_samples
from inversion_dpo.evaluation.scorers import unified_reward, vqa
from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError
from inversion_dpo.evaluation.scorers.local_vlm import LocalModel
from inversion_dpo.evaluation.scorers.registry import load_scorers
from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.run.fields import ParserConfig
from inversion_dpo.run.processes import Team
from inversion_dpo.training.effects import load_checked
from tests.chat_server import completion, serving
from tools.tiny.vlm import write_tiny_vlm

IMAGES = [np.full((8, 8, 3), k, np.uint8) for k in (10, 200)]
PROMPTS = ["a red star", "a cup"]
POINT = "Alignment Score (1-5): 2.5\nCoherence Score (1-5): 4\nStyle Score (1-5): 1"
PAIR = "\n\n".join(
    f"{a} Score:\n Image 1: 0.3\n Image 2: 0.7" for a in "Alignment Coherence Style".split()
)


def scored(name, url, store=None):
    group = load_scorers(name, {name: f"{url}@my-model"}, store=store)
    scores = group(IMAGES, PROMPTS)
    group.conclude()
    return scores


def likely(**tokens):
    """A completion whose first token has these probabilities."""
    top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in tokens.items()]
    body = completion("Yes")
    first = {"token": "Yes", "logprob": 0.0, "bytes": None, "top_logprobs": top}
    body["choices"][0]["logprobs"] = {"content": [first], "refusal": None}
    return body


@pytest.mark.parametrize(
    ("tokens", "expected", "read"),
    [
        ({"Yes": 0.6, "No": 0.3, " yes": 0.05}, 0.65, 1.0),
        ({"No": 0.7, "Maybe": 0.1}, 0.3, 1.0),  # t2v_metrics: 1 less the opposite's
        ({"Maybe": 0.9}, 0.0, 0.0),
    ],
)
def test_the_yes_probability_of_a_server(caplog, tokens, expected, read):
    with serving(lambda request: likely(**tokens)) as (url, script):
        scores = scored("vqa", url)
    assert scores["vqa"].tolist() == pytest.approx([expected] * 2)
    assert scores["vqa_read"].tolist() == [read] * 2
    request, _ = script.seen[0]
    parts = request["messages"][0]["content"]
    assert request["logprobs"] is True and request["max_tokens"] == 1
    assert [part["type"] for part in parts] == ["image_url", "text"]
    texts = {r["messages"][0]["content"][1]["text"] for r, _ in script.seen}
    assert texts == {f'Does this figure show "{p}"? Please answer Yes or No.' for p in PROMPTS}
    assert ("2 of 2 answers could not be read" in caplog.text) == (read == 0)


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory):
    return write_tiny_vlm(tmp_path_factory.mktemp("vlm") / "llava")


def test_the_yes_probability_of_a_local_model_is_the_softmax_of_its_logits(tiny_vlm):
    model = LocalModel(Checkpoint("vqa", str(tiny_vlm)))
    question = vqa.QUESTION.format(PROMPTS[0])
    tokens = model.processor.tokenizer("Yes", add_special_tokens=False).input_ids
    expected = 1.0  # token after token, each by itself
    said = model.processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.fromarray(IMAGES[0])},
                    {"type": "text", "text": question},
                ],
            }
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    for token in tokens:
        with torch.no_grad():
            expected *= float(model.model(**said).logits[0, -1].double().softmax(-1)[token])
        said["input_ids"] = torch.cat([said["input_ids"], torch.tensor([[token]])], 1)
        said["attention_mask"] = torch.ones_like(said["input_ids"])
    group = load_scorers("vqa", {"vqa": str(tiny_vlm)})
    found = group(IMAGES, [PROMPTS[0]] * 2)["vqa"]
    assert found[0] == pytest.approx(expected, rel=1e-4) and found[1] != found[0]


def test_unified_reward_reads_its_authors_form():
    with serving(lambda request: POINT) as (url, script):
        scores = scored("unifiedreward", url)
    assert scores["unifiedreward"].tolist() == pytest.approx([2.5] * 2)
    assert scores["unifiedreward_coherence"].tolist() == [4, 4]
    assert scores["unifiedreward_read"].tolist() == [1, 1]
    text = script.seen[0][0]["messages"][0]["content"][1]["text"]
    assert text.endswith("Text Caption: [a red star]") or text.endswith("Text Caption: [a cup]")
    assert "response_format" not in script.seen[0][0]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no alignment"),
        ("Alignment Score (1-5): X", "no alignment"),
        (POINT.replace("Style", "Taste"), "no style"),
        (POINT.replace("4", "44"), "coherence off the scale"),
        ("I cannot judge this image.", "no alignment"),
        ("**" + POINT + "** \nI like it", ""),
        (POINT.replace("4", "3,5"), "no coherence"),
        (POINT.replace("4", "1e0"), "no coherence"),
        (POINT.replace("4", "2.5.5"), "no coherence"),
        (POINT.replace("4", "4%"), "no coherence"),
        (POINT.replace("4", "4/5"), ""),
        (POINT.replace("4", "4."), ""),
    ],
)
def test_a_spoiled_rating_has_a_name_and_is_not_guessed(text, fault):
    found = unified_reward.read_point(text)
    assert found["read"] == fault and (fault == "") == ("style" in found)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (PAIR, ""),
        (PAIR.replace("0.7", "0.9"), "alignment does not sum to 1"),
        (PAIR.replace("Image 2", "Image 3"), "no alignment"),
        (PAIR.replace("0.3", "-0.3").replace("0.7", "1.3"), "alignment does not sum to 1"),
        ("Image 1 is better", "no alignment"),
        (PAIR.replace("0.7", "0,7"), "no alignment"),
    ],
)
def test_a_spoiled_comparison_has_a_name(text, fault):
    assert unified_reward.read_pair(text)["read"] == fault


def test_spoiled_answers_score_lowest_and_are_counted(caplog, tmp_path):
    replies = iter(["nonsense", POINT])
    with serving(lambda request: next(replies)) as (url, script):
        first = scored("unifiedreward", url, tmp_path / "scores.sqlite")
        again = scored("unifiedreward", url, tmp_path / "scores.sqlite")  # not asked again
    assert sorted(first["unifiedreward"].tolist()) == [1.0, 2.5] and len(script.seen) == 2
    assert {k: v.tolist() for k, v in first.items()} == {k: v.tolist() for k, v in again.items()}
    assert (
        "1 of 2 answers could not be read and have the lowest score (1 no alignment)" in caplog.text
    )


def test_a_server_that_fails_is_one_line_and_keeps_what_was_answered(tmp_path):
    given = iter([POINT, (400, {}, b"no such model", 0.0)])
    with serving(lambda request: next(given)) as (url, _):
        config = [f"evaluation.checkpoints.unifiedreward={url}@my-model"]
        e = load_config(None, [*config, "evaluation.parser.parallel=1"]).evaluation
        group = load_scorers("unifiedreward", e.checkpoints, 2, tmp_path / "s.sqlite", e.parser)
        with pytest.raises(ScorerError, match="HTTP 400.*no such model") as error:
            group(IMAGES, PROMPTS)
    assert "\n" not in str(error.value) and "Earlier answers are kept" in str(error.value)
    with serving(lambda request: POINT) as (other, script):
        at = {"unifiedreward": f"{other}@my-model"}  # another judge: nothing is taken over
        load_scorers("unifiedreward", at, 2, tmp_path / "s.sqlite")(IMAGES, PROMPTS)
        assert len(script.seen) == 2


@pytest.mark.parametrize("name", ["vqa", "unifiedreward"])
def test_without_a_model_it_says_what_to_give(name):
    with pytest.raises(ScorerError, match=f"{name} needs evaluation.parser.url") as error:
        load_scorers(name).names(PROMPTS)
    assert f"evaluation.checkpoints.{name}" in str(error.value)


def test_images_are_compared_in_both_orders(tmp_path, caplog):
    files = [tmp_path / "reference.parquet", tmp_path / "policy.parquet"]
    for file, images in zip(files, (IMAGES, IMAGES[::-1]), strict=True):
        write_samples(file, PROMPTS, [1, 2], images, {})

    def answer(request):
        """Prefer the first image always by 0.1, and the brighter one by 0.3."""
        parts = request["messages"][0]["content"]
        if "[a cup]" in parts[-1]["text"]:
            return "both are fine"
        order = [part["image_url"]["url"] for part in parts[:2]]
        bright_first = order == [given[200], given[10]]
        one = 0.9 if bright_first else 0.3
        return PAIR.replace("0.3", f"{one}").replace("0.7", f"{1 - one:.1f}")

    from inversion_dpo.data.images import data_uri, png

    given = {int(i[0, 0, 0]): data_uri(png(i)) for i in IMAGES}
    with serving(answer) as (url, _):
        place = f"evaluation.checkpoints={json.dumps({'unifiedreward-pair': f'{url}@m'})}"
        config = load_config(None, ["evaluation.scorer=unifiedreward-pair", place])
        found = in_pairs(files, config, tmp_path)
    part = found["pairwise"]
    assert (part["n"], part["unread"], part["win_rate"]) == (1, 1, 1.0)
    assert part["shares"]["style"] == pytest.approx((0.9 + 0.7) / 2)  # its place counts for nothing
    assert "prefers the policy's image in 100.0%" in pairwise_text(found)
    assert "1 could not be read" in pairwise_text(found)


@pytest.mark.parametrize("one", [0.4, 0.13, 0.57, 0.9])
def test_a_judge_that_looks_at_the_place_alone_finds_every_pair_even(one):
    answer = PAIR.replace("0.3", f"{one}").replace("0.7", f"{1 - one:.2f}")
    with serving(lambda request: answer) as (url, _):
        judge = unified_reward.PairJudge(f"{url}@m", ParserConfig(), None)
        found = judge(IMAGES, IMAGES[::-1], PROMPTS)
    assert found["unifiedreward-pair"].tolist() == [0.5, 0.5] and found["read"].all()


def test_the_same_ratings_of_other_axes_make_the_same_mean():
    form = "Alignment Score: {}\nCoherence Score: {}\nStyle Score: {}"
    texts = [form.format(1.0, 1.1, 1.2), form.format(1.0, 1.2, 1.1)]
    replies = iter(texts)
    with serving(lambda request: next(replies)) as (url, _):
        first, second = scored("unifiedreward", url)["unifiedreward"]
    assert first == second


@pytest.mark.parametrize(
    ("name", "body", "fault"),
    [
        ("vqa", completion("Yes"), "no top_logprobs, which this score needs"),
        ("vqa", likely(Yes=2.0), "a log-probability of 0.69"),
        ("vqa", (200, {}, b"<html>Sign in</html>", 0), "no chat completion"),
        ("unifiedreward", (401, {}, b"who are you?", 0), "HTTP 401"),
        ("unifiedreward-pair", (429, {"Retry-After": "3"}, b"slow", 0), "asks to wait 3 s"),
        ("scene-graph", (503, {}, b"", 0), "HTTP 503"),
    ],
)
def test_a_server_that_would_fail_is_found_before_an_image_is_sampled(name, body, fault):
    with serving(lambda request: body) as (url, script):
        place = f"evaluation.checkpoints={json.dumps({name: f'{url}@m'})}"
        config = load_config(None, [f"evaluation.scorer={name}", place])
        parser = replace(config.evaluation.parser, retries=0)
        with pytest.raises(ScorerError, match=fault) as error:
            reach_servers(replace(config, evaluation=replace(config.evaluation, parser=parser)))
    assert len(script.seen) == 1 and "\n" not in str(error.value)


def test_a_refusal_has_no_probability_and_stops_nothing():
    with serving(lambda request: completion(None, refusal="no")) as (url, _):
        assert scored("vqa", url)["vqa_read"].tolist() == [0, 0]


def test_an_own_scorer_that_breaks_in_the_middle_names_its_line_and_the_prompt(monkeypatch):
    def broken(images, prompts):
        return [1 / len(p) for p in prompts]

    monkeypatch.setitem(sys.modules, "own_scorer", SimpleNamespace(broken=broken))
    group = load_scorers("own_scorer:broken", batch_size=1)
    with pytest.raises(
        ScorerError, match=r"test_asking.py, line \d+, on 1 image, the.*ZeroDivision"
    ):
        group(IMAGES, ["a", ""])


def test_two_processes_share_the_pairs_to_compare(tmp_path, monkeypatch):
    files = [tmp_path / "reference.parquet", tmp_path / "policy.parquet"]
    for file, images in zip(files, (IMAGES, IMAGES[::-1]), strict=True):
        write_samples(file, PROMPTS, [1, 2], images, {})
    with serving(lambda request: PAIR) as (url, script):
        place = f"evaluation.checkpoints={json.dumps({'unifiedreward-pair': f'{url}@m'})}"
        asked = ["evaluation.scorer=unifiedreward-pair", "evaluation.batch_size=1", place]
        config, seen = load_config(None, asked), []
        monkeypatch.setattr(Team, "wait", lambda team: None)
        for rank in (1, 0):
            monkeypatch.setattr(pairwise, "current_team", lambda rank=rank: Team(rank, 2))
            found = in_pairs(files, config, tmp_path)
            seen.append((len(script.seen), bool(found)))
    assert seen == [(2, False), (4, True)] and found["pairwise"]["n"] == 2


def test_weights_in_several_files_on_the_hub_are_looked_for(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    )
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    weights = Checkpoint("vqa", "owner/large")

    def download(repository, name, revision=None):
        if not (tmp_path / name).exists():
            raise OSError(f"404 {name}")
        return tmp_path / name

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ScorerError, match="404 two.safetensors"):
        weights.check()
    save_file({"b": torch.zeros(1)}, tmp_path / "two.safetensors")
    weights.check()

    def gated(*_, **__):
        raise GatedRepoError.__new__(GatedRepoError, "gated")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", gated)
    with pytest.raises(ScorerError, match="accept its licence.*hf auth login"):
        weights.check()


def test_a_server_of_its_own_has_the_settings_of_requests():
    place = "evaluation.checkpoints.vqa=http://localhost/v1@m"
    asked = ["evaluation.scorer=vqa", place, "evaluation.parser.retries=1"]
    assert load_checked(None, asked, "evaluate").evaluation.parser.retries == 1
    with pytest.raises(ConfigError, match=r"parser.retries=1 has no effect"):
        load_checked(None, [*asked[:1], "evaluation.parser.retries=1"], "evaluate")
