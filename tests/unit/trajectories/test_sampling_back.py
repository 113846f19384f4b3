"""Sampling pairs back: from which noise, how large the error is, and which process does it."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from inversion_dpo.maths.records import Extent
from inversion_dpo.maths.schedule import add_noise, step
from inversion_dpo.models.base import ModelError
from inversion_dpo.run import disk
from inversion_dpo.run.disk import DiskError
from inversion_dpo.run.fields import InversionConfig
from inversion_dpo.run.folder import BusyError, alone_at
from inversion_dpo.run.processes import Team
from inversion_dpo.trajectories.fill import fill
from inversion_dpo.trajectories.key import NOWHERE
from inversion_dpo.trajectories.reading import SHARD
from inversion_dpo.trajectories.sampling_back import round_trip_error, sampled_back
from tests.by_hand import GRID
from tests.unit.trajectories.test_fill import (
    KEY,
    KIND,
    SIDE,
    Alone,
    Pipeline,
    Source,
    filled,
    prediction,
)

HOW = InversionConfig(steps=3)


@pytest.mark.parametrize(
    ("change", "evaluations"),
    [
        ({}, 3),  # sampled down from the state that is stored
        ({"keep": (2, 1, 3)}, 7),  # which is not stored: inverted again
        ({"extent": Extent(last=2)}, 7),  # or not pure noise
        ({"extent": NOWHERE}, 7),
    ],
)
def test_sampling_back_is_a_report_beside_any_cache(tmp_path, change, evaluations):
    cache, model = filled(tmp_path, replace(KEY, **change)), Pipeline()
    before = {p: p.read_bytes() for p in cache.folder.glob("*")}
    back = sampled_back(model, cache, HOW)
    assert model.calls == evaluations * 10 and back.pairs == 5
    clean, again = (c.of_images(n, [2, 3]) for c, n in ((cache, "clean"), (back, "reconstructed")))
    errors = (again - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)
    assert (errors[0] - errors[2]).abs() > 1e-4  # the worse image of a pair counts
    wanted = torch.maximum(*errors.chunk(2)).tolist()
    assert back.errors[2:4] == pytest.approx(wanted, abs=2e-6) and len(back.errors) == 5
    x = clean[0]
    for i in range(3):
        x = step(x, prediction(x, i, 3), GRID.levels[i], GRID.levels[i + 1], KIND)
    for i in (3, 2, 1):
        x = step(x, prediction(x, i, 3), GRID.levels[i], GRID.levels[i - 1], KIND)
    torch.testing.assert_close(again[0], x)
    assert {p: p.read_bytes() for p in before} == before
    sampled_back(model, cache, HOW)
    assert model.calls == evaluations * 10  # it is there


def test_only_a_damaged_part_is_sampled_back_again(tmp_path):
    cache, model = filled(tmp_path), Pipeline()
    folder = sampled_back(model, cache, HOW).folder
    path = folder / SHARD.format(1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"?")
    model.calls = 0
    sampled_back(model, cache, HOW)
    assert path.read_bytes() == whole and model.calls == 3 * 4


def test_each_way_of_inverting_has_its_own_folder(tmp_path):
    cache = filled(tmp_path, replace(KEY, extent=NOWHERE))
    ways = {
        "reconstruction-1-0-0": {},
        "reconstruction-2-0-0": {"guidance_scale": 2.0},
        "reconstruction-1-2-0": {"fixed_point_iterations": 2},
        "reconstruction-1-0-1": {"t_start": 0.4},
    }
    for name, how in ways.items():
        back = sampled_back(Pipeline(), cache, InversionConfig(steps=3, **how))
        assert back.folder == cache.folder / name
    cases = [back_of(cache, name)[0] for name in ways]
    assert len({case.sum().item() for case in cases}) == 4


def back_of(cache, name):
    """What the first shard's images were sampled back to, and how far off."""
    tensors = load_file(cache.folder / name / SHARD.format(0))
    return tensors["reconstructed"], tensors["reconstruction"]


def test_noise_is_added_by_the_number_of_a_pair(tmp_path):
    """Up to the first level; of pairs 2 and 3, which are the second shard."""
    cache = filled(tmp_path, replace(KEY, extent=NOWHERE))
    back = sampled_back(Pipeline(), cache, InversionConfig(steps=3, t_start=0.4))
    for k in (2, 3):
        noise = torch.randn(1, SIDE, SIDE, generator=torch.Generator().manual_seed(k))
        for side in (0, 1):
            x = add_noise(cache.of_images("clean", [k])[side], noise, GRID.levels[1])
            for i in (2, 3):
                x = step(x, prediction(x, i - 1, k + 1), GRID.levels[i - 1], GRID.levels[i], KIND)
            for i in (3, 2, 1):
                x = step(x, prediction(x, i, k + 1), GRID.levels[i], GRID.levels[i - 1], KIND)
            torch.testing.assert_close(back.of_images("reconstructed", [k])[side], x)


def test_errors_are_written_in_six_digits(tmp_path):
    errors = sampled_back(Pipeline(), filled(tmp_path), HOW).errors
    assert errors == [round(error, 6) for error in errors]
    assert errors != [round(error, 5) for error in errors]


def test_the_manifest_says_of_pairs_what_the_caches_says(tmp_path):
    cache = filled(tmp_path)
    back = sampled_back(Pipeline(), cache, HOW)
    for name in ("pairs", "counts", "digests", "places", "texts", "sizes", "left_out"):
        assert getattr(back, name) == getattr(cache, name), name


def test_processes_share_the_shards_and_the_first_one_writes_the_manifest(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Team, "wait", lambda self: None)
    monkeypatch.setattr(Team, "collect", lambda self, found: found)
    cache = filled(tmp_path)
    folder = cache.folder / "reconstruction-1-0-0"
    capsys.readouterr()
    with pytest.raises(FileNotFoundError):  # the manifest, for which it would have waited
        sampled_back(Pipeline(), cache, HOW, Team(1, 2))
    assert [p.name for p in folder.glob("*.safetensors")] == [SHARD.format(1)]
    assert "sample back" not in capsys.readouterr().err  # one bar a launch
    model = Pipeline()
    sampled_back(model, cache, HOW, Team(0, 2))
    assert model.calls == 3 * (4 + 2)  # the shards 0 and 2, of two pairs and one
    assert "sample back" in capsys.readouterr().err


@pytest.mark.parametrize("single", [False, True])
def test_room_is_asked_for_before_anything_is_computed(tmp_path, monkeypatch, single):
    """Of five pairs, or single images, four numbers of 4 bytes an image."""
    source = Alone() if single else Source()
    cache = fill(tmp_path, Pipeline(), source, replace(KEY, single=single))
    model, needed = Pipeline(), 5 * (1 if single else 2) * 4 * 4
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    what = "reconstructions need about .*, set inversion.reconstruct=false or data.limit"
    with pytest.raises(DiskError, match=what):
        sampled_back(model, cache, HOW)
    assert model.calls == 0 and not list(cache.folder.glob("reconstruction*"))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert sampled_back(model, cache, HOW).pairs == 5


def test_only_the_first_process_asks_for_room(tmp_path, monkeypatch):
    monkeypatch.setattr(Team, "wait", lambda self: None)
    cache = filled(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(FileNotFoundError):
        sampled_back(Pipeline(), cache, HOW, Team(1, 2))


class Counting(Pipeline):
    """Notes how many images it predicts at once."""

    def __init__(self):
        super().__init__()
        self.images = set()

    def predict(self, network, x, t, condition):
        self.images.add(len(x))
        return super().predict(network, x, t, condition)


@pytest.mark.parametrize("change", [{}, {"extent": NOWHERE}])
def test_few_pairs_are_sampled_back_at_once_where_memory_is_short(tmp_path, monkeypatch, change):
    """One at a time, from a stored state and from an inversion, with the same bits."""
    cache, model = filled(tmp_path, replace(KEY, **change)), Counting()
    whole = sampled_back(model, cache, HOW)
    assert model.images == {4, 2}
    wanted = whole.of_images("reconstructed", range(5)), round_trip_error(model, cache, 1.0)
    shutil.rmtree(whole.folder)
    monkeypatch.setattr("inversion_dpo.run.faults.PIXELS", 2 * SIDE * SIDE)
    model.images.clear()
    parts = sampled_back(model, cache, HOW)
    assert torch.equal(parts.of_images("reconstructed", range(5)), wanted[0])
    assert round_trip_error(model, cache, 1.0) == pytest.approx(wanted[1])
    assert model.images == {2}


def test_a_single_image_in_one_shard_is_enough(tmp_path):
    source = Alone()
    source.pairs = source.pairs[:1]
    key = replace(KEY, single=True)
    cache = fill(tmp_path, Pipeline(), source, key)
    assert len(sampled_back(Pipeline(), cache, HOW).errors) == 1
    assert isinstance(round_trip_error(Pipeline(), cache, 1.0), float)


@pytest.mark.parametrize("single", [False, True])
def test_a_pair_that_is_not_finite_on_its_way_back_is_named(tmp_path, single):
    """A network in float16 may overflow; the report's every number would be none."""
    source = Alone() if single else Source()
    key = replace(KEY, single=single, extent=NOWHERE)
    cache, model = fill(tmp_path, Pipeline(), source, key), Pipeline()
    predict = model.predict

    def overflowing(network, x, t, condition):
        found = predict(network, x, t, condition)
        found[condition["prompt"].flatten() == 4, :, 0, 0] = torch.inf
        return found

    model.predict = overflowing
    side, named = ("", "pair 3") if single else (", winner", "pairs.csv, row 7")
    known = [replace(p, where="pairs.csv, row 7") for p in source.pairs[3:4] * (not single)]
    message = rf"{named}{side}: .* not finite. Set model.dtype=float32"
    with pytest.raises(ModelError, match=message):
        sampled_back(model, cache, HOW, pairs=known)


def test_two_runs_do_not_sample_the_same_pairs_back_at_once(tmp_path):
    cache = filled(tmp_path)
    busy = pytest.raises(BusyError, match="reconstruction-1-0-0 is being written already")
    with alone_at(cache.folder / "reconstruction-1-0-0"), busy:
        sampled_back(Pipeline(), cache, HOW)
    assert len(sampled_back(Pipeline(), cache, HOW).errors) == 5


def test_the_round_trip_is_that_of_the_first_shard(tmp_path):
    cache, model = filled(tmp_path), Pipeline()
    for scale in (1.0, 2.0):
        errors = []
        for k, side in ((k, side) for k in (0, 1) for side in (0, 1)):
            x_0 = x = cache.of_images("clean", [k])[side].double()
            prompt = scale * (k + 1)  # the empty one's number is 0
            for i in (1, 2, 3):
                x = step(x, prediction(x, i - 1, prompt), GRID.levels[i - 1], GRID.levels[i], KIND)
            for i in (3, 2, 1):
                x = step(x, prediction(x, i, prompt), GRID.levels[i], GRID.levels[i - 1], KIND)
            errors.append(((x - x_0).norm() / x_0.norm()).item())
        wanted = sum(errors) / 4
        assert round_trip_error(model, cache, scale) == pytest.approx(wanted, rel=1e-4)
