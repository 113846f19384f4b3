"""What a path or a hub id is, and how its rows are read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from inversion_dpo.data.annotations import NAMES, annotation_file, read_annotated
from inversion_dpo.data.columns import RANKED, Table, our_names
from inversion_dpo.data.folders import (
    BESIDE,
    KINDS,
    captions_of,
    nothing_in,
    read_folders,
    read_thumbs,
    two_folders,
)
from inversion_dpo.data.images import DataError
from inversion_dpo.data.rows import Fault, Raw, image_paths, is_hidden, number
from inversion_dpo.data.shards import read_shard
from inversion_dpo.data.tables import SPREADSHEETS, TEXTS, read_dataset, read_parquet, read_text
from inversion_dpo.run.config import resolve
from inversion_dpo.run.disk import sha256_of
from inversion_dpo.run.fields import DataConfig

HUB = "hf:"
_METADATA = ("metadata.csv", "metadata.jsonl")
_SAVED = ("state.json", "dataset_dict.json")
_SPLIT = re.compile(r"(train|val|test|dev|eval)[a-z_]*", re.IGNORECASE)  # begins a file's name
_SUFFIXES = {
    ".parquet": "parquet",
    **dict.fromkeys(TEXTS, "table"),
    **dict.fromkeys((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"), "webdataset"),
}
_SHARED = ("parquet", "webdataset")  # kinds of which several files in a folder are one source
_READERS: dict[str, Callable[[Path, Mapping[str, str]], Iterator[Raw]]] = {
    "parquet": read_parquet,
    "table": read_text,
    "webdataset": read_shard,
}


@dataclass(frozen=True)
class Opened:
    """Rows that can be read again and again.

    identity: says the SHA-256 of their source. count: says how many pairs they may give, without
    reading an image; None if that cannot be known.
    """

    rows: Callable[[], Iterator[Raw]]
    identity: Callable[[], str]
    count: Callable[[], int | None] = lambda: None


def open_rows(config: DataConfig) -> Opened:
    """Find out what the data is and prepare to read it, without masks that do not count.

    Local data is identified by the SHA-256 of its files, those that a table names included; a
    stream from the hub by dataset, commit, configuration and split.
    """
    opened = _opened(config)
    if config.mask == "given":
        return opened
    return replace(opened, rows=lambda: map(_without_mask, opened.rows()))


def _without_mask(raw: Raw) -> Raw:
    table = replace(raw.table, names={k: v for k, v in raw.table.names.items() if k != "mask"})
    return replace(raw, table=table, values={**raw.values, "mask": None})


def _opened(config: DataConfig) -> Opened:
    columns, given = our_names(config.columns), resolve(config.pairs)
    path = Path(given)
    if given.startswith(HUB) and config.format not in ("auto", "dataset"):
        raise DataError(
            f"data.format={config.format} has no effect on {given}, which is read as a dataset; "
            "download it and give the folder, or leave data.format out"
        )
    if given.startswith(HUB):
        _check_effects(config, "dataset")
        return _open_hub(given, config)
    if not path.exists():
        raise DataError(f"{path} does not exist; give a file, a folder or hf:OWNER/NAME")
    if path.is_file() and config.format in (*KINDS, "dataset"):
        raise DataError(
            f"{path} is a file, and data.format={config.format} reads a folder; give it"
        )
    if path.is_file():
        kind, files = _kind_of(path) if config.format == "auto" else config.format, [path]
    else:
        kind, files = _inside(path, config.format, columns)
    _check_effects(config, kind)
    if kind == "dataset":
        return _open_saved(path, config.split, columns)
    if splits := _splits(files) if kind in _SHARED else {}:
        if config.split not in splits:
            raise DataError(
                f"{path} holds files of several splits; set data.split to one of "
                f"{', '.join(splits)}"
            )
        files = splits[config.split]
    elif config.split != DataConfig().split:
        raise DataError(
            f"data.split={config.split} has no effect: {path} is no dataset with splits. Leave it "
            "out, or give the split's own file"
        )
    if kind == "annotated":
        return _open_annotated(path)
    if kind in KINDS:
        return _open_folders(path, columns, kind, masked=config.mask == "given")
    if kind == "hpdv3":  # path1 is the preferred image of each row
        kind, columns = "table", {"winner": "path1", "loser": "path2", **columns}
    root = Path(config.root).expanduser() if config.root else None
    if root and not root.is_dir():
        raise DataError(f"data.root={root} is no folder; give the one that holds the images")
    opened = _open_files(files, kind, columns, root)
    return replace(opened, rows=lambda: chain(opened.rows(), _hidden(path)))


def _check_effects(config: DataConfig, kind: str) -> None:
    """Refuse settings that change nothing in data of a kind."""
    named = our_names(config.columns)
    beside = dict.fromkeys(KINDS, ("winner", "loser", *BESIDE))
    taken = {"annotated": (), **beside}.get(kind, (*named,))
    idle = [f"data.columns.{name}" for name in named if name not in taken]
    idle += ["data.root"] * bool(config.root and kind in ("dataset", "annotated", *KINDS))
    if idle:
        raise DataError(
            f"{idle[0]} has no effect: {config.pairs} is read as data.format={kind}. Leave it out"
        )


def _open_files(
    files: list[Path], kind: str, columns: Mapping[str, str], root: Path | None
) -> Opened:
    """Tables or shards below one another; ``root`` holds the images that tables name."""

    def read(file: Path) -> Iterator[Raw]:
        for raw in _READERS[kind](file, columns):
            if root and raw.table.folder is None:
                raise DataError(
                    f"data.root={root} has no effect: {file} holds its images. Leave it out"
                )
            yield replace(raw, table=replace(raw.table, root=root)) if root else raw

    def identity() -> str:
        named: list[Path] = []
        for file in files if kind != "webdataset" else ():
            for raw in read(file):
                if raw.table.folder is None:  # images are embedded
                    break
                named += image_paths(raw)
        return _digest([*files, *named])

    return Opened(
        lambda: chain.from_iterable(map(read, files)),
        identity,
        partial(_count, files, kind, columns),
    )


def _count(files: list[Path], kind: str, columns: Mapping[str, str]) -> int | None:
    """Labelled rows that are no ties; None for rankings and shards, which must be read for it."""
    if kind == "webdataset":
        return None
    read = partial(read_parquet, only=("label_0",)) if kind == "parquet" else _READERS[kind]
    raws = [raw for file in files for raw in read(file, columns)]
    if any(raw.table.kind in RANKED for raw in raws):
        return None
    return sum(1 for raw in raws if number(raw.values.get("label_0")) != 0.5)


def _hidden(folder: Path) -> Iterator[Raw]:
    """Give what systems put beside the data, to be counted and left out."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_hidden(file.name) and file.is_file():
            yield Raw(file.name, Table("chosen", {}), {}, Fault("hidden", "not of the data"))


def _suffix(file: Path) -> str:
    """Find the suffix by which a format is known, such as .tar.gz."""
    name = file.name.lower()
    return next((s for s in _SUFFIXES if name.endswith(s)), file.suffix.lower())


def _kind_of(file: Path) -> str:
    """Find the format of a file by its suffix, or else by its first bytes."""
    if file.suffix.lower() in SPREADSHEETS:
        raise DataError(f"{file} is a spreadsheet; save it as CSV (UTF-8) and give that file")
    kind = _SUFFIXES.get(_suffix(file))
    if kind is None:
        with file.open("rb") as stream:
            kind = "parquet" if stream.read(4) == b"PAR1" else None
    if kind is None:
        raise DataError(
            f"{file} is none of {', '.join(_SUFFIXES)}; export it as one of them, unpack an "
            "archive, or say what it is (data.format)"
        )
    return kind


def _inside(folder: Path, asked: str, columns: Mapping[str, str]) -> tuple[str, list[Path]]:
    """Find the format of a folder by what it holds, unless it is asked for, and its files."""
    there = sorted(f for f in folder.iterdir() if not is_hidden(f.name))
    held = {
        "dataset": [f for f in there if f.name in _SAVED],
        "annotated": [f for f in there if f.name in NAMES],
        "table": [f for f in there if f.name in _METADATA],
        **{kind: [f for f in there if _SUFFIXES.get(_suffix(f)) == kind] for kind in _SHARED},
    }
    tables = [f for f in there if f.suffix.lower() in (*TEXTS, *SPREADSHEETS)]
    if len(tables) == 1 and (asked in ("table", "hpdv3") or not any(held.values())):
        folders = any(two_folders(folder, columns, kind) for kind in KINDS)
        if not (asked == "auto" and folders) or _of_pairs(tables[0], columns):
            held[asked if asked != "auto" else _kind_of(tables[0])] = tables
    for kind in KINDS:
        if asked == kind or not any(held.values()):
            held[kind] = [folder / n for n in two_folders(folder, columns, kind).values()]
    kinds = [kind for kind in held if held[kind]] if asked == "auto" else [asked]
    if len(kinds) > 1:
        raise DataError(f"{folder} holds several formats; choose data.format={' or '.join(kinds)}")
    if not kinds:
        raise DataError(nothing_in(folder, _is_data))
    kind, files = kinds[0], held.get(kinds[0], [])
    if not files:
        more = ", or name both: data.columns.winner=NAME data.columns.loser=NAME" * (kind in KINDS)
        raise DataError(f"{folder} holds nothing of data.format={kind}; give one that does{more}")
    if kind == "table" and len(files) > 1:
        raise DataError(f"{folder} holds both {' and '.join(_METADATA)}; give one as the path")
    for file in folder.rglob("*") if kind == "dataset" else files:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise DataError(
                f"{file} is a link out of {folder}; put the file itself there, or give it as the "
                "path"
            )
    return kind, files


def _of_pairs(file: Path, columns: Mapping[str, str]) -> bool:
    """Tell whether a table has pairs, rankings or thumbs, rather than notes on the images."""
    try:
        return next(read_text(file, columns)).table.kind != "unrated"
    except (DataError, StopIteration):
        return False


def _is_data(file: Path) -> bool:
    """Tell whether a folder with this file in it is data, whatever else is there."""
    return _SUFFIXES.get(_suffix(file)) in _SHARED or file.name in (*_METADATA, *_SAVED, *NAMES)


def _splits(files: list[Path]) -> dict[str, list[Path]]:
    """Sort files by the split that begins their names, as in test-00000-of-00002.parquet.

    Empty if they tell of no two kinds of splits, or one is of no split.
    """
    found: dict[str, list[Path]] = {}
    kinds: set[str] = set()
    for file in files:
        if not (begins := _SPLIT.match(file.name)):
            return {}
        kinds.add(begins[1].lower())
        found.setdefault(re.split(r"[-_.]\d|\.", file.name)[0], []).append(file)
    return found if len(kinds) > 1 else {}


def _digest(files: Iterable[Path]) -> str:
    """SHA-256 of the files' own digests, in order."""
    total = hashlib.sha256()
    for file in files:
        total.update(bytes.fromhex(sha256_of(file)))
    return total.hexdigest()


def _open_folders(path: Path, columns: Mapping[str, str], kind: str, *, masked: bool) -> Opened:
    """Images in two folders, with caption files: pairs of equal names, or liked and disliked."""
    names = two_folders(path, columns, kind)
    names = {k: name for k, name in names.items() if masked or k != "mask"}
    rows = partial(read_thumbs if kind == "thumbs" else read_folders, path, names)

    def identity() -> str:
        images = chain.from_iterable(map(image_paths, rows()))
        return _digest([*captions_of(path, names.values()), *images])

    return Opened(rows, identity)


def _open_annotated(path: Path) -> Opened:
    """Images with scene graphs (LAION-SG's): pairs of an image and itself, neither better."""
    file = annotation_file(path)

    def rows() -> Iterator[Raw]:
        table = Table("single", {"winner": "image", "loser": "image"}, file.parent)
        images, problems = read_annotated(file)
        for image in images:
            name = str(image.path.relative_to(file.parent))
            said = {"caption": image.caption, "scene_graph": image.graph.to_json()}
            yield Raw(image.where, table, {"winner": name, "loser": name, **said})
        yield from (Raw(file.name, table, {}, Fault("bad_rows", text)) for text in problems)

    def identity() -> str:
        return _digest([file, *(image.path for image in read_annotated(file)[0])])

    return Opened(rows, identity, lambda: len(read_annotated(file)[0]))


def _open_saved(path: Path, split: str, columns: Mapping[str, str]) -> Opened:
    import datasets

    name = path.name
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets lets any error of a damaged file through
        raise DataError(f"{path} cannot be loaded ({error}); save_to_disk it again") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(
                f"{path} has no split {split!r}; set data.split to one of "
                f"{', '.join(map(str, dataset))}"
            )
        dataset, name, path = dataset[split], f"{path.name}/{split}", path / split
    rows = partial(read_dataset, dataset, name, columns)
    files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
    return Opened(rows, partial(_digest, files), lambda: len(dataset))


def _open_hub(data: str, config: DataConfig) -> Opened:
    """Stream ``hf:OWNER/NAME`` or ``hf:OWNER/NAME:CONFIGURATION`` at one commit."""
    name, _, configuration = data.removeprefix(HUB).partition(":")
    commit, folder = _commit(name, config.revision)
    place, revision = (folder, None) if folder else (name, commit)  # the folder is the commit

    def rows() -> Iterator[Raw]:
        dataset = _hub_stream(place, configuration or None, config.split, revision)
        yield from read_dataset(dataset, data, config.columns)

    source = json.dumps([name, configuration, config.split, commit])
    return Opened(rows, lambda: hashlib.sha256(source.encode()).hexdigest())


def _commit(name: str, revision: str | None) -> tuple[str, str]:
    """Find the commit that a branch or tag stands for, and its folder in the hub's cache, if any.

    Offline (HF_HUB_OFFLINE=1) the whole repository must lie there. A commit that is given in full
    needs no network.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    offline = constants.HF_HUB_OFFLINE
    if not offline and revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision, ""
    try:
        if not offline:
            return str(HfApi().dataset_info(name, revision=revision).sha), ""
        folder = snapshot_download(name, repo_type="dataset", revision=revision)
        return Path(folder).name, folder
    except Exception as error:  # the hub's own errors and those of the network below
        if offline:
            raise DataError(
                f"{HUB}{name} at {revision or 'main'} is not in the hub's cache (HF_HOME), and "
                "HF_HUB_OFFLINE=1 keeps it from being streamed: download it first "
                f"(hf download --repo-type dataset {name}), or give data.revision as it is there"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{HUB}{name}: the hub does not say which commit {revision or 'main'} is ({reason}); "
            "check the name and the network, or give the commit as data.revision"
        ) from error


def _hub_stream(name: str, configuration: str | None, split: str, revision: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            name, configuration, split=split, revision=revision, streaming=True
        )
    except Exception as error:  # unknown names, configurations and splits each have their own
        reason = " ".join(str(error).split())[:400]
        raise DataError(
            f"{HUB}{name} cannot be streamed ({reason}); check name, data.split and data.revision"
        ) from error
