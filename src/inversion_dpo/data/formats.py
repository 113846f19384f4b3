"""What a path or a hub id is, and how its rows are read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from inversion_dpo.data.annotations import NAMES, annotation_file, read_annotated
from inversion_dpo.data.columns import KNOWN, Layout
from inversion_dpo.data.images import DataError
from inversion_dpo.data.rankings import SCHEMES
from inversion_dpo.data.rows import Fault, Raw, Table, image_paths, number
from inversion_dpo.data.shards import read_shard
from inversion_dpo.data.tables import read_dataset, read_labels, read_parquet, read_text
from inversion_dpo.run.disk import sha256_of

FORMATS = ("auto", "parquet", "table", "webdataset", "dataset", "annotated")
HUB = "hf:"
_METADATA = ("metadata.csv", "metadata.jsonl")
_SAVED = ("state.json", "dataset_dict.json")
_SUFFIXES = {
    ".parquet": "parquet",
    ".csv": "table",
    ".json": "table",
    ".jsonl": "table",
    ".tar": "webdataset",
}
Reader = Callable[[Path, Mapping[str, str]], Iterator[Raw]]
_READERS: dict[str, Reader] = {
    "parquet": read_parquet,
    "table": read_text,
    "webdataset": read_shard,
}


@dataclass(frozen=True)
class Reading:
    """How to read: everything but the path that changes which pairs come out.

    format: one of FORMATS. split, revision: of Hugging Face datasets. columns: ours to theirs,
    see :data:`columns.KNOWN`. ranking: which pairs a ranking gives, one of rankings.SCHEMES.

    Raises:
        DataError: an unknown format, column or ranking.
    """

    format: str = "auto"
    split: str = "train"
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    ranking: str = "best_worst"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("format", self.format, FORMATS),
            ("ranking", self.ranking, SCHEMES),
            *(("columns", ours, tuple(KNOWN)) for ours in self.columns),
        ):
            if value not in allowed:
                raise DataError(f"data.{name}: {value!r} is not one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Opened:
    """Rows that can be read again and again.

    identity: says the SHA-256 of their source. count: says how many pairs they may give, without
    reading an image; None if that cannot be known.
    """

    rows: Callable[[], Iterator[Raw]]
    identity: Callable[[], str]
    count: Callable[[], int | None] = lambda: None


def open_rows(data: str | Path, reading: Reading) -> Opened:
    """Find out what the data is and prepare to read it.

    Local data is identified by the SHA-256 of its files, those that a table names included; a
    stream from the hub by dataset, commit, configuration and split.

    Raises:
        DataError: no such file, dataset or split, or a folder of nothing that is known.
    """
    if str(data).startswith(HUB):
        return _open_hub(str(data), reading)
    path = Path(data)
    if not path.exists():
        raise DataError(f"{path} does not exist; give a file, a folder or hf:OWNER/NAME")
    kind = _detect(path) if reading.format == "auto" else reading.format
    if kind == "annotated":
        return _open_annotated(path)
    if kind == "dataset":
        return _open_saved(path, reading)
    files = _inside(path, _files(path, kind))
    read = _READERS[kind]

    def rows() -> Iterator[Raw]:
        for file in files:
            yield from read(file, reading.columns)

    def identity() -> str:
        named = () if kind == "webdataset" else _named(files, read, reading.columns)
        return _digest([*files, *named])

    return Opened(rows, identity, partial(_count, files, kind, reading.columns))


def _count(files: list[Path], kind: str, columns: Mapping[str, str]) -> int | None:
    """Labelled rows that are no ties; None for rankings and shards, which must be read for it."""
    if kind == "webdataset":
        return None
    read = read_labels if kind == "parquet" else read_text
    raws = [raw for file in files for raw in read(file, columns)]
    if any(raw.table.layout.kind in ("ranking", "choice") for raw in raws):
        return None
    return sum(1 for raw in raws if number(raw.values.get("label_0")) != 0.5)


def _detect(path: Path) -> str:
    """The format by the file's suffix, or by what the folder holds."""
    if path.is_file():
        return _detect_file(path)
    found = {
        "dataset": any((path / name).is_file() for name in _SAVED),
        "annotated": any((path / name).is_file() for name in NAMES),
        "table": any((path / name).is_file() for name in _METADATA),
        "parquet": bool(_matching(path, ".parquet")),
        "webdataset": bool(_matching(path, ".tar")),
    }
    there = [kind for kind, seen in found.items() if seen]
    if len(there) > 1:
        raise DataError(f"{path} holds several formats; choose data.format={' or '.join(there)}")
    if not there:
        raise DataError(
            f"{path} holds no *.parquet files, no *.tar shards, no metadata.csv or metadata.jsonl "
            "(another table: give the file itself), no annotations.json and no saved dataset; "
            "give the folder that does"
        )
    return there[0]


def _detect_file(path: Path) -> str:
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        with path.open("rb") as stream:
            kind = "parquet" if stream.read(4) == b"PAR1" else None
    if kind is None:
        raise DataError(
            f"{path} is none of {', '.join(_SUFFIXES)}; export it as one of them, unpack an "
            "archive, or say what it is (data.format)"
        )
    return kind


def _files(path: Path, kind: str) -> list[Path]:
    if path.is_file():
        return [path]
    if kind == "table":
        files = [path / name for name in _METADATA if (path / name).is_file()]
        if len(files) > 1:
            raise DataError(f"{path} holds both {' and '.join(_METADATA)}; give one as the path")
    else:
        files = _matching(path, ".parquet" if kind == "parquet" else ".tar")
    if not files:
        raise DataError(f"{path} holds nothing of data.format={kind}; give the folder that does")
    return files


def _inside(path: Path, files: list[Path]) -> list[Path]:
    """The files; DataError for a link that leads out of the folder ``path``."""
    for file in files if path.is_dir() else ():
        if not file.resolve().is_relative_to(path.resolve()):
            raise DataError(
                f"{file} is a link out of {path}; put the file itself there, or give it as the path"
            )
    return files


def _matching(path: Path, suffix: str) -> list[Path]:
    return sorted(
        f for f in path.iterdir() if f.suffix.lower() == suffix and not f.name.startswith(".")
    )


def _named(files: list[Path], read: Reader, columns: Mapping[str, str]) -> Iterator[Path]:
    """The image files that tables name, in order; ends at once where images are embedded."""
    for file in files:
        for raw in read(file, columns):
            if raw.table.folder is None:
                break
            yield from image_paths(raw)


def _digest(files: Iterable[Path]) -> str:
    """SHA-256 of the files' own digests, in order."""
    total = hashlib.sha256()
    for file in files:
        total.update(bytes.fromhex(sha256_of(file)))
    return total.hexdigest()


def _open_annotated(path: Path) -> Opened:
    """Images with scene graphs (LAION-SG's): pairs of an image and itself, neither better."""
    file = annotation_file(path)

    def rows() -> Iterator[Raw]:
        table = Table(Layout("single", {"winner": "image", "loser": "image"}), file.parent)
        images, problems = read_annotated(file)
        for image in images:
            name = str(image.path.relative_to(file.parent))
            said = {"caption": image.caption, "scene_graph": image.graph.to_json()}
            yield Raw(image.where, table, {"winner": name, "loser": name, **said})
        yield from (Raw(file.name, table, {}, Fault("bad_rows", text)) for text in problems)

    def identity() -> str:
        return _digest([file, *(image.path for image in read_annotated(file)[0])])

    return Opened(rows, identity, lambda: len(read_annotated(file)[0]))


def _open_saved(path: Path, reading: Reading) -> Opened:
    import datasets

    name = path.name
    _inside(path, list(path.rglob("*")))
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets lets any error of a damaged file through
        raise DataError(f"{path} cannot be loaded ({error}); save_to_disk it again") from error
    if isinstance(dataset, datasets.DatasetDict):
        if reading.split not in dataset:
            raise DataError(
                f"{path} has no split {reading.split!r}; set data.split to one of "
                f"{', '.join(map(str, dataset))}"
            )
        dataset, name = dataset[reading.split], f"{path.name}/{reading.split}"
        path = path / reading.split
    rows = partial(read_dataset, dataset, name, reading.columns)
    files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
    return Opened(rows, partial(_digest, files), lambda: len(dataset))


def _open_hub(data: str, reading: Reading) -> Opened:
    """Stream ``hf:OWNER/NAME`` or ``hf:OWNER/NAME:CONFIGURATION`` at one commit.

    Offline (HF_HUB_OFFLINE=1) from the hub's cache, where the whole repository must lie.
    """
    from huggingface_hub import constants

    name, _, configuration = data.removeprefix(HUB).partition(":")
    cached = _cached(name, reading.revision) if constants.HF_HUB_OFFLINE else None
    revision = cached.name if cached else _commit(name, reading.revision)

    def rows() -> Iterator[Raw]:
        if cached:  # this folder is the commit
            dataset = _hub_stream(str(cached), configuration or None, reading.split, None)
        else:
            dataset = _hub_stream(name, configuration or None, reading.split, revision)
        yield from read_dataset(dataset, data, reading.columns)

    source = json.dumps([name, configuration, reading.split, revision])
    return Opened(rows, lambda: hashlib.sha256(source.encode()).hexdigest())


def _cached(name: str, revision: str | None) -> Path:
    """The folder of a dataset's commit in the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision))
    except Exception as error:  # one for a missing repository, others for a bad name
        raise DataError(
            f"{HUB}{name} at {revision or 'main'} is not in the hub's cache (HF_HOME), and "
            "HF_HUB_OFFLINE=1 keeps it from being streamed: download it first "
            f"(hf download --repo-type dataset {name}), or give data.revision as it is there"
        ) from error


def _commit(name: str, revision: str | None) -> str:
    """The commit that a branch or tag stands for now; one given in full needs no network."""
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    try:
        sha = HfApi().dataset_info(name, revision=revision).sha
    except Exception as error:  # the hub's own errors and those of the network below
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{HUB}{name}: the hub does not say which commit {revision or 'main'} is ({reason}); "
            "check the name and the network, or give the commit as data.revision"
        ) from error
    return str(sha)


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


def fingerprint(opened: Opened, reading: Reading, limit: int | None, on_bad_row: str) -> str:
    """SHA-256 over everything that changes which pairs come out."""
    settings = asdict(reading) | {"columns": dict(sorted(reading.columns.items()))}
    plain = json.dumps([opened.identity(), settings, limit, on_bad_row])
    return hashlib.sha256(plain.encode()).hexdigest()
