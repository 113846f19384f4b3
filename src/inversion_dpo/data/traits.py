"""What tells winners from losers beside what they were chosen for: plain traits of pictures.

Training follows whatever the pairs have in common. Where winners are also, say, more colourful,
a policy may become so too, whatever the labels were meant to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from inversion_dpo.data.images import one_colour
from inversion_dpo.maths.intervals import wilson
from inversion_dpo.run.words import counted

GRID, LEVELS = 32, 4  # parts a side, and levels of 255 that no part of two like pictures differs by
SIDE = 256  # pixels; larger images are looked at in this size, so that sharpness can be compared
LEAST_PAIRS = 30  # of fewer nothing is said: the interval would be no good
LUMA = (0.299, 0.587, 0.114)
TAIL = 0.005  # beyond each end of a 99% interval: five traits are looked at together
TRAITS = ("brighter", "more contrasty", "more colourful", "warmer", "sharper")
Traits = dict[str, float]


@dataclass(frozen=True)
class Share:
    """Share of pairs whose winner has more of a trait, equal ones counting half; 99% interval."""

    share: float
    low: float
    high: float

    @property
    def chance(self) -> bool:
        """Whether winners may as well be like losers in this."""
        return self.low <= 0.5 <= self.high


def traits(image: Image.Image) -> Traits:
    """How bright, contrasty, colourful, warm (red less blue) and sharp an RGB image is."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    rgb = np.asarray(small, np.float32) / 255
    red, green, blue = np.moveaxis(rgb, 2, 0)
    most, least = np.maximum(red, green), np.minimum(red, green)  # np.ptp takes 25 times longer
    luma = rgb @ np.array(LUMA, np.float32)
    edges = [np.abs(np.diff(luma, axis=k)).mean() if luma.shape[k] > 1 else 0.0 for k in (0, 1)]
    found = (
        luma.mean(),
        luma.std(),
        (np.maximum(most, blue) - np.minimum(least, blue)).mean(),
        (red - blue).mean(),
        sum(edges),
    )
    # rounded: even pixels would differ by what a processor makes of their sum
    return {name: round(float(x), 6) for name, x in zip(TRAITS, found, strict=True)}


ODDITIES = {  # kinds of pairs that hold no preference
    "alike": "two images that look the same: such pairs hold no preference, and still change the "
    "model; leave them out",
    "one_colour": "an image of one colour, which a safety checker or a failed sampling leaves; "
    "leave such pairs out",
}


def oddities(images: Sequence[Image.Image]) -> list[str]:
    """List the kinds of ``ODDITIES`` that two RGB pictures are."""
    found = ["alike"] * alike(*images)
    return found + ["one_colour"] * any(map(one_colour, images))


def oddities_text(counts: Mapping[str, int]) -> list[str]:
    """Write a line for each kind of odd pairs that there are."""
    return [
        f"{counted(counts[kind], 'pair has', 'pairs have')} {words}"
        for kind, words in ODDITIES.items()
        if counts[kind]
    ]


def alike(first: Image.Image, second: Image.Image) -> bool:
    """Tell whether two RGB pictures look the same: no part of a grid differs in colour."""
    a, b = (
        np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), int)
        for image in (first, second)
    )
    return bool(np.abs(a - b).max() <= LEVELS)


class Tally:
    """Counts pairs by which of the two has more of each trait; a million takes no memory."""

    def __init__(self) -> None:
        self.pairs = 0
        self.more: Counter[str] = Counter()
        self.less: Counter[str] = Counter()

    def add(self, winner: Traits, loser: Traits) -> None:
        """Count one pair."""
        self.pairs += 1
        self.more.update(name for name in winner if winner[name] > loser[name])
        self.less.update(name for name in winner if winner[name] < loser[name])

    def shares(self) -> dict[str, Share]:
        """By trait; none of fewer than ``LEAST_PAIRS`` pairs, nor of traits that never differ."""
        found: dict[str, Share] = {}
        for name in TRAITS if self.pairs >= LEAST_PAIRS else ():
            more, less = self.more[name] / self.pairs, self.less[name] / self.pairs
            if more or less:
                share = 0.5 + (more - less) / 2
                found[name] = Share(*wilson(share, self.pairs, TAIL))
        return found


def shares_text(found: Mapping[str, Share]) -> str:
    """Every share with its interval; what is no chance is marked."""
    return ", ".join(
        f"{name} {s.share:.0%} [{s.low:.0%}, {s.high:.0%}]{'' if s.chance else ' !'}"
        for name, s in found.items()
    )


def format_shares(found: Mapping[str, Share]) -> list[str]:
    """Write what winners have more of, as indented lines of a report; none if nothing is known."""
    if not found:
        return []
    lines = [f"  winners are, in the share of pairs [99% interval]: {shares_text(found)}"]
    if not all(s.chance for s in found.values()):
        lines.append(
            "    ! is no chance: a policy may learn this too; `evaluate` says if its images changed"
        )
    return lines
