"""Errors that count in a region only: weights by hand, and a whole step."""

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from inversion_dpo.data.buckets import Place
from inversion_dpo.data.images import DataError
from inversion_dpo.data.source import Pair
from inversion_dpo.data.transforms import fit
from inversion_dpo.maths.losses import residual_overlap, squared_error
from inversion_dpo.run.config import ConfigError
from inversion_dpo.training.beforehand import check_preferences
from inversion_dpo.training.generators import generator_for
from inversion_dpo.training.step import losses, pair_errors
from inversion_dpo.trajectories.jobs import Job, regions
from inversion_dpo.trajectories.key import CacheKey
from tests.sessions import set_up
from tests.unit.trajectories.test_fill import KEY


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def key(mask: str, flip: int | None = None) -> CacheKey:
    return replace(KEY, mask=mask, flip_seed=flip)


def jobs(mask, winner, loser, mode="crop", size=(4, 4)):
    pair = Pair(
        0, "a", png(winner), png(loser), None, "here", mask=None if mask is None else png(mask)
    )
    job = Job(0, pair, Place(size, mode))
    return [job], [fit(image, size, mode) for image in pair.images]


GREY = np.full((4, 4), 100)
FLAT = np.full((2, 8), 9)
LEFT = np.array([[255, 255, 0, 0]] * 4)
CORNER = np.zeros((4, 4)) + [[255, 0, 0, 0]] * np.eye(4)[:, :1]  # one pixel, top left


def test_the_mean_over_the_region_by_hand():
    """Squares 1, 4, 9, 16; of the first column (1 + 9) / 2, of three quarters of the first 1."""
    target, prediction = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 2], [3, 4]]]])
    left = torch.tensor([[[[2.0, 0], [2, 0]]]])
    assert squared_error(target, prediction).item() == 7.5
    assert squared_error(target, prediction, left).item() == 5
    both = torch.cat([prediction, 2 * prediction])
    assert residual_overlap(torch.zeros(2, 1, 2, 2), both, left).item() == 10
    ones = torch.ones(1, 1, 2, 2)
    noise = torch.randn(5, 3, 2, 2)
    assert torch.equal(squared_error(noise, noise[:1], ones), squared_error(noise, noise[:1]))


def test_weights_of_latent_pixels_by_hand():
    """White is the left half, or a quarter of the first latent pixel; grey bars never count."""
    of = lambda *given, how="given", **more: regions(  # noqa: E731
        *jobs(*given, **more), key(how), (2, 2)
    )["region"].tolist()
    assert of(LEFT, GREY, GREY) == [[[[2, 0], [2, 0]]]]
    assert of(CORNER, GREY, GREY) == [[[[4, 0], [0, 0]]]]
    assert of(GREY * 0 + 255, GREY, GREY) == [[[[1, 1], [1, 1]]]]
    wide = np.full((2, 4), 255)
    padded = regions(*jobs(wide, wide, wide, mode="pad"), key("given"), (4, 4))["region"]
    assert padded[0, 0, :, 0].tolist() == [0, 2, 2, 0]
    more = GREY + 17 * (LEFT > 0)
    assert of(None, GREY, more, how="differ") == [[[[2, 0], [2, 0]]]]
    assert regions(*jobs(LEFT, GREY, GREY), key("none"), (2, 2)) == {}
    assert regions(*jobs(None, GREY, GREY), key("given"), (2, 2)) == {}


def test_a_mirrored_pair_has_a_mirrored_mask(monkeypatch):
    monkeypatch.setattr("inversion_dpo.trajectories.jobs.flips", lambda *given: True)
    found = regions(*jobs(LEFT, GREY, GREY), key("given", 0), (2, 2))["region"]
    assert found.tolist() == [[[[0, 2], [0, 2]]]]


@pytest.mark.parametrize(
    ("given", "how", "expected"),
    [
        (
            (None, GREY, GREY + 16),
            "differ",
            "here: its images nowhere differ by more than 16 of 255",
        ),
        (
            (np.eye(1, 8)[[0] * 2] * 255, *[np.full((2, 8), 9)] * 2),
            "given",
            "here: its mask is cut",
        ),
    ],
)
def test_a_region_of_nothing_is_refused(given, how, expected):
    with pytest.raises(DataError, match=expected + ".*; drop the row, or set data.mask=none"):
        regions(*jobs(*given), key(how), (2, 2))


def test_single_images_do_not_differ(tiny_config):
    with pytest.raises(ConfigError, match="data.mask=differ compares the images of pairs"):
        check_preferences(tiny_config("data.mask=differ", "objective.name=kto"), {"single": 4})


@pytest.fixture(scope="module")
def session(tiny_config, pair_file, tmp_path_factory):
    """Of pairs whose left half counts."""
    root, half = tmp_path_factory.mktemp("masks"), np.zeros((64, 64))
    half[:, :32] = 255
    rows = [{**row, "mask": png(half)} for row in pq.read_table(pair_file).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), root / "pairs.parquet")
    return set_up(tiny_config(f"data.pairs={root / 'pairs.parquet'}", "inversion.steps=3"), root)


def test_a_step_takes_errors_in_the_region_only(session):
    cache, pairs = session.cache, [0, 5]
    region = cache.region(pairs)
    left = torch.arange(8) < 4
    assert region.shape == (2, 1, 8, 8) and torch.equal(region, 2.0 * left.expand(2, 1, 8, 8))
    states = cache.states(pairs, [1, 1], "x0")
    prediction = states.x_t.flip(0)
    found = pair_errors(session, states, prediction, pairs)
    squares = (states.target - prediction)[..., left].square().flatten(1).mean(1)
    torch.testing.assert_close(found.winner, (states.scale * squares)[:2])
    torch.testing.assert_close(found.loser, (states.scale * squares)[2:])


def test_a_mask_of_ones_is_no_mask_to_the_bit(session, monkeypatch):
    batch, generators = [(0, 0), (5, 0)], [generator_for(0, 0, 0, k) for k in (0, 1)]
    found = []
    for region in (None, torch.ones(2, 1, 8, 8), session.cache.region([0, 5])):
        monkeypatch.setattr(session.cache, "region", lambda pairs, region=region: region)
        generators = [generator_for(0, 0, 0, k) for k in (0, 1)]
        _, errors, _ = losses(session, batch, generators)
        found.append(torch.stack([errors.winner, errors.loser, errors.winner_ref]).detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
