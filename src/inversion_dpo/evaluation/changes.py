"""Compare how the pictures of policy and reference look, whatever the scores say."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from inversion_dpo.data.traits import Tally, traits
from inversion_dpo.evaluation.samples import pictures


def changes(reference: Path, policy: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return ``traits``: the share of images in which the policy's has more of each trait.

    reference, policy: sample files in the same order, from the same noise. The result is empty if
    nothing differs, or if there are too few images for an interval.
    """
    tally = Tally()
    for before, after in zip(pictures(reference), pictures(policy), strict=True):
        tally.add(traits(after), traits(before))
    return {"traits": {name: asdict(share) for name, share in tally.shares().items()}}
