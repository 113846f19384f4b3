"""Choices from other tools: words, sides, several people, and bad rows by name."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inversion_dpo.data.images import DataError
from inversion_dpo.labels.choices import import_choices
from tests.pair_files import check_pairs, read_pairs


@pytest.fixture
def folder(tmp_path):
    for k, name in enumerate(["a.png", "b.png", "c.png"]):
        image = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / name)
    return tmp_path


def table(folder, rows, name="votes.csv"):
    path = folder / name
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def row(choice, left="a.png", right="b.png", prompt="a star", **more):
    return {"prompt": prompt, "left": left, "right": right, "choice": choice, **more}


def test_two_masks_of_one_pair_are_refused(folder):
    """Also where the images stand the other way round; the first counted."""
    for k, name in enumerate(("top.png", "left.png")):
        mask = np.zeros((8, 8), np.uint8)
        (mask if k else mask.T)[:, :4] = 255
        Image.fromarray(mask).save(folder / name)
    rows = [row("left", mask="top.png"), row("left", "b.png", "a.png", mask="top.png")]
    assert imported(folder, rows)[0]["pairs"] == 1
    with pytest.raises(DataError, match="row 2: the mask is another than in .*row 0, and a pair"):
        imported(folder, [*rows, row("left", "b.png", "a.png", mask="left.png")])


def imported(folder, rows, name="votes.csv", columns=None):
    counts = import_choices(table(folder, rows, name), folder / "pairs.parquet", columns)
    return counts, pq.read_table(folder / "pairs.parquet").to_pylist()


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("left", 1.0),
        ("right", 0.0),
        ("A", 1.0),
        ("B", 0.0),
        (" Tie ", 0.5),
        ("a.png", 1.0),
        ("b.png", 0.0),
        ("first", 1.0),
        ("equal", 0.5),
    ],
)
@pytest.mark.parametrize("name", ["votes.csv", "votes.jsonl"])
def test_every_word_for_a_choice(folder, said, label, name):
    _, rows = imported(folder, [row(said)], name)
    assert rows[0]["label_0"] == rows[0]["preference_0"] == label
    assert rows[0]["jpg_0"] == (folder / "a.png").read_bytes()


def test_several_people_whichever_image_stood_left(folder):
    rows = [
        row("left", annotator="x"),
        row("right", "b.png", "a.png", annotator="y"),
        row("right", annotator="z"),
        row("tie", prompt=" a  star", annotator="x"),
        row("left", prompt="another", annotator="x"),
        row("both bad", annotator="w"),
        row("left", "b.png", "c.png", annotator="x"),
        row("right", "b.png", "c.png", annotator="y"),
    ]
    counts, found = imported(folder, rows)
    assert [(r["caption"], r["preference_0"], r["label_0"], r["labellers"]) for r in found] == [
        ("a star", pytest.approx((0.75 + 1 + 0) / 3), 1.0, 3),  # x said two things
        ("another", 1.0, 1.0, 1),
        ("a star", 0.5, 0.5, 2),
    ]
    assert (counts["rows"], counts["pairs"], counts["ties"], counts["neither"]) == (8, 3, 1, 1)


def test_train_reads_what_was_written(folder):
    rows = [row("left"), row("right", "b.png", "c.png"), row("tie", "a.png", "c.png")]
    imported(folder, rows)
    pairs = read_pairs(folder / "pairs.parquet")
    assert len(pairs.pairs) == 2 and pairs.ties == 1
    assert pairs.pairs[1].winner == (folder / "c.png").read_bytes()
    assert check_pairs(folder / "pairs.parquet").ok


def test_seeds_stay_with_the_first_order_of_the_images(folder):
    rows = [row("left", seed_0=2**60 + 1, seed_1=7), row("left", "b.png", "c.png")]
    _, found = imported(folder, [*rows, row("right", "b.png", "a.png", seed_0=7, seed_1=2**60 + 1)])
    seeds = [(r["label_0"], r["seed_0"], r["seed_1"]) for r in found]
    assert seeds == [(1.0, 2**60 + 1, 7), (1.0, None, None)]


def test_other_column_names(folder):
    rows = [{"q": "a star", "x": "a.png", "y": "b.png", "vote": "y"}]
    columns = {"caption": "q", "image_0": "x", "image_1": "y", "choice": "vote"}
    _, found = imported(folder, rows, columns=columns)
    assert found[0]["label_0"] == 0.0
    spelt = [{"Prompt": "a star", "Image 0": "a.png", "IMAGE_1": "b.png", "Choice": "right"}]
    assert imported(folder, spelt)[1] == found
    with pytest.raises(DataError, match="no column for image_0"):
        imported(folder, rows)
    with pytest.raises(DataError, match="choice=votes names no column"):
        imported(folder, rows, columns=columns | {"choice": "votes"})
    with pytest.raises(DataError, match="'picture' is not one of"):
        imported(folder, rows, columns={"picture": "x"})


def test_of_prompt_and_caption_somebody_says_which_one_counts(folder):
    both = [row("left", caption="what a model saw")]
    with pytest.raises(
        DataError, match="caption and prompt; .*: caption=caption or caption=prompt"
    ):
        imported(folder, both)
    assert imported(folder, both, columns={"caption": "prompt"})[1][0]["caption"] == "a star"


def test_of_two_columns_of_choices_somebody_says_which_one_counts(folder):
    both = [row("left", winner="right")]
    with pytest.raises(DataError, match="choice and winner; .*: choice=choice or choice=winner"):
        imported(folder, both)
    assert imported(folder, both, columns={"choice": "winner"})[1][0]["label_0"] == 0.0
    with pytest.raises(DataError, match="image_0 and left; say which one counts"):
        imported(folder, [row("left", image_0="c.png")])


def test_a_choice_may_name_the_columns_of_label_studio(folder):
    rows = [{"image1": "a.png", "image2": "b.png", "prompt": "a", "pairwise": "image2"}]
    assert imported(folder, rows)[1][0]["label_0"] == 0.0


def test_a_table_that_says_the_better_image_needs_no_import(folder):
    (folder / "votes.csv").write_text("winner,loser,prompt\na.png,b.png,a star\n")
    with pytest.raises(DataError, match=r"needs no import. .*train as data.pairs=.*votes.csv"):
        import_choices(folder / "votes.csv", folder / "pairs.parquet")
    assert check_pairs(folder / "votes.csv").ok


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("1"), "count from 0, some from 1"),
        (row("left", prompt=" "), "caption is empty"),
        (row("left", left="no.png"), "no file 'no.png'"),
        (row("left", left="../a.png"), "leads out"),
        (row("left", right="a.png"), "same file"),
        (row("left", right="votes.csv"), "cannot be read"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(folder, bad, message):
    with pytest.raises(DataError, match="votes.csv, row 1") as error:
        imported(folder, [row("left"), bad])
    assert message in str(error.value) and not (folder / "pairs.parquet").exists()


def test_files_that_are_none(folder):
    (folder / "votes.xlsx").write_bytes(b"x")
    for name, message in (("votes.xlsx", "is none of .csv"), ("gone.csv", "no file")):
        with pytest.raises(DataError, match=message):
            import_choices(folder / name, folder / "pairs.parquet")
    with pytest.raises(DataError, match="names no choice"):
        imported(folder, [row("neither"), row("")])


def test_parquet_holds_its_images(folder):
    images = [(folder / f"{name}.png").read_bytes() for name in "abc"]
    columns = {
        "prompt": ["a", "a", "b"],
        "image_a": [{"bytes": image} for image in (images[0], images[1], images[2])],
        "image_b": [{"bytes": image} for image in (images[1], images[0], images[0])],
        "winner": ["model_a", "image_b", "tie"],
    }
    pq.write_table(pa.table(columns), folder / "votes.parquet")
    counts = import_choices(folder / "votes.parquet", folder / "pairs.parquet")
    assert (counts["pairs"], counts["ties"]) == (2, 1)
    first, second = pq.read_table(folder / "pairs.parquet").to_pylist()
    assert (first["jpg_0"], first["jpg_1"], first["label_0"]) == (images[0], images[1], 1.0)
    assert (first["labellers"], second["label_0"]) == (2, 0.5)
    (folder / "votes.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        import_choices(folder / "votes.parquet", folder / "pairs.parquet")


def test_the_tables_own_columns_are_the_first_words(folder):
    columns = {"image_0": "right", "image_1": "left"}
    _, pairs = imported(folder, [row("left"), row("right", prompt="b")], columns=columns)
    assert [pair["label_0"] for pair in pairs] == [0.0, 1.0]


def test_a_suffix_in_capitals(folder):
    table(folder, [row("left")]).rename(folder / "VOTES.CSV")
    assert import_choices(folder / "VOTES.CSV", folder / "pairs.parquet")["pairs"] == 1
