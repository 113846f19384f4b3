"""How the policy's pictures look beside the reference's, whatever the scores say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from inversion_dpo.data.images import decode_image
from inversion_dpo.data.traits import Tally, traits


def changes(reference: Path, policy: Path) -> dict[str, dict[str, dict[str, float]]]:
    """``traits``: the share of images in which the policy's has more of each, same noise.

    reference, policy: files of samples in the same order. Empty where nothing differs, and for
    fewer images than make an interval.
    """
    tally = Tally()
    for before, after in zip(_pictures(reference), _pictures(policy), strict=True):
        tally.add(traits(after), traits(before))
    return {"traits": {name: asdict(share) for name, share in tally.shares().items()}}


def _pictures(path: Path) -> Iterator[Image.Image]:
    """The images of a file of samples, a few encoded ones in memory at a time."""
    row = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=64, columns=["image"]):
        for encoded in batch["image"]:
            yield decode_image(encoded.as_py(), f"{path} row {row}")
            row += 1
