"""Errors that count in a region only: weights by hand, and a whole step."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from inversion_dpo.data.images import DataError
from inversion_dpo.data.source import open_pairs
from inversion_dpo.maths.losses import residual_overlap, squared_error
from inversion_dpo.run.config import ConfigError
from inversion_dpo.training import beforehand
from inversion_dpo.training.beforehand import check_data, check_preferences
from inversion_dpo.training.generators import generator_for
from inversion_dpo.training.step import losses, pair_errors
from tests.sessions import set_up


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


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


def test_single_images_do_not_differ(tiny_config):
    with pytest.raises(ConfigError, match="data.mask=differ compares the images of pairs"):
        check_preferences(tiny_config("data.mask=differ", "objective.name=kto"), {"single": 4})


def test_odd_masks_are_counted_before_a_training(tiny_config, pair_file, tmp_path, caplog):
    few = pq.read_table(pair_file).to_pylist()[:5]
    masks = [np.full((64, 64), 255)] * 2 + [np.arange(64) * 4 * np.ones((64, 1))] * 3
    rows = [{**row, "mask": png(mask)} for row, mask in zip(few, masks, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    check_data(tiny_config(f"data.pairs={tmp_path / 'pairs.parquet'}"), tmp_path)
    assert "of the masks of the first 5 rows, 2 masks count everything" in caplog.text
    assert "of the masks of the first 5 rows, 3 masks are grey" in caplog.text


def test_images_that_nowhere_differ_are_refused_before_a_training(tiny_config, pair_file, tmp_path):
    few = pq.read_table(pair_file).to_pylist()[:5]
    grey = [png(np.full((64, 64), level)) for level in (100, 116)]
    few[4] |= {"jpg_0": grey[0], "jpg_1": grey[1]}
    pq.write_table(pa.Table.from_pylist(few), tmp_path / "pairs.parquet")
    data = f"data.pairs={tmp_path / 'pairs.parquet'}"
    check_data(tiny_config(data), tmp_path)
    with pytest.raises(DataError, match="row 4: its images nowhere differ by more than 16"):
        check_data(tiny_config(data, "data.mask=differ"), tmp_path)


def test_every_mask_is_looked_at_before_a_training(tiny_config, pair_file, tmp_path, monkeypatch):
    """Not the first rows alone. A cache of the pairs tells that all is well."""
    monkeypatch.setattr(beforehand, "FIRST_PAIRS", 5)
    masks = [png(np.full((64, 64), 255))] * 9 + [png(np.zeros((64, 64)))] * 7
    rows = zip(pq.read_table(pair_file).to_pylist(), masks, strict=True)
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "mask": mask} for row, mask in rows]), file)
    config = tiny_config(f"data.pairs={file}")
    with pytest.raises(DataError, match="row 9, mask: nothing in the mask is white"):
        check_data(config, tmp_path)
    check_data(tiny_config(f"data.pairs={file}", "data.limit=9"), tmp_path)
    check_data(tiny_config(f"data.pairs={file}", "data.mask=none"), tmp_path)
    cache, known = tmp_path / "cache", open_pairs(config.data).fingerprint
    cache.mkdir()
    (cache / "key.json").write_text(json.dumps({"pairs": known}))
    with pytest.raises(DataError, match="row 9, mask"):  # which is not finished
        check_data(config, tmp_path)
    (cache / "manifest.json").write_text("{}")
    check_data(config, tmp_path)


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
