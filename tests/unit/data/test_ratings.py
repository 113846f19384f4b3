"""Ratings by several people, ranks that contradict, and what the check says of them in words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inversion_dpo.data.check import format_report
from inversion_dpo.data.images import DataError
from tests.pair_files import check_pairs, open_pairs
from tests.unit.data.test_formats import BLUE, GREEN, RED, put_images

HEAD = "prompt,image,rating,rater\n"
RATED = HEAD + "".join(
    f"a,{image}.png,{rating},{rater}\n"
    for rater, pair in {"x": (5, 1), "y": (3, 2), "z": (3, 2)}.items()
    for image, rating in zip(("red", "blue"), pair, strict=True)
)
SCORES = {"columns": {"scores": "rating"}}


def table(folder: Path, text: str, name: str = "ratings.csv") -> Path:
    (put_images(folder) / name).write_text(text)
    return folder / name


def test_ratings_of_several_people_become_one_pair(tmp_path: Path) -> None:
    """Means 11/3 and 5/3, variances 4/3 and 1/3: Thurstone's z is 2 / sqrt(5/3)."""
    (pair,) = open_pairs(table(tmp_path, RATED), **SCORES)
    assert (pair.caption, pair.winner, pair.loser) == ("a", RED, BLUE)
    z = 2 / math.sqrt(5 / 3)
    assert pair.preference == pytest.approx((1 + math.erf(z / math.sqrt(2))) / 2)
    report = check_pairs(tmp_path / "ratings.csv", **SCORES)
    assert report.ok
    words = 'prompt "a": red.png (mean 3.667) over blue.png (1.667)'
    assert words in format_report(report)


def test_one_rating_has_the_spread_of_the_others(tmp_path: Path) -> None:
    more = "b,green.png,4,x\nb,white.png,3,x\n"
    file = table(tmp_path, RATED + more)
    pairs = {p.caption: p.preference for p in open_pairs(file, **SCORES)}
    z = 1 / math.sqrt(2 * (8 / 3 + 2 / 3) / 4)  # squares 8/3 and 2/3 over four degrees of freedom
    assert pairs["b"] == pytest.approx((1 + math.erf(z / math.sqrt(2))) / 2)
    (sure,) = open_pairs(table(tmp_path, HEAD + more, "few.csv"), **SCORES)
    assert sure.preference == 1.0  # nobody knows the spread
    assert (
        "green.png (score 4) over white.png (3)"
        in check_pairs(tmp_path / "few.csv", **SCORES).example
    )


def test_spaces_and_spellings_part_no_ratings(tmp_path: Path) -> None:
    """The same people's ratings, but for a space in a prompt and ways to write a path."""
    (before,) = open_pairs(table(tmp_path, RATED), **SCORES)
    text = RATED.replace("a,red.png,3", "a ,./red.png,3", 1).replace(
        "a,blue.png,2", "a,.\\blue.png,2"
    )
    (pair,) = open_pairs(table(tmp_path, text), **SCORES)
    assert pair == before
    assert "1 usable pair in 6 rows" in format_report(
        check_pairs(tmp_path / "ratings.csv", **SCORES)
    )


def test_equal_means_are_ties_and_lone_images_unpaired(tmp_path: Path) -> None:
    text = RATED + "b,red.png,2,x\nb,blue.png,2,x\nc,red.png,3,x\n"
    source = open_pairs(table(tmp_path, text), **SCORES)
    assert len(list(source)) == 1
    assert (source.counts["ties"], source.counts["unpaired"]) == (1, 1)


def test_lists_of_ratings_and_all_pairs(tmp_path: Path) -> None:
    rows = [{"caption": "a", "images": [RED, BLUE, GREEN], "scores": [[1.0, 2.0], [3.0], [9.0]]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pairs = list(open_pairs(tmp_path / "a.parquet", ranking="adjacent"))
    assert [(p.winner, p.loser) for p in pairs] == [(GREEN, BLUE), (BLUE, RED)]


def test_a_score_that_is_none_is_named(tmp_path: Path) -> None:
    file = table(tmp_path, RATED + "b,red.png,good,x\n")
    with pytest.raises(DataError, match="line 8 of ratings.csv, row 6: the score is 'good'; write"):
        list(open_pairs(file, **SCORES))


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        (
            HEAD + "a,red.png,85%,x\na,blue.png,90,x\n",
            SCORES,
            "line 3 of ratings.csv, row 1: rating is '90', and line 2 of .*rating is '85%': write",
        ),
        (
            "image1,image2,votes_image1,votes_image2,prompt\nred.png,blue.png,60%,40,a\n",
            {},
            "row 0: votes_image2 is '40', and .* row 0: votes_image1 is '60%': write all",
        ),
        (
            "prompt,jpg_0,jpg_1,label_0,preference_0\na,red.png,blue.png,1,90%\n"
            "b,red.png,blue.png,1,0.9\n",
            {},
            "row 1: preference_0 is '0.9', and .*row 0: preference_0 is '90%'",
        ),
    ],
)
def test_per_cent_beside_plain_numbers_is_refused(
    tmp_path: Path, text: str, settings: dict[str, Any], expected: str
) -> None:
    """By 85% and 90 nobody knows which image is the better one."""
    for on_bad_row in ("error", "skip"):
        with pytest.raises(DataError, match=expected):
            list(open_pairs(table(tmp_path, text), on_bad_row=on_bad_row, **settings))


def test_per_cent_throughout_is_read(tmp_path: Path) -> None:
    file = table(tmp_path, HEAD + 'a,red.png,85 %,x\na,blue.png,"90,5%",x\n')
    (pair,) = open_pairs(file, **SCORES)
    assert pair.winner == BLUE
    assert "blue.png (score 0.905) over red.png (0.85)" in check_pairs(file, **SCORES).example


@pytest.mark.parametrize("cell", ["", " ", "N/A", "nan"])
def test_an_empty_rating_is_counted_and_left_out(tmp_path: Path, cell: str) -> None:
    source = open_pairs(table(tmp_path, f"{RATED}a,green.png,{cell},x\n"), **SCORES)
    assert [p.winner for p in source] == [RED] and source.counts["unlabelled"] == 1


def test_the_check_tells_the_scale_and_what_is_not_read(tmp_path: Path) -> None:
    """People who rate from 1 to 5 and from 1 to 100 are seen by it; so is a misspelt column."""
    file = table(tmp_path, RATED + "b,red.png,80,w\nb,blue.png,20,w\n")
    text = format_report(check_pairs(file, **SCORES))
    assert "ratings: 8 between 1 and 80, taken for one scale, higher is better" in text
    assert "not read: 'rater'\n" in text
    votes = "image_0,image_1,votes_0,votes_1,label_0,prompt\nred.png,blue.png,3,1,1,a\n"
    assert check_pairs(table(tmp_path, votes, "votes.csv")).idle == ("votes_0", "votes_1")
    row = {"caption": "a", "chosen": {"image": RED, "by": 1}, "rejected": {"image": BLUE}, "x": 1}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert check_pairs(tmp_path / "a.parquet").idle == ("x",)


@pytest.mark.parametrize("name", ["rating", "Aesthetic score", "stars", "MOS"])
def test_ratings_are_not_taken_for_ranks(tmp_path: Path, name: str) -> None:
    file = table(tmp_path, RATED.replace("rating", name))
    with pytest.raises(DataError, match=rf"data.columns.scores={name} \(higher is better\)"):
        list(open_pairs(file))
    with pytest.raises(DataError, match=f"ranks={name} would take 1 for the best.*scores={name}"):
        list(open_pairs(file, columns={"ranks": name, "group": "prompt"}))


def test_two_ranks_of_one_image_are_refused_with_both_lines(tmp_path: Path) -> None:
    text = "prompt_id,prompt,image,rank\n1,a,red.png,1\n1,a,blue.png,2\n1,a,red.png,3\n"
    with pytest.raises(
        DataError, match=r"'red.png' has rank 1 in line 2 of .*row 0 and 3 in line 4 of .*row 2"
    ):
        list(open_pairs(table(tmp_path, text)))
    same = open_pairs(table(tmp_path, text.replace("red.png,3", "red.png,1")), ranking="all")
    assert [(p.winner, p.loser) for p in same] == [(RED, BLUE)]
    assert "red.png (rank 1) over blue.png (2)" in check_pairs(tmp_path / "ratings.csv").example


def test_unlabelled_rows_are_counted(tmp_path: Path) -> None:
    said = [(1.0, 0.0, True), (0.0, 0.0, True), (0.0, 1.0, False), (0.5, 0.5, True)]
    rows = [
        dict(jpg_0=RED, jpg_1=BLUE, caption="a", label_0=a, label_1=b, has_label=has)
        for a, b, has in said
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = open_pairs(tmp_path / "a.parquet")
    assert [p.winner for p in source] == [RED]
    assert (source.counts["unlabelled"], source.counts["ties"]) == (2, 1)
    assert "1 tie, 0 with identical images, 2 unlabelled" in format_report(
        check_pairs(tmp_path / "a.parquet")
    )


def test_votes_become_soft_preferences(tmp_path: Path) -> None:
    rows = "red.png,blue.png,3,1,a\nred.png,blue.png,0,0,b\nred.png,blue.png,2,2,c\n"
    file = table(tmp_path, "image1,image2,votes_image1,votes_image2,prompt\n" + rows)
    source = open_pairs(file)
    assert [(p.winner, p.preference) for p in source] == [(RED, 0.75)]
    assert (source.counts["unlabelled"], source.counts["ties"]) == (1, 1)


def test_images_lie_in_the_root(tmp_path: Path) -> None:
    put_images(tmp_path / "data" / "images")
    put_images(tmp_path / "outside")
    (tmp_path / "data" / "tables").mkdir()
    root = tmp_path / "data"
    names = ["../images/red.png", f"{root}/images/red.png", "images/red.png"]
    text = "winner,loser,prompt\n" + "".join(f"{n},images/blue.png,a\n" for n in names)
    (root / "tables" / "pairs.csv").write_text(text)
    source = open_pairs(root / "tables" / "pairs.csv", root=str(root))
    assert [p.winner for p in source] == [RED] * 3
    before = source.fingerprint
    (root / "images" / "red.png").write_bytes(GREEN)
    assert open_pairs(root / "tables" / "pairs.csv", root=str(root)).fingerprint != before
    with pytest.raises(DataError, match=r"leads out of .*tables; .*set data.root=FOLDER"):
        list(open_pairs(root / "tables" / "pairs.csv"))
    (root / "tables" / "pairs.csv").write_text(text + "../../outside/red.png,images/blue.png,a\n")
    with pytest.raises(DataError, match=r"row 3, winner: .*leads out of .*data; "):
        list(open_pairs(root / "tables" / "pairs.csv", root=str(root)))
    with pytest.raises(DataError, match="data.root=nowhere is no folder"):
        open_pairs(root / "tables" / "pairs.csv", root="nowhere")


def test_hidden_files_are_counted_and_no_rows(tmp_path: Path) -> None:
    folder = put_images(tmp_path)
    (folder / "metadata.csv").write_text("winner,loser,prompt\nred.png,blue.png,a\n")
    for name in ("._red.png", ".DS_Store", "Thumbs.db"):
        (folder / name).write_bytes(b"x")
    report = check_pairs(folder)
    assert (report.ok, report.counts["rows"], report.counts["hidden"]) == (True, 1, 3)
    assert "3 hidden files" in format_report(report)


def test_pairs_the_other_way_round_are_counted(tmp_path: Path) -> None:
    text = "winner,loser,prompt\nred.png,blue.png,a\nblue.png,red.png,a\nred.png,blue.png,a\n"
    report = check_pairs(table(tmp_path, text))
    assert "2 duplicate pairs (1 with the other label)" in format_report(report)
    assert "! 1 pair contradicts an earlier row: keep one label" in format_report(report)
    thumbs = "image,thumb,prompt\nred.png,up,a\nred.png,down,a\nblue.png,up,a\n"
    report = check_pairs(table(tmp_path, thumbs, "thumbs.csv"))
    assert "! 1 image contradicts an earlier row: keep one thumb" in format_report(report)


def two(folder: Path, first: str = "w", second: str = "l") -> Path:
    """Two folders of images with a caption file beside one of each pair."""
    for name, image in ((first, RED), (second, BLUE)):
        (folder / name / "sub").mkdir(parents=True)
        (folder / name / "1.png").write_bytes(image)
        (folder / name / "sub" / "2.png").write_bytes(GREEN if name == first else image)
        (folder / name / "._1.png").write_bytes(b"x")
    (folder / first / "1.txt").write_text("a\n")
    (folder / second / "sub" / "2.txt").write_text("b")
    return folder


@pytest.mark.parametrize("suffix", [".TXT", ".caption"])
def test_captions_of_other_suffixes_are_read(tmp_path: Path, suffix: str) -> None:
    two(tmp_path)
    before = [pair.caption for pair in open_pairs(tmp_path)]
    for file in list(tmp_path.rglob("*.txt")):
        file.rename(file.with_suffix(suffix))
    assert [pair.caption for pair in open_pairs(tmp_path)] == before
    fingerprint = open_pairs(tmp_path).fingerprint
    file.with_suffix(suffix).write_text("another")
    assert open_pairs(tmp_path).fingerprint != fingerprint


@pytest.mark.parametrize("names", [("w", "l"), ("Chosen", "rejected"), ("mine", "theirs")])
def test_two_folders_of_equal_names(tmp_path: Path, names: tuple[str, str]) -> None:
    folder = two(tmp_path, *names)
    columns = dict(zip(("winner", "loser"), names, strict=True)) if "mine" in names else {}
    if columns:
        with pytest.raises(DataError, match="winner=mine data.columns.loser=theirs, or the other"):
            open_pairs(folder)
    source = open_pairs(folder, columns=columns)
    found = [(p.caption, p.winner, p.loser) for p in source]
    assert found == [("a", RED, BLUE), ("b", GREEN, BLUE)]
    assert source.counts["hidden"] == 2
    before = source.fingerprint
    (folder / names[0] / "1.txt").write_text("another")
    assert open_pairs(folder, columns=columns).fingerprint != before


def test_what_belongs_to_no_pair_of_the_folders_is_listed(tmp_path: Path) -> None:
    """An image of an unknown suffix, a caption without images, a folder of another name."""
    folder = two(tmp_path)
    for name in ("w/3.jpe", "w/9.txt", "old/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    source = open_pairs(folder)
    assert len(list(source)) == 2 and source.counts["strays"] == 2 and source.counts["rows"] == 2
    report = check_pairs(folder)
    assert report.ok and "not read: 'old/', 'w/3.jpe', 'w/9.txt'\n" in format_report(report)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.json", '{"made": "today"}'),
        ("captions.csv", "image,prompt\n1.png,a\n"),
        ("pairs.xlsx", "PK"),
        ("empty.csv", ""),
    ],
)
def test_a_table_of_no_pairs_beside_two_folders_is_only_listed(
    tmp_path: Path, name: str, text: str
) -> None:
    (two(tmp_path) / name).write_text(text)
    assert len(list(open_pairs(tmp_path))) == 2
    assert check_pairs(tmp_path).idle == (name,)


def test_a_caption_that_is_a_link_stays_in_the_folder(tmp_path: Path) -> None:
    """As an image does: whoever made the data chose where the link leads."""
    folder = two(tmp_path / "data")
    (folder / "w" / "1.txt").rename(tmp_path / "mine.txt")
    (folder / "w" / "1.txt").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(DataError, match="w/1.txt is a link out of .*data; copy the caption there"):
        list(open_pairs(folder))
    (tmp_path / "mine.txt").rename(folder / "mine.txt")
    (folder / "w" / "1.txt").unlink()
    (folder / "w" / "1.txt").symlink_to("../mine.txt")
    assert [p.caption for p in open_pairs(folder)] == ["a", "b"]


def test_a_caption_may_be_in_utf_16(tmp_path: Path) -> None:
    """As Windows' editor saves it, and as tables are read."""
    (two(tmp_path) / "w" / "1.txt").write_text("a\n", encoding="utf-16")
    assert [p.caption for p in open_pairs(tmp_path)] == ["a", "b"]


def test_folders_of_pairs_are_thumbs_if_they_are_named(tmp_path: Path) -> None:
    (two(tmp_path) / "l" / "1.png").unlink()
    for name in ("w/1", "w/sub/2", "l/sub/2"):
        (tmp_path / f"{name}.txt").write_text("a")
    with pytest.raises(DataError, match="or name both: data.columns.winner=NAME"):
        open_pairs(tmp_path, format="thumbs")
    columns = {"winner": "w", "loser": "l"}
    source = open_pairs(tmp_path, format="thumbs", columns=columns)
    assert [p.loser for p in source] == [BLUE]


def test_a_table_of_pairs_in_two_folders_is_read(tmp_path: Path) -> None:
    (two(tmp_path) / "pairs.csv").write_text("winner,loser,prompt\nw/1.png,l/1.png,mine\n")
    assert [p.caption for p in open_pairs(tmp_path)] == ["mine"]
    assert [p.caption for p in open_pairs(tmp_path, format="folders")] == ["a", "b"]


def test_accents_may_be_spelled_in_two_ways(tmp_path: Path) -> None:
    """As one character on Linux, as two on macOS."""
    folder = two(tmp_path)
    for name, new in (("w/1.png", "é"), ("w/1.txt", "é"), ("l/1.png", "e\u0301")):
        (folder / name).rename(folder / name.replace("1", new))
    (folder / "l" / "1.txt").unlink(missing_ok=True)
    assert [p.winner for p in open_pairs(folder)] == [GREEN, RED]
    assert check_pairs(folder).idle == ()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda f: (f / "l" / "1.png").unlink(), "images 1: l has no image 1; keep one in each"),
        (lambda f: (f / "w" / "1.jpg").write_bytes(RED), "images 1: w has 2 images 1; keep one"),
        (
            lambda f: (f / "l" / "1.png").unlink(),
            "Where they are no pairs, set data.format=thumbs data.columns.winner=w",
        ),
        (lambda f: (f / "w" / "1.txt").unlink(), "images 1: there is no caption; write"),
        (lambda f: (f / "l" / "1.txt").write_text("b"), "images 1: there are two captions; write"),
        (
            lambda f: (f / "w" / "1.txt").write_bytes(b"caf\xe9"),
            "images 1: the caption cannot be read",
        ),
    ],
)
def test_two_folders_that_do_not_fit(tmp_path: Path, spoil: object, expected: str) -> None:
    spoil(two(tmp_path))  # type: ignore[operator]
    with pytest.raises(DataError, match=expected):
        list(open_pairs(tmp_path))


@pytest.mark.parametrize(
    ("columns", "values"),
    [("label_0,preference_0", "1,0.3"), ("label_0,preference_0", "0,0.9")],
)
def test_a_label_against_its_votes_is_named(tmp_path: Path, columns: str, values: str) -> None:
    put_images(tmp_path)
    table = tmp_path / "a.csv"
    table.write_text(f"prompt,jpg_0,jpg_1,{columns}\na,red.png,blue.png,{values}\n")
    with pytest.raises(DataError, match="row 0: .*.png is the better one by its label, and has 0."):
        list(open_pairs(table))
    row = {"prompt": "a", "path1": "red.png", "path2": "blue.png", "choice_dist": [3, 7]}
    (tmp_path / "train.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match="row 0: red.png is .* by its label, and has 0.3 of the"):
        list(open_pairs(tmp_path / "train.json", format="hpdv3"))


def test_hpdv3s_own_columns(tmp_path: Path) -> None:
    """Of MizzenAI/HPDv3 path1 is the preferred image; choice_dist, where it is, counts votes."""
    more = {"confidence": 0.99, "model1": "flux", "model2": "infinity"}
    row = {"prompt": "a", "path1": "red.png", "path2": "blue.png", **more}
    for votes, expected in (([9, 3], 0.75), ("[9, 3]", 0.75), (None, 1.0)):
        text = json.dumps([row | ({"choice_dist": votes} if votes else {})])
        (put_images(tmp_path) / "train.json").write_text(text)
        for data in (tmp_path, tmp_path / "train.json"):
            (pair,) = open_pairs(data, format="hpdv3")
            assert (pair.caption, pair.winner, pair.loser) == ("a", RED, BLUE)
            assert pair.preference == expected
    text = json.dumps([row, row | {"choice_dist": [6, 6]}, row | {"choice_dist": [0, 0]}])
    (tmp_path / "train.json").write_text(text)
    source = open_pairs(tmp_path, format="hpdv3")
    assert len(list(source)) == source.counts["ties"] == source.counts["unlabelled"] == 1
    (tmp_path / "train.json").write_text(json.dumps([row | {"choice_dist": [9, -3]}]))
    with pytest.raises(DataError, match="train.json, row 0: the votes are 9 and -3; write counts"):
        list(open_pairs(tmp_path, format="hpdv3"))


@pytest.mark.parametrize(
    "settings", [{"columns": {"caption": "text"}}, {"root": "."}], ids=["columns", "root"]
)
def test_what_has_no_effect_on_folders_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="data.* has no effect: .* is read as data.format=folders"):
        open_pairs(two(tmp_path), **settings)


@pytest.mark.parametrize("suffix", ["gif", "bmp", "heic"])
def test_a_picture_of_another_kind_in_a_folder_is_named(tmp_path: Path, suffix: str) -> None:
    (two(tmp_path) / "l" / "1.png").rename(tmp_path / "l" / f"1.{suffix}")
    (tmp_path / "l" / f"1.{suffix}").write_bytes(b"BM")
    with pytest.raises(DataError, match="images 1, l: the image cannot be read .*BMP.* JPEG, PNG"):
        list(open_pairs(tmp_path))
