"""Two folders of images with equal names: the better ones in one, the worse in the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from inversion_dpo.data.columns import DOWNS, UPS, Table
from inversion_dpo.data.images import DataError
from inversion_dpo.data.rows import IMAGES, Fault, Raw, is_hidden

WINNERS = ("w", "winner", "winners", "chosen", "good", "better", "preferred", "win")
LOSERS = ("l", "loser", "losers", "rejected", "bad", "worse", "lose")
SOURCES = ("source", "sources")  # of edits, with the names of the edits


def subfolders(folder: Path) -> list[str]:
    """List the names of the folders in a folder."""
    return sorted(f.name for f in folder.iterdir() if f.is_dir() and not is_hidden(f.name))


KINDS = {"folders": (WINNERS, LOSERS), "thumbs": (UPS, DOWNS)}


def two_folders(folder: Path, columns: Mapping[str, str], kind: str) -> tuple[str, ...]:
    """Find the folders of the better and the worse images, and that of any sources, by name.

    The names are those of data.columns, or known ones; there is none if one of the two is missing.

    Args:
        folder: that holds them.
        columns: ``data.columns``, ours to theirs.
        kind: one of ``KINDS``: pairs of equal names, or thumbs.
    """
    there = {name.lower(): name for name in subfolders(folder)}
    given = [columns.get(key, "").lower() for key in ("winner", "loser", "source")]
    known = zip(given, (*KINDS[kind], SOURCES), strict=True)
    found = [
        next((there[name] for name in ([own] if own else usual) if name in there), "")
        for own, usual in known
    ]
    if all(found[:2]) and given[2] and not found[2]:
        raise DataError(f"data.columns.source={given[2]} is no folder in {folder}; put it there")
    return tuple(filter(None, found)) if all(found[:2]) else ()


def read_folders(folder: Path, names: tuple[str, ...]) -> Iterator[Raw]:
    """Read pairs of equal file names; the caption is NAME.txt beside an image or above both.

    Args:
        folder: that holds the others.
        names: of the winners, the losers and any sources.
    """
    keys = ("winner", "loser", "source")[: len(names)]
    table = Table("chosen", dict(zip(keys, names, strict=True)), folder)
    sides: list[dict[str, list[Path]]] = [{} for _ in names]
    for name, side in zip(names, sides, strict=True):
        for path in sorted((folder / name).rglob("*")):
            if path.is_file() and is_hidden(path.name):
                yield Raw(path.name, table, {}, Fault("hidden", "not of the data"))
            elif path.suffix.lower() in IMAGES:
                stem = path.relative_to(folder / name).with_suffix("").as_posix()
                side.setdefault(stem, []).append(path)
    for stem in sorted(sides[0].keys() | sides[1].keys()):
        where = f"{folder.name}, images {stem}"
        fault = _unpaired(stem, names, [side.get(stem, []) for side in sides])
        caption = None if fault else _caption([folder / n for n in (*names, ".")], stem)
        if fault := fault or (caption if isinstance(caption, Fault) else None):
            yield Raw(where, table, {}, fault)
            continue
        images = [side[stem][0].relative_to(folder).as_posix() for side in sides]
        yield Raw(where, table, {**dict(zip(keys, images, strict=True)), "caption": caption})


def read_thumbs(folder: Path, names: tuple[str, ...]) -> Iterator[Raw]:
    """Read images that are liked from one folder, disliked from another, as many as there are.

    A third folder has the source of each, by its name.
    """
    edits = dict(zip(("source",), names[2:], strict=False))
    table = Table("thumbs", {"images": "image", "thumbs": "folder"} | edits, folder)
    sources = {
        path.relative_to(folder / name).with_suffix("").as_posix(): path.relative_to(folder)
        for name in edits.values()
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGES and not is_hidden(path.name)
    }
    for name, thumb in zip(names, (1, 0), strict=False):
        for path in sorted((folder / name).rglob("*")):
            where = path.relative_to(folder)
            if path.is_file() and is_hidden(path.name):
                yield Raw(path.name, table, {}, Fault("hidden", "not of the data"))
            elif path.suffix.lower() in IMAGES:
                stem = path.relative_to(folder / name).with_suffix("").as_posix()
                caption = _caption([folder / name, folder], stem)
                fault = caption if isinstance(caption, Fault) else None
                values = {"images": where.as_posix(), "thumbs": thumb, "caption": caption}
                values |= {"source": sources[stem].as_posix()} if stem in sources else {}
                yield Raw(f"{folder.name}, {where.as_posix()}", table, values, fault)


def captions_of(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """List the caption files that may be read."""
    above = list(folder.glob("*.txt"))
    return sorted([*above, *(path for name in names for path in (folder / name).rglob("*.txt"))])


def _unpaired(stem: str, names: tuple[str, ...], found: list[list[Path]]) -> Fault | None:
    for name, paths in zip(names, found, strict=True):
        if len(paths) != 1:
            count = "no image" if not paths else f"{len(paths)} images"
            text = (
                f"{name} has {count} {stem}; keep one in each folder ({', '.join(IMAGES)}), or set "
                "data.format=thumbs if they are no pairs"
            )
            return Fault("bad_rows", text)
    return None


def _caption(folders: list[Path], stem: str) -> str | Fault:
    files = [path for folder in folders if (path := folder / f"{stem}.txt").is_file()]
    try:
        texts = {path.read_text(encoding="utf-8-sig").strip() for path in files}
    except (OSError, UnicodeDecodeError) as error:
        return Fault("empty_captions", f"the caption cannot be read ({error}); write it as UTF-8")
    if len(texts) != 1:
        what = "are two captions" if texts else "is no caption"
        remedy = f"write the prompt to one {stem}.txt beside an image"
        return Fault("empty_captions", f"there {what}; {remedy}")
    return texts.pop()
