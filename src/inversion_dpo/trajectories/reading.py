"""Read rows of tensors out of safetensors files by their place, into one piece of memory.

A mapped file has the system read ahead of every page that is touched, many times what a batch
needs. Here the system is first told of all rows of a batch, so that the disk finds them together;
then consecutive rows are one ``preadv``, which waits for the disk without Python's lock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, reduce
from itertools import accumulate
from math import prod
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import torch
from torch import Tensor

from inversion_dpo.run.disk import DiskError

OPEN = 256  # files held open; Linux allows a process 1,024
SHARD = "shard-{:05d}.safetensors"
BUFFERS = 1024  # of one preadv, at most
ALIGNED = 64  # bytes, from which every type can be read
DTYPES = {  # https://huggingface.co/docs/safetensors
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a tensor in a shard, from ``first``, and their rows in what is read."""

    name: str
    shard: int
    first: int
    to: Sequence[int]


@dataclass(frozen=True)
class Place:
    """A tensor's type and shape, and where it begins in its file or memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @cached_property
    def size(self) -> int:
        """Its bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @cached_property
    def of_row(self) -> int:
        """Bytes of a row."""
        return self.size // self.shape[0]


@dataclass(frozen=True)
class Block:
    """Tensors in one piece of memory, which a device gets in one copy."""

    memory: Tensor
    places: dict[str, Place]
    _copies: dict[torch.device, Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors on a device; copied once, without waiting for the copy."""
        if device not in self._copies:
            self._copies[device] = self.memory.to(device, non_blocking=True)
        memory = self._copies[device]
        return {
            name: memory[p.begin : p.begin + p.size].view(p.dtype).view(p.shape)
            for name, p in self.places.items()
        }


class Shards:
    """The shards of a folder, read by rows; several threads may read at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[int, tuple[BinaryIO, dict[str, Place]]] = {}
        self._lock = Lock()

    def places(self, number: int) -> dict[str, Place]:
        """Say where the tensors of a shard lie."""
        return self._file(number)[1]

    def size(self, wanted: Sequence[Rows]) -> int:
        """Count the bytes of rows."""
        return sum(len(rows.to) * self.places(rows.shard)[rows.name].of_row for rows in wanted)

    def _file(self, number: int) -> tuple[BinaryIO, dict[str, Place]]:
        with self._lock:
            if number not in self._files:
                if len(self._files) >= OPEN:
                    del self._files[next(iter(self._files))]  # closed once nobody reads it
                file = (self.folder / SHARD.format(number)).open("rb", buffering=0)
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                header.pop("__metadata__", None)
                self._files[number] = (
                    file,
                    {
                        name: Place(
                            DTYPES[t["dtype"]], tuple(t["shape"]), 8 + length + t["data_offsets"][0]
                        )
                        for name, t in header.items()
                    },
                )
            return self._files[number]

    def announce(self, wanted: Sequence[Rows]) -> None:
        """Tell the system which rows will be read, so that the disk serves them together."""
        if not hasattr(os, "posix_fadvise"):  # macOS has none
            return
        with suppress(OSError):  # of a file system that takes no advice
            for rows in wanted:
                file, places = self._file(rows.shard)
                p = places[rows.name]
                there = p.begin + rows.first * p.of_row, len(rows.to) * p.of_row
                os.posix_fadvise(file.fileno(), *there, os.POSIX_FADV_WILLNEED)

    def read(self, wanted: Sequence[Rows], *, pinned: bool = False) -> Block:
        """Read rows; those of one name become one tensor.

        Rows of several lengths L, [L, ...] each, end in zeros. Types that differ from shard to
        shard become one that holds them all.
        """
        named: dict[str, list[tuple[Rows, Place]]] = {}
        for rows in wanted:
            named.setdefault(rows.name, []).append((rows, self.places(rows.shard)[rows.name]))
        places, end = dict[str, Place](), 0
        for name, parts in named.items():
            dtype = reduce(torch.promote_types, {p.dtype for _, p in parts})
            longest = max(p.shape[1:] for _, p in parts)
            shape = (sum(len(rows.to) for rows, _ in parts), *longest)
            places[name] = Place(dtype, shape, end)
            end += -(-places[name].size // ALIGNED) * ALIGNED
        block = Block(torch.empty(end, dtype=torch.uint8, pin_memory=pinned), places)
        self.announce(wanted)
        tensors, memory = block.on(torch.device("cpu")), block.memory.numpy().data
        for name, parts in named.items():
            whole = places[name]
            if any(p.shape[1:] != whole.shape[1:] for _, p in parts):
                tensors[name].zero_()
            for rows, p in parts:
                file, _ = self._file(rows.shard)
                offset = p.begin + rows.first * p.of_row
                if p.dtype == whole.dtype:
                    starts = [whole.begin + k * whole.of_row for k in rows.to]
                    fill(file, offset, [memory[s : s + p.of_row] for s in starts])
                    continue
                raw = bytearray(p.of_row * len(rows.to))
                fill(file, offset, [memoryview(raw)])
                found = torch.frombuffer(raw, dtype=p.dtype).view(-1, *p.shape[1:])
                tensors[name][list(rows.to), : found.shape[1]] = found.to(whole.dtype)
        return block


def fill(file: BinaryIO, offset: int, buffers: list[memoryview]) -> None:
    """Read a file into buffers, one after another.

    Args:
        file: open, unbuffered.
        offset: of the first byte.
        buffers: to be filled; the list is used up.

    Raises:
        DiskError: the file ends before the buffers are full.
    """
    while buffers:
        done = os.preadv(file.fileno(), buffers[:BUFFERS], offset)
        if not done:
            raise DiskError(f"{file.name} ends too early: run the same command again")
        offset += done
        while buffers and done >= len(buffers[0]):
            done -= len(buffers.pop(0))
        if done:
            buffers[0] = buffers[0][done:]


def climb(transitions: Sequence[int]) -> tuple[list[int], list[int]]:
    """Order pairs by their transitions, most first; and count those before each transition."""
    order = sorted(range(len(transitions)), key=lambda k: -transitions[k])
    active = [sum(t > j for t in transitions) for j in range(max(transitions, default=0))]
    return order, [0, *accumulate(active)]
