"""Time and room of an inversion, worked out before it begins."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from inversion_dpo.data.transforms import Framing
from inversion_dpo.maths.records import Extent
from inversion_dpo.models.base import plain_guidance
from inversion_dpo.run import disk
from inversion_dpo.run.disk import DiskError
from inversion_dpo.trajectories import cost
from inversion_dpo.trajectories.cost import (
    Missing,
    announce,
    evaluations_again,
    example,
    seconds_of_batch,
)
from inversion_dpo.trajectories.fill import Inverter, fill, invert_pairs
from inversion_dpo.trajectories.key import NOWHERE
from tests.by_hand import GRID
from tests.unit.trajectories.test_fill import CPU, KEY, SIDE, Pipeline, Source, filled, jobs
from tests.unit.trajectories.test_shard import Editor


def said(
    caplog, monkeypatch, count, change=None, seconds=3.0, rescaled=False, shapes=(), processes=1
):
    """Megabytes and minutes, where one evaluation of a batch takes so many seconds."""
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**10))
    clock = iter([0.0, seconds])
    monkeypatch.setattr(cost, "time", SimpleNamespace(time=lambda: next(clock)))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        model = Pipeline()
        model.combine = (lambda *p: plain_guidance(*p)) if rescaled else plain_guidance
        pairs = SimpleNamespace(expected=lambda: count, edits=False, shapes=lambda most: shapes)
        how = Inverter(model, replace(KEY, **change or {}), GRID, CPU)
        announce(how, pairs, Path("none"), processes, Missing())
    return caplog.messages[0], model.calls


def test_size_and_time_are_worked_out_beforehand(caplog, monkeypatch):
    # an image: 16 bytes, and the predictions at four levels; a prompt: 4 bytes
    text, calls = said(caplog, monkeypatch, 1_000_000)
    assert calls == 4
    megabytes, minutes = re.search(r"about (\d+) MB on disk and ([\d.]+) min", text).groups()
    assert int(megabytes) == 2 * 16 * 5 + 4
    # 500,000 batches of four images, each four evaluations of 3 s
    assert float(minutes) == 500_000 * 4 * 3 / 60
    assert text.startswith("inverting pairs in 3 steps: about")
    fewer = "training.mixed_precision=bf16 would need about 100 MB on disk"
    assert caplog.messages[1:] == [fewer]  # of three states keep=4 saves nothing
    said(caplog, monkeypatch, 1_000_000, {"extent": Extent(last=20), "precision": "bfloat16 bf16"})
    assert caplog.messages[1:] == ["inversion.keep=4 would need about 164 MB on disk"]


def test_processes_share_the_time_and_not_the_room(caplog, monkeypatch):
    text, _ = said(caplog, monkeypatch, 1_000_000, processes=8)
    assert "about 164 MB on disk and 12500.0 min" in text
    text, _ = said(caplog, monkeypatch, 5, processes=2)  # three batches, two of them at once
    assert "and 0.4 min" in text


def test_what_saves_nothing_is_not_said(caplog, monkeypatch):
    """Seven states in 16 bits take 4 + 8 * 2 bytes, and four kept ones 4 + 2 * 4 + 4 * 2."""
    change = {"extent": Extent(last=7), "precision": "bf16"}
    text, _ = said(caplog, monkeypatch, 1_000_000, change)
    assert f"about {4 * 2 * 20 + 4} MB" in text and not caplog.messages[1:]
    keep = replace(KEY, **change).smaller()["inversion.keep=4"]
    assert keep.pair_size(4, 4) == 4 * 2 * 20 + 4


def test_of_few_pairs_so_many_count_as_are_used(caplog, monkeypatch):
    """Half of three are two, a quarter of one is one: a batch, of four evaluations of 3 s."""
    fits, odd = ((64, 64),) * 2, ((64, 96), (96, 64))
    change = {"resolution": 64, "fit": "drop"}
    for count, shapes in ((3, [fits, odd]), (1, [fits, odd, odd, odd])):
        text, _ = said(caplog, monkeypatch, count, change, shapes=shapes)
        assert "and 0.2 min" in text


def test_a_grey_picture_as_large_as_it_will_be_is_encoded(caplog, monkeypatch):
    encoded, framed = [], []
    encode, framing = Pipeline.encode, Pipeline.framing
    monkeypatch.setattr(
        Pipeline, "encode", lambda self, x: encoded.append(x.shape) or encode(self, x)
    )
    monkeypatch.setattr(Pipeline, "framing", lambda self, f: framed.extend(f) or framing(self, f))
    said(caplog, monkeypatch, 5, {"resolution": "4x2", "fit": "pad"})
    assert encoded == [(1, 3, 2, 4)] and framed == [Framing((2, 4), (0, 0), (2, 4))]


def test_the_estimate_is_of_the_pictures_own_sizes(caplog, monkeypatch):
    """Two portraits, a square, and a pair that is left out; the portrait's bucket is timed."""
    shapes = [((96, 64),) * 2] * 2 + [((64, 64),) * 2, ((64, 96), (96, 64))]
    change = {"resolution": 64, "fit": "drop"}
    text, calls = said(caplog, monkeypatch, 10_000, change, shapes=shapes)
    pixels = (2 * 80 * 48 + 64 * 64) / 3
    megabytes = 7500 * replace(KEY, **change).pair_size(round(pixels), 4) / 1e6
    minutes = 3750 * 4 * 3 / 60 * pixels / (80 * 48)
    assert f"about {megabytes:.0f} MB on disk and {minutes:.1f} min" in text and calls == 4


@pytest.mark.parametrize("extent", [KEY.extent, NOWHERE])
def test_a_cache_that_does_not_fit_is_refused_before_the_first_forward(
    tmp_path, monkeypatch, extent
):
    key = replace(KEY, extent=extent)
    needed = 5 * (2 * 16 * (5 if extent.last else 1) + 4)
    fewer = "set inversion.keep, or lower inversion.steps or data.limit"
    remedy = fewer if extent.last else "choose another --output, lower data.limit"
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    model = Pipeline()
    with pytest.raises(DiskError, match=f"trajectories need about .* MB more .*{remedy}"):
        filled(tmp_path, key, model)
    assert model.calls == 0
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    filled(tmp_path, key, model)


@pytest.mark.parametrize("quick", [True, False])
def test_what_is_linked_needs_no_room(tmp_path, monkeypatch, caplog, quick):
    caplog.set_level(logging.INFO)
    filled(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    source, key = Source(), replace(KEY, pairs="again")
    source.quick = quick
    with pytest.raises(DiskError, match="trajectories need about"):
        fill(tmp_path, Pipeline(), source, key)
    fill(tmp_path, Pipeline(), source, key, reuse=True)
    told = "have all of 5 pairs already" if quick else "take neither room nor time, yet"
    assert told in caplog.text


@pytest.mark.parametrize("reuse", [True, False])
def test_only_what_is_missing_is_foretold(tmp_path, monkeypatch, caplog, reuse):
    """Seven pairs, of which the first four are there: in the cache itself, or in one beside it."""
    caplog.set_level(logging.INFO)
    key, size = replace(KEY, pairs="seven"), 2 * 16 * 5 + 4
    if reuse:
        filled(tmp_path)
    else:
        cache = fill(tmp_path, Pipeline(), Source(7), key)
        for file in [cache.folder / "manifest.json", *cache.folder.glob("shard-0000[23].*")]:
            file.unlink()
    caplog.clear()
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * size - 1))
    with pytest.raises(DiskError, match="trajectories need about"):
        fill(tmp_path, Pipeline(), Source(7), key, reuse=reuse)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * size))
    monkeypatch.setattr(cost, "seconds_of_batch", lambda *_: 15.0)
    fill(tmp_path, Pipeline(), Source(7), key, reuse=reuse)
    foretold = [text for text in caplog.messages if text.startswith("inverting")]
    assert foretold == [
        "inverting 3 of 7 pairs (caches have the others) in 3 steps: about 0 MB on disk and 2.0 min"
    ]
    assert "would need" not in caplog.text  # under other settings nothing were there


def test_fewer_states_need_less_room(caplog, monkeypatch):
    text, _ = said(caplog, monkeypatch, 1_000_000, {"keep": (1, 1, 3)})
    assert f"about {2 * 16 * 3 + 4} MB" in text
    text, calls = said(caplog, monkeypatch, 1_000_000, {"extent": NOWHERE})
    assert f"about {2 * 16 + 4} MB" in text and calls == 0


def test_a_stream_is_said_by_the_thousand_and_a_few_pairs_by_a_small_batch(caplog, monkeypatch):
    text, _ = said(caplog, monkeypatch, None, seconds=3.0)
    assert "for every 1,000 pairs, about 0 MB on disk and 100.0 min" in text
    text, calls = said(caplog, monkeypatch, 1)
    assert calls == 2 and "and 0.2 min" in text  # one batch of two images, four times 3 s
    text, _ = said(caplog, monkeypatch, 3)
    assert "and 0.4 min" in text  # six images are two batches


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"guidance_scale": 2.0, "reference_guidance": 2.0},
        {"guidance_scale": 2.0},
        {"guidance_scale": 2.0, "reference_guidance": 3.0},
        {"reference_guidance": 3.0, "extent": Extent(first=2, last=3)},
        {"extent": Extent(start=1, last=3, iterations=2)},
        {"extent": Extent(first=2, last=2)},
    ],
)
@pytest.mark.parametrize("rescaled", [False, True])
def test_the_time_is_that_of_the_evaluations_that_are_done(change, rescaled, caplog, monkeypatch):
    """Where a family rescales guided predictions, one of another guidance takes two."""
    model, key = Pipeline(), replace(KEY, **change)
    model.combine = (lambda *p: plain_guidance(*p)) if rescaled else plain_guidance
    invert_pairs(Inverter(model, key, GRID, CPU), jobs(2))
    text, _ = said(caplog, monkeypatch, 2, change, 60.0, rescaled)  # one batch of four images
    assert f"and {model.calls / 4:.1f} min" in text


def test_an_evaluation_is_timed_as_it_will_be_done(monkeypatch):
    """Without gradients, of both images of each pair, in as many parts as memory asks for."""
    model, asked = Pipeline(), []
    predict = model.predict

    def noted(network, x, t, condition):
        asked.append((len(x), t.tolist(), torch.is_grad_enabled()))
        assert condition["prompt"].shape == (len(x), 1)
        return predict(network, x, t, condition)

    model.predict = noted
    clock = iter([10.0, 13.0] * 2)
    monkeypatch.setattr(cost, "time", SimpleNamespace(time=lambda: next(clock)))
    for single, images in ((False, 2), (True, 1)):
        how = Inverter(model, replace(KEY, single=single), GRID, CPU)
        how.inverted.most = 2
        x_0, condition = torch.zeros(1, 1, SIDE, SIDE), {"prompt": torch.ones(1, 1)}
        assert seconds_of_batch(how, x_0, condition, 3) == 3.0
        assert asked == [(n * images, [10] * n * images, False) for n in (2, 1)]
        asked.clear()


@pytest.mark.parametrize(("edits", "read"), [("must", []), ("reads", [(6, 4)])])
def test_an_edit_is_timed_with_a_source_of_its_size(edits, read):
    """Of a picture 3 pixels wide and 2 high the model reads one twice as large."""
    model = Editor(edits)
    model.source_size = lambda size: (2 * size[0], 2 * size[1])
    condition, sizes = model.condition, []

    def noted(prompts, sources=()):
        sizes.extend(source.size for source in sources)
        return condition(prompts, sources=sources)

    model.condition = noted
    found = example(model, (2, 3), edited=True)
    assert found["source"].shape == (1, 1, 4, 6) and found["prompt"].tolist() == [[9]]
    assert sizes == read
    assert set(example(model, (2, 3), edited=False)) == {"prompt"}


@pytest.mark.parametrize(
    ("along", "stored", "wanted"),
    [(1.0, 2.0, 1), (2.0, 1.0, 1), (2.0, 3.0, 2), (2.0, 2.0, 2)],
)
def test_where_guidance_is_rescaled_two_evaluations_are_needed(along, stored, wanted):
    model = Pipeline()
    assert evaluations_again(model, along, stored) == 1
    model.combine = lambda *p: plain_guidance(*p)
    assert evaluations_again(model, along, stored) == wanted
