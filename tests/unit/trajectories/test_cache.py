"""Random access to a cache that was written by hand, so that every number is known."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from inversion_dpo.maths.schedule import prediction_between
from inversion_dpo.run.disk import DiskError
from inversion_dpo.trajectories import cache as cache_module
from tests.by_hand import GRID, clean, reference, state, write_cache


@pytest.fixture
def cache(tmp_path):
    return write_cache(tmp_path / "cache")


@pytest.fixture
def threaded(monkeypatch):
    monkeypatch.setattr(cache_module, "SMALL", 0)


def test_images_are_winners_then_losers_of_any_shard(cache):
    found = cache.of_images("clean", [3, 0, 4])
    wanted = [clean(p, side) for side in (0, 1) for p in (3, 0, 4)]
    assert torch.equal(found, torch.stack(wanted))


def test_each_pair_is_looked_at_where_it_is_asked(cache):
    found = cache.states([1, 2], [0, 2], "x0").x_t
    wanted = [state(p, side, i) for side in (0, 1) for p, i in ((1, 1), (2, 3))]
    assert torch.equal(found, torch.stack(wanted))


def test_the_error_of_a_v_network_is_scaled_to_that_of_eps(cache):
    # alpha = 0.96, 0.8, 0.6 at the three levels: an error of v counts alpha^2
    states = cache.states([0, 1, 2], [0, 1, 2], "x0")
    assert states.scale.tolist() == pytest.approx([0.9216, 0.64, 0.36] * 2)
    assert states.scale.dtype == torch.float32


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_errors_of_other_networks_count_as_they_are(tmp_path, kind):
    cache = write_cache(tmp_path / kind, kind=kind)
    assert cache.states([0, 1], [0, 2], "x0").scale.tolist() == [1] * 4


def test_states_are_at_the_level_after_their_position(cache):
    states = cache.states([3, 1], [0, 2], "reference")
    assert states.level.tolist() == [1, 3, 1, 3]
    assert states.timesteps.tolist() == [10, 30, 10, 30]
    images = [(3, 0, 1), (1, 0, 3), (3, 1, 1), (1, 1, 3)]
    assert torch.equal(states.x_t, torch.stack([state(*i) for i in images]))
    wanted = torch.stack([reference(*i) for i in images])
    assert torch.equal(states.reference, wanted) and torch.equal(states.target, wanted)
    assert states.evaluations == 0


@pytest.mark.parametrize("target", ["x0", "transition"])
def test_targets_lead_to_the_clean_image_or_one_state_down(cache, target):
    """At position 0 the state below is the clean image; below others it is the stored one."""
    states = cache.states([3, 1], [0, 2], target)
    for row, (p, side, i) in enumerate([(3, 0, 1), (1, 0, 3), (3, 1, 1), (1, 1, 3)]):
        below = i - 1 if target == "transition" else 0
        end = state(p, side, below) if below else clean(p, side)
        levels, here = GRID.levels, state(p, side, i)
        wanted = prediction_between(end, levels[below], here, levels[i], "v_prediction")
        torch.testing.assert_close(states.target[row], wanted)


def test_kept_states_have_the_levels_that_are_stored(tmp_path):
    cache = write_cache(tmp_path / "kept", steps=[[3], [1], [2], [3], [1]])
    states = cache.states([0, 1, 2], [0, 0, 0], "x0")
    assert states.level.tolist() == [3, 1, 2] * 2
    assert torch.equal(states.x_t[2], state(2, 0, 2))
    assert cache.positions(2, 3) == (0, 0)


def test_positions_count_from_the_first_state_with_noise(cache):
    assert cache.positions(1, 3) == (0, 2) and cache.positions(2, 2) == (1, 1)


def test_two_kept_states_are_two_positions(tmp_path):
    """The second is made again from the first."""
    cache = write_cache(tmp_path / "two", steps=[[1, 2]] * 4 + [[2, 3]])
    assert cache.positions(1, 3) == (0, 1)
    states = cache.states([2, 4, 0], [0, 1, 1], "x0")
    assert states.level.tolist() == [1, 3, 2] * 2
    images = [(2, 0, 1), (4, 0, 3), (0, 0, 2), (2, 1, 1), (4, 1, 3), (0, 1, 2)]
    assert torch.equal(states.x_t, torch.stack([state(*i) for i in images]))
    assert torch.equal(states.reference, torch.stack([reference(*i) for i in images]))


def test_a_prompt_is_both_images_and_a_frame_is_its_own(cache):
    condition = cache.condition([4, 1])
    assert set(condition) == {"prompt", "graph_rows", "size"}
    assert condition["prompt"].flatten().tolist() == [5, 2, 5, 2]
    assert condition["size"].flatten().tolist() == [40, 10, 41, 11]
    assert cache.empty["prompt"].tolist() == [[-7]]


def test_the_first_shard_knows_what_a_cache_has(cache, threaded):
    for k in (1, 2):
        (cache.folder / f"shard-{k:05d}.safetensors").unlink()
    assert cache.condition([1])["prompt"].flatten().tolist() == [2, 2]
    assert cache.region([1]) is None
    cache.read_ahead([0], [0])
    assert torch.equal(cache.states([0], [0], "x0").x_t[0], state(0, 0, 1))


def test_preferences_are_of_pairs(cache):
    assert cache.preference([4, 0, 1]).tolist() == pytest.approx([0.6, 1.0, 0.9])


def test_label_noise_exchanges_images_and_leaves_the_rest(cache):
    cache.swap([0, 2, 4], 1.0, 0)
    found = cache.of_images("clean", [2, 1])
    wanted = [clean(2, 1), clean(1, 0), clean(2, 0), clean(1, 1)]
    assert torch.equal(found, torch.stack(wanted))
    at = cache.states([2, 1], [0, 2], "x0")
    images = [(2, 1, 1), (1, 0, 3), (2, 0, 1), (1, 1, 3)]
    assert torch.equal(at.x_t, torch.stack([state(*i) for i in images]))
    assert torch.equal(at.reference, torch.stack([reference(*i) for i in images]))
    assert cache.condition([2, 1])["size"].flatten().tolist() == [21, 10, 20, 11]
    assert cache.condition([2, 1])["prompt"].flatten().tolist() == [3, 2, 3, 2]
    cache.swap([0, 2, 4], 0.0, 0)
    assert torch.equal(cache.of_images("clean", [2])[0], clean(2, 0))


def test_label_noise_is_a_seeded_share(cache):
    numbers = range(10_000)
    cache.swap(numbers, 0.3, 1)
    first = cache._swapped
    assert len(first) / 10_000 == pytest.approx(0.3, abs=0.02)
    cache.swap(numbers, 0.3, 1)
    assert cache._swapped == first
    cache.swap(numbers, 0.3, 2)
    assert cache._swapped != first


def test_a_share_of_nothing_turns_no_label_whatever_is_drawn(cache, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.zeros(count))
    cache.swap([0, 1, 2], 0.0, 0)
    assert not cache._swapped


@pytest.mark.parametrize(("swapped", "wanted"), [([], [0, 0, 1, 1]), ([0, 3], [1, 0, 1, 0])])
def test_an_image_is_liked_above_one_half_and_label_noise_turns_it(
    cache, monkeypatch, swapped, wanted
):
    chances = torch.tensor([0.0, 0.5, 0.6, 1.0])
    monkeypatch.setattr(cache, "preference", lambda pairs: chances[list(pairs)])
    cache.swap(swapped, 1.0, 0)
    assert cache.liked([0, 1, 2, 3]).tolist() == [bool(w) for w in wanted]


def test_the_region_of_a_pair_is_there_if_it_was_stored(cache):
    assert cache.region([0]) is None
    for number in range(3):
        path = cache.folder / f"shard-{number:05d}.safetensors"
        tensors = load_file(path)
        rows = len(tensors["preference"])
        region = 10.0 * number + torch.arange(rows).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
        save_file(tensors | {"region": region.contiguous()}, path)
    again = cache_module.TrajectoryCache(cache.folder, lambda size: GRID, "v_prediction")
    assert again.region([3, 4])[:, 0, 0, 0].tolist() == [11, 20]


def test_a_pair_has_the_size_of_its_shard(cache):
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    sizes = [[8, 16], [16, 16], [24, 8]]
    (cache.folder / "manifest.json").write_text(json.dumps(manifest | {"sizes": sizes}))
    grids = []
    again = cache_module.TrajectoryCache(cache.folder, lambda size: grids.append(size), "epsilon")
    assert [again.size(pair) for pair in range(5)] == [(8, 16)] * 2 + [(16, 16)] * 2 + [(24, 8)]
    assert grids == [(8, 16)]


def test_what_the_manifest_says(cache):
    assert cache.pairs == 5 and cache.counts["ties"] == 2 and cache.inverted
    assert cache.reference == "0123456789abcdef"
    assert cache.errors == [0.1, 0.5, 0.2, 0.4, 0.3] and cache.digests[3] == "3" * 64
    assert cache.overlong == {"tokenizer": 0}


@pytest.mark.parametrize("last", [0, 1])
def test_a_cache_of_encoded_pairs_has_no_trajectories(tmp_path, last):
    write_cache(tmp_path / "cache")
    path = tmp_path / "cache" / "manifest.json"
    path.write_text(path.read_text().replace('"last": 3', f'"last": {last}'))
    again = cache_module.TrajectoryCache(tmp_path / "cache", lambda size: GRID, "epsilon")
    assert again.inverted == (last > 0)


def test_a_small_batch_is_read_when_it_is_needed(cache, monkeypatch):
    """But the system is told of its rows."""
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(cache._shards, "announce", told.append)
        cache.read_ahead([3, 0], [1, 1])  # some hundred bytes
    assert not cache._ahead and told == [cache._of_batch([3, 0], [1, 1])]
    one = cache._shards.size(cache._of_batch([3], [1]))
    rows = cache._shards.read(cache._of_batch([3], [1]))
    assert one == sum(place.size for place in rows.places.values())
    monkeypatch.setattr(cache_module, "SMALL", 2 * one)
    for pairs in ([3], [3, 0]):
        cache.read_ahead(pairs, [1] * len(pairs))
    assert list(cache._ahead) == [(3, 0)]
    monkeypatch.setattr(cache_module, "SMALL", 2 * one + 1)
    cache.read_ahead([0, 3], [1, 1])  # twice the size of one
    assert list(cache._ahead) == [(3, 0)]
    assert torch.equal(cache.of_images("clean", [3])[0], clean(3, 0))


def test_a_batch_that_was_read_ahead_is_the_same(cache, threaded, monkeypatch):
    pairs, positions = [3, 0, 4], [0, 2, 1]
    alone = cache.states(pairs, positions, "transition"), cache.condition(pairs)
    clean_alone = cache.of_images("clean", pairs)
    cache.read_ahead([1], None)
    cache.read_ahead(pairs, positions)
    cache.read_ahead([2, 2], [0, 1])  # the one after; the first is forgotten
    assert len(cache._ahead) == 2
    refuse = lambda *_: pytest.fail("read again")  # noqa: E731
    cache._ahead[(3, 0, 4)][1].result(), cache._ahead[(2, 2)][1].result()
    monkeypatch.setattr(cache, "_read", refuse)
    ahead = cache.states(pairs, positions, "transition"), cache.condition(pairs)
    assert torch.equal(cache.of_images("clean", pairs), clean_alone)
    assert all(torch.equal(alone[1][k], ahead[1][k]) for k in alone[1])
    for name in ("level", "x_t", "timesteps", "scale", "target", "reference"):
        assert torch.equal(getattr(alone[0], name), getattr(ahead[0], name)), name
    monkeypatch.undo()
    other = cache.states(pairs, [1, 1, 1], "x0")  # not what was read ahead
    assert other.level.tolist() == [2] * 6


def test_label_noise_turns_what_was_read_ahead_too(cache, threaded):
    cache.read_ahead([2, 1], [0, 2])
    cache.swap([0, 2, 4], 1.0, 0)
    images = [(2, 1), (1, 0), (2, 0), (1, 1)]
    assert torch.equal(cache.of_images("clean", [2, 1]), torch.stack([clean(*i) for i in images]))


def test_what_fails_ahead_fails_where_it_is_needed(cache, threaded):
    path = cache.folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    cache.read_ahead([0], [0])
    cache.read_ahead([3], [2])
    assert cache.states([0], [0], "x0").level.tolist() == [1, 1]
    with pytest.raises(DiskError, match="shard-00001.safetensors ends too early"):
        cache.states([3], [2], "x0")


def test_a_state_without_a_prediction_is_refused(cache):
    with pytest.raises(ValueError, match="no prediction of state 4"):
        cache.states([0], [3], "x0")
