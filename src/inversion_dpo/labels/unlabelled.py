"""Pairs without a preference yet, in the columns that labelled ones have."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from inversion_dpo.run.disk import atomic_table

Images = Sequence[NDArray[np.uint8]]


def write_unlabelled(path: Path, prompts: Sequence[str], first: Images, second: Images) -> None:
    """Write two images [H, W, 3] of each prompt as Parquet, lossless, ``label_0`` empty.

    An old file is replaced only once all is written. ValueError if the lengths differ.
    """
    rows = {
        "jpg_0": [png(image) for image in first],
        "jpg_1": [png(image) for image in second],
        "label_0": pa.nulls(len(prompts), pa.float64()),
        "caption": list(prompts),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_table(pa.table(rows), path, compression="zstd")


def png(image: NDArray[np.uint8]) -> bytes:
    """Encode uint8 [H, W, 3] losslessly."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
