"""Two folders of images with equal names: the better ones in one, the worse in the other."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from inversion_dpo.data.columns import Table
from inversion_dpo.data.images import DataError
from inversion_dpo.data.rows import IMAGES, PICTURES, Fault, Raw, is_hidden
from inversion_dpo.data.tables import text_of
from inversion_dpo.data.vocabulary import DOWNS, UPS
from inversion_dpo.run.words import counted

WINNERS = ("w", "winner", "winners", "chosen", "good", "better", "preferred", "win")
LOSERS = ("l", "loser", "losers", "rejected", "bad", "worse", "lose")
BESIDE = {  # folders of images with the names of the others: what is edited, and what counts
    "source": ("source", "sources"),
    "mask": ("mask", "masks"),
}
CAPTIONS = (".txt", ".caption")  # suffixes of caption files, also in capitals


def subfolders(folder: Path) -> list[str]:
    """List the names of the folders in a folder."""
    return sorted(f.name for f in folder.iterdir() if f.is_dir() and not is_hidden(f.name))


KINDS = {"folders": (WINNERS, LOSERS), "thumbs": (UPS, DOWNS)}


def two_folders(folder: Path, columns: Mapping[str, str], kind: str) -> dict[str, str]:
    """Find the folders of the better and the worse images, and any of sources and masks.

    The names are those of data.columns, or known ones; ours -> theirs, or nothing if one of the two
    is missing.

    Args:
        folder: that holds them.
        columns: ``data.columns``, ours to theirs.
        kind: one of ``KINDS``: pairs of equal names, or thumbs.
    """
    there = {name.lower(): name for name in subfolders(folder)}
    known = dict(zip(("winner", "loser"), KINDS[kind], strict=True)) | BESIDE
    found = dict[str, str]()
    for ours, usual in known.items():
        own = columns.get(ours, "").lower()
        if name := next((there[n] for n in ([own] if own else usual) if n in there), ""):
            found[ours] = name
        elif ours not in BESIDE:
            return {}
        elif own:
            raise DataError(f"data.columns.{ours}={own} is no folder in {folder}; put it there")
    return found


def nothing_in(folder: Path, is_data: Callable[[Path], bool]) -> str:
    """Say that a folder holds no data, and which folder in it does.

    Args:
        folder: without data of its own.
        is_data: whether the folder of a file is data.
    """
    names = subfolders(folder)
    if within := [n for n in names if any(map(is_data, (folder / n).iterdir()))]:
        listed = " or ".join(str(folder / name) for name in within[:4])
        return f"{folder} holds data in its folders, and none itself; give {listed}"
    beside = {name for known in BESIDE.values() for name in known}
    if len(two := [n for n in names if n.lower() not in beside]) == 2:
        return (
            f"{folder} holds two folders; say which has the better images: data.columns.winner="
            f"{two[0]} data.columns.loser={two[1]}, or the other way round; with "
            "data.format=thumbs if they are no pairs of equal names"
        )
    return (
        f"{folder} holds no *.parquet files, no *.tar shards, no metadata.csv or "
        "metadata.jsonl (another table: give the file itself), no annotations.json, no saved "
        "dataset and no two folders such as w and l; give the folder that does"
    )


def read_folders(folder: Path, names: Mapping[str, str]) -> Iterator[Raw]:
    """Read pairs of equal file names; the caption is NAME.txt beside an image or above both.

    NAME.caption does as well.

    Args:
        folder: that holds the others.
        names: those of the winners, the losers and any sources and masks.
    """
    table = Table("chosen", names, folder, idle=_unread(folder, names))
    sides: dict[str, dict[str, list[Path]]] = {ours: {} for ours in names}
    for ours, name in names.items():
        for path in sorted((folder / name).rglob("*")):
            if path.is_file() and is_hidden(path.name):
                yield Raw(path.name, table, {}, Fault("hidden", "not of the data"))
            elif path.suffix.lower() in PICTURES:
                sides[ours].setdefault(_stem(path, folder / name), []).append(path)
    stems = sides["winner"].keys() | sides["loser"].keys()
    yield from _strays(folder, names.values(), stems, table)
    for stem in sorted(stems):
        where = f"{folder.name}, images {stem}"
        fault = _unpaired(stem, {names[ours]: sides[ours].get(stem, []) for ours in names})
        caption = None if fault else _caption([folder / n for n in (*names.values(), ".")], stem)
        if fault := fault or (caption if isinstance(caption, Fault) else None):
            yield Raw(where, table, {}, fault)
            continue
        images = {k: side[stem][0].relative_to(folder).as_posix() for k, side in sides.items()}
        yield Raw(where, table, {**images, "caption": caption})


def read_thumbs(folder: Path, names: Mapping[str, str]) -> Iterator[Raw]:
    """Read images that are liked from one folder, disliked from another, as many as there are.

    Further folders have the source or the mask of each, by its name.
    """
    beside = {ours: name for ours, name in names.items() if ours in BESIDE}
    columns = {"images": "image", "thumbs": "folder"} | beside
    table = Table("thumbs", columns, folder, idle=_unread(folder, names))
    found = {ours: _by_stem(folder / name) for ours, name in beside.items()}
    stems = set[str]()
    for name, thumb in ((names["winner"], 1), (names["loser"], 0)):
        for path in sorted((folder / name).rglob("*")):
            where = path.relative_to(folder)
            if path.is_file() and is_hidden(path.name):
                yield Raw(path.name, table, {}, Fault("hidden", "not of the data"))
            elif path.suffix.lower() in PICTURES:
                stem = _stem(path, folder / name)
                stems.add(stem)
                caption = _caption([folder / name, folder], stem)
                more = {ours: side[stem] for ours, side in found.items() if stem in side}
                several = next((ours for ours, paths in more.items() if len(paths) > 1), "")
                fault = caption if isinstance(caption, Fault) else None
                if several:
                    text = f"{names[several]} has {len(more[several])} images {stem}; keep one"
                    fault = Fault("bad_rows", text)
                values = {"images": where.as_posix(), "thumbs": thumb, "caption": caption}
                values |= {k: p[0].relative_to(folder).as_posix() for k, p in more.items()}
                yield Raw(f"{folder.name}, {where.as_posix()}", table, values, fault)
    yield from _strays(folder, names.values(), stems, table)


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    """Find the images in a folder by their places and names."""
    found = dict[str, list[Path]]()
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURES and not is_hidden(path.name):
            found.setdefault(_stem(path, folder), []).append(path)
    return found


def _stem(path: Path, folder: Path) -> str:
    """Name an image by its place in its folder, without its suffix, accents as one character."""
    name = path.relative_to(folder).with_suffix("").as_posix()
    return unicodedata.normalize("NFC", name)


def _unread(folder: Path, names: Mapping[str, str]) -> tuple[str, ...]:
    """List what lies beside the folders and is no caption."""
    there = [f for f in sorted(folder.iterdir()) if not is_hidden(f.name)]
    others = [f for f in there if f.is_dir() or f.suffix.lower() not in CAPTIONS]
    return tuple(f.name + "/" * f.is_dir() for f in others if f.name not in names.values())


def _strays(
    folder: Path, names: Iterable[str], stems: Collection[str], table: Table
) -> Iterator[Raw]:
    """Give the files in these folders that belong to no row: of other kinds, or of other names."""
    for name in names:
        for path in sorted((folder / name).rglob("*")):
            known = path.suffix.lower() in (*PICTURES, *CAPTIONS)
            if (
                path.is_dir()
                or is_hidden(path.name)
                or (known and _stem(path, folder / name) in stems)
            ):
                continue
            where = path.relative_to(folder).as_posix()
            yield Raw(where, table, {}, Fault("strays", "of no row"))


def captions_of(folder: Path, names: Iterable[str]) -> list[Path]:
    """List the caption files that may be read."""
    there = [*folder.iterdir(), *(path for name in names for path in (folder / name).rglob("*"))]
    return sorted(path for path in there if path.suffix.lower() in CAPTIONS)


def _unpaired(stem: str, found: Mapping[str, list[Path]]) -> Fault | None:
    better, worse, *_ = found
    for name, paths in found.items():
        if len(paths) != 1:
            count = "no image" if not paths else counted(len(paths), "image")
            text = (
                f"{name} has {count} {stem}; keep one in each folder ({', '.join(IMAGES)}). Where "
                f"they are no pairs, set data.format=thumbs data.columns.winner={better} "
                f"data.columns.loser={worse}"
            )
            return Fault("bad_rows", text)
    return None


def _caption(folders: list[Path], stem: str) -> str | Fault:
    """Read the caption of an image from one of these folders; all lie in the last."""
    endings = [form for suffix in CAPTIONS for form in (suffix, suffix.upper())]
    forms = dict.fromkeys(unicodedata.normalize(form, stem) for form in ("NFC", "NFD"))
    named = (f / f"{form}{ending}" for f in folders for form in forms for ending in endings)
    files = [path for path in named if path.is_file()]
    for path in files:
        if not path.resolve().is_relative_to(folders[-1].resolve()):
            text = f"{path} is a link out of {folders[-1]}; copy the caption there"
            return Fault("bad_paths", text)
    try:
        texts = {text_of(path.read_bytes()) for path in files}
    except (OSError, UnicodeDecodeError) as error:
        return Fault("empty_captions", f"the caption cannot be read ({error}); write it as UTF-8")
    if len(texts) != 1:
        what = "are two captions" if texts else "is no caption"
        remedy = f"write the prompt to one {stem}.txt beside an image"
        return Fault("empty_captions", f"there {what}; {remedy}")
    return texts.pop()
