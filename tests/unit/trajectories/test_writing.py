"""A cache's files: whole or not at all, named where damaged, joined by the numbers of pairs."""

import errno
import json
import os

import pytest
import torch

from inversion_dpo.run import disk
from inversion_dpo.run.disk import DiskError, read_json, sha256_of
from inversion_dpo.run.processes import Team
from inversion_dpo.trajectories.reading import SHARD
from inversion_dpo.trajectories.writing import (
    damaged_files,
    is_cached,
    is_intact,
    is_whole,
    write_manifest,
    write_shard,
)

TENSORS = {"clean": torch.arange(6.0).reshape(2, 3)}
ENTRY = {
    "pairs": [0],
    "size": [2, 4],
    "digests": ["d"],
    "images": [["w", "l"]],
    "overlong": {"tokenizer": 1},
    "errors": [],
    "texts": [[0, 0]],
}


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / SHARD.format(0)
    write_shard(path, TENSORS, ENTRY)
    return path


@pytest.fixture
def whole(shard):
    """A finished cache of two shards."""
    names = [SHARD.format(k) for k in (0, 1)]
    write_shard(shard.with_name(names[1]), TENSORS, ENTRY | {"pairs": [1]})
    write_manifest(shard.parent, {}, names)
    return shard.parent


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class One(Team):
    """A process that is not told what the others found."""

    def collect(self, found):
        return found

    def wait(self):
        pass


# ---- one shard


def test_a_shard_is_intact_once_its_entry_lies_beside_it(shard, caplog):
    assert is_intact(shard, ["d"])
    shard.with_suffix(".json").unlink()  # as a run leaves it that is killed between the two
    assert is_intact(shard, ["d"]) is False and not caplog.messages


@pytest.mark.parametrize("text", ["", '{"digests": ["d"], "sha', '{"digests": ["d"]}'])
def test_a_broken_entry_is_none(shard, text):
    shard.with_suffix(".json").write_text(text)
    assert not is_intact(shard, ["d"])


@pytest.mark.parametrize("change", [{"pairs": [1]}, {"texts": [[0, 1]]}, {"size": [4, 4]}])
def test_an_entry_that_was_altered_is_none(shard, change, caplog):
    """Its numbers say which row is which pair: one other digit, and training would mix them up."""
    file = shard.with_suffix(".json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert not is_intact(shard, ["d"])
    assert f"{shard} is damaged or of other pairs: making it again" in caplog.text


def test_an_altered_manifest_is_named_and_the_cache_made_again(whole, caplog):
    file = whole / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"places": [[1, 0], [0, 0]]}))
    assert is_whole(whole, Team()) is False
    assert "manifest.json is damaged (its checksum differs)" in caplog.text


def test_an_entry_without_its_shard_is_none(shard):
    shard.unlink()
    assert not is_intact(shard, ["d"])


def test_a_shard_of_other_pairs_is_named(shard, caplog):
    assert not is_intact(shard, ["other"])
    assert [m.partition(" is ")[0] for m in caplog.messages] == [str(shard)]


def test_a_shard_with_another_bit_is_named(shard, caplog):
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert not is_intact(shard, ["d"])
    assert f"{shard} is damaged or of other pairs: making it again" in caplog.text


def refuse(monkeypatch, *, after):
    """A disk that is full once so many files have been written."""
    replace, written = os.replace, []

    def full(partial, path):
        written.append(path)
        if len(written) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(partial, path)

    monkeypatch.setattr(disk.os, "replace", full)


@pytest.mark.parametrize(
    ("after", "refused", "left"),
    [(0, ".safetensors", []), (1, ".json", ["shard-00000.safetensors"])],
)
def test_a_full_disk_is_said_and_the_shard_is_none(tmp_path, monkeypatch, after, refused, left):
    path = tmp_path / SHARD.format(0)
    refuse(monkeypatch, after=after)
    with pytest.raises(DiskError, match=f"cannot write .*shard-00000{refused}: No space left"):
        write_shard(path, TENSORS, ENTRY)
    assert names(tmp_path) == left and not is_intact(path, ["d"])
    monkeypatch.undo()  # there is room again
    write_shard(path, TENSORS, ENTRY)
    assert is_intact(path, ["d"])


def test_what_a_kill_left_half_written_is_written_over(shard):
    wanted = shard.read_bytes()
    shard.unlink()
    for suffix in (".safetensors", ".json"):
        shard.with_name(f"shard-00000{suffix}.partial").write_bytes(b"half")
    write_shard(shard, TENSORS, ENTRY)
    assert shard.read_bytes() == wanted
    assert names(shard.parent) == ["shard-00000.json", "shard-00000.safetensors"]


# ---- the manifest


def test_a_manifest_has_all_pairs_in_the_order_of_their_numbers(tmp_path):
    """Three pairs in two shards: number 1 is alone in the second one."""
    paths = [tmp_path / SHARD.format(k) for k in (0, 1)]
    first = {
        "pairs": [2, 0],
        "size": [8, 16],
        "digests": ["d2", "d0"],
        "images": [["w2", "l2"], ["w0", "l0"]],
        "overlong": {"one": 1, "two": 2},
        "errors": [0.2, 0.0],
        "texts": [[0, 0], [0, 1]],
    }
    second = {
        "pairs": [1],
        "size": [16, 8],
        "digests": ["d1"],
        "images": [["w1", "l1"]],
        "overlong": {"two": 3},
        "errors": [0.1],
        "texts": [[0, 1]],
    }
    for path, entry in zip(paths, (first, second), strict=True):
        write_shard(path, TENSORS, entry)
    write_manifest(tmp_path, {"counts": {"rows": 4}}, [path.name for path in paths])
    assert read_json(tmp_path / "manifest.json") == {
        "counts": {"rows": 4},
        "pairs": 3,
        "overlong": {"one": 1, "two": 5},
        "digests": ["d0", "d1", "d2"],
        "images": [["w0", "l0"], ["w1", "l1"], ["w2", "l2"]],
        "errors": [0.0, 0.1, 0.2],
        "texts": [[0, 1], [0, 1], [0, 0]],
        "places": [[0, 1], [1, 0], [0, 0]],
        "sizes": [[8, 16], [16, 8]],
        "shards": {path.name: sha256_of(path) for path in paths},
    }


def test_pairs_that_were_not_sampled_back_have_no_errors_and_reports_no_images(shard):
    entry = {k: v for k, v in ENTRY.items() if k != "images"}
    write_shard(shard, TENSORS, entry)
    write_manifest(shard.parent, {}, [shard.name])
    manifest = json.loads((shard.parent / "manifest.json").read_text())
    assert manifest["errors"] == manifest["images"] == [] and manifest["pairs"] == 1


def test_the_empty_prompt_is_one_of_the_files(shard):
    empty = shard.with_name("empty.safetensors")
    empty.write_bytes(b"of no prompt")
    write_manifest(shard.parent, {}, [shard.name])
    empty.write_bytes(b"of another one")
    assert damaged_files(shard.parent, Team()) == [empty]


def test_without_room_for_the_manifest_the_cache_is_not_finished(shard, monkeypatch):
    refuse(monkeypatch, after=0)
    with pytest.raises(DiskError, match=r"manifest\.json: No space left"):
        write_manifest(shard.parent, {}, [shard.name])
    assert not is_whole(shard.parent, Team()) and is_intact(shard, ["d"])


# ---- a whole cache


def test_a_cache_without_a_manifest_is_not_whole_and_keeps_its_files(shard):
    before = names(shard.parent)
    assert not is_whole(shard.parent, Team())
    assert names(shard.parent) == before


def test_a_whole_cache_is_left_as_it_is(whole, caplog):
    before = names(whole)
    assert is_whole(whole, Team()) and is_whole(whole, Team())
    assert names(whole) == before and not caplog.messages


def test_damaged_files_are_named_and_deleted_with_the_manifest(whole, caplog):
    missing, cut = (whole / SHARD.format(k) for k in (0, 1))
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    assert damaged_files(whole, Team()) == [missing, cut]
    assert not is_whole(whole, Team())
    assert names(whole) == ["shard-00000.json", "shard-00001.json"]
    assert [m.partition(" is missing")[0] for m in caplog.messages] == [str(missing), str(cut)]


def test_only_the_first_process_deletes(whole, caplog):
    (whole / SHARD.format(1)).unlink()
    before = names(whole)
    assert not is_whole(whole, One(1, 2))  # whose share that is
    assert names(whole) == before and not caplog.messages


def test_each_file_is_read_by_one_process(whole):
    for path in whole.glob("*.safetensors"):
        path.write_bytes(b"")
    shares = [damaged_files(whole, One(rank, 2)) for rank in (0, 1)]
    assert shares == [[whole / SHARD.format(0)], [whole / SHARD.format(1)]]


def test_all_processes_have_what_any_found_in_one_order(whole):
    class Others(One):
        def collect(self, found):
            return ["/z", *found, "/a"]

    assert [str(path) for path in damaged_files(whole, Others(0, 2))] == ["/a", "/z"]


def test_processes_wait_until_damaged_files_are_gone(whole):
    left = []

    class Waiting(One):
        def wait(self):
            left.append(names(whole))

    (whole / SHARD.format(0)).write_bytes(b"")
    is_whole(whole, Waiting(0, 2))
    assert left == [["shard-00000.json", "shard-00001.json", "shard-00001.safetensors"]]


def test_a_damaged_manifest_is_named_and_the_cache_made_again(whole, caplog):
    file = whole / "manifest.json"
    file.write_text(file.read_text()[:-9])
    assert is_whole(whole, Team()) is False
    assert "manifest.json is damaged" in caplog.text and "It is made again" in caplog.text


def test_pairs_are_cached_once_a_cache_of_them_is_finished(tmp_path):
    """Of any model; a key that is cut short is of no pairs."""
    assert not is_cached(tmp_path, "mine")
    for name, key in (("a", '{"pairs": "mine", '), ("b", '{"pairs": "other"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key.json").write_text(key)
        (tmp_path / name / "manifest.json").write_text("{}")
    assert is_cached(tmp_path, "mine") is False and is_cached(tmp_path, "other") is True
    (tmp_path / "a" / "key.json").write_text('{"pairs": "mine", "model": "any"}')
    (tmp_path / "a" / "manifest.json").unlink()
    assert not is_cached(tmp_path, "mine")  # which is still to be finished
    (tmp_path / "a" / "manifest.json").write_text("{}")
    assert is_cached(tmp_path, "mine")
