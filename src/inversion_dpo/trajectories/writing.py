"""Write a cache's files, and tell whether they are all there and intact.

A cache holds sharded safetensors, written whole or not at all, and ``manifest.json`` last.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from inversion_dpo.run.disk import (
    DiskError,
    atomic_save,
    atomic_text,
    read_json,
    sha256_of,
)
from inversion_dpo.run.processes import Team

logger = logging.getLogger(__name__)
MANIFEST, EMPTY = "manifest.json", "empty.safetensors"


def damaged_files(folder: Path, team: Team) -> list[Path]:
    """List files of a finished cache that are missing or differ from the manifest's checksum.

    Each process reads its share of the files, and all get the whole list.
    """
    listed = sorted(read_json(folder / MANIFEST)["shards"].items())
    mine = [(folder / name, digest) for name, digest in listed[team.rank :: team.size]]
    damaged = [str(p) for p, digest in mine if not p.exists() or sha256_of(p) != digest]
    return [Path(p) for p in sorted(team.collect(damaged))]


def is_whole(folder: Path, team: Team) -> bool:
    """Tell whether a cache is finished and every file intact; name and delete damaged ones."""
    finished = (folder / MANIFEST).exists()
    try:
        damaged = damaged_files(folder, team) if finished else []
    except DiskError as error:
        logger.warning("%s. It is made again", error)
        return False
    if damaged and team.main:
        for path in damaged:
            logger.warning("%s is missing or damaged (checksum differs): making it again", path)
            path.unlink(missing_ok=True)
        (folder / MANIFEST).unlink()
    team.wait()
    return finished and not damaged


def is_intact(path: Path, digests: list[str]) -> bool:
    """Tell whether a shard of these pairs was finished and has its checksum."""
    try:
        entry = json.loads(path.with_suffix(".json").read_text())
        same = entry["digests"] == digests and entry["sha256"] == sha256_of(path)
    except (FileNotFoundError, ValueError, KeyError):
        return False
    if not same:
        logger.warning("%s is damaged or of other pairs: making it again", path)
    return bool(same)


def write_shard(path: Path, tensors: dict[str, Tensor], entry: dict[str, Any]) -> None:
    """Write a shard, then its part of the manifest: without one it counts as missing.

    Args:
        path: of the safetensors file; the entry lies beside it.
        tensors: see :class:`.cache.TrajectoryCache`.
        entry: what the manifest says of the shard, as JSON.
    """
    atomic_save(tensors, path)
    atomic_text(json.dumps(entry | {"sha256": sha256_of(path)}), path.with_suffix(".json"))


def write_manifest(folder: Path, about: dict[str, Any], names: Sequence[str]) -> None:
    """Join the parts of all shards, whichever process wrote them, and what is known besides.

    ``digests``, ``images``, ``errors``, ``places`` and ``texts``, the [shard, row] of each pair and
    of its condition, are in the order of the numbers of pairs; ``sizes`` has one (height, width)
    for each shard.

    Args:
        folder: of the cache; every shard has its entry there.
        about: key, counts and what was left out.
        names: file names of all shards, in order.
    """
    entries = [read_json((folder / name).with_suffix(".json")) for name in names]
    cut: Counter[str] = Counter()
    for entry in entries:
        cut.update(entry["overlong"])
    rows = sorted(
        (number, [shard, row])
        for shard, entry in enumerate(entries)
        for row, number in enumerate(entry["pairs"])
    )
    places = [place for _, place in rows]
    manifest = about | {
        "pairs": len(places),
        "overlong": dict(cut),
        "digests": [entries[shard]["digests"][row] for shard, row in places],
        "images": [entries[s]["images"][r] for s, r in places if "images" in entries[s]],
        "errors": [e for s, r in places for e in entries[s]["errors"][r : r + 1]],
        "texts": [entries[shard]["texts"][row] for shard, row in places],
        "places": places,
        "sizes": [entry["size"] for entry in entries],
        "shards": {n: e["sha256"] for n, e in zip(names, entries, strict=True)},
    }
    if (folder / EMPTY).exists():
        manifest["shards"][EMPTY] = sha256_of(folder / EMPTY)
    atomic_text(json.dumps(manifest, indent=1), folder / MANIFEST)
