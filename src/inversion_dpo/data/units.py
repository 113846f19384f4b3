"""What numbers of a table mean together: one unit in a column, thumbs of one kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from inversion_dpo.data.images import DataError
from inversion_dpo.data.rows import Raw, number, shown
from inversion_dpo.data.vocabulary import DOWNS, UPS

_NUMBERS = {  # our columns of numbers that are compared, and what of them has one unit
    **{name: name for name in ("scores", "ranks", "preferences", "preference_0", "label_0")},
    **dict.fromkeys(("share_0", "share_1"), "share"),
}


def thumb(value: Any) -> float | str | None:
    """Read a thumb as 1 (up), 0 or -1 (down) or 0.5 (neither)."""
    word = value.strip(" :").lower() if isinstance(value, str) else None
    word = re.sub(r"(?<=[a-z])[ -](?=[a-z])", "_", word) if word else word  # not of -1
    if word in (*UPS, *DOWNS):
        return float(word in UPS)
    found = number(value if word is None else word)
    return max(found, 0.0) if found in (-1.0, 0.0, 0.5, 1.0) else shown(value)


def either_zero(raws: Iterable[Raw], first: dict[float, str]) -> Iterator[Raw]:
    """Pass on rows with thumbs; DataError once these are -1 in one and 0 in another.

    ``first`` collects where each of the two first stands.
    """
    for raw in raws:
        given = raw.values.get("thumbs")
        for cell in given if isinstance(given, list) else [given]:
            if (found := number(cell)) in (-1.0, 0.0):
                first.setdefault(float(found or 0), raw.where)
        if len(first) > 1:
            raise DataError(
                f"the thumb is -1 in {first[-1.0]} and 0 in {first[0.0]}: write down for a thumb "
                "down, and leave the cell empty where there is none"
            )
        yield raw


def one_unit(raws: Iterable[Raw]) -> Iterator[Raw]:
    """Pass on rows; DataError once numbers of a kind are per cent in one cell and not in another.

    Of "85%" and "90" nobody knows which is more.
    """
    first: dict[tuple[str, bool], str] = {}
    for raw in raws:
        for ours, kind in _NUMBERS.items():
            for cell in flat(raw.values.get(ours)):
                if isinstance(number(cell), float):
                    percent = isinstance(cell, str) and cell.strip().endswith("%")
                    name = raw.table.names.get(ours, ours)
                    first.setdefault((kind, percent), f"{raw.where}: {name} is {shown(cell)}")
            if (kind, True) in first and (kind, False) in first:
                raise DataError(
                    f"{first[kind, False]}, and {first[kind, True]}: write all of them in per "
                    "cent, or none"
                )
        yield raw


def flat(value: Any) -> Iterator[Any]:
    """Give the cells of lists within lists."""
    if isinstance(value, list):
        yield from chain.from_iterable(map(flat, value))
    else:
        yield value
