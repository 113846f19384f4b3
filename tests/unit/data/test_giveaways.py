"""Files that tell winners from losers are marked, warned of and refused; content is not."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inversion_dpo.data import giveaways, source
from inversion_dpo.data.check import format_report
from inversion_dpo.data.giveaways import Files, pixel_traits, refuse_giveaways, traits_of
from inversion_dpo.data.images import DataError
from inversion_dpo.data.source import PairSource
from inversion_dpo.run.fields import DataConfig
from tests.pair_files import check_pairs, open_pairs

RNG = np.random.default_rng(0)


def stored(image: Image.Image, form: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def picture(width: int = 64, height: int = 64) -> Image.Image:
    """Noise with less power in finer detail, as photographs have it."""
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / 64
    noise = np.fft.irfft2(np.fft.rfft2(RNG.standard_normal((height, width))) / f, (height, width))
    levels = (128 + 40 * noise / noise.std()).clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")


def enlarged() -> Image.Image:
    return picture(32, 32).resize((64, 64), Image.Resampling.BICUBIC)


def again(quality: int) -> bytes:
    """A PNG that was a JPEG once."""
    return stored(Image.open(io.BytesIO(stored(picture(), "JPEG", quality=quality))))


def thumbs_of(
    folder: Path, liked: Callable[[], bytes], other: Callable[[], bytes], n: int = 40
) -> Path:
    """A file of n images that are liked, then of n that are not."""
    rows = [
        {"image": make(), "thumb": thumb, "prompt": f"{k}"}
        for make, thumb in ((liked, "up"), (other, "down"))
        for k in range(n)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    return folder / "t.parquet"


def pairs_of(
    folder: Path,
    winner: Callable[[], bytes],
    loser: Callable[[], bytes],
    n: int = 40,
    given: int = 40,
) -> Path:
    """A file of n pairs, in ``given`` of which winner and loser differ so."""
    rows = []
    for k in range(n):
        images = [(winner if k < given else loser)(), loser()]
        first = k % 2
        rows.append(
            {
                "jpg_0": images[1 - first],
                "jpg_1": images[first],
                "label_0": float(first),
                "caption": f"{k}",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "p.parquet")
    return folder / "p.parquet"


def open_alone(data: Path) -> PairSource:
    return source.open_pairs(DataConfig(pairs=str(data)), alone=True)


def plain() -> bytes:
    return stored(picture())


GIVEN = {
    "shape": (lambda: stored(picture(48, 72)), plain, "narrower in shape in 40 of 40 pairs"),
    "a shape between others": (
        plain,
        lambda: stored(picture(*((80, 64), (64, 80))[RNG.integers(2)])),
        "closer to a square",
    ),
    "size": (lambda: stored(picture(80, 80)), plain, "larger in 40"),
    "one size among others": (
        lambda: stored(picture(72, 72)),
        lambda: stored(picture(*((64, 64), (80, 80))[RNG.integers(2)])),
        "72x72 in 40 of 40",
    ),
    "format": (plain, lambda: stored(picture(), "WEBP", lossless=True), "PNG in 40 of 40"),
    "quality of a JPEG": (
        lambda: stored(picture(), "JPEG", quality=95),
        lambda: stored(picture(), "JPEG", quality=90),
        "JPEG of higher quality in 40",
    ),
    "quality of a WebP": (
        lambda: stored(picture(), "WEBP", quality=30),
        lambda: stored(picture(), "WEBP", quality=95),
        "stored in fewer bytes a pixel",
    ),
    "a JPEG of before": (lambda: again(95), lambda: again(30), "freer of JPEG blocks"),
    "enlarging": (plain, lambda: stored(enlarged()), "sharper in the finest detail"),
}


@pytest.mark.parametrize(("winner", "loser", "words"), GIVEN.values(), ids=GIVEN.keys())
def test_files_that_give_labels_away_are_refused(
    tmp_path: Path, winner: Callable[[], bytes], loser: Callable[[], bytes], words: str
) -> None:
    data = pairs_of(tmp_path, winner, loser)
    with pytest.raises(DataError, match=rf"{words}.*data.allow_giveaways=true"):
        refuse_giveaways(open_pairs(data), tmp_path / "memo.json")
    report = check_pairs(data)
    assert not report.ok and f"! by their files, winners are {words}" in format_report(report)
    assert "no problems" not in format_report(report)


@pytest.mark.parametrize("name", ["size", "format", "a JPEG of before"])
def test_single_images_give_their_thumbs_away_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A policy learns what all liked images have in common; those that are not come late here."""
    monkeypatch.setattr(giveaways, "PAIRS", 30)
    liked, other, words = GIVEN[name]
    data = thumbs_of(tmp_path, liked, other)
    with pytest.raises(DataError, match=f"Liked images are .*{words[:6]}.*save all images in one"):
        refuse_giveaways(open_alone(data), tmp_path / "memo.json")
    report = check_pairs(data)
    assert not report.ok and "! by their files, liked images are " in format_report(report)


def test_thumbs_on_images_of_one_kind_are_not_marked(tmp_path: Path) -> None:
    data = thumbs_of(tmp_path, plain, plain)
    refuse_giveaways(open_alone(data), tmp_path / "memo.json")
    assert check_pairs(data).ok and check_pairs(data).giveaways == ()
    few = pairs_of(tmp_path, plain, plain, 3)
    assert check_pairs(few).ok


def test_an_image_is_counted_beside_an_earlier_one_of_the_other_kind() -> None:
    files, large = Files(), lambda: stored(picture(80, 80))
    for image, liked in ((plain, False), (plain, False), (large, True), (large, True), (large, 1)):
        files.add_single(image(), bool(liked))
    assert (files.pairs[False], files.more["pixels"], files.less["pixels"]) == (2, 2, 0)


def test_whoever_asks_for_it_is_warned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = pairs_of(tmp_path, lambda: stored(picture(48, 72)), plain)
    memo, source = tmp_path / "memo.json", open_pairs(data, allow_giveaways=True)
    with caplog.at_level(logging.WARNING):
        refuse_giveaways(source, memo)
        refuse_giveaways(source, memo)  # the pairs are not read again
    assert caplog.text.count("files tell winners") == 2 and source.counts["pairs"] == 40
    with pytest.raises(DataError, match="allow_giveaways=true"):
        refuse_giveaways(open_pairs(data), memo)
    assert "Winners are 48x72 in 40 of 40 pairs" in caplog.text
    report = check_pairs(data, allow_giveaways=True, fit="crop")
    assert report.ok and format_report(report).endswith("look at what is marked with !")


def test_a_few_per_cent_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """16 of 200 pairs: the trait alone is right in 54%, and in 50.5% at least."""
    small = (lambda: stored(picture(24, 36)), lambda: stored(picture(32, 32)))
    data = pairs_of(tmp_path, *small, 200, 16)
    with caplog.at_level(logging.WARNING):
        refuse_giveaways(open_pairs(data), tmp_path / "memo.json")
    assert "narrower in shape in 16 of 16 pairs that differ, of 200" in caplog.text
    report = check_pairs(data)
    assert report.ok and "no problems" not in format_report(report)


def test_chance_is_not_marked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = pairs_of(tmp_path, lambda: stored(picture(48, 72)), plain, 9, 9)  # too few to tell
    refuse_giveaways(open_pairs(one), tmp_path / "one.json")
    taste = open_pairs("asset:taste.parquet", limit=200)  # warm winners are content
    refuse_giveaways(taste, tmp_path / "taste.json")
    assert not caplog.records
    assert check_pairs(one).giveaways == ()


@pytest.mark.parametrize(
    ("loser", "words"),
    [
        (lambda p: stored(p, compress_level=0), "2 pairs have two images that look the same"),
        (lambda p: stored(Image.new("RGB", p.size)), "2 pairs have an image of one colour"),
    ],
)
def test_pairs_that_show_no_preference_are_marked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, loser: Callable[..., bytes], words: str
) -> None:
    one = picture()
    data = pairs_of(tmp_path, lambda: stored(one), lambda: loser(one), 2, 2)
    refuse_giveaways(open_pairs(data), tmp_path / "memo.json")
    assert f"of the first pairs, {words}" in caplog.text
    text = format_report(check_pairs(data))
    assert f"! {words}" in text and text.endswith("look at what is marked with !")


def test_the_bound_by_hand() -> None:
    """All of n pairs: the least share is (alpha / 2) to the power of 1 / n."""
    files = Files()
    for _ in range(20):
        files.add((stored(picture(), "JPEG"), plain()))
    jpeg = next(g for g in files.found() if g.words == "JPEG")
    assert (jpeg.hits, jpeg.differing, jpeg.pairs) == (20, 20, 20)
    assert jpeg.least == pytest.approx(0.0005 ** (1 / 20))
    for _ in range(20):
        files.add((plain(), plain()))
    jpeg = next(g for g in files.found() if g.words == "JPEG")
    assert jpeg.least == pytest.approx(0.5 * 0.0005 ** (1 / 20) + 0.25)


def test_traits_of_a_file_by_hand() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    lying = traits_of(stored(Image.new("RGB", (20, 10)), exif=exif))
    assert lying["10x20"] == lying["PNG"] == 1 and lying["pixels"] == 200
    assert lying["aspect"] == pytest.approx(-np.log(2)) == lying["square"]
    flat = pixel_traits(np.zeros((1, 1), np.float32))
    assert flat == {"sharpness": 0.0, "blocks": 0.0}
    steps = np.repeat(np.arange(8, dtype=np.float32), 8)[None].repeat(16, 0)  # 8 blocks in a row
    assert pixel_traits(steps)["blocks"] == pytest.approx(np.log((7 / 8 + 0.1) / 0.1))
