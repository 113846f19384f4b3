"""How the policy's pictures look beside the reference's, whatever the scores say."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from inversion_dpo.data.traits import Tally, traits
from inversion_dpo.evaluation.samples import pictures


def changes(reference: Path, policy: Path) -> dict[str, dict[str, dict[str, float]]]:
    """``traits``: the share of images in which the policy's has more of each, same noise.

    reference, policy: files of samples in the same order. Empty where nothing differs, and for
    fewer images than make an interval.
    """
    tally = Tally()
    for before, after in zip(pictures(reference), pictures(policy), strict=True):
        tally.add(traits(after), traits(before))
    return {"traits": {name: asdict(share) for name, share in tally.shares().items()}}
