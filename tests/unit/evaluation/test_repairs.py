"""What training repaired and broke: counts by hand, and which pictures are drawn."""

from io import BytesIO

import numpy as np
from PIL import Image

from inversion_dpo.evaluation import repairs as room
from inversion_dpo.evaluation.figures import BLUE, ORANGE, plate, sheet
from inversion_dpo.evaluation.repairs import judge, repairs, repairs_text, some_of

BEFORE = {"sg_iou": np.array([0, 0.5, 1, 1, 0]), "exact": np.array([0.0, 0, 1, 1, 0])}
AFTER = {"sg_iou": np.array([1, 1, 0.5, 1, 0]), "exact": np.array([1.0, 1, 0, 1, 0])}


def colour(text):
    return tuple(int(text[k : k + 2], 16) for k in (1, 3, 5))


def count(image, text):
    return int((np.asarray(image) == colour(text)).all(-1).sum())


def test_counts_by_hand():
    found = repairs(BEFORE, AFTER)
    assert found == {"repairs": {"by": "exact", "images": 5, "repaired": 2, "broken": 1}}
    assert repairs_text(found) == "Training repaired 2 of 5 pictures and broke 1, by `exact`."


def test_a_score_between_right_and_wrong_judges_nothing():
    shares = {"sg_iou": BEFORE["sg_iou"]}
    assert judge(shares, {"sg_iou": AFTER["sg_iou"]}) is None and repairs(shares, shares) == {}
    constant = {"exact": np.ones(3)}
    assert repairs(constant, constant) == {} and repairs({}, {}) == {} and repairs_text({}) == ""
    assert some_of(["a"] * 3, ["r", "p"], [constant, constant]) == []


def test_repaired_and_broken_pictures_are_those_shown(monkeypatch):
    asked = []

    def images(file, rows):
        asked.append((file, rows))
        return [f"{file}{row}" for row in rows]

    monkeypatch.setattr(room, "read_images", images)
    repaired, broken = some_of(list("abcde"), ["r", "p"], [BEFORE, AFTER])
    assert asked == [("r", [0, 1]), ("p", [0, 1]), ("r", [2]), ("p", [2])]
    assert (repaired.captions, repaired.right) == (["a", "b"], (False, True))
    assert repaired.pairs == [("r0", "p0"), ("r1", "p1")]
    assert (broken.captions, broken.right) == (["c"], (True, False))
    assert repaired.title == "Repaired: 2 of 5 pictures (all shown)"


def test_a_tick_is_blue_and_a_cross_orange(monkeypatch):
    pair = [np.full((64, 64, 3), 9, np.uint8)] * 2
    both = sheet(["a"], [pair], right=[(False, True)])
    none = sheet(["a"], [pair])
    assert count(both, BLUE) > 100 < count(both, ORANGE) and count(none, BLUE) == 0
    left = both.crop((0, 0, both.width // 2, both.height))
    assert count(left, ORANGE) == count(both, ORANGE) and count(left, BLUE) == 0
    page = Image.open(BytesIO(plate([("one", both), ("two", none)])))
    assert page.height == both.height + none.height + 52
