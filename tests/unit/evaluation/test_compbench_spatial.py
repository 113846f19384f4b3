"""T2I-CompBench's rule for places on boxes by hand, and OWLv2's boxes against its own processor."""

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer, Owlv2ForObjectDetection

from inversion_dpo.evaluation.named_sets import named_sets
from inversion_dpo.evaluation.prompt_sets import PromptSet
from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError
from inversion_dpo.evaluation.scorers.compbench_rule import (
    Asked,
    overlap,
    placed,
    read_relation,
    score_of,
    size_of,
)
from inversion_dpo.evaluation.scorers.compbench_spatial import SpatialScorer
from inversion_dpo.evaluation.scorers.geneval_rule import Detection
from inversion_dpo.evaluation.scorers.registry import load_scorers
from inversion_dpo.evaluation.wording import remarks
from tools.tiny.scorers import write_tiny_scorer

WEST, EAST, NORTH = (0, 200, 100, 300), (300, 210, 400, 310), (10, 0, 110, 100)


@pytest.mark.parametrize(
    "relation, first, second, expected",
    [
        ("on the left of", WEST, EAST, 1),
        ("on the left of", EAST, WEST, 0),
        ("on the right of", EAST, WEST, 1),
        ("on the right of", WEST, EAST, 0),
        ("on the top of", NORTH, WEST, 1),
        ("on the top of", WEST, NORTH, 0),
        ("on the bottom of", WEST, NORTH, 1),
        ("on the left of", WEST, NORTH, 0),  # 10 to the side, 200 up
        ("on the left of", (0, 0, 10, 10), (20, 20, 30, 30), 0),  # no side is the greater part
        ("on the left of", (0, 0, 100, 100), (50, 0, 150, 100), 0.1 / (1 / 3)),  # they overlap
        ("on the left of", (0, 0, 100, 100), (90, 0, 190, 100), 1),  # 1/19 is below a tenth
        ("near", WEST, EAST, 1),  # 300 apart, but 10 in height
        ("next to", (0, 0, 10, 10), (149, 149, 159, 159), 1),
        ("on side of", (0, 0, 10, 10), (300, 200, 310, 210), 150 / 300),
        ("near", WEST, WEST, 1),
        ("on the left of", (0.1, 0.2, 0.7, 1.3), (0.1, 0.2, 0.7, 1.3), 0),
        ("on the left of", (353.6312911, 1, 426.6666667, 9), (353.6312911, 1, 426.6666667, 9), 0),
    ],
)
def test_a_place_by_hand(relation, first, second, expected):
    assert placed(relation, first, second) == pytest.approx(expected)


def test_the_score_is_half_place_and_a_quarter_of_each_detection():
    dog, cat = Detection("dog", 0.8, WEST), Detection("cat", 0.4, EAST)
    asked = Asked("dog", "on the left of", "cat")
    assert score_of(asked, {"dog": dog, "cat": cat}) == pytest.approx(0.25 * 1.2 + 0.5)
    assert score_of(asked, {"dog": dog}) == score_of(asked, {}) == 0
    assert score_of(asked._replace(relation="on the right of"), {"dog": dog, "cat": cat}) == 0
    far = {"dog": Detection("dog", 0.9, (0, 0, 9, 9)), "cat": Detection("cat", 0.9, (300,) * 4)}
    beside = asked._replace(relation="near")
    assert score_of(beside, far) == pytest.approx(0.45 + 150 / 295.5 / 2)
    far["dog"] = Detection("dog", 0.02, far["dog"].box)
    assert score_of(beside, far) == 0  # below one half


def by_authors(locality, a, b):
    """The authors' determine_position in other words."""
    (ax, ay), (bx, by) = (((q[0] + q[2]) / 2, (q[1] + q[3]) / 2) for q in (a, b))
    dx, dy, share = bx - ax, by - ay, overlap(a, b)
    if locality in ("next to", "on side of", "near"):
        close = abs(dx) < 150 or abs(dy) < 150
        return 1 if close else 150 / max(abs(dx), abs(dy))
    wide, high = abs(dx) > abs(dy), abs(dy) > abs(dx)
    holds = {
        "on the right of": dx < 0 and wide,
        "on the left of": dx > 0 and wide,
        "on the bottom of": dy < 0 and high,
        "on the top of": dy > 0 and high,
    }[locality]
    return 0 if not holds else 1 if share < 0.1 else 0.1 / share


def test_the_rule_equals_the_authors_on_random_boxes():
    rng, kinds = np.random.default_rng(0), set()
    words = ["near", *(f"on the {side} of" for side in ("left", "right", "top", "bottom"))]
    for _ in range(1000):
        corners = rng.uniform(0, 400, (2, 2))
        a, b = ((*c, *(c + rng.uniform(20, 300, 2))) for c in corners)
        word = str(rng.choice(words))
        ours = placed(word, a, b)
        assert ours == pytest.approx(by_authors(word, a, b)), (word, a, b)
        kinds.add((word, min(ours, 1) if ours in (0, 1) else 0.5))
    assert len(kinds) == 4 * 3 + 2


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("a giraffe next to a lamp", Asked("giraffe", "next to", "lamp")),
        ("A girl on the top of an airplane.", Asked("person", "on the top of", "airplane")),
        ("a teddy bear near a hot dog", Asked("teddy bear", "near", "hot dog")),
        ("a red car and a blue bus", None),
        ("The dog is on the left of a cat", None),
        ("", None),
    ],
)
def test_a_prompt_says_objects_and_relation(prompt, expected):
    assert read_relation(prompt) == expected


def test_boxes_are_in_the_authors_pixels():
    assert size_of(512, 512) == 479 and size_of(768, 512) == size_of(512, 768) == 480


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_scorer("compbench-spatial", tmp_path_factory.mktemp("owl") / "owlv2")


def picture(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def processed(image, side):
    """OWLv2's own steps: pad below and right, resize bilinearly, normalise."""
    long = max(image.shape[:2])
    square = np.zeros((long, long, 3), np.float32)
    square[: image.shape[0], : image.shape[1]] = image / 255
    at = (np.arange(side) + 0.5) * long / side - 0.5
    low = np.clip(np.floor(at), 0, long - 1).astype(int)
    high, part = np.minimum(low + 1, long - 1), np.clip(at, 0, None) - low
    rows = square[low] * (1 - part)[:, None, None] + square[high] * part[:, None, None]
    out = rows[:, low] * (1 - part)[None, :, None] + rows[:, high] * part[None, :, None]
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return torch.tensor((out - mean) / std).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("height, width", [(16, 16), (24, 16), (20, 30)])
def test_detections_equal_owlv2s_own(folder, height, width):
    image = picture(height, width)
    scorer = SpatialScorer(Checkpoint.at("compbench-spatial", str(folder)), read_relation)
    torch.testing.assert_close(scorer.pixels(image), processed(image, 32), rtol=1e-4, atol=1e-4)
    network = Owlv2ForObjectDetection.from_pretrained(folder).eval()
    texts = CLIPTokenizer.from_pretrained(folder)(
        ["a photo of a red circle", "a photo of a blue star"],
        padding="max_length",
        max_length=16,
        return_tensors="pt",
    )
    with torch.no_grad():
        out = network(**texts, pixel_values=processed(image, 32))
    scale = size_of(height, width) / max(height, width)
    expected = {}
    for logits, box in zip(out.logits[0].tolist(), out.pred_boxes[0].tolist(), strict=True):
        name = "red circle" if logits[0] >= logits[1] else "blue star"
        score = 1 / (1 + np.exp(-max(logits)))
        x, y, w, h = (v * max(height, width) * scale for v in box)
        left, right = (min(max(v, 0), width * scale) for v in (x - w / 2, x + w / 2))
        top, bottom = (min(max(v, 0), height * scale) for v in (y - h / 2, y + h / 2))
        if score > max(0.1, expected.get(name, (0,))[0]) and left < right and top < bottom:
            expected[name] = (score, left, top, right, bottom)
    found = scorer.best(image, ["red circle", "blue star"])
    assert {*found} == {*expected} and expected
    for name, one in found.items():
        assert (one.score, *one.box) == pytest.approx(expected[name], rel=1e-3, abs=1e-2)


def test_the_scorer_end_to_end(folder):
    prompts = ["a red circle near a blue star", "a red star on the left of a red star"]
    whole = PromptSet(prompts, [""] * 2, [None] * 2)
    group = load_scorers(
        "compbench-spatial", {"compbench-spatial": str(folder)}, prompt_set=lambda: whole
    )
    assert group.names(prompts) == ["compbench-spatial"]
    images = [picture(16 + k, 16) for k in range(8)] * 2
    asked = [prompts[0]] * 8 + [prompts[1]] * 8
    found = group(images, asked)["compbench-spatial"]
    scorer = group.members[0].call
    names = ["red circle", "blue star"]
    expected = [score_of(read_relation(prompts[0]), scorer.best(i, names)) for i in images[:8]]
    np.testing.assert_allclose(found[:8], expected)
    assert 0 < found[:8].max() <= 1 and found[:8].min() == 0
    assert found[8:].max() <= 0.5  # one object has no place beside itself
    with pytest.raises(ScorerError, match="'a dog' is not of the form .*=t2i-compbench-spatial"):
        group.names(["a dog"])


def test_no_table_hides_that_the_detector_is_another_one():
    (text,) = remarks(["clip", "compbench-spatial"])
    assert "UniDet" in text and "not compare" in text
    assert remarks(["clip", "compbench"]) == []


def test_the_set_is_the_spatial_part_of_the_whole_one():
    part, whole = (named_sets()[f"t2i-compbench{more}"] for more in ("-spatial", ""))
    assert (part.repository, part.revision) == (whole.repository, whole.revision)
    assert part.sha256.items() <= whole.sha256.items()
