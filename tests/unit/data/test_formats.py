"""Every format on a small real file of its kind, and on spoiled ones."""

from __future__ import annotations

import csv
import io
import json
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, constants
from PIL import Image

from inversion_dpo.data import formats
from inversion_dpo.data.check import format_report, tokens_of
from inversion_dpo.data.columns import our_names
from inversion_dpo.data.images import DataError
from inversion_dpo.data.rankings import SCHEMES
from inversion_dpo.run.fields import DataConfig
from tests.pair_files import check_pairs, open_pairs


def encoded(colour: str, size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


COLOURS = ("red", "blue", "green", "white")
RED, BLUE, GREEN, WHITE = (encoded(c) for c in COLOURS)


def triples(data: Any, **reading: Any) -> list[tuple[str, bytes, bytes]]:
    return [(p.caption, p.winner, p.loser) for p in open_pairs(data, **reading)]


def put_images(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in COLOURS:
        (folder / f"{name}.png").write_bytes(encoded(name))
    return folder


def put_csv(folder: Path, header: list[str], *rows: list[Any]) -> Path:
    with (put_images(folder) / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


CHOSEN = ["file_name_winner", "file_name_loser", "prompt"]


# ---- a folder with a table


def test_csv_of_winners_and_losers(tmp_path: Path) -> None:
    folder = put_csv(tmp_path, CHOSEN, ["red.png", "blue.png", "a cat, sitting"])
    assert triples(folder) == [("a cat, sitting", RED, BLUE)]


def test_jsonl_of_two_images_and_a_label(tmp_path: Path) -> None:
    rows = [
        {"file_name_0": "red.png", "file_name_1": "blue.png", "label_0": label, "prompt": "a"}
        for label in (1, 0, 0.5)
    ]
    lines = "\n".join(json.dumps(r) for r in rows)
    (put_images(tmp_path) / "metadata.jsonl").write_text(lines)
    source = open_pairs(tmp_path)
    assert [(p.winner, p.loser) for p in source] == [(RED, BLUE), (BLUE, RED)]
    assert (source.counts["rows"], source.counts["ties"]) == (3, 1)


@pytest.mark.parametrize(
    ("names", "words", "mapping"),
    [
        (("image_a", "image_b", "winner"), ("image_a", " Image B ", "tie", "both bad"), {}),
        (("image1", "image2", "preference"), ("image1", "image2", "draw", None), {}),
        (("left", "right", "choice"), ("left", "right", "equal", "skip"), {}),
        (("jpg_0", "jpg_1", "winner"), ("model_a", "model_b", "tie", "tie (bothbad)"), {}),
        (("right", "left", "label_0"), ("right", "left", "same", ""), {"choice": "label_0"}),
        (("x", "y", "said"), ("A", "B", "Tie", "Neither"), {"choice": "said"}),
    ],
)
def test_a_choice_in_words(tmp_path: Path, names: Any, words: Any, mapping: Any) -> None:
    """First, second, a tie and neither; the images' own columns are the first words to count."""
    first, second, choice = names
    if first in ("x", "right"):
        mapping = mapping | {"jpg_0": first, "jpg_1": second}
    shades = ("red", "blue", "green", "white", "black", "pink", "gold", "gray")
    images = [encoded(shade) for shade in shades]
    columns = {
        first: images[::2],
        second: images[1::2],
        choice: list(words),
        "prompt": list("abcd"),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    pairs = open_pairs(tmp_path / "a.parquet", columns=mapping)
    assert [(p.caption, p.winner, p.loser) for p in pairs] == [
        ("a", images[0], images[1]),
        ("b", images[3], images[2]),
    ]
    assert (pairs.counts["ties"], pairs.counts["unlabelled"]) == (1, 1)


def test_the_fingerprint_of_a_folder_follows_its_images(tmp_path: Path) -> None:
    folder = put_csv(tmp_path, CHOSEN, ["red.png", "blue.png", "a"])
    before = open_pairs(folder).fingerprint
    assert before == open_pairs(folder).fingerprint
    (folder / "blue.png").write_bytes(GREEN)
    assert open_pairs(folder).fingerprint != before


@pytest.mark.parametrize("bad", ["../out.png", "/etc/hostname", "a/../../out.png", "C:\\out.png"])
def test_a_path_that_leads_out_is_refused(tmp_path: Path, bad: str) -> None:
    (tmp_path / "out.png").write_bytes(RED)
    folder = put_csv(tmp_path / "data", CHOSEN, ["red.png", "blue.png", "a"], ["red.png", bad, "b"])
    with pytest.raises(DataError, match=r"metadata.csv, row 1, file_name_loser.*leads out"):
        triples(folder)
    assert check_pairs(folder).counts["bad_paths"] == 1


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(RED)
    folder = put_csv(tmp_path / "data", CHOSEN, ["red.png", "link.png", "a"])
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(DataError, match=r"row 0, file_name_loser.*link out of"):
        triples(folder)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (["red.png", "none.png", "a"], "row 1, file_name_loser: there is no file 'none.png'"),
        (["red.png", "blue.png", "  "], "row 1: caption is empty"),
        (["red.png", "broken.png", "a"], "row 1, file_name_loser: the image cannot be read"),
        (["red.png", "blue.png"], "row 1: 2 cells under 3 columns"),
    ],
)
def test_a_bad_row_is_named_or_skipped_whole(
    tmp_path: Path, row: list[str], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = ["green.png", "white.png", "b"]
    folder = put_csv(tmp_path, CHOSEN, good, row, good)
    (folder / "broken.png").write_bytes(RED[:40])
    with pytest.raises(DataError, match=expected):
        triples(folder)
    report = check_pairs(folder)
    assert report.problems_total == 1 and expected in report.problems[0]
    with caplog.at_level(logging.WARNING):
        source = open_pairs(folder, on_bad_row="skip")
        assert [p.winner for p in source] == [GREEN, GREEN]
    assert source.counts["skipped"] == 1 and expected in caplog.text


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    folder = put_csv(tmp_path, CHOSEN[:2] + ["text"], ["red.png", "blue.png", "a"])
    with pytest.raises(DataError, match=r"metadata.csv lacks the columns caption.*text.*columns"):
        triples(folder)
    assert triples(folder, columns={"caption": "text"}) == [("a", RED, BLUE)]


def test_a_mapping_to_no_column_is_refused(tmp_path: Path) -> None:
    folder = put_csv(tmp_path, CHOSEN, ["red.png", "blue.png", "a"])
    with pytest.raises(DataError, match="data.columns.caption=texts names no column; it has"):
        triples(folder, columns={"caption": "texts"})
    with pytest.raises(DataError, match="'captoin' is not one of"):
        triples(folder, columns={"captoin": "prompt"})


def test_columns_of_another_language(tmp_path: Path) -> None:
    """No name is known: the message shows the ones of a table, and takes the documents' words."""
    folder = put_csv(tmp_path, ["Gut;Schlecht;Text"], ["red.png;blue.png;ein Kreis"])
    with pytest.raises(DataError, match=r"Gut, Schlecht, Text.*data.columns.winner=NAME"):
        triples(folder)
    german = {"chosen": "Gut", "rejected": "Schlecht"}
    with pytest.raises(DataError, match="data.columns.caption=THEIR_NAME$"):
        triples(folder, columns=german)
    assert triples(folder, columns=german | {"prompt": "Text"}) == [("ein Kreis", RED, BLUE)]
    with pytest.raises(DataError, match="caption names caption a second time"):
        triples(folder, columns={"prompt": "Text", "caption": "Gut"})


def test_the_documents_words_name_columns() -> None:
    given = {"image": "Bild", "rating": "Note", "thumb": "Daumen", "Winner Image": "Gut"}
    assert list(our_names(given)) == ["images", "scores", "thumbs", "winner"]


# ---- Hugging Face datasets


def saved(tmp_path: Path, **settings: Any) -> Path:
    import datasets

    rows = {
        "jpg_0": [{"bytes": RED, "path": None}] * 2,
        "jpg_1": [{"bytes": BLUE, "path": None}] * 2,
        "label_0": [1.0, 0.0],
        "caption": ["a", "b"],
    }
    features = datasets.Features(
        jpg_0=datasets.Image(),
        jpg_1=datasets.Image(),
        label_0=datasets.Value("float32"),
        caption=datasets.Value("string"),
    )
    whole = datasets.Dataset.from_dict(rows, features=features)
    if settings.get("split"):
        whole = datasets.DatasetDict({"train": whole, "validation": whole.select([1])})
    whole.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_dataset_with_image_columns(tmp_path: Path) -> None:
    assert triples(saved(tmp_path)) == [("a", RED, BLUE), ("b", BLUE, RED)]


def test_a_split_of_saved_datasets(tmp_path: Path) -> None:
    folder = saved(tmp_path, split=True)
    assert triples(folder, split="validation") == [("b", BLUE, RED)]
    with pytest.raises(DataError, match="no split 'test'; set data.split to one of train, valid"):
        triples(folder, split="test")


def test_of_files_of_several_splits_one_split_is_read(tmp_path: Path) -> None:
    """As a dataset that was downloaded has them; trained on together they would leak."""
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test_unique-00000-of-00001"):
        row = {"winner": [RED], "loser": [BLUE], "caption": [name]}
        pq.write_table(pa.table(row), tmp_path / f"{name}.parquet")
    assert [c[:7] for c, *_ in triples(tmp_path)] == ["train-0", "train-0"]
    assert [c[:6] for c, *_ in triples(tmp_path, split="test_unique")] == ["test_u"]
    with pytest.raises(DataError, match="several splits; set data.split to one of test_unique, tr"):
        triples(tmp_path, split="test")
    (tmp_path / "test_unique-00000-of-00001.parquet").rename(tmp_path / "more.parquet")
    assert len(triples(tmp_path)) == 3  # no split, so that all files are meant


def test_a_damaged_dataset_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    arrow = next(folder.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(DataError, match="saved.*(cannot be loaded|breaks off)"):
        triples(folder)


class Endless:
    """A hub stream that must never be read to its end."""

    def __init__(self) -> None:
        self.served = 0

    def with_format(self, _: str) -> Endless:
        return self

    def iter(self, batch_size: int) -> Iterator[Any]:
        while True:
            self.served += batch_size
            assert self.served <= 3 * batch_size, "read far beyond the limit"
            rows = [
                {"jpg_0": RED, "jpg_1": BLUE, "label_0": 1.0, "caption": str(k)}
                for k in range(batch_size)
            ]
            yield pa.Table.from_pylist(rows)


def test_a_hub_dataset_is_streamed_as_far_as_it_is_needed(monkeypatch: Any) -> None:
    stream, asked = Endless(), []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(formats, "_hub_stream", lambda *a: asked.append(a) or stream)
    commit = "0123456789abcdef0123456789abcdef01234567"
    source = open_pairs("hf:owner/name", revision=commit, limit=70)
    assert stream.served == 0 and source.fingerprint  # known before anything is read
    assert sum(1 for _ in source) == 70
    assert asked == [("owner/name", None, "train", commit)]
    other = open_pairs("hf:owner/name", revision=commit[::-1], limit=70)
    assert other.fingerprint != source.fingerprint


def unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError("no network")


def test_a_hub_id_without_network_says_so(monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    with pytest.raises(DataError, match="hf:owner/name: the hub does not say which commit main is"):
        open_pairs("hf:owner/name")


def test_offline_a_hub_dataset_is_read_from_the_hubs_cache(tmp_path: Path, hub_cache: Any) -> None:
    (tmp_path / "d/data").mkdir(parents=True)
    row = {"jpg_0": RED, "jpg_1": BLUE, "label_0": 1.0, "text": "a"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "d/data/train-00000-of-00001.parquet")
    hub_cache("datasets", "owner/pairs", tmp_path / "d", commit="c" * 40)
    hub_cache("datasets", "owner/pairs", tmp_path / "d", "v2", commit="d" * 40)
    columns = {"caption": "text"}
    assert triples("hf:owner/pairs", columns=columns) == [("a", RED, BLUE)]
    assert triples("hf:owner/pairs", columns=columns, revision="v2") == [("a", RED, BLUE)]
    one, two = (open_pairs("hf:owner/pairs", columns=columns, revision=r) for r in (None, "v2"))
    assert one.fingerprint != two.fingerprint
    with pytest.raises(DataError, match="hf:owner/pairs at v3 is not in the hub's cache.*download"):
        open_pairs("hf:owner/pairs", revision="v3")
    with pytest.raises(DataError, match="hf:owner/none at main.*hf download --repo-type dataset"):
        open_pairs("hf:owner/none")
    with pytest.raises(DataError, match="cannot be streamed"):
        triples("hf:owner/pairs", split="validation")


# ---- WebDataset


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_shards_of_winners_and_losers(tmp_path: Path) -> None:
    for k in (0, 1):
        shard(
            tmp_path / f"{k:05d}.tar",
            {
                f"a{k}.winner.png": RED,
                f"a{k}.loser.png": BLUE,
                f"a{k}.txt": b"a cat",
            },
        )
    assert triples(tmp_path) == [("a cat", RED, BLUE)] * 2


def test_a_shard_of_two_images_and_json(tmp_path: Path) -> None:
    label = json.dumps({"label_0": 0, "caption": "b"}).encode()
    file = shard(
        tmp_path / "a.tar",
        {
            "x/1.jpg_0.png": RED,
            "x/1.jpg_1.png": BLUE,
            "x/1.json": label,
        },
    )
    assert triples(file) == [("b", BLUE, RED)]


def test_members_of_a_sample_that_stand_apart_are_named(tmp_path: Path) -> None:
    members = {f"{k}.{side}.png": RED for side in ("winner", "loser") for k in (1, 2)}
    file = shard(tmp_path / "a.tar", members | {"1.txt": b"a", "2.txt": b"b"})
    with pytest.raises(DataError, match=r"a\.tar: the members of sample '1' stand apart"):
        triples(file)
    both = [("1.winner.png", RED), ("1.loser.png", BLUE), ("1.txt", b"a")]
    other = [("2.winner.png", BLUE), ("2.loser.png", RED), ("2.txt", b"b")]
    with tarfile.open(tmp_path / "b.tar", "w") as tar:  # one name for two samples is no fault
        for name, content in (*both, *other, *both):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert len(triples(tmp_path / "b.tar")) == 3


def test_a_first_row_that_lacks_a_column_is_one_bad_row(tmp_path: Path) -> None:
    sound = {"2.winner.png": RED, "2.loser.png": BLUE, "2.txt": b"b"}
    file = shard(tmp_path / "a.tar", {"1.winner.png": RED, "1.txt": b"a"} | sound)
    with pytest.raises(DataError, match="sample '1' of a.tar, row 0, loser: no image"):
        triples(file)
    assert len(list(open_pairs(file, on_bad_row="skip"))) == 1
    lines = [{"winner": "a.png", "prompt": "a"}] * 21
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match="a.jsonl lacks the columns loser; it has winner, prompt"):
        triples(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(json.dumps(lines[0]))
    with pytest.raises(DataError, match="a.jsonl lacks the columns loser; it has winner, prompt"):
        triples(tmp_path / "a.jsonl")


def test_a_sample_of_a_shard_is_named_by_its_key(tmp_path: Path) -> None:
    both = {"x/1.winner.png": RED, "x/1.loser.png": BLUE, "x/1.txt": b"a"}
    file = shard(tmp_path / "a.tar", both | {"x/2.winner.png": RED, "x/2.txt": b"b"})
    with pytest.raises(DataError, match=r"sample 'x/2' of a\.tar, row 1, loser: no image"):
        triples(file)


@pytest.mark.parametrize("cut", [700, 1536, -1024])
def test_a_truncated_shard_is_named(tmp_path: Path, cut: int) -> None:
    members = {"1.winner.png": RED, "1.loser.png": BLUE, "1.txt": b"a"}
    file = shard(tmp_path / "a.tar", members)
    data = file.read_bytes().rstrip(b"\0")
    file.write_bytes((data + bytes(-len(data) % 512))[: cut if cut > 0 else None])
    with pytest.raises(DataError, match="a.tar (is damaged in row 0|lacks the columns)"):
        triples(file)


def test_a_sample_that_lacks_an_image_is_left_out_whole(tmp_path: Path) -> None:
    file = shard(
        tmp_path / "a.tar",
        {
            "1.winner.png": RED,
            "1.loser.png": BLUE,
            "1.txt": b"a",
            "2.winner.png": GREEN,
            "2.txt": b"b",
            "3.winner.png": GREEN,
            "3.loser.png": WHITE,
            "3.txt": b"c",
        },
    )
    with pytest.raises(DataError, match="a.tar, row 1, loser: no image"):
        triples(file)
    source = open_pairs(file, on_bad_row="skip")
    assert [(p.winner, p.loser) for p in source] == [(RED, BLUE), (GREEN, WHITE)]


# ---- rankings


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("best_worst", [(2, 0)]),
        ("adjacent", [(2, 1), (1, 0)]),
        ("all", [(2, 1), (2, 0), (1, 0)]),
    ],
)
def test_pairs_of_a_ranking_by_hand(scheme: str, expected: list[tuple[int, int]]) -> None:
    assert list(SCHEMES[scheme]([2, 1, 0])) == expected
    with pytest.raises(ValueError, match="best_worst.*adjacent.*all"):
        DataConfig(ranking="some")  # type: ignore[arg-type]


def test_ranked_images_of_one_prompt_in_json(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "image_path": ["red.png", "blue.png", "green.png"], "rank": [2, 1, 3]}]
    (put_images(tmp_path) / "train.json").write_text(json.dumps(rows))
    found = triples(tmp_path / "train.json", ranking="adjacent")
    assert found == [("a", BLUE, RED), ("a", RED, GREEN)]


def test_images_of_one_prompt_in_several_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt_id": p, "prompt": p, "image_path": f"{name}.png", "rank": rank}
        for p, name, rank in (("a", "red", 2), ("a", "blue", 1), ("b", "red", 1), ("b", "green", 1))
    ]
    pq.write_table(pa.Table.from_pylist(rows), put_images(tmp_path) / "pairs.parquet")
    source = open_pairs(tmp_path / "pairs.parquet")
    assert [(p.caption, p.winner, p.loser) for p in source] == [("a", BLUE, RED)]
    assert source.counts["ties"] == 1


def test_a_ranking_that_does_not_fit_its_images_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "image_path": ["red.png", "blue.png"], "rank": [2]}]
    (put_images(tmp_path) / "train.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="train.json, row 0"):
        triples(tmp_path / "train.json")


def test_seeds_of_samples_follow_their_images(tmp_path: Path) -> None:
    rows = [
        {"jpg_0": RED, "jpg_1": BLUE, "label_0": 0.0, "caption": "a", "seed_0": 3, "seed_1": 2**40},
        {"jpg_0": RED, "jpg_1": GREEN, "label_0": 1.0, "caption": "b", "seed_0": None, "seed_1": 5},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    assert [pair.seeds for pair in open_pairs(tmp_path / "pairs.parquet")] == [(2**40, 3), (5,)]


# ---- the check


def test_the_check_speaks_of_every_format(tmp_path: Path) -> None:
    folder = put_csv(
        tmp_path,
        CHOSEN,
        ["red.png", "blue.png", "a"],
        ["red.png", "big.png", "a b"],
        ["red.png", "blue.png", "a"],
        ["red.png", "red.png", "c"],
    )
    (folder / "big.png").write_bytes(encoded("blue", (16, 6)))
    report = check_pairs(folder)
    assert (
        report.counts["pairs"],
        report.counts["identical"],
        report.counts["duplicates"],
        report.counts["mixed_sizes"],
    ) == (3, 1, 1, 1)
    assert "1 duplicate pair, 1 of two image sizes" in format_report(report)
    assert report.counts["alike"] == 0 and "look the same" not in format_report(report)
    pale = Image.new("RGB", (8, 8), (253, 0, 2))  # beside red, (255, 0, 0)
    pale.save(folder / "blue.png")
    report = check_pairs(folder)
    assert report.counts["alike"] == 2 and "! 2 pairs have two images that look" in format_report(
        report
    )
    assert report.first_preferred is None  # nobody labelled a first and a second image


def test_captions_are_measured_in_tokens(tmp_path: Path) -> None:
    from inversion_dpo.run.config import resolve

    measure = tokens_of(resolve("asset:pipeline"))
    folder = put_csv(
        tmp_path,
        CHOSEN,
        ["red.png", "blue.png", "a small red star " * 20],
        ["red.png", "blue.png", "a star"],
    )
    report = check_pairs(folder, measure=measure)
    assert report.captions is not None
    assert report.captions[0] == 4 and report.captions[2] > measure.longest
    assert report.long_captions == 1 and "1 caption over" in format_report(report)
    with pytest.raises(DataError, match="give a diffusers pipeline's folder"):
        tokens_of(tmp_path / "nowhere")


def test_a_bad_first_row_does_not_hide_the_images_from_the_fingerprint(tmp_path: Path) -> None:
    folder = put_csv(tmp_path, CHOSEN, ["red.png", "blue.png"], ["red.png", "blue.png", "a"])
    before = open_pairs(folder, on_bad_row="skip").fingerprint
    (folder / "blue.png").write_bytes(GREEN)
    assert open_pairs(folder, on_bad_row="skip").fingerprint != before


# ---------------------------------------------------------------- tables as people have them


@pytest.mark.parametrize(
    "name",
    ["RED.png", "./RED.png", ".\\RED.png", " RED.png\n", "%52ED.png", "RED%2Epng", "RED.PNG"],
)
def test_names_of_files_as_other_systems_write_them(tmp_path: Path, name: str) -> None:
    (put_images(tmp_path) / "RED.png").write_bytes(RED)
    row = {"winner": name, "loser": f"file://{tmp_path}/blue.png", "prompt": "42"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    assert triples(tmp_path / "p.jsonl") == [("42", RED, BLUE)]


@pytest.mark.parametrize(
    "name", ["%2e%2e/red.png", "..%2fred.png", "file:///etc/passwd", "a%00.png"]
)
def test_no_spelling_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    put_images(tmp_path)
    (inner := tmp_path / "inner").mkdir()
    (inner / "p.jsonl").write_text(json.dumps({"winner": name, "loser": "b.png", "prompt": "a"}))
    with pytest.raises(DataError, match="row 0, winner: (there is no file|.* leads out of)"):
        triples(inner / "p.jsonl")


def test_empty_cells_after_the_last_column_are_none(tmp_path: Path) -> None:
    text = "winner,loser,prompt\nred.png,blue.png,a,, \n,,,,\n"
    (put_images(tmp_path) / "p.csv").write_text(text)
    assert triples(tmp_path / "p.csv") == [("a", RED, BLUE)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("winner,loser,prompt\nred.png,blue.png\n", "2 cells under 3 columns; complete the row"),
        ("winner;loser;prompt\nred.png,blue.png,a\n", "1 cell .* are parted by ';', as in"),
        ("winner,loser,prompt\nred.png,blue.png,a,b\n", "4 cells under 3 columns; quote text"),
        ("Ratings\nwinner,loser,prompt\n", "3 cells under 1 column; the first row must name"),
    ],
)
def test_uneven_rows_say_what_to_look_at(tmp_path: Path, text: str, message: str) -> None:
    (put_images(tmp_path) / "p.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        triples(tmp_path / "p.csv")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_a_name_that_is_twice_in_a_row_of_json_is_refused(tmp_path: Path, name: str) -> None:
    row = '{"winner": "red.png", "loser": "blue.png", "prompt": "a", "winner": "blue.png"}'
    (put_images(tmp_path) / name).write_text(row if name == "p.jsonl" else f"[{row}]")
    with pytest.raises(DataError, match="two entries are named 'winner'"):
        triples(tmp_path / name)


def test_of_prompt_and_caption_somebody_says_which_one_counts(tmp_path: Path) -> None:
    rows = "winner,loser,Prompt,caption\nred.png,blue.png,a,what a model saw\n"
    (put_images(tmp_path) / "p.csv").write_text(rows)
    remedy = "caption and Prompt; .*: data.columns.caption=caption or data.columns.caption=Prompt"
    with pytest.raises(DataError, match=remedy):
        triples(tmp_path / "p.csv")
    assert triples(tmp_path / "p.csv", columns={"prompt": "Prompt"}) == [("a", RED, BLUE)]


def test_what_tables_write_for_no_text_is_no_prompt(tmp_path: Path) -> None:
    (put_images(tmp_path) / "p.csv").write_text("winner,loser,prompt\nred.png,blue.png,N/A\n")
    with pytest.raises(DataError, match="caption is 'N/A', an empty cell"):
        triples(tmp_path / "p.csv")
