"""GenEval's rule on hand-made detections, and its networks against their formulas written anew."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer, Mask2FormerForUniversalSegmentation

from inversion_dpo.evaluation.evaluate import judged
from inversion_dpo.evaluation.metrics import mean_of_groups, paired_bootstrap
from inversion_dpo.evaluation.prompt_sets import PromptSet, read_prompt_set
from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError
from inversion_dpo.evaluation.scorers.geneval import GenEvalScorer, box_of
from inversion_dpo.evaluation.scorers.geneval_rule import (
    CLASSES,
    COLOURS,
    Detection,
    coloured,
    fault_of,
    kept,
    relations,
    verdict,
)
from inversion_dpo.evaluation.scorers.registry import load_scorers
from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.run.fields import EvaluationConfig
from inversion_dpo.training.effects import check_checkpoints
from tools.tiny.scorers import write_tiny_scorer

DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
THREE = {"include": [DOG | {"count": 3}], "exclude": [DOG | {"count": 4}], "tag": "counting"}
LEFT, RIGHT = (0, 0, 10, 10), (30, 0, 40, 10)


def dog(score=0.95, box=LEFT, name="dog"):
    return Detection(name, score, box)


def right(asked, detections, colours=None):
    """Apply the rule; colours: class -> names for its detections, best first."""
    found = kept(detections, asked.get("tag", ""))
    groups = coloured(asked, found)
    return verdict(asked, found, {k: (colours or {})[k][: len(groups[k])] for k in groups})


@pytest.mark.parametrize(
    "asked, detections, colours, reason",
    [
        ({"include": [DOG]}, [dog()], {}, ""),  # single object
        ({"include": [DOG]}, [dog(0.3)], {}, "1 dog asked, 0 found"),  # not above 0.3
        ({"include": [DOG]}, [dog(0.31), dog(0.4)], {}, ""),  # more of them is no fault
        ({"include": [DOG, CAT]}, [dog()], {}, "1 cat asked, 0 found"),  # two objects
        ({"include": [DOG, CAT]}, [dog(), dog(name="cat")], {}, ""),
        (THREE, [dog()] * 3, {}, ""),  # counting: overlapping boxes all count
        (THREE, [dog(), dog(), dog(0.9)], {}, "3 dog asked, 2 found"),  # not above 0.9
        (THREE, [dog()] * 4, {}, "fewer than 4 dog asked, 4 found"),
        (THREE, [dog()] * 3 + [dog(0.85)], {}, ""),
        ({"include": [DOG | {"color": "red"}]}, [dog()], {"dog": ["red"]}, ""),  # colours
        (
            {"include": [DOG | {"color": "red"}]},
            [dog(0.9), dog(0.8)],
            {"dog": ["blue", "red"]},
            "red dog asked, blue found",  # only the surest one counts
        ),
        (
            {"include": [DOG, CAT | {"position": ["right of", 0]}]},
            [dog(), dog(box=RIGHT, name="cat")],
            {},
            "",
        ),
        (
            {"include": [DOG, CAT | {"position": ["left of", 0]}]},
            [dog(), dog(box=RIGHT, name="cat")],
            {},
            "cat left of dog asked, right of found",
        ),
        (
            {"include": [DOG, CAT | {"position": ["above", 0]}]},
            [dog(name="cat")],
            {},
            "1 dog asked, 0 found; nothing found for cat to be above",
        ),
        (  # attribution: each colour at its own object
            {"include": [DOG | {"color": "red"}, CAT | {"color": "blue"}]},
            [dog(), dog(name="cat")],
            {"dog": ["blue"], "cat": ["red"]},
            "red dog asked, blue found; blue cat asked, red found",
        ),
        (
            {"include": [DOG | {"color": "red"}, CAT | {"color": "blue"}]},
            [dog(), dog(name="cat")],
            {"dog": ["red"], "cat": ["blue"]},
            "",
        ),
    ],
)
def test_each_task_by_hand(asked, detections, colours, reason):
    assert right(asked, detections, colours) == (not reason, reason)


@pytest.mark.parametrize(
    "box, expected",
    [
        ((30, 0, 40, 10), {"right of"}),
        ((2, 0, 12, 10), set()),  # within a tenth of both widths: 2 of 20
        ((2.5, 0, 12.5, 10), set()),  # beyond by 0.5 of 2.5: no half
        ((30, 30, 40, 40), {"right of", "below"}),
        ((-4, -30, 6, -20), {"above"}),  # (4 - 2) / 30.3 is no direction
        (LEFT, set()),
    ],
)
def test_an_offset_within_a_tenth_of_the_sizes_has_no_direction(box, expected):
    assert relations(box, LEFT) == expected


def test_at_most_sixteen_of_a_class_best_first():
    found = kept([dog(0.5 + k / 100) for k in range(20)], "")["dog"]
    assert [round(d.score, 2) for d in found] == [round(0.69 - k / 100, 2) for k in range(16)]


def by_authors(asked, detections, colours):
    """The authors' evaluate_image and evaluate, in other words and in plain loops."""
    threshold = 0.9 if asked["tag"] == "counting" else 0.3
    lists = defaultdict(list)
    for name, score, box in sorted(detections, key=lambda d: d[1], reverse=True):
        if score > threshold and len(lists[name]) < 16:
            lists[name].append((box, colours[box]))
    correct, groups = True, []
    for req in asked["include"]:
        objects, good = lists[req["class"]][: req["count"]], True
        if len(objects) < req["count"]:
            good = False
        else:
            if "color" in req:
                good = [c for _, c in objects].count(req["color"]) >= req["count"]
            if "position" in req and good:
                name, target = req["position"]
                good = groups[target] is not None and all(
                    name in where(a, b) for a, _ in objects for b, _ in groups[target]
                )
        groups.append(objects if good else None)
        correct = correct and good
    for req in asked.get("exclude", []):
        correct = correct and len(lists[req["class"]]) < req["count"]
    return correct


def where(a, b):
    ax, ay, bx, by = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2, (b[0] + b[2]) / 2, (b[1] + b[3]) / 2
    dx, dy = ax - bx, ay - by
    wide = 0.1 * (abs(a[2] - a[0]) + abs(b[2] - b[0]))
    high = 0.1 * (abs(a[3] - a[1]) + abs(b[3] - b[1]))
    rx = np.sign(dx) * max(abs(dx) - wide, 0)
    ry = np.sign(dy) * max(abs(dy) - high, 0)
    if abs(rx) < 1e-3 and abs(ry) < 1e-3:
        return set()
    rx, ry = rx / np.hypot(dx, dy), ry / np.hypot(dx, dy)
    names = {"left of": rx < -0.5, "right of": rx > 0.5, "above": ry < -0.5, "below": ry > 0.5}
    return {name for name, holds in names.items() if holds}


def test_the_rule_equals_the_authors_formula_on_random_scenes():
    rng, results = np.random.default_rng(0), []
    for _ in range(600):
        boxes = [(*corner, *(corner + side)) for corner, side in rng.uniform(1, 40, (7, 2, 2))]
        scene = [(str(rng.choice(["dog", "cat"])), rng.uniform(0.6, 1), b) for b in boxes]
        colours = {b: str(rng.choice(["red", "blue"])) for b in boxes}
        asked = {"tag": str(rng.choice(["counting", "position"])), "include": []}
        for place, name in enumerate(rng.permutation(["dog", "cat"])):
            clause = {"class": str(name), "count": int(rng.integers(1, 3 if not place else 2))}
            clause |= {"color": "red"} if rng.random() < 0.3 else {}
            near = place and rng.random() < 0.6
            clause |= {"position": [str(rng.choice(["left of", "below"])), 0]} if near else {}
            asked["include"].append(clause)
        if rng.random() < 0.3:
            asked["exclude"] = [{"class": "dog", "count": int(rng.integers(1, 4))}]
        assert fault_of(asked) == ""
        found = kept([Detection(*d) for d in scene], asked["tag"])
        named = {k: [colours[d.box] for d in g] for k, g in coloured(asked, found).items()}
        ours, _ = verdict(asked, found, named)
        assert ours == by_authors(asked, scene, colours), (asked, scene)
        results.append(ours)
    assert 60 < sum(results) < 540, sum(results)


@pytest.mark.parametrize(
    "asked, fault",
    [
        ({}, 'neither "include" nor "exclude"'),
        ({"include": [{"class": "mouse", "count": 1}]}, "no class of COCO as GenEval writes it"),
        ({"include": [{"class": "dog"}]}, "\"count\" of 'dog'"),
        ({"include": [DOG | {"count": True}]}, "\"count\" of 'dog'"),
        ({"include": [DOG | {"color": "beige"}]}, "'beige' is none of the colours"),
        ({"include": [DOG | {"position": ["left of", 0]}]}, "\"position\" of 'dog'"),
        ({"include": [DOG, CAT | {"position": ["behind", 0]}]}, "\"position\" of 'cat'"),
        ({"include": [DOG, CAT | {"position": "above"}]}, "\"position\" of 'cat'"),
        ({"include": ["dog"]}, "'dog' names no class"),
    ],
)
def test_a_row_that_the_rule_cannot_read_is_named(asked, fault):
    assert fault in fault_of(asked)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("geneval")
    return {name: write_tiny_scorer(name, root / name) for name in ("geneval", "clip")}


@pytest.fixture(scope="module")
def scorer(places):
    at = [Checkpoint.at(name, str(places[name])) for name in ("geneval", "clip")]
    return GenEvalScorer(*at, lambda prompt: {"include": [DOG]})


def picture(height, width):
    small = np.random.default_rng(height).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST))


@pytest.mark.parametrize("height, width", [(64, 64), (80, 51), (33, 120)])
def test_detections_equal_mmdets_formula(scorer, places, height, width):
    image = picture(height, width)
    network = Mask2FormerForUniversalSegmentation.from_pretrained(places["geneval"])
    scale = min(96 / max(height, width), 64 / min(height, width))
    h, w = int(height * scale + 0.5), int(width * scale + 0.5)
    pixels = torch.tensor(image).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, (h, w), mode="bilinear").round() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    tall, wide = -(-h // 32) * 32, -(-w // 32) * 32
    padded = torch.zeros(1, 3, tall, wide)
    padded[:, :, :h, :w] = pixels
    with torch.no_grad():
        out = network(pixel_values=padded)
    masks = F.interpolate(out.masks_queries_logits, (tall, wide), mode="bilinear")
    masks = F.interpolate(masks[:, :, :h, :w], (height, width), mode="bilinear")[0]
    expected = []
    for query, classes in enumerate(out.class_queries_logits[0].softmax(-1)[:, :80].tolist()):
        inside = masks[query] > 0
        sure = masks[query].sigmoid()[inside].sum() / (inside.sum() + 1e-6)
        y, x = torch.where(inside)
        if len(y):
            box = (x.min().item(), y.min().item(), x.max().item() + 1, y.max().item() + 1)
            both = zip(CLASSES, classes, strict=True)
            expected += [(name, p * sure.item(), box) for name, p in both if p > 0.3]
    found = scorer.detections(image)
    for one, (name, score, box) in zip(
        sorted(found, key=lambda d: -d.score), sorted(expected, key=lambda d: -d[1]), strict=True
    ):
        assert (one.name, one.box) == (name, box) and one.score == pytest.approx(score, rel=1e-4)
        assert one.mask.shape == (height, width)
    assert len({int(d.mask.sum()) for d in found}) > 1


def test_colours_are_clips_of_the_object_alone_on_grey(scorer, places):
    image, mask = picture(70, 90), np.zeros((70, 90), bool)
    mask[20:50, 30:60], mask[20:30, 30:40] = True, False
    one = Detection("dog", 1.0, box_of(mask), mask)
    assert one.box == (30, 20, 60, 50)
    model, words = (c.from_pretrained(places["clip"]) for c in (CLIPModel, CLIPTokenizer))
    cut = np.where(mask[..., None], image, 153)[20:50, 30:60].astype(np.uint8)
    pixels = np.asarray(Image.fromarray(cut).resize((32, 32), Image.Resampling.BICUBIC)) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = torch.tensor((pixels - mean) / std).permute(2, 0, 1)[None].float()
    rows = []
    with torch.no_grad():
        for c in COLOURS:
            texts = [
                f"a photo of a {c} dog",
                f"a photo of a {c}-colored dog",
                f"a photo of a {c} object",
            ]
            each = words(texts, padding="max_length", max_length=77, return_tensors="pt")
            row = F.normalize(model.get_text_features(**each).pooler_output, dim=-1).mean(0)
            rows.append(row / row.norm())
        expected = (
            model.get_image_features(pixel_values=pixels).pooler_output[0] @ torch.stack(rows).T
        )
        torch.testing.assert_close(scorer.words("dog"), torch.stack(rows), rtol=1e-4, atol=1e-5)
    assert scorer.colours(image, "dog", [one]) == [COLOURS[expected.argmax()]]
    other = np.where(mask[..., None], image, 255 - image).astype(np.uint8)
    assert scorer.colours(other, "dog", [one]) == scorer.colours(image, "dog", [one])


def rows(*asked):
    texts = [f"prompt {k}" for k in range(len(asked))]
    return PromptSet(texts, [""] * len(asked), [None] * len(asked), rows=list(asked))


def test_the_scorer_reads_the_sets_rows_and_keeps_by_them(scorer, places, tmp_path, caplog):
    image = picture(64, 64)
    best = max(scorer.detections(image), key=lambda d: d.score)
    asked = [{"tag": "", "include": [{"class": best.name, "count": n}]} for n in (1, 16)]
    at = {name: str(place) for name, place in places.items()}

    def group(*asked):
        store = tmp_path / "scores.sqlite"
        return load_scorers("geneval", at, store=store, prompt_set=lambda: rows(*asked))

    first = group(*asked)
    assert first.names(["prompt 0", "prompt 1"]) == ["geneval"]
    with caplog.at_level("INFO"):
        assert first([image] * 2, ["prompt 0", "prompt 1"])["geneval"].tolist() == [1, 0]
        first.conclude()
    assert f"1 of 2 images are not as asked; 'prompt 1': 16 {best.name} asked" in caplog.text
    assert group(*asked[::-1])([image] * 2, ["prompt 0", "prompt 1"])["geneval"].tolist() == [0, 1]
    with pytest.raises(ScorerError, match="'prompt 9': neither .*evaluation.prompts=geneval"):
        first.names(["prompt 0", "prompt 9"])
    with pytest.raises(ScorerError, match=r"evaluation.checkpoints.clip=.*no .safetensors"):
        (tmp_path / "empty").mkdir()
        at["clip"] = str(tmp_path / "empty")
        group(*asked).names(["prompt 0"])


def test_clips_weights_may_be_given_for_geneval(caplog):
    given = ["evaluation.checkpoints.clip=my_clip"]
    check_checkpoints(given, EvaluationConfig(scorer="geneval, pickscore"))
    with pytest.raises(ConfigError, match=r"checkpoints.clip has no effect"):
        check_checkpoints(given, EvaluationConfig(scorer=["pickscore"]))
    with caplog.at_level("INFO"):
        load_scorers("geneval", {"clip": "my_clip"}, prompt_set=lambda: rows({}))
    assert "not used" not in caplog.text


def test_a_jsonl_file_keeps_its_rows(tmp_path):
    row = {"tag": "colors", "include": [DOG | {"color": "red"}], "prompt": "a red dog"}
    (tmp_path / "my.jsonl").write_text(json.dumps(row))
    found = read_prompt_set(str(tmp_path / "my.jsonl"), None)
    assert found.row_of == {"a red dog": row} and found.categories == ["colors"]


def test_the_overall_score_weighs_tasks_alike_as_the_paper_does():
    policy = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    reference = np.zeros((4, 2))
    row = mean_of_groups(reference, policy, [[0], [1, 2, 3]])
    assert row["policy"] == row["gain"] == pytest.approx((1 + 1 / 3) / 2) and row["reference"] == 0
    assert row["gain_low"] == pytest.approx((1 + 0) / 2) and row["gain_high"] <= 0.75
    one = mean_of_groups(reference[:3], policy[:3], [[0, 1, 2]])
    alone = paired_bootstrap(reference[:3], policy[:3])
    assert (one["gain"], one["gain_low"], one["gain_high"]) == pytest.approx(
        (alone.value, alone.low, alone.high)
    )
    tasks = PromptSet(list("abcd"), ["counting", *["colors"] * 3], [None] * 4)
    config = load_config(None, ["evaluation.seeds=2", "evaluation.preference=geneval"])
    found = judged(tasks, {"geneval": reference.ravel()}, {"geneval": policy.ravel()}, config)
    assert found["geneval_overall"]["policy"] == pytest.approx(2 / 3)
    assert found["geneval"]["policy"] == 0.5
    assert found["categories"]["counting"]["geneval"]["policy"] == 1
