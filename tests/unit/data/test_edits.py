"""Pairs of edits: a source image beside a better and a worse edit, in every layout."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inversion_dpo.data.check import format_report
from inversion_dpo.data.images import DataError
from inversion_dpo.data.source import open_pairs as opened
from inversion_dpo.run.fields import DataConfig
from tests.pair_files import check_pairs, open_pairs
from tests.unit.data.test_formats import BLUE, GREEN, RED, WHITE, encoded, put_images

HEAD = "winner,loser,source_image,prompt\n"
TABLE = HEAD + "red.png,blue.png,green.png,a\nblue.png,red.png,white.png,a\n"


def table(folder: Path, text: str = TABLE) -> Path:
    (put_images(folder) / "edits.csv").write_text(text)
    return folder / "edits.csv"


def three(folder: Path, better: str, worse: str, source: str) -> Path:
    """Three folders of images of equal names, with a caption file above them."""
    for name, image in ((better, RED), (worse, BLUE), (source, GREEN)):
        (folder / name).mkdir(parents=True)
        (folder / name / "1.png").write_bytes(image)
    (folder / "1.txt").write_text("a")
    return folder


def test_a_table_names_a_source_for_each_pair(tmp_path: Path) -> None:
    source = open_pairs(file := table(tmp_path))
    found = list(source)
    assert [(p.winner, p.loser, p.source) for p in found] == [
        (RED, BLUE, GREEN),
        (BLUE, RED, WHITE),
    ]
    assert source.edits and source.counts["edits"] == 2 and not source.counts["duplicates"]
    assert len(found[0].sizes) == 3 and len({p.digest for p in found}) == 2
    assert found[0].source_image.getpixel((0, 0)) == (0, 128, 0)  # type: ignore[union-attr]
    before = source.fingerprint
    (tmp_path / "green.png").write_bytes(WHITE)
    assert open_pairs(file).fingerprint != before
    assert "edits: 2 pairs have a source image" in format_report(check_pairs(file))


def test_another_source_is_another_pair(tmp_path: Path) -> None:
    plain = next(iter(open_pairs(table(tmp_path / "a", "winner,loser,prompt\nred.png,blue.png,a"))))
    edit = next(iter(open_pairs(table(tmp_path / "b"))))
    assert plain.source is plain.source_image is None and plain.digest != edit.digest


@pytest.mark.parametrize("names", [("w", "l", "source"), ("better", "worse", "before")])
def test_a_third_folder_holds_the_sources(tmp_path: Path, names: tuple[str, str, str]) -> None:
    folder = three(tmp_path, *names)
    columns = {"source": "before"} if "before" in names else {}
    source = open_pairs(folder, columns=columns)
    assert [(p.caption, p.winner, p.loser, p.source) for p in source] == [("a", RED, BLUE, GREEN)]
    (folder / names[2] / "1.png").unlink()
    with pytest.raises(DataError, match=f"images 1: {names[2]} has no image 1; keep one in each"):
        list(open_pairs(folder, columns=columns))
    with pytest.raises(DataError, match=r"data.columns.source=after is no folder in .*; put it"):
        open_pairs(folder, columns={"source": "after"})


@pytest.mark.parametrize("columns", [{}, {"mask": "region"}])
def test_another_folder_holds_the_masks(tmp_path: Path, columns: dict[str, str]) -> None:
    """With or without sources; of thumbs too. One that is missing is named."""
    folder, name = three(tmp_path, "w", "l", "source"), columns.get("mask", "mask")
    (folder / name).mkdir()
    (folder / name / "1.png").write_bytes(WHITE)
    for sources in (GREEN, None):
        source = open_pairs(folder, columns=columns)
        assert [(p.winner, p.source, p.mask) for p in source] == [(RED, sources, WHITE)]
        if sources:
            (folder / "source" / "1.png").unlink()
            (folder / "source").rmdir()
    named = columns | {"winner": "w", "loser": "l"}
    alone = opened(DataConfig(pairs=str(folder), format="thumbs", columns=named), alone=True)
    assert [(p.winner, p.mask) for p in alone] == [(RED, WHITE), (BLUE, WHITE)]
    (folder / name / "1.png").rename(folder / name / "2.png")
    with pytest.raises(DataError, match=f"images 1: {name} has no image 1; keep one in each"):
        list(open_pairs(folder, columns=columns))
    with pytest.raises(DataError, match=r"w/1.png, mask: no mask; give a white one"):
        list(opened(DataConfig(pairs=str(folder), format="thumbs", columns=named), alone=True))


def test_thumbs_on_edits(tmp_path: Path) -> None:
    """Each image with a thumb has the source of its name; one without is named."""
    three(tmp_path, "liked", "disliked", "source")
    source = opened(DataConfig(pairs=str(tmp_path)), alone=True)
    found = [(p.winner, p.source, p.preference) for p in source]
    assert found == [(RED, GREEN, 1.0), (BLUE, GREEN, 0.0)] and source.edits
    (tmp_path / "source" / "1.png").rename(tmp_path / "source" / "2.png")
    with pytest.raises(DataError, match=r"liked/1.png, source: no image to be edited; embed"):
        list(opened(DataConfig(pairs=str(tmp_path)), alone=True))


@pytest.mark.parametrize(
    "head", ["prompt,image,score,input_image", "prompt,image,thumb,input_image"]
)
def test_ratings_of_one_instruction_stay_with_their_source(tmp_path: Path, head: str) -> None:
    rows = "a,red.png,1,green.png\na,blue.png,0,green.png\na,red.png,0,white.png\n"
    columns = {"scores": "score"} if "score" in head else {}
    source = open_pairs(table(tmp_path, f"{head}\n{rows}"), columns=columns)
    assert [(p.winner, p.loser, p.source) for p in source] == [(RED, BLUE, GREEN)]
    assert source.counts["unpaired"] == 1


def test_a_ranking_of_edits(tmp_path: Path) -> None:
    row = {"images": [RED, BLUE], "ranks": [2, 1], "caption": "a", "source_image": GREEN}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (pair,) = open_pairs(tmp_path / "a.parquet")
    assert (pair.winner, pair.loser, pair.source) == (BLUE, RED, GREEN)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("", "row 1, source: no image to be edited; embed or name it, or drop the row"),
        ("none.png", "row 1, source: there is no file 'none.png' in .*; put it there"),
        ("../x.png", "row 1, source: '../x.png' leads out of"),
        ("broken.png", "row 1, source: the image cannot be read"),
    ],
)
def test_a_source_that_cannot_be_used(tmp_path: Path, cell: str, expected: str) -> None:
    file = table(tmp_path, TABLE.replace("white.png", cell))
    (tmp_path / "broken.png").write_bytes(RED[:40])
    with pytest.raises(DataError, match=expected):
        list(open_pairs(file))
    report = check_pairs(file)
    assert report.problems_total == 1 and expected[:14] in report.problems[0]
    skipping = open_pairs(file, on_bad_row="skip")
    assert len(list(skipping)) == 1 and skipping.counts["broken_images"] == (cell[:2] != "..")


def test_files_with_and_without_sources_are_not_mixed(tmp_path: Path) -> None:
    rows = [{"jpg_0": RED, "jpg_1": BLUE, "label_0": 1.0, "caption": "a", "source_image": GREEN}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "1.parquet")
    pq.write_table(
        pa.table({k: [v] for k, v in rows[0].items() if k[0] != "s"}), tmp_path / "2.parquet"
    )
    with pytest.raises(DataError, match=r"2.parquet, row 0: rows with and without a source image"):
        list(open_pairs(tmp_path))


def test_a_source_of_another_shape_counts_for_the_size(tmp_path: Path) -> None:
    file = table(tmp_path, HEAD + "red.png,blue.png,wide.png,a\n")
    (tmp_path / "wide.png").write_bytes(encoded("white", (64, 16)))
    report = check_pairs(file, resolution=64)
    assert report.counts["mixed_shapes"] == 1 and not report.trained_at
