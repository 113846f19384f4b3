"""Who may see which pictures: a fixed split of the emoji by a hash of their code points.

The base model sees some emoji by one hand only. The judges learn from the pictures that the base
never saw, and from emoji that it never saw at all.

======== ===== ==================== ====================
group    share the base sees        the judges learn from
======== ===== ==================== ====================
noto     20%   Noto's picture       Twemoji's picture
twemoji  20%   Twemoji's picture    Noto's picture
judges   10%   nothing              both pictures
pairs    20%   one, by hash         nothing
both     30%   both pictures        nothing
======== ===== ==================== ====================

``noto`` and ``twemoji`` are the prompts of evaluation. Preference pairs come from ``pairs`` and
``both``, so no prompt and no judge's picture is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from tools.drawn.fetch import HANDS, Emoji

SHARES = {"noto": 4, "twemoji": 4, "judges": 2, "pairs": 4, "both": 6}  # of twenty
NOTO, TWEMOJI = range(len(HANDS))


def number_of(code: str, salt: str = "") -> int:
    """Return a fixed number for an emoji's code points."""
    return int.from_bytes(hashlib.sha256(f"{salt}{code}".encode()).digest()[:4], "big")


def group_of(emoji: Emoji) -> str:
    """Name the emoji's group."""
    place = number_of(emoji.code) % sum(SHARES.values())
    for name, share in SHARES.items():
        if place < share:
            return name
        place -= share
    raise AssertionError


def of_group(emoji: Iterable[Emoji], *groups: str) -> list[Emoji]:
    """Keep the emoji of these groups."""
    return [e for e in emoji if group_of(e) in groups]


def base_hands(emoji: Emoji) -> tuple[int, ...]:
    """List the hands by which the base model sees an emoji."""
    one = number_of(emoji.code, "pairs") % 2
    return {
        "noto": (NOTO,),
        "twemoji": (TWEMOJI,),
        "judges": (),
        "pairs": (one,),
        "both": (NOTO, TWEMOJI),
    }[group_of(emoji)]


def judge_hands(emoji: Emoji) -> tuple[int, ...]:
    """List the hands by which the judges learn an emoji; never one that the base saw."""
    return {"noto": (TWEMOJI,), "twemoji": (NOTO,), "judges": (NOTO, TWEMOJI)}.get(
        group_of(emoji), ()
    )
