"""From rows of one table to pairs: rankings and ratings of several images become pairs here."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, groupby, pairwise
from typing import Any

from scipy.special import ndtr

from inversion_dpo.data.columns import RANKED, Table
from inversion_dpo.data.images import DataError
from inversion_dpo.data.rows import (
    EMPTY,
    UNLABELLED,
    Encoded,
    Fault,
    Raw,
    Row,
    encoded_image,
    group_of,
    number,
    row_of,
    shown,
)
from inversion_dpo.data.units import either_zero, one_unit, thumb
from inversion_dpo.run.fields import DataConfig

SCHEME = DataConfig().ranking  # the default
Rated = tuple[Any, list[float]]  # an image and its ratings, higher is better
# Which pairs (better, worse) a ranking gives, from its places, the best first: one pair; each image
# with the next one down; every two. Images of equal rank keep their order; their pairs are ties.
SCHEMES: dict[str, Callable[[Sequence[int]], Iterable[tuple[int, int]]]] = {
    "best_worst": lambda places: [(places[0], places[-1])],
    "adjacent": pairwise,
    "all": lambda places: combinations(places, 2),
}


def rows_of(raws: Iterable[Raw], scheme: str, *, alone: bool = False) -> Iterator[Row]:
    """Give the rows to be checked: for rankings and ratings one for each pair of a scheme.

    Ratings of an image may stand anywhere in the data, so that those are read to the end first.
    Thumbs up and down are ratings too, but with ``alone`` each image is a row of its own. Labels
    of 1 and -1 become 1 and 0, and so do thumbs.

    Args:
        raws: rows of tables, in their order.
        scheme: ``data.ranking``, one of ``SCHEMES``.
        alone: give images with a thumb one by one.

    Raises:
        DataError: labels are -1 and 0, so that nobody knows which of them prefers image 1; or
            thumbs are, and one of them may mean neither.
    """
    first: dict[float | str | None, str] = {}
    for row in _rows(raws, scheme, alone):
        if row.label in (-1.0, 0.0) and first.setdefault(row.label, row.where) and len(first) > 1:
            raise DataError(
                f"label_0 is -1 in {first[-1.0]} and 0 in {first[0.0]}: write 0 where image 1 is "
                "preferred and 0.5 for a tie"
            )
        yield replace(row, label=0.0) if row.label == -1.0 else row


def _rows(raws: Iterable[Raw], scheme: str, alone: bool) -> Iterator[Row]:
    seen: set[object] = set()
    rated: list[Raw] = []
    downs: dict[float, str] = {}
    for kind, part in groupby(one_unit(raws), lambda raw: "" if raw.fault else raw.table.kind):
        if kind == "thumbs":
            part = either_zero(part, downs)
        if kind == "thumbs" and alone:
            yield from map(row_of, chain.from_iterable(map(_single, part)))
        elif kind in ("scored", "thumbs"):
            rated += part
        elif kind and kind not in RANKED and scheme != SCHEME:
            where = next(part).where
            raise DataError(
                f"{where}: no ranking, so data.ranking={scheme} has no effect. Leave it out"
            )
        elif kind == "unrated":
            yield from (row_of(replace(raw, fault=_UNRATED)) for raw in part)
        else:
            yield from map(row_of, _unranked(part, scheme, seen) if kind in RANKED else part)  # noqa: B031
    yield from map(row_of, _unrated(rated, scheme))


def _unranked(raws: Iterable[Raw], scheme: str, seen: set[object]) -> Iterator[Raw]:
    """Rows of two images from rankings: rows of all images, or a row for each image of a prompt.

    ``seen`` collects the prompts' ids, whose rows must stand together.
    """

    def group(raw: Raw) -> object:
        key = group_of(raw.values.get("group"))
        whole = isinstance(raw.values["images"], list)
        return raw.where if whole or key is None else (key,)

    for key, part in groupby(raws, group):
        rows = list(part)
        remedy = None
        if isinstance(key, tuple):
            if key in seen:
                remedy = f"prompt_id {key[0]} was seen before other rows; sort the rows by it"
            seen.add(key)
        elif not isinstance(rows[0].values["images"], list):
            remedy = (
                f"prompt_id is {shown(rows[0].values.get('group'))}; write a text or a whole "
                "number that says which rows belong together (data.columns.group); lists of "
                "images need JSON or Parquet"
            )
        if remedy:
            yield from (replace(raw, fault=Fault("bad_rows", remedy)) for raw in rows)
        else:
            yield from _pairs_of(rows, scheme)


def _pairs_of(rows: list[Raw], scheme: str) -> Iterator[Raw]:
    """Give the pairs of one ranking: rows of one image each, or one row of all images."""
    table, first = rows[0].table, rows[0].values
    last = rows[-1].where.rpartition("row ")[2]
    where = rows[0].where + (f" to {last}" if len(rows) > 1 else "")
    by = "ranks" if table.kind == "ranking" else "preferences"
    whole = isinstance(first["images"], list)
    images = first["images"] if whole else [raw.values["images"] for raw in rows]
    ranks = first[by] if whole else [raw.values[by] for raw in rows]
    if fault := _ranking_fault(rows, images, ranks):
        yield Raw(where, table, {}, fault)
        return
    numbers = [float(number(rank) or 0) for rank in ranks]
    places = sorted({_key(image): k for k, image in reversed(list(enumerate(images)))}.values())
    ranked = _Ranked(
        Raw(where, table, first),
        images,
        {k: -numbers[k] if by == "ranks" else numbers[k] for k in places},
        [f"{by[:-1]} {n:g}" for n in numbers],
    )
    yield from _pairs(ranked, scheme)


@dataclass(frozen=True)
class _Ranked:
    """Images of one prompt. values: by place, higher is better. words: what each was given."""

    raw: Raw
    images: Sequence[Any]
    values: Mapping[int, float]
    words: Sequence[str]


def _pairs(
    ranked: _Ranked, scheme: str, sure: Callable[[int, int], float | None] = lambda w, l: None
) -> Iterator[Raw]:
    """Give the pairs of a scheme; ``sure`` gives the probability that the first is better."""
    raw, images, values = ranked.raw, ranked.images, ranked.values
    loaded: dict[int, Encoded] = {}
    more = {k: v for k, v in raw.table.names.items() if k in ("source", "mask")}
    shared = {k: encoded_image(raw.values.get(k), raw.table) for k in more}
    for w, l in SCHEMES[scheme](sorted(values, key=lambda k: -values[k])):
        tie = values[w] == values[l]
        for k in () if tie else (w, l):
            loaded[k] = loaded[k] if k in loaded else encoded_image(images[k], raw.table)
        names = [images[k] if isinstance(images[k], str) else f"image {k}" for k in (w, l)]
        said = (ranked.words[w], ranked.words[l].rpartition(" ")[2])
        pair = {
            "caption": raw.values["caption"],
            **{k: raw.values.get(k) for k in ("scene_graph", "group")},
            "winner": loaded.get(w),
            "loser": loaded.get(l),
            "tie": 0.5 if tie else 1.0,
            "preference_0": sure(w, l),
            **shared,
            "called": tuple(f"{name} ({text})" for name, text in zip(names, said, strict=True)),
        }
        named = Table("chosen", {"winner": f"image {w}", "loser": f"image {l}"} | more)
        yield Raw(f"{raw.where}, images {w} and {l}", named, pair)


def _unrated(raws: Iterable[Raw], scheme: str) -> Iterator[Raw]:
    """Rows of two images from ratings, all those of an image and its prompt put together.

    The probability that the winner is better is that of Thurstone's law of comparative judgment
    (1927, https://doi.org/10.1037/h0070288) for one person's ratings: the normal distribution at
    the difference of the means over the root of both variances. An image with one rating has the
    variance within images over the whole data.
    """
    groups: dict[object, tuple[list[Raw], dict[object, Rated]]] = {}
    for raw in raws:
        found = _ratings(raw)
        if isinstance(found, Fault):
            yield replace(raw, fault=found)
            continue
        group, source = group_of(raw.values.get("group")), _key(raw.values.get("source"))
        key = (group is None, group or _words(raw), source)
        rows, images = groups.setdefault(key, ([], {}))
        rows.append(replace(raw, values={**raw.values, "images": None}))
        for image, ratings in found:
            images.setdefault(_key(image), (image, []))[1].extend(ratings)
    several = [r for _, images in groups.values() for _, r in images.values() if len(r) > 1]
    squares = sum(statistics.variance(r) * (len(r) - 1) for r in several)
    common = squares / sum(len(r) - 1 for r in several) if several else 0.0
    for rows, images in groups.values():
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        first = replace(rows[0], where=rows[0].where + more)
        rated = list(images.values())
        if fault := _differing(rows):
            yield replace(first, fault=fault)
        elif len(rated) < 2:
            yield replace(first, fault=_ALONE)
        else:
            yield from _rated_pairs(first, rated, common, scheme)


def _rated_pairs(raw: Raw, rated: list[Rated], common: float, scheme: str) -> Iterator[Raw]:
    means = [statistics.fmean(ratings) for _, ratings in rated]
    spread = [statistics.variance(r) if len(r) > 1 else common for _, r in rated]

    def sure(w: int, l: int) -> float:
        both = spread[w] + spread[l]
        return float(ndtr((means[w] - means[l]) / math.sqrt(both))) if both else 1.0

    one = "thumb" if raw.table.kind == "thumbs" else "score"
    words = [
        f"{'mean' if len(ratings) > 1 else one} {mean:.4g}"
        for mean, (_, ratings) in zip(means, rated, strict=True)
    ]
    images = [image for image, _ in rated]
    yield from _pairs(_Ranked(raw, images, dict(enumerate(means)), words), scheme, sure)


def _single(raw: Raw) -> Iterator[Raw]:
    """Rows of one image each, given twice; the label is 1 if most of its thumbs are up."""
    found = _ratings(raw)
    if isinstance(found, Fault):
        yield replace(raw, fault=found)
        return
    column = raw.table.names["images"]
    names = {k: v for k, v in raw.table.names.items() if k in ("source", "mask")}
    names |= {"winner": column, "loser": column}
    table = replace(raw.table, kind="single", names=names)
    for image, thumbs in found:
        likes = statistics.fmean(thumbs)
        label = 0.5 if likes == 0.5 else float(likes > 0.5)
        name = image if isinstance(image, str) else "image"
        said = {"winner": image, "loser": image, "tie": label, "preference_0": likes}
        called = (f"{name} (thumb {'up' if label else 'down'})", "")
        yield Raw(raw.where, table, {**raw.values, **said, "called": called})


def _ratings(raw: Raw) -> list[Rated] | Fault:
    """Give the images of a row with the ratings of each: one or several."""
    thumbs = raw.table.kind == "thumbs"
    images, scores = raw.values["images"], raw.values["thumbs" if thumbs else "scores"]
    if scores == [] or _empty(scores):
        return Fault(UNLABELLED, "no thumb or score")
    if not isinstance(images, list):
        images, scores = [images], [scores]
    if not isinstance(scores, list) or len(scores) != len(images):
        count = len(scores) if isinstance(scores, list) else "no"
        return Fault("bad_rows", f"{len(images)} images and {count} scores; give one each")
    found = []
    for image, given in zip(images, scores, strict=True):
        read = thumb if thumbs else number
        numbers = [read(x) for x in (given if isinstance(given, list) else [given])]
        sound = [x for x in numbers if isinstance(x, float) and math.isfinite(x)]
        if len(sound) < len(numbers) or not sound:
            what = ("thumb", "up or down, or 1 or 0") if thumbs else ("score", "a number")
            text = f"the {what[0]} is {shown(given)}; write {what[1]}, or drop the row"
            return Fault("bad_rows", text)
        found.append((image, sound))
    return found


def _empty(value: Any) -> bool:
    """Tell whether a cell is empty, or has the word that a table's writer put for that."""
    return value is None or str(value).strip().lower() in EMPTY


def _words(raw: Raw) -> str:
    """Give the caption by which rows belong together, whatever the spaces around its words."""
    return " ".join(str(raw.values["caption"]).split())


def _differing(rows: list[Raw]) -> Fault | None:
    """Say that rows of one prompt differ in what their pairs have once, if they do."""
    if len({(_words(raw), _key(raw.values.get("source"))) for raw in rows}) > 1:
        return _TWO_CAPTIONS
    masks = {encoded_image(raw.values.get("mask"), raw.table) for raw in rows}
    broken = [mask for mask in masks if isinstance(mask, Fault)]
    return broken[0] if broken else _TWO_MASKS if len(masks) > 1 else None


def _key(image: Any) -> object:
    """Say what an image is told by: its name, however the path to it is written, or its bytes."""
    value = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(value, str):
        return os.path.normpath(value.strip().replace("\\", "/"))
    return value if isinstance(value, bytes) else id(image)


_TWO_CAPTIONS = Fault(
    "bad_rows", "rows of one prompt_id differ in caption or source; give each its own"
)
_TWO_MASKS = Fault(
    "bad_rows",
    "the images of one prompt have several masks, and a pair has one: give them the same, set "
    "data.mask=none, or take each image by itself (objective.name=kto)",
)
_UNRATED = Fault(
    "bad_labels",
    "no rank, score or thumb; name its column (data.columns.thumbs, scores or ranks), or label by "
    "hand: inversion-dpo web DATA --kind thumbs",
)
_ALONE = Fault("unpaired", "one image alone is no pair; add another or drop the row")


def _contradiction(rows: list[Raw], images: Any, numbers: list[float | str | None]) -> str | None:
    """Two ranks of one image, with the places of both."""
    first: dict[object, int] = {}
    for k, image in enumerate(images):
        j = first.setdefault(_key(image), k)
        if numbers[j] != numbers[k]:
            places = [rows[i].where if len(rows) > 1 else f"place {i}" for i in (j, k)]
            name = shown(image) if isinstance(image, str) else "an image"
            return (
                f"{name} has rank {shown(numbers[j])} in {places[0]} and {shown(numbers[k])} in "
                f"{places[1]}; keep one, or give the ratings of several people as "
                "data.columns.scores (higher is better)"
            )
    return None


def _ranking_fault(rows: list[Raw], images: Any, ranks: Any) -> Fault | None:
    if not isinstance(ranks, list) or len(ranks) != len(images):
        count = len(ranks) if isinstance(ranks, list) else "no"
        return Fault("bad_rows", f"{len(images)} images and {count} ranks; give one each")
    numbers = [number(rank) for rank in ranks]
    words = {str(rank).strip().lower() for rank in ranks}
    if rows[0].table.kind == "ranking" and not words.isdisjoint(("true", "false")):
        remedy = "write 1 for the best, or name the column as thumbs (data.columns.thumbs) if true"
        return Fault("bad_rows", f"ranks are {shown(ranks)}; {remedy} is the better one")
    least = 0 if rows[0].table.kind == "ranking" else -math.inf  # -1 is no place before the first
    if not all(isinstance(n, float) and least <= n < math.inf for n in numbers):
        remedy = "write a number for each image, from 0 or 1 on"
        return Fault("bad_rows", f"ranks are {shown(ranks)}; {remedy}")
    if text := _contradiction(rows, images, numbers):
        return Fault("bad_rows", text)
    return _differing(rows) or (_ALONE if len(images) < 2 else None)
