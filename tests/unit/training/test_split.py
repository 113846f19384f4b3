"""Pairs that are held out: a share by chance, and no image on both sides."""

from itertools import combinations

import pytest

from inversion_dpo.training.notices import leak_text
from inversion_dpo.training.split import grouped, split_pairs


@pytest.mark.parametrize(
    ("count", "share", "aside"),
    [(10, 0.2, 2), (10, 0.26, 3), (10, 0.001, 1), (10, 0.0, 1), (10, 1.0, 9), (2, 0.9, 1)],
)
def test_a_share_is_held_out_at_least_one_and_not_all(count, share, aside):
    numbers = [100 + k for k in range(count)]
    training, heldout = split_pairs(numbers, share)
    assert len(heldout) == aside
    assert sorted(training + heldout) == numbers
    assert training == sorted(training) and heldout == sorted(heldout)


def test_the_split_is_seeded_and_by_chance():
    numbers = list(range(1000))
    assert split_pairs(numbers, 0.5) == split_pairs(numbers, 0.5, seed=0)
    assert split_pairs(numbers, 0.5) != split_pairs(numbers, 0.5, seed=1)
    assert 400 < sum(split_pairs(numbers, 0.5)[1]) / 500 < 600


def ranked(prompts, images):
    """Every two images of a prompt, as data.ranking=all gives them."""
    return [
        [f"{p}-{a}", f"{p}-{b}"] for p in range(prompts) for a, b in combinations(range(images), 2)
    ]


def test_pairs_group_by_images_also_by_way_of_others():
    images = [["a", "b"], ["c", "d"], ["e", "b"], ["f", "f"], ["c", "e"], ["f", "g"]]
    assert grouped(range(6), images) == [[0, 1, 2, 4], [3, 5]]
    assert grouped([1, 3, 5], images) == [[1], [3, 5]]
    assert grouped([1, 3], []) == [[1], [3]]


@pytest.mark.parametrize(("prompts", "images", "aside"), [(40, 3, 12), (20, 5, 20), (5, 6, 15)])
def test_no_image_is_on_both_sides(prompts, images, aside):
    """Even if one prompt's 15 pairs are more than the share of 8."""
    marks = ranked(prompts, images)
    numbers = list(range(len(marks)))
    training, heldout = split_pairs(numbers, 0.1, marks)
    assert sorted(training + heldout) == numbers and len(heldout) == aside
    assert not leak_text(marks, training, heldout)
    assert leak_text(marks, *split_pairs(numbers, 0.1))  # as it was


def test_the_split_of_pairs_without_a_common_image_is_what_it_was():
    marks = [[f"{k}", f"-{k}"] for k in range(100)]
    assert split_pairs(range(100), 0.1, marks) == split_pairs(range(100), 0.1)
    assert split_pairs(range(10), 0.3)[1] == [1, 4, 7]  # as before groups were kept


def test_an_image_in_all_pairs_is_split_by_chance_and_said():
    marks = [["same", f"{k}"] for k in range(20)]
    training, heldout = split_pairs(range(20), 0.1, marks)
    assert (training, heldout) == split_pairs(range(20), 0.1)
    assert leak_text(marks, training, heldout).startswith("2 of 2 held-out pairs")
