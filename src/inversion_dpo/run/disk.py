"""Files written whole or not at all, and the same bytes for the same content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM = "checksum"  # of the rest of a JSON file
COUNTED = (".safetensors", ".json", ".txt", ".model")  # what makes a model, in its folder
# What the system says of a disk that takes no more, or a folder that must not be written to.
REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)


class DiskError(RuntimeError):
    """Something could not be written; says where and why. What was written before is intact."""


@contextmanager
def writing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a temporary name beside ``path``; on success flush it to disk and rename it.

    After any error the temporary file is removed. What a kill leaves, the next run writes over.

    Args:
        path: where the file or folder shall be.
        shared: two processes may write it at once, so each has a temporary name of its own.

    Raises:
        DiskError: the disk is full or the folder is read-only.
    """
    own = f".{os.getpid()}" if shared else ""
    partial = path.with_name(f"{path.name}{own}.partial")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except BaseException as error:
        _remove(partial)
        reason = refusal(error)
        if reason is None:
            raise
        raise DiskError(
            f"cannot write {path}: {reason}. Nothing written before is lost: make room, or the "
            "folder writable, and run the same command again"
        ) from error


def _nearest(folder: Path) -> Path:
    """Find the folder itself, or the nearest above it that is there."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def check_writable(folder: Path) -> None:
    """Refuse a folder in which no file can be made; it need not be there yet, and is not made."""
    there = _nearest(folder)
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise DiskError(
            f"{folder}: nothing can be written to {there} ({error.strerror}): choose another "
            "--output"
        ) from error


def check_room(
    folder: Path, size: float, what: str, remedy: str = "", *, whole: bool = True
) -> None:
    """Refuse work whose result does not fit; DiskError names both sizes.

    Args:
        folder: where it will be written; it need not be there yet.
        size: of the result in bytes, roughly.
        what: the result's name.
        remedy: the settings that make it smaller, if any do.
        whole: whether what the folder holds is a part of the result.
    """
    if whole:
        size -= sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    free = shutil.disk_usage(_nearest(folder)).free
    if free < size:
        raise DiskError(
            f"{folder}: {what} need about {size / 1e6:,.0f} MB more and {free / 1e6:,.0f} MB "
            f"are free: make room, choose another --output{f', {remedy}' * bool(remedy)}"
        )


def refusal(error: BaseException) -> str | None:
    """Quote the system about a full or forbidden disk; None for any other error."""
    if isinstance(error, OSError) and not isinstance(error, shutil.Error):
        return error.strerror if error.errno in REFUSALS else None
    for number in REFUSALS:  # safetensors and shutil.copytree pass the system's error on as text
        if any(words in str(error) for words in (f"os error {number})", f"[Errno {number}]")):
            return os.strerror(number)
    return str(error) if "disk is full" in str(error) else None  # SQLite's words


def atomic_save(
    tensors: Mapping[str, Tensor], path: Path, about: dict[str, str] | None = None
) -> None:
    """Write safetensors with metadata, whole or not at all; DiskError if the disk refuses."""
    from safetensors.torch import save_file

    with writing(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, about)


def atomic_text(text: str, path: Path, *, shared: bool = False) -> None:
    """Write a text file, whole or not at all; ``shared`` and DiskError as :func:`writing`."""
    with writing(path, shared=shared) as partial:
        partial.write_text(text, encoding="utf-8")


def atomic_json(value: Any, path: Path, *, shared: bool = False) -> None:
    """Write a JSON file for :func:`read_json`; ``shared`` and DiskError as :func:`writing`.

    An object has a checksum of the rest, by which it is seen to be altered.
    """
    plain = json.loads(json.dumps(value))
    if isinstance(plain, dict):
        plain[CHECKSUM] = checksum_of(plain)
    atomic_text(json.dumps(plain, indent=1), path, shared=shared)


def checksum_of(found: Mapping[str, Any]) -> str:
    """Hash what a JSON file holds, in any order of its keys."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def atomic_bytes(data: bytes, path: Path, *, shared: bool = False) -> None:
    """Write a file of bytes, whole or not at all; ``shared`` and DiskError as :func:`writing`."""
    with writing(path, shared=shared) as partial:
        partial.write_bytes(data)


def atomic_figure(figure: Any, path: Path, **settings: Any) -> None:
    """Write a figure of matplotlib, whole or not at all; DiskError if the disk refuses."""
    with writing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], **settings)


def atomic_table(table: pa.Table, path: Path, **settings: Any) -> None:
    """Write a table that :func:`read_table` can check; DiskError if the disk refuses."""
    atomic_tables([table], table.schema, path, **settings)


def atomic_tables(
    tables: Iterable[pa.Table], schema: pa.Schema, path: Path, **settings: Any
) -> None:
    """Write tables below one another into one file; otherwise as :func:`atomic_table`."""
    rows = 0
    with (
        writing(path) as partial,
        pq.ParquetWriter(partial, schema, write_page_checksum=True, **settings) as writer,
    ):
        for table in tables:
            writer.write_table(table)
            rows += len(table)
        writer.add_key_value_metadata({_CONTENT: _content(rows, schema)})


def read_json(path: Path, kind: type = dict) -> Any:
    """Read a JSON file that a command wrote, without its checksum; DiskError if it is damaged.

    Args:
        path: of the file.
        kind: what it holds as a whole.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, kind):
            raise ValueError(f"it holds a {type(found).__name__}")
        if isinstance(found, dict) and found.pop(CHECKSUM, None) not in (None, checksum_of(found)):
            raise ValueError("its checksum differs")
        return found
    except ValueError as error:
        raise DiskError(
            f"{path} is damaged ({error}): delete it and run the command again that wrote it"
        ) from error


def read_table(path: Path) -> pa.Table | None:
    """Read a table of :func:`atomic_table`; None if it is missing, cut short or altered.

    Parquet's page checksums cover the data. They do not cover the footer, where a flipped bit can
    change a column's name, its type or the number of rows: the file repeats these in its metadata.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table, noted = file.read(), file.metadata.metadata or {}
        content = _content(len(table), table.schema).encode()
        return table if noted.get(_CONTENT) == content else None
    except (OSError, ValueError, pa.ArrowException):
        return None


def mark_of(path: Path) -> str:
    """Read the ``MARK`` of a Parquet file; empty for any other file."""
    try:
        return (pq.read_metadata(path).metadata or {}).get(MARK, b"").decode()
    except (OSError, ValueError, pa.ArrowException):
        return ""


MARK = b"inversion_dpo.by"  # in a Parquet file: the command that wrote it, or a hash of settings
_CONTENT = b"inversion_dpo.content"


def _content(rows: int, schema: pa.Schema) -> str:
    return f"{rows} rows\n{schema.to_string(show_field_metadata=False, show_schema_metadata=False)}"


def atomic_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write into a temporary folder, flush all of it, then give it its name.

    A folder of that name is replaced; DiskError if the disk refuses.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target) as partial:
        _remove(partial)
        fill(partial)
        for path in sorted(partial.rglob("*")):
            _flush(path)
        if target.is_dir():
            shutil.rmtree(target)
        elif target.exists():
            raise DiskError(f"{target} is a file, and a folder goes there: move it away")


def steady_header(path: Path) -> None:
    """Order a safetensors file's metadata, which the library writes in an order of chance.

    The header is eight bytes of its length, then JSON padded with spaces
    (https://huggingface.co/docs/safetensors); sorting its keys does not change its length.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        metadata = dict(sorted(header.pop("__metadata__", {}).items()))
        ordered = {"__metadata__": metadata, **header} if metadata else header
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"{path}: its header grew from {length} to {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(length))


def sha256_of(path: Path) -> str:
    """Hash a file (SHA-256), read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(places: Iterable[Path]) -> str:
    """Hash files, and in folders all files of weights or configuration."""
    digest = hashlib.sha256()
    for place in places:
        files = [place] if place.is_file() else sorted(place.rglob("*")) if place.exists() else []
        for file in files:
            if file.is_file() and (file == place or file.suffix in COUNTED):
                digest.update(f"{file.name} {content_of(file)} ".encode())
    return digest.hexdigest()[:16]


def content_of(file: Path) -> str:
    """Hash a file, once for as long as its size and time stay the same."""
    about = file.stat()
    return _content_of(file, about.st_size, about.st_mtime_ns)


@cache
def _content_of(file: Path, size: int, changed: int) -> str:
    return sha256_of(file)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
