"""WebDataset tar shards: consecutive members KEY.FIELD are one sample.

Read by the standard library's ``tarfile`` in streaming mode: a shard is a tar, plain or packed,
members are read one after another into memory, and none is ever extracted. The builder of
``datasets`` takes the first samples' members for the columns of all and cannot say which member is
at fault.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from inversion_dpo.data.images import DataError
from inversion_dpo.data.rows import MAX_IMAGE_BYTES, PICTURES, Fault, Raw, is_hidden, shown
from inversion_dpo.data.tables import Placed, parse_object, records, text_of

_PACKED: dict[bytes, Callable[[Any], Any]] = {  # by a file's first bytes
    b"\x1f\x8b": gzip.open,
    b"BZ": bz2.open,
    b"\xfd7": lzma.open,
}


def read_shard(file: Path, columns: Mapping[str, str]) -> Iterator[Raw]:
    """Read the samples of a tar shard.

    Of a sample's members ``KEY.FIELD.jpg`` (or another of IMAGES) is an image, ``KEY.FIELD.txt`` a
    text, ``KEY.txt`` the caption, and the entries of ``KEY.json`` are fields of their own.
    """
    return records(file, _samples(file), columns)


def _samples(file: Path) -> Iterator[Placed]:
    done, hidden, before = 0, 0, dict[tuple[str, str], set[str]]()
    key: tuple[str, str] | None = None
    sample: list[tuple[str, bytes | Fault]] = []
    try:
        with file.open("rb") as raw:
            start = raw.read(2)
            raw.seek(0)
            unpack = _PACKED.get(start, lambda stream: stream)
            stream: IO[bytes] = unpack(raw)
            for member, content in _members(stream):
                folder, _, name = member.rpartition("/")
                stem, _, field = name.partition(".")
                if any(map(is_hidden, member.split("/"))):
                    hidden += 1
                    continue
                if key and key != (folder, stem):
                    _check_apart(file, key, sample, before)
                    yield f"{_named(key)} of ", _fields(sample)
                    done, sample = done + 1, []
                key = (folder, stem)
                sample.append((field.lower(), content))
        if start not in _PACKED:
            _check_end(file)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        what = f"is damaged in row {done}" if key else "cannot be read as a tar, plain or packed"
        raise DataError(f"{file} {what} ({error}); copy or download it again") from error
    if key:
        _check_apart(file, key, sample, before)
        yield f"{_named(key)} of ", _fields(sample)
    yield from [("", Fault("hidden", "not of the data"))] * hidden


def _check_apart(
    file: Path,
    key: tuple[str, str],
    sample: list[tuple[str, bytes | Fault]],
    before: dict[tuple[str, str], set[str]],
) -> None:
    """Raise DataError if this is a further part of an earlier sample, not one of the same name.

    ``before`` collects the fields of each.
    """
    fields = {field for field, _ in sample}
    if before.setdefault(key, fields).isdisjoint(fields):
        raise DataError(
            f"{file}: the members of {_named(key)} stand apart; write those of a sample in a "
            "row: sort the tar by name"
        )


def _named(key: tuple[str, str]) -> str:
    """Name a sample as its members are, which a shard is searched for."""
    return f"sample {shown('/'.join(filter(None, key)))}"


def _members(stream: IO[bytes]) -> Iterator[tuple[str, bytes | Fault]]:
    """Name and content of what is no folder; then to the end, which shows a cut .gz."""
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            if not member.isdir():
                yield member.name.removeprefix("./"), _content(tar, member)
    while stream.read(2**20):
        pass


def _fields(members: list[tuple[str, bytes | Fault]]) -> dict[str, Any] | Fault:
    """Give the fields of one sample; a member of an unknown name is one nobody asks for."""
    fields: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    seen: set[str] = set()
    for field, content in members:
        name, dot, suffix = field.rpartition(".")
        key = name if dot + suffix in PICTURES else field
        if key in seen:
            text = f"{key} is there twice under one key; give every sample a key of its own"
            return Fault("bad_rows", text)
        seen.add(key)
        if isinstance(content, Fault):
            fields[key] = content
        elif field == "json":
            found = parse_object(content)
            if isinstance(found, Fault):
                return found
            entries = found
        elif suffix == "txt":
            try:
                fields[name or "caption"] = text_of(content)
            except UnicodeDecodeError as error:
                return Fault("bad_rows", f"{field} is no UTF-8 ({error}); write it as UTF-8")
        else:
            fields[key] = content
    return entries | fields


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Fault:
    if not member.isfile():
        return Fault("bad_paths", "is a link or a device in the tar; store the image itself")
    if member.size > MAX_IMAGE_BYTES:
        return Fault("broken_images", f"is over {MAX_IMAGE_BYTES} bytes; make it smaller")
    stream = tar.extractfile(member)
    return stream.read() if stream else b""


def _check_end(file: Path) -> None:
    """``tarfile`` takes a tar cut between two members for whole: look for the block of zeros."""
    with file.open("rb") as stream:
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - tarfile.BLOCKSIZE))
        if stream.read() != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")
