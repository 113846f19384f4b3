"""What winners have that losers do not: measured by hand, and told where it is no chance."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inversion_dpo.data.check import format_report
from inversion_dpo.data.images import one_colour
from inversion_dpo.data.traits import Share, Tally, alike, format_shares, traits
from tests.pair_files import check_pairs


def flat(r: int, g: int, b: int, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), (r, g, b))


def test_a_flat_colour_by_hand() -> None:
    found = traits(flat(255, 0, 51))
    assert found["brighter"] == pytest.approx(0.299 + 0.114 * 0.2)
    assert found["more colourful"] == pytest.approx(1.0)
    assert found["warmer"] == pytest.approx(0.8)
    assert found["more contrasty"] == pytest.approx(0.0, abs=1e-6)
    assert found["sharper"] == 0.0


@pytest.mark.parametrize(("levels", "told"), [(2, True), (3, False)])
def test_one_colour_is_what_varies_by_two_levels_at_most(levels: int, told: bool) -> None:
    image = flat(9, 100, 250)
    image.putpixel((3, 4), (9, 100, 250 - levels))
    assert one_colour(image) is told and one_colour(np.asarray(image)) is told


def test_pictures_are_alike_under_faint_noise_and_compression_but_not_with_another_part() -> None:
    rng, noisy, spot = np.random.default_rng(0), io.BytesIO(), flat(90, 120, 200, 64)
    first = Image.fromarray(rng.integers(60, 196, (4, 4, 3)).astype("u1")).resize((256, 256))
    first.save(noisy, "JPEG", quality=90)
    faint = np.asarray(first, int) + rng.integers(-1, 2, (256, 256, 3))
    assert alike(first, Image.open(noisy))
    assert alike(first, Image.fromarray(faint.clip(0, 255).astype("u1")))
    spot.paste((90, 120, 170), (10, 10, 14, 14))  # a thousandth of the picture and more
    assert not alike(flat(90, 120, 200, 64), spot)
    assert not alike(flat(90, 120, 200), flat(90, 120, 206))


def test_stripes_are_contrasty_and_sharp_and_grey() -> None:
    stripes = np.zeros((4, 4, 3), np.uint8)
    stripes[:, ::2] = 255
    found = traits(Image.fromarray(stripes))
    assert found["more contrasty"] == pytest.approx(0.5)
    assert found["sharper"] == pytest.approx(1.0)  # along x every step is 1, along y none
    assert found["more colourful"] == found["warmer"] == 0.0


def test_large_images_are_compared_in_one_size_and_stay_as_they_were() -> None:
    large = flat(10, 20, 30, size=600)
    assert traits(large) == pytest.approx(traits(flat(10, 20, 30)), abs=1e-6)
    assert large.size == (600, 600)
    assert traits(Image.new("RGB", (1, 1)))["sharper"] == 0.0


@pytest.mark.parametrize("side", [8, 17, 64])
def test_an_image_of_one_colour_has_no_contrast_whatever_the_processor(side):
    image = Image.new("RGB", (side, side), (90, 90, 120))
    assert traits(image)["more contrasty"] == 0.0 == traits(image)["sharper"]


def tally(*pairs: tuple[float, float]) -> Tally:
    made = Tally()
    for winner, loser in pairs:
        made.add({"warmer": winner, "sharper": 1.0}, {"warmer": loser, "sharper": 1.0})
    return made


def test_shares_and_their_interval_by_hand() -> None:
    won, lost, equal = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)
    found = tally(*[won] * 40).shares()
    assert list(found) == ["warmer"]  # sharper: never differs
    every, never = found["warmer"], tally(*[lost] * 40).shares()["warmer"]
    assert (every.share, every.high) == (1.0, pytest.approx(1.0))
    assert every.low == pytest.approx(40 / (40 + 2.576**2), rel=1e-4)  # Wilson's: .858, and not 1
    assert (never.low, never.high) == pytest.approx((0.0, 1 - every.low))
    half = tally(*[won, lost] * 20).shares()["warmer"]
    assert half.share == 0.5
    assert half.chance
    assert half.high == pytest.approx(0.5 + 2.576 * 0.5 / (40 + 2.576**2) ** 0.5, rel=1e-4)
    ties = tally(*[won] * 30, *[equal] * 10).shares()["warmer"]
    assert ties.share == pytest.approx(0.875)  # 30 won, 10 equal: .5 + .75 / 2
    assert not ties.chance
    assert tally(*[won] * 29).shares() == {}
    assert tally(*[won] * 29, lost).shares()["warmer"].high < 1.0  # a share goes no further


def test_chance_has_no_mark_and_no_warning() -> None:
    assert format_shares({}) == []
    even = format_shares({"a": Share(0.51, 0.4, 0.62)})
    assert even == ["  winners are, in the share of pairs [99% interval]: a 51% [40%, 62%]"]
    marked = format_shares({"a": Share(0.4, 0.35, 0.45)})
    assert marked[0].endswith("a 40% [35%, 45%] !")
    assert "learn this too" in marked[1]


def test_the_report_knows_winners_by_the_label(tmp_path: Path) -> None:
    """Winners are the red ones, in whichever column they stand; bad rows and ties do not count."""

    def png(image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    red, blue = png(flat(200, 0, 0)), png(flat(0, 0, 200))
    rows = [
        {"caption": f"{k}", "jpg_0": red, "jpg_1": blue, "label_0": 1.0}
        if k % 2
        else {"caption": f"{k}", "jpg_0": blue, "jpg_1": red, "label_0": 0.0}
        for k in range(30)
    ]
    rows += [{"caption": "tie", "jpg_0": blue, "jpg_1": red, "label_0": 0.5}]
    rows += [{"caption": "bad", "jpg_0": b"no image", "jpg_1": blue, "label_0": 1.0}]
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    report = check_pairs(file)
    assert report.traits["warmer"].share == 1.0
    assert "more contrasty" not in report.traits
    assert "warmer 100% [82%, 100%] !" in format_report(report)
