"""The dataset that a build with splits gives: Parquet shards, card, pictures, checksums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inversion_dpo.data.images import DataError
from inversion_dpo.evaluation.sides import details_of
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.graphs.scene_key import SceneKey
from inversion_dpo.making_pairs.candidates import (
    Labelled,
    graph_of,
    pair_rows,
    schema_of,
    write_rows,
)
from inversion_dpo.run.config import Config, to_yaml
from inversion_dpo.run.disk import atomic_folder, atomic_text, sha256_of
from inversion_dpo.run.words import counted

SHARD = 2000  # pairs in a file
CHECKSUMS = "SHA256SUMS"


def write_dataset(
    config: Config, output: Path, splits: Mapping[str, Sequence[Labelled]]
) -> dict[str, int]:
    """Write OUTPUT/dataset, whole or not at all; returns the number of pairs by file.

    Args:
        config: the run's settings.
        output: the folder of the command.
        splits: labelled pairs, by the name of the split.

    Raises:
        DataError: a scene stands in two splits, or an image in two pairs.
    """
    from inversion_dpo.making_pairs.card import write_card

    refuse_leaks(splits)
    refuse_repeats(splits)
    made: dict[str, int] = {}

    def write(folder: Path) -> None:
        seed, edited = config.build.seed, details_of(config.build.prompts).source_of
        shards = {split: pair_rows(pairs, seed, edited) for split, pairs in splits.items()}
        for split, rows in shards.items():
            made.update(write_shards(folder / split, split, rows))
        atomic_text(to_yaml(config), folder / "config.yaml")
        write_card(folder, config, shards)
        write_checksums(folder)

    atomic_folder(output / "dataset", write)
    return {f"dataset/{name}": count for name, count in made.items()}


def write_shards(folder: Path, split: str, rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """``SPLIT-00000-of-00003.parquet`` and so on, as the hub names them; rows by file.

    A split has a folder of its own, so that it can be given as ``data.pairs``.
    """
    parts = [rows[k : k + SHARD] for k in range(0, len(rows), SHARD)]
    made = {}
    for k, part in enumerate(parts):
        name = f"{split}-{k:05d}-of-{len(parts):05d}"
        write_rows(folder / f"{name}.parquet", part, schema_of(rows))
        made[f"{split}/{name}"] = len(part)
    return made


def refuse_leaks(splits: Mapping[str, Sequence[Labelled]]) -> None:
    """Raise DataError if a scene stands in more than one split."""
    graphs = {
        split: [graph_of(p.winner.caption, p.winner.scene_graph) for p in pairs]
        for split, pairs in splits.items()
    }
    if found := leaks(graphs):
        raise DataError(
            f"{counted(len(found), 'scene leaks', 'scenes leak')} between splits, the first: "
            f"{found[0]}"
        )


def leaks(splits: Mapping[str, Iterable[SceneGraph]]) -> list[str]:
    """List each scene that stands in more than one split."""
    seen: dict[SceneKey, str] = {}
    found = []
    for split, graphs in splits.items():
        for graph in graphs:
            first = seen.setdefault(SceneKey(graph), split)
            if first != split:
                found.append(f"{graph.caption!r} stands in {first} and in {split}")
    return found


def refuse_repeats(splits: Mapping[str, Sequence[Labelled]]) -> None:
    """Raise DataError if an image, by its bytes, stands in more than one pair."""
    images = [c.jpg for pairs in splits.values() for p in pairs for c in (p.winner, p.loser)]
    if repeated := len(images) - len(set(images)):
        raise DataError(
            f"{counted(repeated, 'image stands', 'images stand')} in more than one pair; set "
            "build.once=true"
        )


def write_checksums(folder: Path) -> None:
    """SHA-256 of every file, as ``sha256sum --check`` reads it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    lines = [f"{sha256_of(p)}  {p.relative_to(folder).as_posix()}\n" for p in files]
    atomic_text("".join(lines), folder / CHECKSUMS)
