"""Numbers in sentences."""

from collections import Counter

from inversion_dpo.data.masks import odd_masks_text
from inversion_dpo.data.traits import oddities_text
from inversion_dpo.run.words import counted


def test_one_is_singular():
    assert [counted(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert [counted(n, "person is", "people are") for n in (1, 2)] == [
        "1 person is",
        "2 people are",
    ]


def test_a_single_odd_row_is_told_in_the_singular():
    one, two = (Counter(mask_whole=n, mask_grey=n, alike=n) for n in (1, 2))
    told = [*odd_masks_text(one), *oddities_text(one)]
    assert [text.split()[:3] for text in told] == [
        ["1", "mask", "counts"],
        ["1", "mask", "is"],
        ["1", "pair", "has"],
    ]
    told = [*odd_masks_text(two), *oddities_text(two)]
    assert [text.split()[1] for text in told] == ["masks", "masks", "pairs"]
