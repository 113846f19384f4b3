"""Count the pictures that training repaired and broke, and show some of both.

It needs a score that is 1 where a picture shows what its prompt asks for, and 0 where it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inversion_dpo.evaluation.figures import Pixels, plate, sheet
from inversion_dpo.evaluation.samples import read_images
from inversion_dpo.evaluation.scorers.own import Scores

SHOWN = {"repaired": 8, "broken": 4}  # prompts of each kind, at most
_NEVER = np.zeros(0, bool)


def judge(reference: Scores, policy: Scores) -> str | None:
    """Name a score that only takes the values 0 and 1, and takes both; None without one."""
    for name in sorted(reference, key=lambda name: name != "exact"):
        values = np.concatenate([reference[name], policy[name]])
        if set(np.unique(values)) == {0.0, 1.0}:
            return name
    return None


def changed(reference: Scores, policy: Scores) -> dict[str, NDArray[np.bool_]]:
    """Say of each image whether it was repaired, and whether it was broken."""
    name = judge(reference, policy)
    if name is None:
        return dict.fromkeys(SHOWN, _NEVER)
    before, after = reference[name] == 1, policy[name] == 1
    return {"repaired": ~before & after, "broken": before & ~after}


def repairs(reference: Scores, policy: Scores) -> dict[str, Any]:
    """Count them for ``metrics.json``; empty if no score judges right and wrong."""
    name = judge(reference, policy)
    counts = {k: int(v.sum()) for k, v in changed(reference, policy).items()}
    return {"repairs": {"by": name, "images": len(reference[name]), **counts}} if name else {}


def repairs_text(metrics: Mapping[str, Any]) -> str:
    """Write the counts as a sentence, or nothing."""
    if not (found := metrics.get("repairs")):
        return ""
    return (
        f"Training repaired {found['repaired']:,} of {found['images']:,} pictures "
        f"and broke {found['broken']:,}, by `{found['by']}`."
    )


@dataclass(frozen=True)
class Kind:
    """Some of the pictures that were repaired, or broken.

    title: says how many there are and how these were chosen. pairs: the images of reference and
    policy under each caption. right: which of the two show what the prompt asks for.
    """

    title: str
    captions: Sequence[str]
    pairs: Sequence[Sequence[Pixels]]
    right: tuple[bool, bool]


def some_of(prompts: Sequence[str], files: Sequence[Path], scores: Sequence[Scores]) -> list[Kind]:
    """Choose repaired and broken pictures at random with seed 0.

    Args:
        prompts: of each image.
        files: the samples of reference and policy.
        scores: of reference and policy.

    Returns:
        The kinds of which there are any, repaired first.
    """
    kinds, random = [], np.random.default_rng(0)
    for kind, those in changed(*scores).items():
        rows = np.flatnonzero(those)
        chosen = sorted(random.choice(rows, min(SHOWN[kind], len(rows)), replace=False).tolist())
        if not chosen:
            continue
        pairs = list(zip(*(read_images(file, chosen) for file in files), strict=True))
        some = "all shown" if len(chosen) == len(rows) else f"{len(chosen)} drawn at random"
        title = f"{kind.capitalize()}: {len(rows):,} of {len(those):,} pictures ({some})"
        right = (kind == "broken", kind == "repaired")
        kinds.append(Kind(title, [prompts[k] for k in chosen], pairs, right))
    return kinds


def draw_repairs(kinds: Sequence[Kind]) -> bytes:
    """Draw them with ticks and crosses, as bytes of a PNG file."""
    return plate(
        [(k.title, sheet(k.captions, k.pairs, right=[k.right] * len(k.captions))) for k in kinds]
    )
