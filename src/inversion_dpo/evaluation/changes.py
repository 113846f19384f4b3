"""Compare how the pictures of policy and reference look, whatever the scores say."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from inversion_dpo.data.images import one_colour
from inversion_dpo.data.traits import Tally, traits
from inversion_dpo.evaluation.samples import pictures


def changes(reference: Path, policy: Path) -> dict[str, dict[str, Any]]:
    """Return ``traits``: the share of images in which the policy's has more of each trait.

    reference, policy: sample files in the same order, from the same noise. The traits are empty if
    nothing differs, or if there are too few images for an interval. ``distance`` has the ``mean``
    over images of :func:`distance`, and how many are ``identical``. ``one_colour`` names each
    side's images that show nothing, if there are any.
    """
    tally, away = Tally(), []
    blank: dict[str, list[str]] = {"reference": [], "policy": []}
    rows = pq.read_table(policy, columns=["prompt", "seed"]).to_pylist()
    for row, *pair in zip(rows, pictures(reference), pictures(policy), strict=True):
        tally.add(*map(traits, pair[::-1]))
        away.append(distance(*pair))
        for names, image in zip(blank.values(), pair, strict=True):
            names += [f"{row['prompt'][:60]!r}, seed {row['seed']}"] if one_colour(image) else []
    found: dict[str, dict[str, Any]] = {"one_colour": blank} if any(blank.values()) else {}
    found |= {"distance": {"mean": float(np.mean(away)), "identical": away.count(0.0)}}
    return found | {"traits": {n: asdict(share) for n, share in tally.shares().items()}}


def distance(before: Image.Image, after: Image.Image) -> float:
    """Compute the root mean square difference at 64x64 pixels, in grey levels of 255."""
    both = (np.asarray(image.resize((64, 64)), np.float32) for image in (before, after))
    return float(np.sqrt(np.square(np.subtract(*both)).mean()))
