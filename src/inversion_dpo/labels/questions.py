"""Pairs to be asked about, from data of any format, whatever labels it holds already."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from inversion_dpo.data.columns import RANKED
from inversion_dpo.data.formats import open_rows
from inversion_dpo.data.images import DataError
from inversion_dpo.data.rankings import rows_of
from inversion_dpo.data.rows import Raw, inspect
from inversion_dpo.data.source import content
from inversion_dpo.run.fields import DataConfig


class WebError(ValueError):
    """What the page cannot be started or exported with; the message names the remedy."""


@dataclass(frozen=True)
class Question:
    """Two encoded images (JPEG, PNG or WebP) of one caption; a single one is there twice.

    pair: 16 hex digits, a hash of caption and images, the same for either order of the images.
    seeds: of the noise that each was sampled from, if the data say.
    source: the encoded image that both edit, if they do. mask: an encoded image, white where errors
    count, if the data say. group: of the prompt, if it has an id.
    """

    pair: str
    caption: str
    images: tuple[bytes, bytes]
    scene_graph: str | None
    seeds: tuple[int | None, ...] = ()
    source: bytes | None = None
    mask: bytes | None = None
    group: str | None = None


def questions(
    config: DataConfig, limit: int | None, counts: Counter[str], *, alone: bool = False
) -> Iterator[Question]:
    """Give the first ``limit`` pairs of the data, or its images one by one (``alone``).

    Labels in the data are not looked at, and each pair is given once. ``counts`` is told what is
    left out: ``identical`` (one image twice), ``unpaired``, ``ties`` of rankings, and ``skipped``
    rows, which cannot be used; also ``beyond``, 1 if there are rows beyond the limit.

    Raises:
        DataError: no such data, or a row that cannot be used unless ``on_bad_row`` is skip.
    """
    seen = dict[str, tuple[str, bytes]]()  # pair -> its first row, and a hash of the mask there
    raws = (_unlabelled(raw, alone) for raw in open_rows(config).rows())
    for row in rows_of(raws, config.ranking, alone=alone):
        if limit is not None and counts["pairs"] >= limit:
            counts["beyond"] = 1
            return
        if row.left_out:
            counts[row.left_out] += 1
            continue
        faults, _ = inspect(row)
        if faults and config.on_bad_row == "error":
            raise DataError(f"{faults[0].text}, or set data.on_bad_row=skip")
        counts.update(["skipped"] if faults else [])
        each = [(i, i) for i in dict.fromkeys(row.encoded)] if alone else [row.encoded]
        for images in [] if faults else each:
            named = content(replace(row, images=images)).hex()
            source, mask = (i if isinstance(i, bytes) else None for i in (row.source, row.mask))
            masked = hashlib.sha256(mask or b"").digest()
            if named in seen:
                where, first = seen[named]
                if first != masked and config.on_bad_row == "error":
                    raise DataError(
                        f"{row.where}: the mask is another than in {where}, and what is asked "
                        "about has one: give them the same, or set data.mask=none"
                    )
                counts["skipped"] += first != masked
                continue
            seen[named] = row.where, masked
            counts["pairs"] += 1
            seeds = () if alone else row.seeds
            told = (row.caption or "", images, row.scene_graph)
            yield Question(named, *told, seeds, source, mask, row.group)


def _unlabelled(raw: Raw, alone: bool) -> Raw:
    """Give the row any valid label, so that both images of a tie or unlabelled row are read."""
    said = dict.fromkeys(("label_1", "has_label", "share_1", "preference_0", "votes"))
    values = {**raw.values, **said, "label_0": 1.0, "share_0": 1.0, "choice": "first"}
    if alone and raw.table.kind in RANKED and not raw.fault:
        images = values.get("images")
        thumbs = [1.0] * len(images) if isinstance(images, list) else 1.0
        return replace(
            raw, table=replace(raw.table, kind="thumbs"), values=values | {"thumbs": thumbs}
        )
    return replace(raw, values=values)
