"""People's files, good and spoiled: the pairs, or one line with file, row and remedy."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inversion_dpo.data.annotations import is_annotated
from inversion_dpo.data.images import DataError, decode_image, picture_size
from tests.pair_files import check_pairs, open_pairs


def encoded(colour: Any, form: str = "PNG", mode: str = "RGB", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 6), colour).save(buffer, form, **settings)
    return buffer.getvalue()


RED, BLUE = encoded("red"), encoded("blue")
NOISE = random.Random(0).randbytes(10**4)
HEAD = "file_name_winner,file_name_loser,prompt\n"
LABELLED = "file_name_0,file_name_1,label_0,prompt\n"
Make = Callable[[Path], Path]


def text(content: str | bytes, name: str = "metadata.csv", images: tuple[str, ...] = ()) -> Make:
    """A table beside red.png, blue.png and others; the folder itself, or the file."""

    def make(folder: Path) -> Path:
        for image in ("red.png", "blue.png", *images):
            (folder / image).parent.mkdir(exist_ok=True)
            content_of = b"" if "empty" in image else BLUE if "blue" in image else RED
            (folder / image).write_bytes(content_of)
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


def parquet(name: str = "a.parquet", drop: tuple[str, ...] = (), **columns: Any) -> Make:
    def make(folder: Path) -> Path:
        whole = {"jpg_0": [RED], "jpg_1": [BLUE], "label_0": [1.0], "caption": ["a"]} | columns
        pq.write_table(pa.table({k: v for k, v in whole.items() if k not in drop}), folder / name)
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


def cut_gz(folder: Path) -> Path:
    noise = random.Random(0).randbytes(5000)
    file = shard(*SAMPLE, ("1.txt", b"a"), ("2.bin", noise), name="a.tar.gz", mode="w:gz")(folder)
    file.write_bytes(file.read_bytes()[:-3000])
    return file


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
    "semicolons": text((HEAD + "red.png,blue.png,a\n").replace(",", ";")),
    "a header with a comma": text("winner;loser;prompt;seen, by\nred.png;blue.png;a;b\n"),
    "tabs": text((HEAD + "red.png,blue.png,a\n").replace(",", "\t"), "pairs.tsv"),
    "Excel's first line": text("sep=;\n" + HEAD.replace(",", ";") + "red.png;blue.png;a\n"),
    "empty rows of a spreadsheet": text(HEAD + ",,\nred.png,blue.png,a\n,,\n"),
    "names in any case": text("File Name Winner,file-name-loser,PROMPT\nred.png,blue.png,a\n"),
    "winner and loser": text("Winner,Loser,Prompt\nred.png,blue.png,a\n"),
    "chosen and rejected": text("chosen,rejected,prompt\nred.png,blue.png,a\n"),
    "names of the hub's image folders": text(
        "chosen_file_name,rejected_file_name,prompt\nred.png,blue.png,a\n"
    ),
    "a text in UTF-16": shard(*SAMPLE, ("1.txt", "a\r\n".encode("utf-16"))),
    "good and bad": text("good,bad,prompt\nred.png,blue.png,a\n"),
    "the only table of a folder": lambda folder: (
        text(HEAD + "red.png,blue.png,a\n", "votes.csv")(folder).parent
    ),
    "paths of Windows": text(HEAD + "i\\red.png,.\\blue.png,a\n", images=("i/red.png",)),
    "a path by way of a folder": text(HEAD + "i/../red.png,blue.png,a\n", images=("i/red.png",)),
    "labels -1 and 1": text(LABELLED + "blue.png,red.png,-1,a\n"),
    "both labels": text("file_name_0,file_name_1,label_0,label_1,prompt\nblue.png,red.png,0,1,a\n"),
    "counts of votes": text("image1,image2,votes_0,votes_1,prompt\nblue.png,red.png,3,7,a\n"),
    "per cent of votes": text(
        "image1;image2;share_0;share_1;prompt\nblue.png;red.png;12,5 %;87,5 %;a\n"
    ),
    "a share of votes": text("image1,image2,share_0,prompt\nred.png,blue.png,0.7,a\n"),
    "images in objects": rows(
        {"prompt": ["a"], "chosen": {"image": "red.png"}, "rejected": {"image": "blue.png"}}
    ),
    "images in objects of Parquet": parquet(
        chosen=[{"image": {"bytes": RED, "path": "x"}}],
        rejected=[{"image": {"bytes": BLUE, "path": "x"}}],
        drop=("jpg_0", "jpg_1", "label_0"),
    ),
    "prompts as lists of one": parquet(caption=[["a"]]),
    "a list in an object": text(json.dumps({"info": 1, "data": [chosen()]}), "p.json"),
    "a compressed tar": shard(*SAMPLE, ("1.txt", b"a"), name="a.tar.gz", mode="w:gz"),
    "the same, not called so": shard(*SAMPLE, ("1.txt", b"a"), mode="w:gz"),
    "the same, with bzip2": shard(*SAMPLE, ("1.txt", b"a"), name="a.tar.bz2", mode="w:bz2"),
    "the same, with xz": shard(*SAMPLE, ("1.txt", b"a"), name="a.tar.xz", mode="w:xz"),
    "UTF-16, as Excel's text": text((HEAD + "red.png,blue.png,a\n").encode("utf-16")),
    "UTF-16 without a mark": text((HEAD + "red.png,blue.png,a\n").encode("utf-16-le")),
    "UTF-16 in JSON Lines": text(json.dumps(chosen()).encode("utf-16"), "p.jsonl"),
    "better and worse": text("better,worse,prompt\nred.png,blue.png,a\n"),
    "one id in three spellings": rows(
        *(
            {"prompt_id": key, "prompt": "a", "image_path": f"{name}.png", "rank": rank}
            for key, name, rank in ((1, "red", 1), (1.0, "blue", 3), ("1", "red", 1))
        )
    ),
    "bars": text((HEAD + "red.png,blue.png,a\n").replace(",", "|")),
    "a list called JSON Lines": text(json.dumps([chosen()], indent=1), "p.jsonl"),
    "JSON Lines called JSON": text(
        f"{json.dumps(chosen())}\n{json.dumps(chosen(file_name_loser='red.png'))}", "p.json"
    ),
    "both images in one object": rows(
        {"prompt": "a", "images": {"chosen": "red.png", "rejected": {"path": "blue.png"}}}
    ),
    "images as lists of one": rows({"prompt": "a", "chosen": ["red.png"], "rejected": "blue.png"}),
    "what Windows puts into a tar": shard(("Thumbs.db", b"x"), *SAMPLE, ("1.txt", b"a")),
}
BAD: dict[str, tuple[Make, str]] = {
    "two columns of one name": (twice, "a.parquet has two columns named jpg_0; rename"),
    "in a CSV too": (text("prompt," + HEAD + "b,red.png,blue.png,a\n"), "two columns named prompt"),
    "a comma that nobody quoted": (
        text(HEAD.replace(",", ";") + "red.png;blue.png;a;b\n"),
        "line 2 of metadata.csv, row 0: 4 cells under 3 columns; quote text with ';'",
    ),
    "two names that differ in case": (
        text("Prompt,PROMPT,winner,loser\na,b,red.png,blue.png\n"),
        r"two columns named prompt \(Prompt and PROMPT\); rename",
    ),
    "a spreadsheet": (raw("pairs.xlsx", b"PK"), r"pairs.xlsx is a spreadsheet; save it as CSV"),
    "labels of two kinds": (
        text(LABELLED + "red.png,blue.png,-1,a\nred.png,blue.png,0,b\n"),
        "-1 in line 2 of metadata.csv, row 0 and 0 in line 3 of metadata.csv, row 1",
    ),
    "two labels that disagree": (
        parquet(label_1=[1.0]),
        "row 0: label_0 is 1 and label_1 is 1; write 1 for",
    ),
    "unlabelled only": (parquet(has_label=[False]), r"no usable pair in 1 row .*1 unlabelled"),
    "votes below 0": (
        text("image1,image2,votes_0,votes_1,prompt\nred.png,blue.png,-1,2,a\n"),
        "row 0: the votes are -1 and 2; write counts",
    ),
    "Windows' path of another place": (
        text(HEAD + "i\\red.png,blue.png,a\n"),
        r"there is no file 'i\\\\red.png'",
    ),
    "two lists": (text('{"a": [{}], "b": [{}]}', "p.json"), 'is not a list.*write .*"data"'),
    "an open quotation mark": (
        text(HEAD + 'red.png,blue.png,a\nred.png,blue.png,"a\n'),
        "metadata.csv, row 1 cannot be r",
    ),
    "a comma too many": (text(HEAD + "red.png,blue.png,a, b\n"), "row 0: 4 cells under 3 columns"),
    "Latin-1": (
        text((HEAD + "red.png,blue.png,é\n").encode("latin-1")),
        "export it again as UTF-8",
    ),
    "an empty CSV": (text(""), "has no rows"),
    "a header alone": (text(HEAD), "has no rows"),
    "a label in words": (text(LABELLED + "red.png,blue.png,left,a\n"), "row 0: label_0 is 'left'"),
    "a share as a label": (
        text(LABELLED + "red.png,blue.png,0.8,a\n"),
        "if it is a share of the votes: data.columns.share_0=label_0",
    ),
    "a label that is NaN": (text(LABELLED + "red.png,blue.png,nan,a\n"), "row 0: label_0 is nan"),
    "no name": (text(HEAD + ",blue.png,a\n"), "row 0, file_name_winner: no image; .*name the file"),
    "a long name": (text(HEAD + "x" * 9999 + ",blue.png,a\n"), "row 0.*no file 'x{59} in .*put it"),
    "an address": (
        text(HEAD + "https://a.b/c.png,blue.png,a\n"),
        "row 0.*no file 'https.*download",
    ),
    "an image as text": (rows(chosen(file_name_winner="iVBORw0K")), "row 0.*image as text; write"),
    "an empty image": (
        text(HEAD + "empty.png,blue.png,a\n", images=("empty.png",)),
        "row 0.*is empty; write",
    ),
    "an empty cell of pandas": (
        text(HEAD + "red.png,blue.png,nan\n"),
        "caption is 'nan', an empty",
    ),
    "an answer of a chat": (
        rows(chosen(file_name_winner=[{"role": "assistant", "content": "red.png"}])),
        "row 0, file_name_winner: holds {'role': 'assistant', .*, not an image",
    ),
    "a folder": (text(HEAD + "i,blue.png,a\n", images=("i/red.png",)), "row 0.*no file 'i' in"),
    "an endless JSON": (text("[" * 99999, "p.json"), "p.json cannot be read.*export it again"),
    "JSON cut short": (text("[{", "p.json"), "p.json cannot be read.*export it again as UTF-8"),
    "a number of 5000 digits": (text("[1" + "0" * 5000, "p.json"), "p.json cannot be read"),
    "no list": (text("{}", "p.json"), "p.json is not a list of objects"),
    "an empty list": (rows(), "has no rows"),
    "a list of nothing": (rows(None), "pairs.json, row 0: not an object"),
    "a caption that is null": (rows(chosen(prompt=None)), "row 0: caption is empty or no text"),
    "a caption that is a number": (rows(chosen(prompt=3)), "row 0: caption is empty or no text"),
    "a caption of no width": (text(HEAD + "red.png,blue.png,\u200b\n"), "row 0: caption is empty"),
    "columns of which one is known": (
        text("mine,theirs,prompt\nred.png,blue.png,a\n"),
        "has columns of other names than we know: mine, theirs, prompt. Say which is which",
    ),
    "half a character": (rows(chosen(prompt="\ud800")), "row 0: caption is empty or no text"),
    "a label beyond all numbers": (
        text(LABELLED + "red.png,blue.png," + "1" * 400 + ",a\n"),
        "row 0: label_0 is inf; write",
    ),
    "a rank beyond all numbers": (
        rows({"prompt": "a", "image_path": ["red.png", "blue.png"], "rank": [10**400, 2]}),
        "row 0: ranks are",
    ),
    "a rank that stands for none": (
        rows({"prompt": "a", "image_path": ["red.png", "blue.png"], "rank": [-1, 1]}),
        r"row 0: ranks are \[-1, 1\]; write a number for each image, from 0 or 1 on",
    ),
    "a rank that is true or false": (
        rows({"prompt": "a", "image_path": ["red.png", "blue.png"], "rank": [True, False]}),
        r"row 0: ranks are \[True, False\]; .* as thumbs \(data.columns.thumbs\) if true is the",
    ),
    "lists in a CSV": (
        text('prompt,images,ranks\na,"[""red.png"", ""blue.png""]","[1, 2]"\n'),
        "row 0: prompt_id is null; .*; lists of images need JSON or Parquet",
    ),
    "rows of a ranking without a number": (
        rows({"prompt": "a", "image_path": "red.png", "rank": 1}),
        "row 0: prompt_id is null; write",
    ),
    "a member twice": (
        shard(*SAMPLE, ("1.winner.jpg", BLUE), ("1.txt", b"a")),
        "row 0: winner is there twice",
    ),
    "a compressed tar that is cut": (
        raw("a.tar.gz", gzip.compress(bytes(10**5))[:50]),
        "a.tar.gz cannot be read",
    ),
    "a compressed tar, cut later": (cut_gz, "a.tar.gz (is damaged in row|cannot be read)"),
    "a tar with xz, cut": (raw("a.tar.xz", lzma.compress(NOISE)[:99]), "a.tar.xz cannot be read"),
    "a tar with bzip2, cut": (raw("a.tar.bz2", bz2.compress(NOISE)[:99]), "a.tar.bz2 cannot be r"),
    "an empty tar": (raw("a.tar", b""), "a.tar cannot be read"),
    "an empty Parquet": (raw("a.parquet", b""), "a.parquet cannot be read as Parquet"),
    "no table at all": (raw("notes.txt", b"hello"), "notes.txt is none of .parquet, .csv"),
    "images in GIF": (
        parquet(jpg_0=[encoded("red", "GIF")]),
        "row 0, jpg_0.*it is a GIF.*PNG or We",
    ),
    "an error page": (parquet(jpg_0=[b"<!DOCTYPE html>"]), "row 0, jpg_0.*HTML.* of a download"),
    "a pointer": (parquet(jpg_0=[b"version https://git-lfs.github.com/spec/v1"]), "git lfs pull"),
    "a phone's format": (parquet(jpg_0=[b"\0\0\0\x18ftypheic"]), "it is a HEIC.*as JPEG"),
    "HPDv3's columns": (
        rows({"prompt": "a", "path1": "red.png", "path2": "blue.png"}),
        "has the columns of HPDv3: set data.format=hpdv3",
    ),
    "an answer of no": (parquet(has_label=["no"]), r"no usable pair in 1 row .*1 unlabelled"),
    "votes in words": (
        text("winner,loser,prompt,choice_dist\nred.png,blue.png,a,most\n"),
        r"row 0: the votes are no list of two counts, such as \[7, 3\]; write one",
    ),
    "thousands": (
        text("image1;image2;votes_0;votes_1;prompt\nred.png;blue.png;1,234;987;a\n"),
        "row 0: the votes are '1,234 .write a thousand without a comma",
    ),
    "a label by a name": (
        text(LABELLED + "red.png,blue.png,A,a\n"),
        "row 0: label_0 is 'A'.*for words such as left, A or tie: data.columns.choice=ITS_NAME",
    ),
    "a choice by a number": (
        parquet(drop=("label_0",), preference=[1]),
        r"column preference holds int64; store it as words .* data.columns.label_0 .1 for image 0",
    ),
    "a choice in no known word": (
        text("image_a,image_b,winner,prompt\nred.png,blue.png,1,a\n"),
        "row 0: winner is '1'; write left, right, tie or neither.* as label_0, 1 means the first",
    ),
    "a choice between images of unknown names": (
        text("one,two,winner,prompt\nred.png,blue.png,left,a\n"),
        "lacks the columns loser; .* words such as left or A: data.columns.choice=winner ",
    ),
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


@pytest.mark.parametrize("form", ["WEBP", "PNG"])
def test_an_animation_is_refused_by_its_header_and_a_phones_views_are_not(form: str) -> None:
    frames: Any = {"save_all": True, "append_images": [Image.new("RGB", (8, 6), "blue")]}
    moving, phone = (encoded("red", kind, **frames) for kind in (form, "MPO"))
    for read in (decode_image, picture_size):
        with pytest.raises(DataError, match=r"here: .*an animation of 2 frames"):
            read(moving, "here")
    assert picture_size(phone, "here") == (6, 8) and decode_image(phone, "here").size == (8, 6)


def test_ink_becomes_light() -> None:
    """CMYK as a printer has it: no ink is white, all cyan has no red."""
    white, cyan = (encoded(c, "JPEG", "CMYK") for c in ((0, 0, 0, 0), (255, 0, 0, 0)))
    assert decode_image(white, "here").getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(cyan, "here").getpixel((0, 0))[0] < 10  # type: ignore[index]


def test_a_column_that_the_first_row_lacks_counts(tmp_path: Path) -> None:
    """Writers of JSON Lines leave out what is null."""
    row = {"file_name_0": "red.png", "file_name_1": "blue.png", "label_0": 1, "prompt": "a"}
    more = [{"preference_0": 0.75, "seed_0": 3}, {"has_label": False}]
    lines = "\n".join(json.dumps(row | about) for about in [{}, *more])
    source = open_pairs(text(lines, "p.jsonl")(tmp_path))
    assert [(pair.preference, pair.seeds) for pair in source] == [(1.0, ()), (0.75, (3,))]
    assert source.counts["unlabelled"] == 1
    late = shard(*SAMPLE, ("1.txt", b"a"), ("2.winner.png", RED), ("2.loser.png", BLUE))
    data = shard(
        ("1.winner.png", RED),
        ("1.loser.png", BLUE),
        ("1.txt", b"a"),
        *[
            (f"2.{name}", content)
            for name, content in (
                ("winner.png", RED),
                ("loser.png", BLUE),
                ("txt", b"b"),
                ("mask.png", encoded("white")),
            )
        ],
    )(tmp_path)
    with pytest.raises(DataError, match="row 1: rows with and without a mask are mixed"):
        list(open_pairs(data))
    with pytest.raises(DataError, match="row 1: caption is empty"):
        list(open_pairs(late(tmp_path)))


def test_one_column_is_never_both_of_two(tmp_path: Path) -> None:
    """votes_1 is known as the second image's votes, until it is said to be the first one's."""
    table = text("image1,image2,votes_1,votes_2,prompt\nblue.png,red.png,3,7,a\n", "v.csv")(
        tmp_path
    )
    first = {"share_0": "votes_1"}
    (pair,) = open_pairs(table, columns=first | {"share_1": "votes_2"})
    assert (pair.winner, pair.preference) == (RED, 0.7)
    with pytest.raises(DataError, match="row 0: the votes are 3 and null; write counts"):
        list(open_pairs(table, columns=first))
    with pytest.raises(DataError, match="data.columns.share_1 and share_0 both name votes_1; corr"):
        list(open_pairs(table, columns={"share_1": "votes_1"} | first))


@pytest.mark.parametrize(
    ("make", "settings", "expected"),
    [
        (parquet(), {"root": "."}, "data.root=. has no effect: .*holds its images. Leave it out"),
        (shard(*SAMPLE, ("1.txt", b"a")), {"root": "."}, "data.root=. has no effect"),
        (parquet(), {"ranking": "all"}, "row 0: no ranking, so data.ranking=all has no effect"),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(
    make: Make, settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    for read in (open_pairs, check_pairs):
        with pytest.raises(DataError, match=expected):
            list(read(make(tmp_path), **settings))  # type: ignore[call-overload]


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text(HEAD + "red.png,blue.png,a\n", "pairs.csv")(tmp_path)
    assert (
        len(list(open_pairs("~/pairs.csv"))) == len(list(open_pairs("~/pairs.csv", root="~"))) == 1
    )


def test_pairs_in_utf_16_are_no_annotations(tmp_path: Path) -> None:
    assert not is_annotated(GOOD["UTF-16 in JSON Lines"](tmp_path))
