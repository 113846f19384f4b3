"""A mask of the region that counts: read beside a pair, or refused with its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inversion_dpo.data.check import format_report
from inversion_dpo.data.images import DataError
from inversion_dpo.data.masks import counting, mask_oddities
from tests.pair_files import check_pairs, open_pairs
from tests.unit.data.test_formats import BLUE, RED, WHITE, encoded, put_images

TABLE = "winner,loser,mask,prompt\nred.png,blue.png,white.png,a\nblue.png,red.png,white.png,b\n"


def table(folder: Path, text: str = TABLE) -> Path:
    (put_images(folder) / "masked.csv").write_text(text)
    (folder / "black.png").write_bytes(encoded("black"))
    (folder / "wide.png").write_bytes(encoded("white", (9, 6)))
    Image.new("RGBA", (8, 6), (0, 0, 0, 0)).save(folder / "clear.png")  # over white it is white
    (folder / "broken.png").write_bytes(RED[:40])
    return folder / "masked.csv"


def test_a_table_names_a_mask_for_each_pair(tmp_path: Path) -> None:
    source = open_pairs(file := table(tmp_path))
    found = list(source)
    assert [p.mask for p in found] == [WHITE, WHITE] and source.counts["masked"] == 2
    assert found[0].mask_image.getpixel((0, 0)) == 255  # type: ignore[union-attr]
    text = format_report(check_pairs(file))
    assert "masks: 2 pairs have masks; errors count in 100.0% of the pixels (median)" in text
    assert "! 2 masks count everything: are black and white swapped?" in text
    plain = next(iter(open_pairs(table(tmp_path, TABLE.replace("mask", "x")))))
    assert plain.mask is plain.mask_image is None and plain.digest != found[0].digest


@pytest.mark.parametrize("column", ["rank", "scores", "thumb"])
def test_one_prompt_of_several_masks_is_refused(tmp_path: Path, column: str) -> None:
    """Not that of the first row taken for all: of thumbs, each image by itself has its own."""
    folder = put_images(tmp_path)
    (folder / "same.png").write_bytes(WHITE)
    Image.open(folder / "same.png").convert("L").save(folder / "other.png")
    rows = ("red.png,1,white.png", "blue.png,0,{}")
    head = f"prompt,prompt_id,image,{column},mask\n"
    for name, refused in (("same.png", False), ("other.png", True)):
        text = "".join(f"a,7,{row.format(name)}\n" for row in rows)
        (folder / "t.csv").write_text(head + text)
        source = open_pairs(folder / "t.csv")
        if refused:
            with pytest.raises(DataError, match="row 0.*several masks, and a pair has one: give"):
                list(source)
        else:
            assert [p.mask for p in source] == [WHITE]
    if column == "thumb":
        assert check_pairs(folder / "t.csv").ok
    else:
        assert not check_pairs(folder / "t.csv").ok
        assert check_pairs(folder / "t.csv", mask="none").ok


def test_a_ranking_has_one_mask(tmp_path: Path) -> None:
    row = {"images": [RED, BLUE], "ranks": [2, 1], "caption": "a", "mask": WHITE}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert [p.mask for p in open_pairs(tmp_path / "a.parquet")] == [WHITE]


def test_a_region_of_nothing_is_a_problem_of_its_row(tmp_path: Path) -> None:
    """Where two images hardly differ, or a white edge is cut off: named before any inversion."""
    wide, edge, faint = (np.full((40, 100, 3), level, np.uint8) for level in (90, 0, 90))
    edge[0], faint[:, :50] = 255, 100
    for name, pixels in (("wide", wide), ("edge", edge), ("faint", faint)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    other = Image.fromarray(np.concatenate([faint[:, :50] + 99, faint[:, 50:]], 1))
    other.save(tmp_path / "other.png")
    text = "winner,loser,prompt\nwide.png,other.png,a\nwide.png,faint.png,b\n"
    (tmp_path / "pairs.csv").write_text(text)
    report = check_pairs(tmp_path / "pairs.csv", resolution=64, mask="differ", fit="pad")
    assert report.problems == (
        "line 3 of pairs.csv, row 1: its images nowhere differ by more than 16 of 255 levels; "
        "drop the row, or set data.mask=none",
    )
    half = "masks: in 1 pair, errors count where the two images differ: 41.7% of"
    assert half in format_report(report)  # of 96x32 it fills 80x32, and differs in half
    text = "winner,loser,prompt,mask\nwide.png,other.png,a,edge.png\n"
    (tmp_path / "pairs.csv").write_text(text)
    report = check_pairs(tmp_path / "pairs.csv", resolution=64, fit="crop")
    assert "row 0: its mask is cut off with the edge of the image; drop" in report.problems[0]


@pytest.mark.parametrize("how", ["none", "differ"])
def test_no_mask_is_needed_that_does_not_count(tmp_path: Path, how: Any) -> None:
    file = table(tmp_path, TABLE.replace("white.png,b", ",b"))
    assert [pair.mask for pair in open_pairs(file, mask=how)] == [None, None]
    report = check_pairs(file, mask=how)
    assert report.ok and ("masks:" in format_report(report)) == (how == "differ")
    for name, image in (("w/1", RED), ("l/1", BLUE), ("mask/2", WHITE)):
        (tmp_path / "two" / name[0:-2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "two" / f"{name}.png").write_bytes(image)
    (tmp_path / "two" / "1.txt").write_text("a")
    assert len(list(open_pairs(tmp_path / "two", mask=how))) == 1
    with pytest.raises(DataError, match="mask has no image 1"):
        list(open_pairs(tmp_path / "two"))


@pytest.mark.parametrize(
    ("levels", "counted", "odd"),
    [
        ([0] * 6 + [255] * 6, 6, []),
        ([127] + [255] * 11, 11, ["mask_grey"]),
        ([0] + [200] * 11, 11, ["mask_grey"]),
        ([0] * 999 + [128], 1, ["mask_little"]),
        ([255] * 999 + [0], 999, ["mask_whole"]),
        ([20, 240] * 100, 100, []),  # as JPEG leaves them
    ],
)
def test_a_pixel_counts_from_128_on(levels: list[int], counted: int, odd: list[str]) -> None:
    mask = Image.fromarray(np.array([levels], np.uint8))
    assert counting(mask).sum() == counted and mask_oddities(mask) == odd


@pytest.mark.parametrize("colour", ["red", "blue", "yellow", "cyan"])
def test_a_colour_counts_by_its_brightness(tmp_path: Path, colour: str) -> None:
    """Yellow and cyan are bright; a red or a blue region is named, not left out in silence."""
    file = table(tmp_path, TABLE.replace("white.png", "colour.png"))
    (tmp_path / "colour.png").write_bytes(encoded(colour))
    if colour in ("yellow", "cyan"):
        assert all(counting(p.mask_image).all() for p in open_pairs(file) if p.mask_image)
    else:
        with pytest.raises(DataError, match="row 0, mask: nothing in the mask is white"):
            list(open_pairs(file))


@pytest.mark.parametrize("label", [1, 0])
def test_a_mask_has_the_winners_size(tmp_path: Path, label: int) -> None:
    names = ["wide.png", "red.png"][:: 1 if label else -1]
    text = f"image_0,image_1,label_0,mask,prompt\n{','.join(names)},{label},wide.png,a\n"
    file = table(tmp_path, text)
    (pair,) = open_pairs(file)
    assert pair.mask_image is not None and check_pairs(file).ok
    with pytest.raises(DataError, match="row 0, mask: mask and image are 9x6 and 8x6 pixels"):
        list(open_pairs(table(tmp_path, text.replace(f",{label},", f",{1 - label},"))))


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("", "row 1, mask: no mask; give a white one if the whole image counts, or drop the row"),
        ("wide.png", "row 1, mask: mask and image are 9x6 and 8x6 pixels; save the mask at the"),
        ("black.png", "row 1, mask: nothing in the mask is white; paint white what counts, or dro"),
        ("clear.png", "row 1, mask: the mask is transparent in places; save it in black and whit"),
        ("broken.png", "row 1, mask: the image cannot be read"),
        ("none.png", "row 1, mask: there is no file 'none.png'"),
    ],
)
def test_a_mask_that_cannot_be_used(tmp_path: Path, cell: str, expected: str) -> None:
    file = table(tmp_path, TABLE.replace("white.png,b", f"{cell},b"))
    with pytest.raises(DataError, match=expected):
        list(open_pairs(file))
    with pytest.raises(DataError, match=expected):  # also where images wait undecoded
        _ = [pair.mask_image for pair in open_pairs(file).read()]
    assert expected in check_pairs(file).problems[0]
