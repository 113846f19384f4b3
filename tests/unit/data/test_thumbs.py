"""Thumbs up and down: as single images, and as pairs where one prompt has both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inversion_dpo.data.check import format_report
from inversion_dpo.data.images import DataError
from inversion_dpo.data.source import open_pairs as opened
from inversion_dpo.run.fields import DataConfig
from tests.pair_files import check_pairs, open_pairs
from tests.unit.data.test_formats import BLUE, GREEN, RED, WHITE, put_images

ROWS = "a,red.png,up\na,blue.png,down\nb,green.png,👍\nc,white.png,0\nb,red.png,\n"


def table(folder: Path, rows: str = ROWS, head: str = "prompt,image,thumb\n") -> Path:
    (put_images(folder) / "thumbs.csv").write_text(head + rows)
    return folder / "thumbs.csv"


def singles(data: Path, **settings: Any) -> list[tuple[str, bytes, float]]:
    source = opened(DataConfig(pairs=str(data), **settings), alone=True)
    found = [(p.caption, p.winner, p.preference) for p in source]
    assert all(p.single and p.winner == p.loser for p in source)
    assert source.counts["single"] == source.counts["pairs"] == len(found)
    return found


def two(folder: Path, first: str = "liked", second: str = "disliked") -> Path:
    """Two images that are liked, one that is not."""
    for name, images in ((first, {"1": RED, "sub/2": GREEN}), (second, {"1": BLUE})):
        for stem, image in images.items():
            path = folder / name / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
            path.with_suffix(".txt").write_text(f"a {stem[-1]}\n")
    return folder


def test_two_masks_of_one_image_are_refused(tmp_path: Path) -> None:
    """One in PNG, one in JPEG: none of them is taken in silence."""
    folder = two(tmp_path)
    for name in ("1.png", "sub/2.png", "1.jpg"):
        (folder / "mask" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "mask" / name).write_bytes(WHITE)
    with pytest.raises(DataError, match="liked/1.png: mask has 2 images 1; keep one"):
        singles(folder)
    (folder / "mask" / "1.jpg").unlink()
    assert len(singles(folder)) == 3


def test_each_image_with_a_thumb_is_a_row(tmp_path: Path) -> None:
    file = table(tmp_path)
    assert singles(file) == [("a", RED, 1.0), ("a", BLUE, 0.0), ("b", GREEN, 1.0), ("c", WHITE, 0)]
    source = opened(DataConfig(pairs=str(file)), alone=True)
    assert len(list(source)) == 4
    assert (source.counts["disliked"], source.counts["unlabelled"]) == (2, 1)


@pytest.mark.parametrize("word", ["nan", "N/A", "None", " "])
def test_a_word_for_an_empty_cell_is_no_thumb(tmp_path: Path, word: str) -> None:
    source = opened(DataConfig(pairs=str(table(tmp_path, f"{ROWS}c,red.png,{word}\n"))), alone=True)
    assert len(list(source)) == 4 and source.counts["unlabelled"] == 2


def test_a_prompt_with_both_gives_pairs_to_the_other_losses(tmp_path: Path) -> None:
    source = open_pairs(file := table(tmp_path))
    assert [(p.caption, p.winner, p.loser, p.single) for p in source] == [("a", RED, BLUE, False)]
    assert (source.counts["unpaired"], source.counts["unlabelled"]) == (2, 1)
    assert source.fingerprint != opened(DataConfig(pairs=str(file)), alone=True).fingerprint


def test_no_prompt_with_both_is_refused_with_the_losses_that_need_none(tmp_path: Path) -> None:
    file = table(tmp_path, "a,red.png,up\na,green.png,up\nb,blue.png,down\n")
    with pytest.raises(
        DataError, match=r"no prompt has both .* 2 rows \(1 tie, 1 prompt of.*name=kto"
    ):
        list(open_pairs(file))
    assert len(singles(file)) == 3


def test_thumbs_of_several_people_are_counted(tmp_path: Path) -> None:
    """The majority is the label, an even split a tie; the share is kept."""
    rows = [
        {"image": image, "thumbs": thumbs, "caption": "a"}
        for image, thumbs in ((RED, [1.0, 1.0, 0.0]), (BLUE, [0.0, 1.0]), (GREEN, [0.0]))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert singles(tmp_path / "a.parquet") == [("a", RED, pytest.approx(2 / 3)), ("a", GREEN, 0.0)]
    ranked = list(open_pairs(tmp_path / "a.parquet", ranking="adjacent"))
    assert [(p.winner, p.loser) for p in ranked] == [(RED, BLUE), (BLUE, GREEN)]
    assert 0.5 < ranked[0].preference < 1.0


@pytest.mark.parametrize(
    "words", [("+1", "-1"), ("thumbs up", "Thumbs-Down"), (":thumbsup:", ":-1:"), ("1.0", "-1.0")]
)
def test_thumbs_of_other_tools(tmp_path: Path, words: tuple[str, str]) -> None:
    up, down = words
    file = table(tmp_path, f"a,red.png,{up}\na,blue.png,{down}\nb,green.png,\n")
    assert singles(file) == [("a", RED, 1.0), ("a", BLUE, 0.0)]
    assert [(p.winner, p.loser) for p in open_pairs(file)] == [(RED, BLUE)]


@pytest.mark.parametrize("alone", [True, False])
def test_a_thumb_of_0_beside_one_of_minus_1_may_mean_neither(tmp_path: Path, alone: bool) -> None:
    file = table(tmp_path, "a,red.png,1\na,blue.png,0\nb,green.png,-1\n")
    for on_bad_row in ("error", "skip"):
        config = DataConfig(pairs=str(file), on_bad_row=on_bad_row)
        with pytest.raises(DataError, match="-1 in line 4 of .* and 0 in line 3 of .* write down"):
            list(opened(config, alone=alone))


def test_two_folders_of_unequal_numbers(tmp_path: Path) -> None:
    assert singles(two(tmp_path)) == [("a 1", RED, 1.0), ("a 2", GREEN, 1.0), ("a 1", BLUE, 0.0)]
    (pair,) = open_pairs(tmp_path)  # the prompt "a 1" has both
    assert (pair.winner, pair.loser) == (RED, BLUE)
    before = open_pairs(tmp_path).fingerprint
    (tmp_path / "disliked" / "1.txt").write_text("another")
    assert open_pairs(tmp_path).fingerprint != before


def test_what_is_no_image_is_listed(tmp_path: Path) -> None:
    two(tmp_path)
    for name in ("liked/7.tmp", "disliked/9.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert len(singles(tmp_path)) == 3
    assert check_pairs(tmp_path).idle == ("liked/7.tmp", "disliked/9.txt")


def test_two_folders_of_any_names(tmp_path: Path) -> None:
    two(tmp_path, "chosen", "rejected")
    with pytest.raises(DataError, match="rejected has no image sub/2; .*data.format=thumbs"):
        list(open_pairs(tmp_path))
    columns = {"winner": "chosen", "loser": "rejected"}
    assert len(singles(tmp_path, columns=columns, format="thumbs")) == 3


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("d,red.png,7", r"line 7 of thumbs.csv, row 5: the thumb is '7'; write up or down, or 1"),
        ("d,red.png,-2", "row 5: the thumb is '-2'; write up or down, or 1 or 0"),
        ("d,red.png,maybe", "row 5: the thumb is 'maybe'; write up or down"),
        ("d,none.png,up", "row 5, image: there is no file 'none.png'"),
        (",red.png,up", "row 5: caption is empty"),
    ],
)
def test_a_spoiled_row_is_named(tmp_path: Path, row: str, expected: str) -> None:
    file = table(tmp_path, ROWS + row + "\n")
    with pytest.raises(DataError, match=expected):
        singles(file)
    assert len(singles(file, on_bad_row="skip")) == 4
    assert check_pairs(file).problems_total == 1


def test_a_folder_without_a_caption_is_named(tmp_path: Path) -> None:
    (two(tmp_path) / "liked" / "1.txt").unlink()
    with pytest.raises(DataError, match="liked/1.png: there is no caption; write the prompt to"):
        singles(tmp_path)


def test_the_check_counts_thumbs(tmp_path: Path) -> None:
    report = check_pairs(table(tmp_path))
    assert report.ok and report.example == 'prompt "a": red.png (thumb up)'
    words = "thumbs: 2 up, 2 down; objective.name=kto and nft take each"
    assert words in format_report(
        report
    ) and "pairs of the 1 prompt that has both" in format_report(report)


@pytest.mark.parametrize("kind", ["thumbs", "folders", "dataset"])
def test_a_file_is_no_folder(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(DataError, match=f"is a file, and data.format={kind} reads a folder"):
        open_pairs(table(tmp_path), format=kind)


def test_a_format_has_no_effect_on_the_hub() -> None:
    with pytest.raises(DataError, match="hpdv3 has no effect on hf:owner/name.*download it"):
        open_pairs("hf:owner/name", format="hpdv3")


def test_thumbs_of_one_image_that_differ_are_counted(tmp_path: Path) -> None:
    report = check_pairs(table(tmp_path, "a,red.png,up\na,red.png,down\na,red.png,up\n"))
    text = format_report(report)
    assert "3 usable images in 3 rows" in text and "and their images:" in text
    assert "kept: 2 duplicate images (1 with the other label)\n" in text
