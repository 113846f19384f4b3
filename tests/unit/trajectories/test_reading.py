"""Rows of shards, by their place: of several files, types and lengths at once."""

import os

import pytest
import torch
from safetensors.torch import save_file

from inversion_dpo.run.disk import DiskError
from inversion_dpo.trajectories import reading
from inversion_dpo.trajectories.reading import Rows, Shards, climb
from tests.by_hand import clean, write_cache

CPU = torch.device("cpu")


def write(folder, *shards):
    """Open shards of these tensors."""
    for number, tensors in enumerate(shards):
        save_file(tensors, folder / f"shard-{number:05d}.safetensors")
    return Shards(folder)


def test_no_more_shards_are_open_than_allowed(tmp_path, monkeypatch):
    cache = write_cache(tmp_path / "cache")
    monkeypatch.setattr(reading, "OPEN", 2)
    whole = cache.of_images("clean", [0, 2, 4, 0])
    assert len(cache._shards._files) == 2
    assert torch.equal(whole[0], clean(0, 0)) and torch.equal(whole[2], clean(4, 0))


def test_rows_of_several_types_and_lengths_come_together(tmp_path):
    one = torch.arange(12.0).reshape(2, 3, 2)
    two, half = torch.ones(1, 5, 2), torch.tensor([[[0.5, -2.0]]])
    shards = write(tmp_path, *({"text": t} for t in (one, two, half.bfloat16())))
    wanted = [Rows("text", *place) for place in ((2, 0, [1]), (0, 0, [3, 0]), (1, 0, [2]))]
    found = shards.read(wanted).on(CPU)["text"]
    assert found.shape == (4, 5, 2) and found.dtype == torch.float32
    assert torch.equal(found[3, :3], one[0]) and torch.equal(found[0, :3], one[1])
    assert torch.equal(found[2:3], two) and torch.equal(found[1, :1], half[0])
    assert not found[[0, 3], 3:].any() and not found[1, 1:].any()
    alone = shards.read([Rows("text", 2, 0, [0])]).on(CPU)["text"]
    assert alone.dtype == torch.bfloat16 and torch.equal(alone, half.bfloat16())


def test_rows_lie_where_they_are_asked_for(tmp_path):
    shards = write(tmp_path, {"a": torch.arange(5), "b": 10 + torch.arange(10.0).reshape(5, 2)})
    wanted = [Rows("a", 0, 1, [2, 0]), Rows("b", 0, 3, [0, 1]), Rows("a", 0, 4, [1])]
    found = shards.read(wanted).on(CPU)
    assert found["a"].tolist() == [2, 4, 1]
    assert found["b"].tolist() == [[16, 17], [18, 19]]
    assert shards.size(wanted) == 3 * 8 + 2 * 8


def test_numbers_of_fewer_bits_become_those_of_the_others(tmp_path):
    """Two of three rows in bfloat16, shorter than the one beside them in float32."""
    one, two = torch.tensor([[9.0], [1.5], [3.0]]), torch.tensor([[1.25, 7.0, 0.5]])
    shards = write(tmp_path, {"x": one.bfloat16()}, {"x": two})
    found = shards.read([Rows("x", 0, 1, [2, 0]), Rows("x", 1, 0, [1])]).on(CPU)["x"]
    assert found.dtype == torch.float32
    assert found.tolist() == [[3, 0, 0], [1.25, 7, 0.5], [1.5, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_rows_end_in_zeros_whatever_the_memory_held(tmp_path, monkeypatch, dtype):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **more: empty(*size, **more).fill_(77))
    shards = write(tmp_path, {"x": torch.ones(1, 1)}, {"x": torch.ones(1, 3, dtype=dtype)})
    found = shards.read([Rows("x", 0, 0, [1]), Rows("x", 1, 0, [0])]).on(CPU)["x"]
    assert found.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_every_tensor_begins_where_any_type_can_be_read(tmp_path):
    shards = write(tmp_path, {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(3, 33)})
    block = shards.read(
        [Rows("a", 0, 0, [0, 1, 2]), Rows("b", 0, 0, [0]), Rows("c", 0, 0, [0])][:2]
    )
    assert {name: place.begin for name, place in block.places.items()} == {"a": 0, "b": 64}
    assert len(block.memory) == 64 + 3 * 64  # 132 bytes, filled up
    block = shards.read([Rows("b", 0, 0, [1, 0]), Rows("a", 0, 2, [0])])
    assert block.places["a"].begin == 5 * 64  # 264 bytes


def test_a_block_is_copied_once_to_a_device(tmp_path):
    block = write(tmp_path, {"a": torch.arange(4)}).read([Rows("a", 0, 0, [0])])
    meta = torch.device("meta")
    assert block.on(meta)["a"].device == meta
    copy = block._copies[meta]
    block.on(meta)
    assert block._copies[meta] is copy


def test_more_rows_than_one_call_of_the_system_takes(tmp_path):
    """Linux takes 1,024 buffers; each of these rows goes to a place of its own."""
    count = 3000
    shards = write(tmp_path, {"a": torch.arange(count)})
    to = [(7 * k) % count for k in range(count)]
    found = shards.read([Rows("a", 0, 0, to)]).on(CPU)["a"]
    assert torch.equal(found[to], torch.arange(count))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_the_system_is_told_of_all_rows_before_the_first_is_read(tmp_path, monkeypatch):
    shards = write(tmp_path, {"a": torch.arange(50.0).reshape(5, 10)}, {"b": torch.arange(6)})
    calls = []
    advise, real = os.posix_fadvise, os.preadv
    monkeypatch.setattr(
        reading.os, "posix_fadvise", lambda f, *what: (calls.append(what), advise(f, *what))
    )
    monkeypatch.setattr(
        reading.os, "preadv", lambda f, *what: (calls.append("read"), real(f, *what))[1]
    )
    a, b = shards.places(0)["a"].begin, shards.places(1)["b"].begin
    shards.read([Rows("a", 0, 1, [0, 2]), Rows("b", 1, 5, [0]), Rows("a", 0, 4, [1])])
    told = [(a + 40, 80), (b + 40, 8), (a + 160, 40)]
    assert calls == [(*t, os.POSIX_FADV_WILLNEED) for t in told] + ["read"] * 3


def test_rows_are_read_where_the_system_takes_no_advice(tmp_path, monkeypatch):
    """As on macOS, or on a file system that refuses."""
    shards, wanted = write(tmp_path, {"a": torch.arange(5)}), [Rows("a", 0, 2, [1, 0])]

    def refuse(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(reading.os, "posix_fadvise", refuse, raising=False)
    assert shards.read(wanted).on(CPU)["a"].tolist() == [3, 2]
    monkeypatch.delattr(reading.os, "posix_fadvise")
    assert shards.read(wanted).on(CPU)["a"].tolist() == [3, 2]


@pytest.mark.parametrize("most", [1, 3, 8, 11])
def test_a_disk_that_gives_few_bytes_at_a_time(tmp_path, monkeypatch, most):
    shards = write(tmp_path, {"a": torch.arange(9)})
    real = os.preadv

    def short(descriptor, buffers, offset):
        """At most so many bytes, into one buffer or two."""
        wanted = buffers[:2]
        first = wanted[0][:most]
        more = wanted[1][: most - len(first)] if wanted[1:] and len(first) < most else None
        return real(descriptor, [first] if more is None else [first, more], offset)

    monkeypatch.setattr(reading.os, "preadv", short)
    found = shards.read([Rows("a", 0, 2, [3, 1, 0, 2])]).on(CPU)["a"]
    assert found.tolist() == [4, 3, 5, 2]


def test_a_file_that_ends_early_is_named(tmp_path):
    shards = write(tmp_path, {"a": torch.arange(9)})
    path = tmp_path / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert shards.read([Rows("a", 0, 6, [0])]).on(CPU)["a"].tolist() == [6]
    with pytest.raises(DiskError, match="shard-00000.safetensors ends too early: run the same"):
        shards.read([Rows("a", 0, 7, [0])])


def test_pairs_climb_those_with_the_longest_way_first():
    """Three take a first transition, two a second and two a third; pairs 1 and 3 the most."""
    assert climb([1, 3, 0, 3]) == ([1, 3, 0, 2], [0, 3, 5, 7])
    assert climb([0, 0]) == ([0, 1], [0]) and climb([]) == ([], [0])
