"""Which pairs make a shard and in what order, what is foretold of them, and what of them counts."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from inversion_dpo.data.buckets import Place
from inversion_dpo.data.images import DataError
from inversion_dpo.data.source import Pair
from inversion_dpo.data.transforms import fit
from inversion_dpo.run.faults import PIXELS
from inversion_dpo.trajectories import jobs as module
from inversion_dpo.trajectories.jobs import (
    Inverter,
    Job,
    grouped,
    one_ahead,
    pictures,
    regions,
    sizes_ahead,
    sources,
    text_places,
    turned,
)
from tests.unit.trajectories.test_key import KEY

WIDE, TALL, SQUARE = (48, 80), (80, 48), (64, 64)  # (height, width): three of the buckets of 64
CPU = torch.device("cpu")


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def key(**changed):
    return replace(KEY, resolution=64, **changed)


def of(*sizes):
    """Pairs whose two pictures have a size."""
    return [
        Pair(k, "a", b"w", b"l", None, f"row {k}", decoded=(Image.new("RGB", size[::-1]),) * 2)
        for k, size in enumerate(sizes)
    ]


# ---- shards


def test_a_shard_is_written_when_it_is_full_and_what_is_left_by_size():
    """So that few pairs wait, and the same stream makes the same shards on any number of GPUs."""
    stream = of(WIDE, TALL, SQUARE, TALL, WIDE, SQUARE, SQUARE, WIDE, TALL)
    shards = list(grouped(stream, key(pairs_per_shard=2), {}))
    assert [[job.number for job in shard] for shard in shards] == [
        [1, 3],  # TALL, full at the fourth pair
        [0, 4],
        [2, 5],
        [7],  # the rest: WIDE is the least high, then SQUARE, then TALL
        [6],
        [8],
    ]
    assert [shard[0].place.size for shard in shards] == [TALL, WIDE, SQUARE, WIDE, SQUARE, TALL]


def test_a_shard_is_given_before_the_next_pair_is_read():
    read = []
    stream = (read.append(pair.row) or pair for pair in of(*[SQUARE] * 5))
    shards = grouped(stream, key(pairs_per_shard=2), {})
    for wanted in ([0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4]):
        next(shards)
        assert read == wanted


def test_numbers_leave_out_what_is_left_out_and_rows_do_not():
    left_out = {}
    stream = of(SQUARE, (200, 20), SQUARE, (20, 200), SQUARE)
    (shard,) = grouped(stream, key(pairs_per_shard=5, fit="drop"), left_out)
    assert [(job.number, job.pair.row) for job in shard] == [(0, 0), (1, 2), (2, 4)]
    assert left_out == {1: "odd_shapes", 3: "odd_shapes"}
    assert {job.place.fit for job in shard} == {"crop"}


def test_a_text_is_stored_in_the_first_shard_that_has_it():
    """Two of three pairs share theirs; the next shard stores only what is new."""
    texts = {}
    assert text_places(texts, [b"a", b"b", b"a"], 0) == ([(0, 0), (0, 1), (0, 0)], [0, 1])
    assert text_places(texts, [b"b", b"c", b"d"], 1) == ([(0, 1), (1, 0), (1, 1)], [1, 2])
    assert text_places(texts, [b"d"], 2) == ([(1, 1)], [])


# ---- what is foretold


def looked_at(shapes, resolution=64, fit="crop"):
    """Sizes and share of the first pairs; and how many were asked for."""
    asked = []
    pairs = SimpleNamespace(shapes=lambda most: asked.append(most) or iter(shapes))
    return *sizes_ahead(pairs, resolution, fit), asked


def test_the_sizes_ahead_are_counted_by_bucket():
    shapes = [((96, 160),) * 2, ((480, 800),) * 2, ((8, 8),) * 2]
    assert looked_at(shapes) == ({WIDE: 2, SQUARE: 1}, 1, [256])


def test_the_share_ahead_is_of_those_that_get_a_size():
    shapes = [(SQUARE, SQUARE), (WIDE, TALL), (TALL, TALL), (TALL, TALL)]
    assert looked_at(shapes, fit="drop") == ({SQUARE: 1, TALL: 2}, 0.75, [256])


def test_pictures_of_unknown_size_are_taken_for_squares():
    assert looked_at([(), (TALL, TALL), ()], fit="drop") == ({SQUARE: 2, TALL: 1}, 1, [256])


@pytest.mark.parametrize("shapes", [[], [(WIDE, TALL)]])
def test_without_a_pair_that_fits_one_square_is_foretold(shapes):
    assert looked_at(shapes, fit="drop") == ({SQUARE: 1}, 1, [256])


def test_of_one_size_no_picture_is_looked_at_unless_some_are_dropped():
    assert looked_at([], "80x48", "crop") == ({WIDE: 1}, 1, [])
    assert looked_at([], "80x48", "pad") == ({WIDE: 1}, 1, [])
    shapes = [(WIDE, WIDE), (TALL, TALL)]
    assert looked_at(shapes, "80x48", "drop") == ({WIDE: 1}, 0.5, [256])


# ---- who inverts


def test_each_size_has_the_grid_of_its_schedule_and_as_many_pairs_as_fit():
    asked = []
    model = SimpleNamespace(
        schedule_at=lambda size: SimpleNamespace(grid=lambda *how: asked.append((size, *how)))
    )
    how = Inverter(model, key(steps=7, spacing="even"), None, CPU).at(WIDE)
    assert asked == [(WIDE, 7, "even")]
    assert how.encoded.most == how.inverted.most == PIXELS // (2 * 48 * 80)


# ---- what is turned and edited


def edit(**more):
    left, right = ([[255, 0]], [[0, 255]])
    return Pair(0, "a", png(left), png(right), None, "here", **more)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("edited", [False, True])
def test_a_source_is_turned_with_its_pair(monkeypatch, mirrored, edited):
    monkeypatch.setattr(module, "flips", lambda *given: mirrored)
    pair = edit(source=png([[9, 0]]) if edited else None)
    images = turned(Job(0, pair, Place(SQUARE, "crop")), key(flip_seed=3))
    wanted = [[255, 0], [0, 255], *[[9, 0]] * edited]
    assert [np.asarray(image)[0, :, 0].tolist() for image in images] == [
        row[::-1] if mirrored else row for row in wanted
    ]


def test_who_is_mirrored_is_drawn_from_caption_seed_and_digest_once(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "flips", lambda *given: asked.append(given))
    pair = edit()
    module.mirrored(pair, key(flip_seed=None))
    module.mirrored(pair, key(flip_seed=0))
    assert asked == [("a", 0, pair.digest)]


class Doubling:
    """Reads sources at twice the size of the picture; a latent is the red of each pixel."""

    @staticmethod
    def source_size(size):
        return 2 * size[0], 2 * size[1]

    @staticmethod
    def encode(pixels):
        return pixels[:, :1]


def test_a_source_comes_to_the_size_that_the_model_reads():
    job = Job(0, edit(), Place((2, 4), "crop"))
    given = replace(job, pair=edit(source=png([[9] * 5] * 5)))
    (found,) = pictures(Doubling(), given, key()).edited
    assert found.size == (8, 4)
    assert pictures(None, job, key()).edited == []


def test_an_item_is_given_once_the_next_is_made():
    made = []
    items = (made.append(k) or k for k in range(3))
    assert [(k, *made) for k in one_ahead(items)] == [(0, 0, 1), (1, 0, 1, 2), (2, 0, 1, 2)]
    assert list(one_ahead([])) == []


def test_sources_are_encoded_in_the_order_of_their_pairs():
    given = [[Image.new("RGB", (2, 1), (red, 0, 0))] for red in (0, 255, 51)]
    found = sources(Doubling(), given)
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))


# ---- what counts


GREY = np.full((4, 4), 100)
LEFT = np.array([[255, 255, 0, 0]] * 4)
CORNER = np.zeros((4, 4)) + [[255, 0, 0, 0]] * np.eye(4)[:, :1]  # one pixel, top left


def weights(*rows, mask="given", place=None, size=(2, 2), **more):
    """Of pairs (mask, winner, loser), each of so many pixels."""
    place = place or Place((4, 4), "crop")
    pairs = [
        Pair(0, "a", png(w), png(lost), None, f"row {k}", mask=None if m is None else png(m))
        for k, (m, w, lost) in enumerate(rows)
    ]
    fitted = [fit(image, place.size, place.fit) for pair in pairs for image in pair.images]
    found = regions([Job(0, p, place) for p in pairs], fitted, key(mask=mask, **more), size)
    return found["region"].tolist() if found else found


def test_a_mask_weighs_latent_pixels_by_their_white_part():
    """The left half; a quarter of the first latent pixel; everything."""
    assert weights((LEFT, GREY, GREY)) == [[[[2, 0], [2, 0]]]]
    assert weights((CORNER, GREY, GREY)) == [[[[4, 0], [0, 0]]]]
    assert weights((GREY * 0 + 255, GREY, GREY)) == [[[[1, 1], [1, 1]]]]


def test_latents_may_be_higher_than_wide():
    assert weights((LEFT, GREY, GREY), size=(4, 2)) == [[[[2, 0]] * 4]]
    assert weights((LEFT, GREY, GREY), size=(1, 4)) == [[[[2, 2, 0, 0]]]]


def test_levels_of_a_mask_count_from_the_middle_on():
    assert weights((LEFT // 255 * 128 + 127 * (LEFT == 0), GREY, GREY)) == [[[[2, 0], [2, 0]]]]


def test_levels_are_judged_before_a_mask_is_shrunk():
    """Three quarters of the left half are white, if barely; their mean with black is not."""
    mask = np.kron(LEFT > 0, [[129, 129], [129, 0]])
    large = np.full((8, 8), 100)
    assert weights((mask, large, large)) == [[[[2, 0], [2, 0]]]]


def test_a_light_colour_in_a_mask_is_white_and_a_dark_one_black():
    """As the check of the row has it: green is light, whatever its red is; blue is dark."""
    mask = np.zeros((4, 4, 3))
    mask[:, :2, 1], mask[:, 2:, 2] = 255, 255
    assert weights((mask, GREY, GREY)) == [[[[2, 0], [2, 0]]]]


def test_grey_bars_never_count():
    wide = np.full((2, 4), 255)
    (((*rows,),),) = weights((wide, wide, wide), place=Place((4, 4), "pad"), size=(4, 4))
    assert [row[0] for row in rows] == [0, 2, 2, 0]


def test_where_images_differ_enough_counts():
    more = GREY + 17 * (LEFT > 0)
    assert weights((None, GREY, more), mask="differ") == [[[[2, 0], [2, 0]]]]
    assert weights((None, more, GREY), mask="differ") == [[[[2, 0], [2, 0]]]]


def test_one_channel_is_enough_to_differ():
    colour = np.stack([GREY, GREY, GREY + 17 * (LEFT > 0)], -1)
    assert weights((None, np.stack([GREY] * 3, -1), colour), mask="differ") == [[[[2, 0], [2, 0]]]]


def test_each_pair_has_its_own_region():
    rows = (LEFT, GREY, GREY + LEFT // 2), (CORNER, GREY, GREY + CORNER // 2)
    wanted = [[[[2, 0], [2, 0]]], [[[4, 0], [0, 0]]]]
    assert weights(*rows) == weights(*rows, mask="differ") == wanted


def test_without_a_mask_or_its_use_all_counts_alike():
    assert weights((LEFT, GREY, GREY), mask="none") == weights((None, GREY, GREY)) == {}


def test_a_mirrored_pair_has_a_mirrored_mask(monkeypatch):
    monkeypatch.setattr(module, "flips", lambda *given: True)
    assert weights((LEFT, GREY, GREY), flip_seed=0) == [[[[0, 2], [0, 2]]]]


def test_a_region_of_nothing_is_refused_by_its_row():
    some, none = (None, GREY, GREY + 17), (None, GREY, GREY + 16)
    remedy = ".*; drop the row, or set data.mask=none"
    with pytest.raises(
        DataError, match="row 1: its images nowhere differ by more than 16" + remedy
    ):
        weights(some, none, some, mask="differ")
    flat, edge = np.full((2, 8), 9), np.eye(1, 8)[[0] * 2] * 255
    with pytest.raises(DataError, match="row 0: its mask is cut off" + remedy):
        weights((edge, flat, flat))
