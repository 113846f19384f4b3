"""Which numbers of a trajectory are stored, and in how many bits."""

import pytest
import torch

from inversion_dpo.maths.records import Extent
from inversion_dpo.trajectories.storing import endpoint_size, form_of, kept_steps, smallest


def test_kept_states_are_stratified():
    def kept(k, low, high, numbers=range(400), **more):
        extent = Extent(first=low, last=high, **more)
        return kept_steps(numbers, form_of(extent, (k, low, high), 1.0, 1.0))

    rows = kept(3, 4, 12)  # one of each of 4-6, 7-9, 10-12
    for column, low in enumerate((4, 7, 10)):
        assert set(rows[:, column].tolist()) == {low, low + 1, low + 2}
    rows = kept(3, 1, 10)  # ten indices are as even as can be: 3, 4 and 3 of them
    assert [set(column.tolist()) for column in rows.T] == [{1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10}]
    rows = kept(3, 4, 12)
    assert torch.equal(kept(3, 4, 12, range(100, 120)), rows[100:120])  # by the pair's number
    assert kept(5, 2, 3).tolist() == [[2, 3]] * 400  # two indices are two states
    rows = kept(4, 1, 20)  # two neighbours in each half
    assert {tuple(r) for r in rows[:, :2].tolist()} == {(i, i + 1) for i in range(1, 11, 2)}
    assert {tuple(r) for r in rows[:, 2:].tolist()} == {(i, i + 1) for i in range(11, 21, 2)}
    count = rows.flatten().bincount()[1:]
    assert count.min() > 50 and count.max() < 110  # 80 of each index
    assert {tuple(r) for r in kept(2, 1, 5).tolist()} == {(1, 2), (2, 3), (3, 4), (4, 5)}
    rows = kept(2, 1, 4, start=2)  # states with noise do not follow from one another
    assert {i for i, _ in rows.tolist()} == {1, 2} and {i for _, i in rows.tolist()} == {3, 4}


FIELDS = ("kept", "apart", "low", "run", "latents", "predictions", "moves")


@pytest.mark.parametrize(
    ("extent", "keep", "scales", "wanted"),
    [
        # all states: x_0 of both images, and the predictions that lead from state to state
        (Extent(last=3), None, (1, 1), (0, False, 0, 2, 2, 4, 0)),
        (Extent(first=3, last=5), None, (1, 1), (0, False, 0, 2, 2, 6, 0)),
        # with added noise: one more latent, for both images; the path begins later
        (Extent(start=2, last=5), None, (1, 1), (0, False, 1, 1, 3, 5, 0)),
        (Extent(start=2, first=3, last=5), None, (1, 1), (0, False, 2, 2, 3, 4, 0)),
        (Extent(start=1, first=1, last=5), None, (1, 1), (0, False, 1, 2, 3, 5, 0)),
        # another guidance, or a refined path: what moves is stored apart
        (Extent(first=2, last=5), None, (2, 1), (0, True, 2, 2, 2, 4, 5)),
        (Extent(first=2, last=5, iterations=1), None, (1, 1), (0, True, 2, 2, 2, 4, 5)),
        (Extent(start=3, first=2, last=5), None, (1, 2), (0, True, 2, 1, 3, 4, 2)),
        (Extent(start=5, first=2, last=4), None, (1, 2), (0, True, 2, 1, 3, 3, 0)),
        # some states, two that follow one another: the first, and what leads to the second
        (Extent(first=1, last=9), (4, 1, 9), (1, 1), (4, False, 0, 2, 6, 4, 0)),
        (Extent(first=1, last=9), (4, 1, 9), (2, 1), (4, True, 1, 2, 6, 4, 2)),
        (Extent(start=1, first=1, last=9), (6, 1, 9), (2, 1), (6, True, 1, 2, 8, 6, 3)),
        # an odd number, or noise added above the lowest: each state by itself
        (Extent(first=1, last=9), (3, 1, 9), (2, 1), (3, True, 1, 1, 8, 3, 0)),
        (Extent(start=2, first=1, last=9), (4, 1, 9), (2, 1), (4, True, 1, 1, 10, 4, 0)),
        # no more than there are
        (Extent(first=2, last=5), (9, 2, 5), (1, 1), (4, False, 0, 2, 6, 4, 0)),
    ],
)
def test_what_is_stored_of_a_path(extent, keep, scales, wanted):
    form = form_of(extent, keep, *scales)
    assert {name: getattr(form, name) for name in FIELDS} == dict(zip(FIELDS, wanted, strict=True))
    assert form.extent == extent


def test_where_the_prediction_at_a_state_lies():
    """Position 0 is state 1. A path from state 0 has a prediction there too."""
    whole = form_of(Extent(last=3), None, 1, 1)
    assert [whole.column(k) for k in range(3)] == [1, 2, 3]
    upper = form_of(Extent(first=2, last=4), None, 2, 1)
    assert [upper.column(k) for k in (1, 2, 3)] == [0, 1, 2]
    for form, position in ((whole, 3), (upper, 0), (upper, 4)):
        with pytest.raises(ValueError, match=f"no prediction of state {position + 1} "):
            form.column(position)
    kept = form_of(Extent(last=9), (4, 1, 9), 1, 1)
    assert [kept.column(k) for k in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no prediction"):
        kept.column(4)


def test_how_far_a_state_is_from_what_is_stored():
    def transitions(positions, *form):
        return [form_of(*form, 1, 1).transitions(k) for k in positions]

    assert transitions(range(3), Extent(last=3), None) == [1, 2, 3]  # from x_0
    assert transitions(range(5), Extent(start=2, last=5), None) == [0, 0, 1, 2, 3]  # from noise
    assert transitions(range(4), Extent(last=9), (4, 1, 9)) == [0, 1, 0, 1]  # from every second
    assert transitions(range(3), Extent(last=9), (3, 1, 9)) == [0, 0, 0]


def test_bytes_of_a_pair_by_hand():
    """Ten numbers a latent, both images; predictions of 16 bits, moves of 32; 3 bytes of text."""
    form = form_of(Extent(start=1, first=2, last=5), None, 2, 1)  # 4 predictions and 4 moves
    assert form.size(10, (16, 32)) == 10 * (3 * 4 + 2 * 4 * 2 + 2 * 4 * 4)
    assert form_of(Extent(last=0), None, 1, 1).size(10, (16, 32)) == 10 * 2 * 4
    assert endpoint_size(10) == 10 * 2 * (2 + 2)


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (1 + 2**-7, torch.bfloat16),
        (2.0**100, torch.bfloat16),
        (1 + 2**-10, torch.float16),
        (1 + 2**-11, torch.float32),
        (2.0**17 + 1, torch.float32),
    ],
)
def test_predictions_take_the_fewest_bits_that_hold_them(number, dtype):
    given = torch.tensor([0.5, number])
    found = smallest(given)
    assert found.dtype == dtype and torch.equal(found.float(), given)
