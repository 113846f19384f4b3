"""Files written whole or not at all, and tables that show damage."""

import errno
import os
import shutil
import sqlite3

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inversion_dpo.run import disk, folder
from inversion_dpo.run.config import ConfigError, load_config, to_yaml
from inversion_dpo.run.disk import (
    DiskError,
    atomic_folder,
    atomic_json,
    atomic_table,
    atomic_tables,
    read_json,
    read_table,
    refusal,
    writing,
)


def test_a_full_disk_under_a_database_is_understood():
    assert refusal(sqlite3.OperationalError("database or disk is full")) is not None
    assert refusal(sqlite3.OperationalError("no such table: votes")) is None


TABLE = pa.table({"caption": ["a cat", "a dog", None] * 9, "score": [0.5, 1.0, 2.0] * 9})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "table.parquet"
    atomic_table(TABLE, path, compression="zstd")
    return path


def test_a_table_is_plain_parquet_and_the_same_bytes_every_time(file, tmp_path):
    assert read_table(file).equals(TABLE) and pq.read_table(file).equals(TABLE)
    atomic_table(TABLE, tmp_path / "again.parquet", compression="zstd")
    assert (tmp_path / "again.parquet").read_bytes() == file.read_bytes()


def altered(file):
    """Places where a flipped bit, one in every byte, changes what is read."""
    whole = file.read_bytes()
    for place in range(len(whole)):
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << place % 8
        file.write_bytes(spoiled)
        table = read_table(file)
        if not (table is None or (table.equals(TABLE) and table.schema.equals(TABLE.schema))):
            yield place
    file.write_bytes(whole)


def test_no_flipped_bit_changes_what_is_read(file, monkeypatch):
    assert list(altered(file)) == []
    monkeypatch.setattr(disk, "_content", lambda rows, schema: "")
    atomic_table(TABLE, file)
    assert any(altered(file))  # the page checksums alone do not cover names, types and rows


def test_a_flipped_bit_of_an_image_is_noticed(file):
    atomic_table(pa.table({"image": [bytes(5000)]}), file, compression="none")
    spoiled = bytearray(file.read_bytes())
    spoiled[2500] ^= 1
    file.write_bytes(spoiled)
    assert pq.read_table(file) and read_table(file) is None


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_a_table_cut_short_is_noticed(file, share):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    assert read_table(file) is None


def test_a_file_of_others_is_not_taken_for_checked(file):
    pq.write_table(TABLE, file)
    assert read_table(file) is None
    assert read_table(file.with_name("none.parquet")) is None


def test_tables_below_one_another_are_one(file):
    atomic_tables(iter([TABLE, TABLE]), TABLE.schema, file)
    assert read_table(file).equals(pa.concat_tables([TABLE, TABLE]))


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), writing(path) as partial:
        partial.write_text("half of the ne")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        atomic_folder(tmp_path / "b", lambda folder: [folder.mkdir(), 1 / 0])
    with pytest.raises(DiskError, match="a.txt is a file, and a folder goes there"):
        atomic_folder(path, lambda folder: folder.mkdir())
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "old"


def test_a_shared_file_is_written_under_a_name_of_the_process(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    with writing(path, shared=True) as first:
        monkeypatch.setattr("os.getpid", lambda: 123456)
        with writing(path, shared=True) as second:
            second.write_text("second")
            first.write_text("first")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_file_of_ours_that_is_damaged_is_named(tmp_path, caplog):
    """Times are no reason to stop a run, and a row that a kill tore is left out alone."""
    (tmp_path / "seconds.json").write_text('{"train": 1')
    with pytest.raises(DiskError, match="seconds.json is damaged .*: delete it and run"):
        read_json(tmp_path / "seconds.json")
    assert folder.read_seconds(tmp_path) == {} and "Earlier times are lost" in caplog.text
    (tmp_path / "rows").write_text('{"step": 0}\n{"st\n{"step": 1}\n')
    assert folder.read_rows(tmp_path / "rows") == [{"step": 0}, {"step": 1}]


def test_a_disk_that_is_full_in_the_middle_of_a_folder_is_said(tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "weights").write_bytes(b"w")

    def full(source, target, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    def fill(partial):
        shutil.copytree(tmp_path / "made", partial, copy_function=full)

    with pytest.raises(DiskError, match="cannot write .*export: No space left on device"):
        atomic_folder(tmp_path / "export", fill)


def test_json_says_when_it_was_altered(tmp_path):
    found = {"a": [1, 2.5], "b": {"c": None}, "d": float("inf")}
    atomic_json(found, tmp_path / "a.json")
    assert read_json(tmp_path / "a.json") == found
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text.replace("2.5", "2.6"))
    with pytest.raises(DiskError, match=r"a.json is damaged \(its checksum differs\): delete it"):
        read_json(tmp_path / "a.json")


def test_damage_of_other_kinds_is_named_or_counted(tmp_path, caplog):
    for text in ("[1]", '{"train": "x"}', '{"train": null}'):
        (tmp_path / "seconds.json").write_text(text)
        caplog.clear()
        assert folder.read_seconds(tmp_path) == {} and "Earlier times are lost" in caplog.text
        assert caplog.text.count("seconds.json") == 1
    with pytest.raises(DiskError, match=r"seconds.json is damaged \(it holds a dict\)"):
        read_json(tmp_path / "seconds.json", list)
    rows = tmp_path / "rows"
    rows.write_bytes(b'{"step": 0}\n\xff\xfe\n3\nnull\n{"loss": 1}\n{"step": 1}\n')
    caplog.clear()
    assert folder.read_rows(rows) == [{"step": 0}, {"step": 1}]
    assert "rows: 4 damaged lines left out, the first is line 2" in caplog.text
    rows.write_text('{"step": 0}\n{"st')
    caplog.clear()
    assert folder.read_rows(rows) == [{"step": 0}] and not caplog.text  # what a kill leaves


def test_settings_of_a_run_that_are_cut_short_are_not_read_as_defaults(tmp_path):
    file = tmp_path / "config.yaml"
    whole = to_yaml(load_config("taste", []))
    file.write_text(whole)
    assert folder.read_config(tmp_path) == load_config("taste", [])
    file.write_text(whole[: whole.index("training:")])
    load_config(str(file), [])  # as YAML it is whole
    with pytest.raises(ConfigError, match="config.yaml has no .*evaluation.*: it is damaged"):
        folder.read_config(tmp_path)
