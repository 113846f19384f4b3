"""People's files, good and spoiled: the pairs, or one line with file, row and remedy."""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inversion_dpo.data.images import DataError, decode_image
from tests.pair_files import check_pairs, open_pairs


def encoded(colour: Any, form: str = "PNG", mode: str = "RGB", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 6), colour).save(buffer, form, **settings)
    return buffer.getvalue()


RED, BLUE = encoded("red"), encoded("blue")
HEAD = "file_name_winner,file_name_loser,prompt\n"
LABELLED = "file_name_0,file_name_1,label_0,prompt\n"
Make = Callable[[Path], Path]


def text(content: str | bytes, name: str = "metadata.csv", images: tuple[str, ...] = ()) -> Make:
    """A table beside red.png, blue.png and others; the folder itself, or the file."""

    def make(folder: Path) -> Path:
        for image in ("red.png", "blue.png", *images):
            (folder / image).parent.mkdir(exist_ok=True)
            (folder / image).write_bytes(BLUE if "blue" in image else RED)
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return folder if name.startswith("metadata") else path

    return make


def rows(*objects: Any, name: str = "pairs.json") -> Make:
    return text(json.dumps(objects), name)


def chosen(**changes: Any) -> dict[str, Any]:
    row = {"file_name_winner": "red.png", "file_name_loser": "blue.png", "prompt": "a"}
    return row | changes


def shard(*members: tuple[str, bytes], name: str = "a.tar", mode: Any = "w") -> Make:
    def make(folder: Path) -> Path:
        with tarfile.open(folder / name, mode) as tar:
            for member, content in members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return folder / name

    return make


def parquet(name: str = "a.parquet", **columns: Any) -> Make:
    def make(folder: Path) -> Path:
        whole = {"jpg_0": [RED], "jpg_1": [BLUE], "label_0": [1.0], "caption": ["a"]} | columns
        pq.write_table(pa.table(whole), folder / name)
        return folder / name

    return make


def twice(folder: Path) -> Path:
    names = ["jpg_0", "jpg_0", "jpg_1", "label_0", "caption"]
    table = pa.table([[RED], [RED], [BLUE], [1.0], ["a"]], names=names)
    pq.write_table(table, folder / "a.parquet")
    return folder / "a.parquet"


def raw(name: str, content: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


SAMPLE = (("1.winner.png", RED), ("1.loser.png", BLUE))
GOOD: dict[str, Make] = {
    "BOM and CRLF": text(("\ufeff" + HEAD + "red.png,blue.png,a\n").replace("\n", "\r\n")),
    "carriage returns only": text((HEAD + "red.png,blue.png,a\n").replace("\n", "\r")),
    "spaces after commas, blank lines": text(
        '\n file_name_winner, file_name_loser, prompt\n\nred.png, blue.png, "a"\n\n'
    ),
    "a label with spaces": text(LABELLED + "red.png,blue.png, 1 ,a\n"),
    "another name": text(HEAD + "red.png,blue.png,a\n", "pairs.csv"),
    "an upper-case suffix": text(HEAD + "red.png,blue.png,a\n", "PAIRS.CSV"),
    "upper-case images": text(HEAD + "R.PNG,blue.JPG,a\n", images=("R.PNG", "blue.JPG")),
    "a folder of images": text(
        HEAD + "./i/red.png,i/blue.png,a\n", images=("i/red.png", "i/blue.png")
    ),
    "names in other letters": text(HEAD + "猫.png,blue.png,a\n", images=("猫.png",)),
    "names as macOS spells them": text(
        HEAD + "é.png,blue.png,a\n", images=(unicodedata.normalize("NFD", "é.png"),)
    ),
    "JSON Lines with BOM and CRLF": text("\ufeff" + json.dumps(chosen()) + "\r\n", "p.jsonl"),
    "a label that is true": rows(
        {"file_name_0": "red.png", "file_name_1": "blue.png", "label_0": True, "prompt": "a"}
    ),
    "a tar of upper-case names": shard(
        ("1.Winner.PNG", RED), ("1.LOSER.png", BLUE), ("1.TXT", b"a"), name="A.TAR"
    ),
    "a text with BOM and a line's end": shard(*SAMPLE, ("1.txt", "\ufeffa\r\n".encode())),
    "what macOS puts into a tar": shard(("._1.winner.png", b"x"), *SAMPLE, ("1.txt", b"a")),
    "Parquet under another name": parquet("pairs.pq"),
    "an upper-case Parquet": parquet("PAIRS.PARQUET"),
    "captions as a dictionary": parquet(caption=pa.array(["a"]).dictionary_encode()),
    "a label as bool": parquet(label_0=[True]),
}
BAD: dict[str, tuple[Make, str]] = {
    "two columns of one name": (twice, "a.parquet has two columns named jpg_0; rename"),
    "in a CSV too": (text("prompt," + HEAD + "b,red.png,blue.png,a\n"), "two columns named prompt"),
    "semicolons": (text((HEAD + "red.png,blue.png,a\n").replace(",", ";")), "separated by ';'"),
    "tabs": (text((HEAD + "red.png,blue.png,a\n").replace(",", "\t")), "export it with commas"),
    "an open quotation mark": (
        text(HEAD + 'red.png,blue.png,a\nred.png,blue.png,"a\n'),
        "metadata.csv, row 1 cannot be r",
    ),
    "a comma too many": (text(HEAD + "red.png,blue.png,a, b\n"), "row 0: 4 cells under 3 columns"),
    "UTF-16": (text((HEAD + "red.png,blue.png,a\n").encode("utf-16")), "export it again as UTF-8"),
    "an empty CSV": (text(""), "has no rows"),
    "a header alone": (text(HEAD), "has no rows"),
    "a label in words": (text(LABELLED + "red.png,blue.png,left,a\n"), "row 0: label_0 is 'left'"),
    "a label that is NaN": (text(LABELLED + "red.png,blue.png,nan,a\n"), "row 0: label_0 is nan"),
    "no name": (text(HEAD + ",blue.png,a\n"), "row 0, file_name_winner: no image; .*name the file"),
    "a long name": (text(HEAD + "x" * 9999 + ",blue.png,a\n"), "row 0.*no file 'x{59} in .*put it"),
    "an address": (text(HEAD + "https://a.b/c.png,blue.png,a\n"), "row 0.*no file 'https"),
    "a folder": (text(HEAD + "i,blue.png,a\n", images=("i/red.png",)), "row 0.*no file 'i' in"),
    "an endless JSON": (text("[" * 99999, "p.json"), "p.json cannot be read.*export it again"),
    "JSON cut short": (text("[{", "p.json"), "p.json cannot be read.*export it again as UTF-8"),
    "a number of 5000 digits": (text("[1" + "0" * 5000, "p.json"), "p.json cannot be read"),
    "no list": (text("{}", "p.json"), "p.json is not a list of objects"),
    "an empty list": (rows(), "has no rows"),
    "a list of nothing": (rows(None), "pairs.json, row 0: not an object"),
    "a caption that is null": (rows(chosen(prompt=None)), "row 0: caption is empty or no text"),
    "a caption that is a number": (rows(chosen(prompt=3)), "row 0: caption is empty or no text"),
    "half a character": (rows(chosen(prompt="\ud800")), "row 0: caption is empty or no text"),
    "a label beyond all numbers": (
        text(LABELLED + "red.png,blue.png," + "1" * 400 + ",a\n"),
        "row 0: label_0 is inf; write",
    ),
    "captions in a list": (
        rows({"prompt": ["a"], "image_path": ["red.png", "blue.png"], "rank": [1, 2]}),
        "row 0, images 0 and 1: caption is empty",
    ),
    "a rank beyond all numbers": (
        rows({"prompt": "a", "image_path": ["red.png", "blue.png"], "rank": [10**400, 2]}),
        "row 0: ranks are",
    ),
    "rows of a ranking without a number": (
        rows({"prompt": "a", "image_path": "red.png", "rank": 1}),
        "row 0: prompt_id is null; write",
    ),
    "a member twice": (
        shard(*SAMPLE, ("1.winner.jpg", BLUE), ("1.txt", b"a")),
        "row 0: winner is there twice",
    ),
    "a compressed tar": (shard(*SAMPLE, name="a.tar.gz", mode="w:gz"), "none of .*unpack"),
    "the same, not called so": (shard(*SAMPLE, mode="w:gz"), "a.tar cannot be read as an uncompre"),
    "an empty tar": (raw("a.tar", b""), "a.tar cannot be read"),
    "an empty Parquet": (raw("a.parquet", b""), "a.parquet cannot be read as Parquet"),
    "no table at all": (raw("notes.txt", b"hello"), "notes.txt is none of .parquet, .csv"),
    "images in GIF": (parquet(jpg_0=[encoded("red", "GIF")]), "row 0, jpg_0.*JPEG, PNG or WebP"),
    "images by their path": (parquet(jpg_0=["red.png"]), "column jpg_0 holds string; store it as"),
}


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD.keys())
def test_what_is_good_gives_its_pair(make: Make, tmp_path: Path) -> None:
    (pair,) = open_pairs(make(tmp_path))
    assert (pair.caption, pair.winner, pair.loser) == ("a", RED, BLUE)


@pytest.mark.parametrize(("make", "expected"), BAD.values(), ids=BAD.keys())
def test_what_is_bad_is_one_line_with_a_remedy(make: Make, expected: str, tmp_path: Path) -> None:
    data = make(tmp_path)
    with pytest.raises(DataError, match=expected) as caught:
        list(open_pairs(data))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(tmp_path))
    with pytest.raises(DataError):
        list(open_pairs(data, on_bad_row="skip"))
    try:
        problems = check_pairs(data).problems
    except DataError as error:
        problems = (str(error),)
    assert str(caught.value) in problems


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_taken(form: str) -> None:
    later = Image.new("RGB", (8, 6), "blue")
    data = encoded("red", form, save_all=True, append_images=[later], lossless=True)
    assert decode_image(data, "here").getpixel((0, 0)) == (255, 0, 0)


def test_ink_becomes_light() -> None:
    """CMYK as a printer has it: no ink is white, all cyan has no red."""
    white, cyan = (encoded(c, "JPEG", "CMYK") for c in ((0, 0, 0, 0), (255, 0, 0, 0)))
    assert decode_image(white, "here").getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(cyan, "here").getpixel((0, 0))[0] < 10  # type: ignore[index]
