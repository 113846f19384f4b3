"""Files that say themselves whether they are whole."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inversion_dpo.run.disk import atomic_folder, atomic_table, is_sealed, read_table, writing

TABLE = pa.table({"caption": ["a cat", "inversion_dpo sha256:" + "0" * 64], "score": [0.5, 1.0]})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "table.parquet"
    atomic_table(TABLE, path, compression="zstd")
    return path


def test_a_table_is_plain_parquet_and_the_same_bytes_every_time(file, tmp_path):
    assert read_table(file).equals(TABLE) and pq.read_table(file).equals(TABLE)
    atomic_table(TABLE, tmp_path / "again.parquet", compression="zstd")
    assert (tmp_path / "again.parquet").read_bytes() == file.read_bytes()


def test_every_flipped_bit_is_noticed(file):
    whole = file.read_bytes()
    for place in range(len(whole)):
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << place % 8
        file.write_bytes(spoiled)
        assert read_table(file) is None, place
    for length in (0, 3, 8, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert read_table(file) is None, length
    file.write_bytes(whole)
    assert read_table(file) is not None


def test_a_file_of_others_is_not_sealed(file):
    pq.write_table(TABLE, file)
    assert not is_sealed(file) and read_table(file) is None
    assert read_table(file.with_name("none.parquet")) is None


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), writing(path) as partial:
        partial.write_text("half of the ne")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        atomic_folder(tmp_path / "b", lambda folder: [folder.mkdir(), 1 / 0])
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
