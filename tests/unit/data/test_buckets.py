"""Buckets of a size, by numbers worked out by hand."""

import pytest

from inversion_dpo.data.buckets import buckets, nearest, place, share_cut, square


def test_those_of_sdxl_are_its_papers():
    """Appendix I of Podell et al., between 1:1 and 2:1; (height, width)."""
    found = [size for size in buckets(1024) if 1 <= size[1] / size[0] <= 2]
    assert found == [
        *[(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1280), (768, 1344)],
        *[(704, 1408)],
    ]
    assert {size[::-1] for size in buckets(1024)} == set(buckets(1024))
    assert max(h * w for h, w in buckets(1024)) == 1024**2
    assert buckets(1024)[-1] in ((512, 2048), (2048, 512))


@pytest.mark.parametrize(
    ("side", "step"), [(1024, 64), (768, 32), (512, 32), (480, 16), (256, 16), (64, 16), (96, 16)]
)
def test_the_step_is_a_16th_of_the_side_where_it_can_be(side, step):
    sizes = [n for size in buckets(side) for n in size if n != side]
    assert all(n % step == 0 for n in sizes) and min(abs(n - side) for n in sizes) == step


def test_one_size_is_asked_for_by_both_sides():
    assert buckets("832x1216") == ((1216, 832),) and buckets("64x64") == ((64, 64),)
    assert buckets(40) == ((40, 40),)  # no multiple of 16
    assert square(512) == (512, 512) and square("832x1216") == (1216, 832)


@pytest.mark.parametrize(
    ("picture", "wanted", "cut"),
    [
        ((1000, 1000), (1024, 1024), 0),
        ((3000, 2000), (1216, 832), 0.0256),  # 1.5 against 1.4615: 1 - 1.4615 / 1.5
        ((1080, 1920), (768, 1344), 0.0156),  # 1.7778 against 1.75
        ((600, 800), (896, 1152), 0.0357),  # 1.3333 against 1.2857
        ((1, 9), (512, 2048), 0.5556),  # 9 against 4
    ],
)
def test_the_nearest_ratio_of_sides_is_taken(picture, wanted, cut):
    size = nearest(buckets(1024), picture)
    assert size == wanted and share_cut(picture, size) == pytest.approx(cut, abs=1e-4)
    assert nearest(buckets(1024), picture[::-1]) == wanted[::-1]


PORTRAIT, LANDSCAPE, STRIP = (1200, 800), (800, 1200), (100, 1000)


@pytest.mark.parametrize(
    ("pictures", "fit", "wanted"),
    [
        ((PORTRAIT, (600, 400)), "drop", ((1216, 832), "crop", "")),  # of one shape
        (((1000, 1000), (1024, 1000)), "drop", ((1024, 1024), "crop", "")),
        (((1000, 1000), (1024, 1000)), "pad", ((1024, 1024), "pad", "")),  # nothing is cut
        ((PORTRAIT, LANDSCAPE), "drop", ((1024, 1024), "", "mixed_shapes")),  # the mean shape
        ((PORTRAIT, LANDSCAPE), "pad", ((1024, 1024), "pad", "mixed_shapes")),
        ((PORTRAIT, (1000, 1000)), "crop", ((1152, 896), "crop", "mixed_shapes")),
        ((STRIP, STRIP), "drop", ((512, 2048), "", "odd_shapes")),
    ],
)
def test_a_pair_has_one_bucket_whichever_picture_won(pictures, fit, wanted):
    for order in (pictures, pictures[::-1]):
        found = place(buckets(1024), order, fit)
        assert (found.size, found.fit, found.odd) == wanted


@pytest.mark.parametrize(
    ("fit", "wanted"),
    [("pad", ["pad", "pad"]), ("crop", ["crop", "crop"]), ("drop", ["crop", ""])],
)
def test_one_size_takes_every_picture_as_it_is_told(fit, wanted):
    """Of 8:9 an 8th is cut at most; of 2:3 more would be."""
    found = [place([(64, 64)], [shape] * 2, fit) for shape in ((63, 72), (60, 90))]
    assert [p.fit for p in found] == wanted and [p.odd for p in found] == ["", "odd_shapes"]
