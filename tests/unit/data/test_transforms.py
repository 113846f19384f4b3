from __future__ import annotations

import hashlib
from base64 import b64decode
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from inversion_dpo.data.images import data_uri, decode_image, png
from inversion_dpo.data.transforms import (
    Framing,
    chance,
    fit,
    flip,
    flips,
)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def digests(count: int) -> list[str]:
    return [hashlib.sha256(str(k).encode()).hexdigest() for k in range(count)]


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_an_image_of_the_target_is_not_touched(mode: str) -> None:
    image = picture(64, 48)
    fitted = fit(image, (48, 64), mode)
    assert np.array_equal(np.asarray(fitted.image), np.asarray(image))
    assert fitted.framing == Framing((48, 64), (0, 0), (48, 64))


def test_padding_keeps_the_whole_image_in_the_middle() -> None:
    fitted = fit(Image.new("RGB", (20, 10), (200, 0, 100)), (8, 8), "pad")
    levels = np.asarray(fitted.image)
    assert (levels[2:6] == (200, 0, 100)).all()  # 20x10 becomes 8x4
    assert (levels[[0, 1, 6, 7]] == 127).all()
    assert fitted.framing == Framing((10, 20), (0, 0), (8, 8))


def test_only_padding_does_not_resample() -> None:
    image = picture(8, 6)
    levels = np.asarray(fit(image, (8, 8), "pad").image)
    assert np.array_equal(levels[1:7], np.asarray(image))


def test_cropping_takes_the_middle_and_says_where() -> None:
    image = picture(14, 8)
    fitted = fit(image, (8, 8), "crop")
    assert np.array_equal(np.asarray(fitted.image), np.asarray(image)[:, 3:11])
    assert fitted.framing == Framing((8, 14), (0, 3), (8, 8))


def test_the_crop_corner_is_given_in_resized_pixels() -> None:
    assert fit(picture(400, 200), (100, 100), "crop").framing.crop == (0, 50)
    assert fit(picture(200, 400), (100, 50), "crop").framing.crop == (0, 0)


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [(1, 300), (300, 1), (5, 5), (640, 480)])
def test_every_shape_comes_out_at_the_target(mode: str, size: tuple[int, int]) -> None:
    fitted = fit(picture(*size), (32, 48), mode)
    assert fitted.image.size == (48, 32)
    assert fitted.framing.original == size[::-1]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="pad, crop"):
        fit(picture(4, 4), (4, 4), "stretch")


def test_a_flip_is_its_own_inverse_and_takes_both_images() -> None:
    winner, loser = picture(6, 4), picture(6, 4, 1)
    once = flip(winner, loser)
    assert np.array_equal(np.asarray(once[0]), np.asarray(winner)[:, ::-1])
    assert np.array_equal(np.asarray(once[1]), np.asarray(loser)[:, ::-1])
    twice = flip(*once)
    assert np.array_equal(np.asarray(twice[0]), np.asarray(winner))
    assert np.array_equal(np.asarray(twice[1]), np.asarray(loser))


@pytest.mark.parametrize(
    "caption",
    [
        "a cat left of a dog",
        "Right: a tree",
        "the leftmost cup",
        "a right-handed man",
        "on its LEFT",
    ],
)
def test_captions_that_say_left_or_right_never_flip(caption: str) -> None:
    assert not any(flips(caption, 0, digest) for digest in digests(64))


def test_other_words_may_flip() -> None:
    assert any(flips("a bright copyright sign", 0, digest) for digest in digests(64))


def test_decisions_follow_seed_and_pair_only() -> None:
    names = digests(512)
    first = [flips("a cat", 1, d) for d in names]
    assert first == [flips("a cat", 1, d) for d in names]
    assert first != [flips("a cat", 2, d) for d in names]
    assert first[::-1] == [flips("a cat", 1, d) for d in reversed(names)]
    assert chance("prompt", 1, "a", 2) != chance("prompt", 1, "a", 3)


def test_a_coin_is_fair_and_the_two_decisions_are_independent() -> None:
    names = digests(4000)
    table = Counter((flips("a", 0, d), chance("prompt", 0, d, 0) < 0.5) for d in names)
    # each cell is binomial(4000, 1/4): standard deviation 27.4, four of them
    assert all(abs(table[a, b] - 1000) < 110 for a in (True, False) for b in (True, False))


def test_prompt_dropout_has_its_share() -> None:
    names = digests(4000)
    assert not any(chance("prompt", 0, d, 0) < 0.0 for d in names)
    assert all(chance("prompt", 0, d, 0) < 1.0 for d in names)
    dropped = {p: {d for d in names if chance("prompt", 0, d, 0) < p} for p in (0.1, 0.3)}
    assert dropped[0.1] < dropped[0.3]  # a larger share drops the same ones and more
    assert abs(len(dropped[0.1]) - 400) < 76  # four standard deviations


def test_png_is_lossless_and_its_address_holds_it():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode_image(png(image), "here")), image)
    kind, text = data_uri(png(image)).split(",")
    assert kind == "data:image/png;base64" and b64decode(text) == png(image)
