"""Write a cache's files, and tell whether they are all there and intact.

A cache holds sharded safetensors, written whole or not at all, and ``manifest.json`` last.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from inversion_dpo.run.disk import (
    DiskError,
    atomic_json,
    atomic_save,
    read_json,
    sha256_of,
    writing,
)
from inversion_dpo.run.processes import Team
from inversion_dpo.trajectories.key import CacheKey

logger = logging.getLogger(__name__)
MANIFEST, EMPTY, KEY = "manifest.json", "empty.safetensors", "key.json"


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


def is_intact(path: Path, digests: list[str], made_of: str = "", *, ours: bool = True) -> bool:
    """Tell whether a shard of these pairs was finished and has its checksum.

    Args:
        path: of the shard.
        digests: of its pairs.
        made_of: a hash of whatever else of the pairs it depends on.
        ours: whether to warn of a shard that is not so.
    """
    if not path.with_suffix(".json").exists() or not path.exists():
        return False
    entry = _entry(path) or {}
    same = is_of(path, digests, made_of) and entry.get("sha256") == sha256_of(path)
    if ours and not same:
        logger.warning("%s is damaged or of other pairs: making it again", path)
    return same


def is_of(path: Path, digests: list[str], made_of: str) -> bool:
    """Tell whether there is a shard that says it is of these pairs, without reading it whole.

    Args:
        path: of the shard.
        digests: of its pairs.
        made_of: see :func:`is_intact`.
    """
    entry = _entry(path) or {}
    return entry.get("digests") == digests and entry.get("made_of", "") == made_of


def _entry(path: Path) -> dict[str, Any] | None:
    """Read the entry of a shard that is there; None if it is none."""
    try:
        entry: dict[str, Any] = read_json(path.with_suffix(".json"))
    except (OSError, DiskError):
        return None
    return entry if path.exists() and {"digests", "sha256"} <= entry.keys() else None


def neighbours(key: CacheKey, folder: Path) -> list[Path]:
    """Find the caches beside one whose keys differ from its own by the pairs alone.

    So do those of the same file before a row was added or mended.

    Args:
        key: of the cache.
        folder: of the cache.
    """
    wanted, found = json.loads(json.dumps(asdict(key))), list[Path]()
    for file in sorted(folder.parent.glob(f"*/{KEY}")):
        try:
            known = read_json(file)
        except DiskError as error:
            logger.warning("%s. Nothing is taken over from that cache", error)
            continue
        same = isinstance(known, dict) and known | {"pairs": key.pairs} == wanted
        found += [file.parent] if same and file.parent != folder else []
    return found


def is_cached(caches: Path, pairs: str) -> bool:
    """Tell whether a finished cache is of these pairs, whatever model and settings it is of.

    Args:
        caches: the folder of caches.
        pairs: the fingerprint of their source.
    """
    for file in caches.glob(f"*/{KEY}"):
        with suppress(DiskError):
            if (file.parent / MANIFEST).exists() and read_json(file).get("pairs") == pairs:
                return True
    return False


def take_over(path: Path, digests: list[str], made_of: str, caches: Sequence[Path]) -> Path | None:
    """Link a shard from a cache that has the same one, or copy it; None if no cache has it.

    A link takes no room. A copy is for file systems that know no links.

    Args:
        path: of the shard that is missing.
        digests: of its pairs.
        made_of: see :func:`is_intact`.
        caches: :func:`neighbours`.

    Returns:
        The cache that has it.
    """
    for cache in caches:
        if not is_intact(cache / path.name, digests, made_of, ours=False):
            continue
        try:
            for name in (path.name, path.with_suffix(".json").name):  # the entry last
                _link(cache / name, path.parent / name)
        except FileNotFoundError:  # somebody deleted it meanwhile
            continue
        return cache
    return None


def _link(source: Path, target: Path) -> None:
    """Put a file under a second name, or a copy of it; DiskError if the disk refuses both."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with writing(target) as partial:
            shutil.copyfile(source, partial)


def write_shard(path: Path, tensors: dict[str, Tensor], entry: dict[str, Any]) -> None:
    """Write a shard, then its part of the manifest: without one it counts as missing.

    Args:
        path: of the safetensors file; the entry lies beside it.
        tensors: see :class:`.cache.TrajectoryCache`.
        entry: what the manifest says of the shard, as JSON.
    """
    atomic_save(tensors, path)
    atomic_json(entry | {"sha256": sha256_of(path)}, path.with_suffix(".json"))


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
    atomic_json(manifest, folder / MANIFEST)
