"""Images that are the same, to the byte or to the eye."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from inversion_dpo.data.images import decode_image
from inversion_dpo.making_pairs.candidates import Candidate


def dhash(image: Image.Image) -> int:
    """64 bits: where, in 9x8 grey cells, a cell is darker than its right neighbour.

    Difference hash of Neal Krawetz (2013,
    https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html).
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), int)
    bits = (grey[:, 1:] > grey[:, :-1]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


class Duplicates:
    """Remembers images and drops those that have been seen; ``dropped`` counts them.

    An image is dropped if its bytes were seen before, or if its hash differs in at most ``near`` of
    64 bits from that of an image of the same caption. near below 0: by bytes only. Images of
    different captions may look alike in grey: a red and a blue star are not the same.
    """

    def __init__(self, near: int) -> None:
        self.near, self.dropped = near, 0
        self._bytes: set[bytes] = set()
        self._hashes: defaultdict[str, list[int]] = defaultdict(list)

    def fresh(self, group: Sequence[Candidate]) -> list[Candidate]:
        """Give the group without what was seen before, in this group or an earlier one."""
        kept = [candidate for candidate in group if self._is_new(candidate)]
        self.dropped += len(group) - len(kept)
        return kept

    def _is_new(self, candidate: Candidate) -> bool:
        digest = hashlib.sha256(candidate.jpg).digest()
        if digest in self._bytes:
            return False
        self._bytes.add(digest)
        if self.near < 0:
            return True
        found = dhash(decode_image(candidate.jpg, f"seed {candidate.seed}"))
        known = self._hashes[candidate.caption]
        if any((found ^ other).bit_count() <= self.near for other in known):
            return False
        known.append(found)
        return True
