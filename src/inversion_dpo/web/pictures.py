"""The pictures that the page shows: kept in memory for a while, and few of many."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from threading import RLock

import numpy as np

MOST_IMAGES = 512  # kept in memory


class Pictures:
    """The latest images by SHA-256, PNG; the oldest are forgotten."""

    def __init__(self, most: int = MOST_IMAGES) -> None:
        self._most, self._kept, self._lock = most, OrderedDict[str, bytes](), RLock()

    def add(self, data: bytes) -> str:
        """Keep an image; return its name."""
        name = hashlib.sha256(data).hexdigest()
        with self._lock:
            self._kept[name] = data
            self._kept.move_to_end(name)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> bytes | None:
        """Find an image by its name; None if it is not kept (any more)."""
        with self._lock:
            return self._kept.get(name)


def spread(count: int, most: int) -> list[int]:
    """Choose at most ``most`` of the indices 0..count-1, evenly, both ends among them."""
    return sorted({round(float(k)) for k in np.linspace(0, count - 1, min(count, most))})
