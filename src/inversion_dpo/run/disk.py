"""Files written whole or not at all, and the same bytes for the same content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file
from torch import Tensor

# What the system says of a disk that takes no more, or a folder that must not be written to.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


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


def refusal(error: BaseException) -> str | None:
    """The system's words for a full or forbidden disk; None for any other error."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in REFUSALS else None
    for number in REFUSALS:  # safetensors passes the system's error on as text
        if f"os error {number})" in str(error):
            return os.strerror(number)
    return None


def atomic_save(
    tensors: Mapping[str, Tensor], path: Path, about: dict[str, str] | None = None
) -> None:
    """Write safetensors with metadata, whole or not at all; DiskError if the disk refuses."""
    with writing(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, about)


def atomic_text(text: str, path: Path) -> None:
    """Write a text file, whole or not at all; DiskError if the disk refuses."""
    with writing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def atomic_bytes(data: bytes, path: Path) -> None:
    """Write a file of bytes, whole or not at all; DiskError if the disk refuses."""
    with writing(path) as partial:
        partial.write_bytes(data)


def atomic_figure(figure: Any, path: Path, **settings: Any) -> None:
    """Write a figure of matplotlib, whole or not at all; DiskError if the disk refuses."""
    with writing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], **settings)


def atomic_table(table: Any, path: Path, **settings: Any) -> None:
    """Write Parquet with its own checksum inside, whole or not at all; DiskError as above."""
    with writing(path) as partial:
        with pq.ParquetWriter(partial, table.schema, **settings) as writer:
            writer.write_table(table)
            unsealed(writer)
        seal(partial)


def read_table(path: Path) -> Any | None:
    """A table whose file was sealed; None if it is missing, cut short or altered in any byte."""
    try:
        return pq.read_table(path) if is_sealed(path) else None
    except (OSError, pa.ArrowException):
        return None


# A sealed Parquet file holds the SHA-256 of its own bytes, with zeros in the digest's place, among
# its footer's metadata. Every other tool reads it as what it is.
_MARK, _ZEROS = b"inversion_dpo sha256:", b"0" * 64


def unsealed(writer: pq.ParquetWriter) -> None:
    """Leave room for the digest; to be called before the writer is closed."""
    writer.add_key_value_metadata({"checksum": (_MARK + _ZEROS).decode()})


def seal(path: Path) -> None:
    """Write the digest into its place; only then may the file get its name."""
    place = _place_of_digest(path)
    digest = _digest_without(path, place)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest)


def is_sealed(path: Path) -> bool:
    """Whether a Parquet file holds the digest of its own bytes."""
    place = _place_of_digest(path)
    if place < 0:
        return False
    with path.open("rb") as file:
        file.seek(place)
        return file.read(len(_ZEROS)) == _digest_without(path, place)


def _place_of_digest(path: Path) -> int:
    """Offset in the file; -1 if the footer, whose length the last bytes tell, has no mark."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        start = size - 8 - int.from_bytes(file.read(4), "little")
        if not 0 <= start < size:
            return -1
        file.seek(start)
        found = file.read().rfind(_MARK)
    return start + found + len(_MARK) if found >= 0 else -1


def _digest_without(path: Path, place: int) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = place
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        digest.update(_ZEROS)
        file.seek(place + len(_ZEROS))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest().encode()


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
        if target.exists():
            shutil.rmtree(target)


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
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
