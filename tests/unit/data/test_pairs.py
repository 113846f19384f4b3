from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from inversion_dpo.data import source
from inversion_dpo.data.check import format_report
from inversion_dpo.data.images import DataError, decode_image, picture_size, stack_pixels
from inversion_dpo.data.transforms import fit
from tests.pair_files import check_pairs, open_pairs, read_pairs

IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(colour: str = "red", size: tuple[int, int] = (8, 6), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form)
    return buffer.getvalue()


RED, BLUE = encoded("red"), encoded("blue")


def noise(form: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def row(**changes: Any) -> dict[str, Any]:
    return {"jpg_0": RED, "jpg_1": BLUE, "label_0": 1.0, "caption": "a cat", **changes}


def write(path: Path, rows: list[dict[str, Any]], image: pa.DataType | None = None) -> Path:
    image = image or pa.binary()
    types = {"jpg_0": image, "jpg_1": image, "label_0": pa.float64(), "caption": pa.string()}
    extra = {name: pa.string() for r in rows for name in r if name not in types}
    pq.write_table(pa.Table.from_pylist(rows, pa.schema({**types, **extra}.items())), path)
    return path


BAD_ROWS = {
    "label outside": ({"label_0": 0.7}, "label_0 is 0.7", "0.5 (tie), or drop the row"),
    "label null": ({"label_0": None}, "label_0 is null", "drop the row"),
    "label outside, images identical": (
        {"label_0": -2.0, "jpg_1": RED},
        "label_0 is -2",
        "drop the row",
    ),
    "label nan": ({"label_0": float("nan")}, "label_0 is nan", "drop the row"),
    "caption null": ({"caption": None}, "caption is empty", "write the prompt"),
    "caption blank": ({"caption": " \n"}, "caption is empty", "write the prompt"),
    "image null": ({"jpg_0": None}, "jpg_0: no image", "embed the file's bytes"),
    "image empty": ({"jpg_1": b""}, "jpg_1: no image", "embed the file's bytes"),
    "both images empty": ({"jpg_0": b"", "jpg_1": b""}, "jpg_0: no image", "embed"),
    "both images one error page": (
        {"jpg_0": b"<html>404", "jpg_1": b"<html>404"},
        "jpg_0: the image cannot be read (it is HTML",
        "write it again",
    ),
    "image unreadable": ({"jpg_1": b"not an image"}, "jpg_1: the image cannot", "write it again"),
    "image truncated": ({"jpg_0": noise("JPEG")[:600]}, "jpg_0: the image cannot", "drop the row"),
}
bad_rows = pytest.mark.parametrize(
    ("changes", "reason", "remedy"), BAD_ROWS.values(), ids=BAD_ROWS.keys()
)


def test_the_label_says_which_image_won(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [row(label_0=1.0), row(label_0=0.0)])
    first, second = read_pairs(file).pairs
    assert (first.winner, first.loser) == (RED, BLUE)
    assert (second.winner, second.loser) == (BLUE, RED)
    assert (first.row, second.row) == (0, 1)


def test_ties_and_identical_images_are_counted_and_left_out_whole(tmp_path: Path) -> None:
    rows = [row(label_0=0.5, jpg_0=None), row(jpg_1=RED), row(caption="kept")]
    read = read_pairs(write(tmp_path / "a.parquet", rows))
    assert [(p.row, p.caption) for p in read.pairs] == [(2, "kept")]
    assert (read.rows, read.ties, read.identical) == (3, 1, 1)


def test_fingerprint_follows_content_and_reading_not_the_name(tmp_path: Path) -> None:
    file, same = (
        write(tmp_path / n, [row(), row(jpg_0=BLUE, jpg_1=RED)]) for n in ("a.parquet", "b.parquet")
    )
    other = write(tmp_path / "c.parquet", [row(caption="a dog")])
    found = read_pairs(file).fingerprint
    assert found == read_pairs(same).fingerprint != read_pairs(other).fingerprint
    assert found != read_pairs(file, limit=1).fingerprint
    assert found != open_pairs(file, on_bad_row="skip").fingerprint


def test_scene_graph_is_kept_where_there_is_one(tmp_path: Path) -> None:
    with_graph = write(tmp_path / "a.parquet", [row(scene_graph='{"items": []}'), row()])
    assert [p.scene_graph for p in read_pairs(with_graph).pairs] == ['{"items": []}', None]
    without = write(tmp_path / "b.parquet", [row()])
    assert read_pairs(without).pairs[0].scene_graph is None


def test_columns_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [row(scores_0="not JSON", ranking="x")])
    assert len(read_pairs(file).pairs) == 1


@pytest.mark.parametrize(
    "labels",
    [
        *(pa.array([1, 0], pa.int32()), pa.array([True, False]), pa.array([1, 0], pa.float32())),
        *(
            pa.array(["1", "0"]),
            pa.array(["True", "False"]),
            pa.array([1, -1]),
            pa.array(["1", "-1"]),
        ),
    ],
)
def test_labels_may_be_any_kind_of_number(tmp_path: Path, labels: pa.Array) -> None:
    columns = {"jpg_0": [RED, RED], "jpg_1": [BLUE, BLUE], "caption": ["a", "b"]}
    pq.write_table(pa.table({**columns, "label_0": labels}), tmp_path / "a.parquet")
    assert [p.winner for p in read_pairs(tmp_path / "a.parquet").pairs] == [RED, BLUE]


def test_image_structs_give_their_bytes(tmp_path: Path) -> None:
    images = {"jpg_0": {"bytes": RED, "path": "0.png"}, "jpg_1": {"bytes": BLUE, "path": None}}
    file = write(tmp_path / "a.parquet", [row(**images)], IMAGE_STRUCT)
    assert (read_pairs(file).pairs[0].winner, read_pairs(file).pairs[0].loser) == (RED, BLUE)


def test_the_path_of_an_image_struct_is_never_followed(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(RED)
    images = {
        "jpg_0": {"bytes": None, "path": str(tmp_path / "0.png")},
        "jpg_1": {"bytes": BLUE, "path": None},
    }
    file = write(tmp_path / "a.parquet", [row(**images)], IMAGE_STRUCT)
    with pytest.raises(DataError, match="a.parquet, row 0, jpg_0: no image; embed"):
        read_pairs(file)


def test_a_folder_is_read_in_name_order(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", [row(caption="third")])
    write(tmp_path / "a.parquet", [row(caption="first"), row(caption="second")])
    (tmp_path / "notes.txt").write_text("not Parquet")
    (tmp_path / "._a.parquet").write_text("not Parquet either")
    read = read_pairs(tmp_path)
    assert [(p.row, p.caption) for p in read.pairs] == [(0, "first"), (1, "second"), (2, "third")]
    write(tmp_path / "b.parquet", [row(caption="changed")])
    assert read_pairs(tmp_path).fingerprint != read.fingerprint


def test_in_a_folder_an_error_names_the_file_and_its_own_row(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [row(), row()])
    write(tmp_path / "b.parquet", [row(), row(label_0=2.0)])
    with pytest.raises(DataError, match="^b.parquet, row 1: label_0 is 2; write"):
        read_pairs(tmp_path)


def test_limit_counts_pairs_and_stops_reading(tmp_path: Path) -> None:
    rows = [row(label_0=0.5), row(), row(), row(label_0=None)]
    file = write(tmp_path / "a.parquet", rows)
    read = read_pairs(file, limit=2)
    assert [p.row for p in read.pairs] == [1, 2]
    assert (read.rows, read.ties) == (3, 1)
    with pytest.raises(DataError, match="row 3"):
        read_pairs(file, limit=3)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        read_pairs(file, limit=0)


@bad_rows
def test_a_bad_row_stops_reading(
    tmp_path: Path, changes: dict[str, Any], reason: str, remedy: str
) -> None:
    # row 70 lies in the second batch that is read
    file = write(tmp_path / "bad.parquet", [*[row()] * 70, row(**changes)])
    with pytest.raises(DataError) as caught:
        read_pairs(file)
    message = str(caught.value)
    assert message.startswith("bad.parquet, row 70")
    assert reason in message
    assert remedy in message


@bad_rows
def test_the_check_says_what_reading_says(
    tmp_path: Path, changes: dict[str, Any], reason: str, remedy: str
) -> None:
    file = write(tmp_path / "bad.parquet", [row(), row(**changes)])
    report = check_pairs(file)
    assert not report.ok
    assert (report.counts["rows"], report.counts["pairs"]) == (2, 1)
    with pytest.raises(DataError) as caught:
        read_pairs(file)
    assert report.problems[0] == str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for function in (read_pairs, check_pairs):
        with pytest.raises(DataError, match="nowhere.parquet does not exist; give a file"):
            function(tmp_path / "nowhere.parquet")


def test_a_folder_without_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="data holds no \\*.parquet files, .*give the folder"):
        read_pairs(tmp_path / "data")


@pytest.mark.parametrize("names", [["data"], ["test", "train"]])
def test_a_downloaded_dataset_names_the_folder_that_holds_the_pairs(names, tmp_path):
    """As the hub has them: data/train-00000-of-00001.parquet, or a folder for each split."""
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-00000-of-00001.parquet").touch()
    (tmp_path / "README.md").touch()
    with pytest.raises(DataError) as error:
        open_pairs(tmp_path)
    assert str(error.value).endswith(f"give {' or '.join(str(tmp_path / n) for n in names)}")


def test_a_file_that_is_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("caption,jpg_0\n" * 20)
    for function in (read_pairs, check_pairs):
        with pytest.raises(DataError, match="a.parquet cannot be read as Parquet .*export it as"):
            function(tmp_path / "a.parquet")


def test_a_file_damaged_in_the_middle(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row()] * 70), file, row_group_size=64)
    assert len(read_pairs(file).pairs) == 70
    column = pq.read_metadata(file).row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(file.read_bytes())
    data[start : start + 20] = b"\xff" * 20  # the header of the second group's first page
    file.write_bytes(bytes(data))
    for function in (read_pairs, check_pairs):
        with pytest.raises(
            DataError, match="a.parquet is damaged after row 63 .*; copy or download"
        ):
            function(file)


def test_a_missing_column_is_named_beside_those_there_are(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"jpg_0": [RED], "jpg_1": [BLUE], "text": ["a"]}), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError) as caught:
        read_pairs(tmp_path / "a.parquet")
    message = str(caught.value)
    assert "a.parquet lacks the columns label_0, caption" in message
    assert "it has jpg_0, jpg_1, text" in message
    assert "rename or add columns until it has jpg_0, jpg_1, label_0, caption" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"label_0": [b"1"]}, "column label_0 holds binary; store it as numbers"),
        ({"caption": [3]}, "column caption holds int64; store it as text"),
        ({"jpg_1": ["cat.png"]}, "column jpg_1 holds string; store it as binary"),
        ({"jpg_0": [{"path": "x"}]}, "column jpg_0 holds struct<path: string>; store it as binary"),
        ({"scene_graph": [{"items": 1}]}, "column scene_graph holds struct<.*>; store it as text"),
    ],
)
def test_a_column_of_the_wrong_type(
    tmp_path: Path, changes: dict[str, list[Any]], expected: str
) -> None:
    columns = {name: [value] for name, value in row().items()}
    pq.write_table(pa.table({**columns, **changes}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=f"a.parquet: {expected}"):
        read_pairs(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "a.parquet has no rows; export it again"),
        (
            [row(label_0=0.5)] * 2,
            r"no usable pair in 2 rows \(2 ties, 0 with .*; add rows that prefer",
        ),
        ([row(label_0=0.5), row(jpg_0=BLUE)], r"in 2 rows \(1 tie, 1 with identical images"),
    ],
)
def test_a_file_without_a_preference(
    tmp_path: Path, rows: list[dict[str, Any]], expected: str
) -> None:
    file = write(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=expected) as caught:
        read_pairs(file)
    report = check_pairs(file)
    assert not report.ok
    assert report.problems == (str(caught.value),)
    assert report.first_preferred is None
    assert report.captions is None


def test_the_check_counts_everything(tmp_path: Path) -> None:
    rows = [
        row(caption="one two three"),
        row(caption="one two three", jpg_0=BLUE, jpg_1=RED, label_0=0.0),  # the same, turned round
        row(caption="word " * 78),
        row(caption="one", jpg_0=encoded("green", (4, 4)), label_0=0.0),
        row(label_0=0.5),
        row(jpg_1=RED),
        row(label_0=3.0, caption="", jpg_0=b"x", jpg_1=None),
    ]
    report = check_pairs(write(tmp_path / "a.parquet", rows))
    assert (
        report.counts["rows"],
        report.counts["pairs"],
        report.counts["ties"],
        report.counts["identical"],
    ) == (7, 4, 1, 1)
    assert (
        report.counts["bad_labels"],
        report.counts["empty_captions"],
        report.counts["broken_images"],
    ) == (1, 1, 2)
    assert (report.problems_total, len(report.problems)) == (4, 4)
    assert report.counts["duplicates"] == 1
    assert report.image_sizes == {(8, 6): 7, (4, 4): 1}
    assert report.captions == (1, 3.0, 78)
    assert report.long_captions == 1
    assert report.first_preferred == 0.5
    text = format_report(report)
    for part in ("4 usable pairs in 7 rows", "8x6 (7), 4x4 (1)", "1 to 78, median 3", "50.0%"):
        assert part in text
    assert all(problem in text for problem in report.problems)


def test_the_check_lists_the_sizes_of_training(tmp_path: Path) -> None:
    """3:2 goes to 1216x832 and 4:3 to 1152x896; the mean of 3:2 and 1:4 is near to neither."""
    wide, flat, tall = ((300, 200), (80, 60), (50, 200))
    pairs = [(wide, wide), (flat, flat), (wide, wide), (wide, tall), ((900, 90), (900, 90))]
    rows = [
        row(caption=f"{k}", jpg_0=encoded("red", a), jpg_1=encoded("blue", b))
        for k, (a, b) in enumerate(pairs)
    ]
    data = write(tmp_path / "a.parquet", rows)
    report = check_pairs(data, allow_giveaways=True)
    assert report.trained_at == {(832, 1216): 2, (896, 1152): 1}
    assert (report.counts["mixed_shapes"], report.counts["odd_shapes"]) == (1, 1)
    text = format_report(report)
    assert "sizes for model.resolution=1024, and their pairs:\n     1216x832        2\n" in text
    assert "left out by data.fit=drop: 1 pair of two shapes and 1 pair far from" in text
    small = check_pairs(data, resolution=512, fit="pad", allow_giveaways=True)
    assert small.trained_at.total() == 5 and "padded by data.fit=pad: 1" in format_report(small)


MASK = encoded("white")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"jpg_0": RED, "jpg_1": BLUE, "label_0": 1.0}, {"image": RED, "thumb": 1}, "single im"),
        ({"winner": RED, "loser": BLUE}, {"winner": RED, "loser": BLUE, "mask": MASK}, "a mask"),
        ({"winner": RED, "loser": BLUE}, {"chosen": RED, "bad": BLUE, "source_image": RED}, "a so"),
    ],
)
def test_the_check_refuses_the_mixtures_that_training_refuses(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], expected: str
) -> None:
    for name, row in (("a", one), ("b", other)):
        pq.write_table(
            pa.Table.from_pylist([row | {"caption": name}]), tmp_path / f"{name}.parquet"
        )
    report = check_pairs(tmp_path)
    (problem,) = report.problems
    assert expected in problem and "are mixed; give each kind as data of its own" in problem
    assert "problems: 1 (1 mixture); rows count" in format_report(report)


def test_the_check_refuses_data_of_which_no_pair_fits(tmp_path: Path) -> None:
    text = "2 of 2 pairs are left out: their images differ in shape"
    data = write(tmp_path / "a.parquet", [row(jpg_1=encoded("red", (40, 8)))] * 2)
    (problem,) = check_pairs(data).problems
    assert text in problem and check_pairs(data, fit="crop").ok


def test_the_check_of_a_sound_file(tmp_path: Path) -> None:
    sound = row(jpg_0=noise("PNG"), jpg_1=noise("JPEG"))
    report = check_pairs(write(tmp_path / "a.parquet", [sound]))
    assert report.ok
    assert report.problems == ()
    assert format_report(report).endswith("no problems")


def test_problems_alike_are_spelled_out_a_few_times_and_all_are_counted(tmp_path: Path) -> None:
    rows = [row(caption="", label_0=None)] * 30 + [row(jpg_1=b"torn")]
    report = check_pairs(write(tmp_path / "a.parquet", rows))
    assert (len(report.problems), report.problems_total) == (11, 61)
    assert "row 30" in report.problems[-1]  # not hidden behind thirty of another kind
    assert format_report(report).endswith("... and 50 more")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_images_decode_whole_or_not_at_all(form: str) -> None:
    data = noise(form)
    assert decode_image(data, "here").size == (32, 32)
    for length in (len(data) // 8, len(data) // 2, len(data) - 40):
        with pytest.raises(DataError, match="^here: the image cannot be read .* write it again"):
            decode_image(data[:length], "here")


def test_other_formats_are_refused() -> None:
    with pytest.raises(DataError, match="it is a GIF.*JPEG, PNG or WebP"):
        decode_image(encoded(form="GIF"), "here")


@pytest.mark.parametrize(
    ("side", "reason"),
    [(8193, "8193x8193 is over 67108864 pixels"), (60000, "decompression bomb")],
)
def test_decompression_bombs_are_refused_before_decoding(side: int, reason: str) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data)
    ]
    with pytest.raises(DataError, match=reason):
        decode_image(b"\x89PNG\r\n\x1a\n" + b"".join(chunks), "here")


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    decoded = decode_image(buffer.getvalue(), "here")
    assert decoded.mode == "RGB"
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_a_transparent_palette_entry_is_white_too() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)
    decoded = decode_image(buffer.getvalue(), "here")
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2), 128 * 256, np.uint16)).save(buffer, "PNG")
    assert decode_image(buffer.getvalue(), "here").getpixel((0, 0)) == (128, 128, 128)


def test_images_are_turned_upright_by_their_exif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: 90 degrees clockwise puts it upright
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    decoded = decode_image(buffer.getvalue(), "here")
    assert decoded.size == (1, 2)
    assert [decoded.getpixel((0, y)) for y in (0, 1)] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("orientation", [None, 3, 6])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_the_header_tells_the_size_of_the_upright_image(form: str, orientation: int | None) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", (20, 10)).save(buffer, form, exif=exif)
    data = buffer.getvalue()
    wanted = (20, 10) if orientation == 6 else (10, 20)
    assert picture_size(data, "here") == wanted == decode_image(data, "here").size[::-1]
    if form == "PNG":  # whose eXIf may stand behind the pixels
        start = data.find(b"eXIf") - 4
        end = start + 12 + int.from_bytes(data[start : start + 4]) if orientation else start
        moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
        assert picture_size(moved if orientation else data, "here") == wanted


def test_a_size_that_the_header_does_not_tell_is_an_error_of_the_decoder() -> None:
    with pytest.raises(DataError, match="^here: the image cannot be read"):
        picture_size(b"x", "here")


def test_an_image_that_is_decoded_late_is_named_by_its_column(tmp_path: Path) -> None:
    broken = noise("PNG")[:-40]
    table = [{"jpg_0": RED, "jpg_1": broken, "label_0": 0.0, "caption": "a"}]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "p.parquet")
    pair = next(open_pairs(tmp_path / "p.parquet").read())
    assert pair.sizes == ((32, 32), (6, 8))  # headers are whole
    with pytest.raises(DataError, match="row 0, jpg_1: the image cannot be read"):
        _ = pair.images


def to_pixels(images: list[Image.Image], size: int) -> torch.Tensor:
    return stack_pixels([fit(image, (size, size), "crop").image for image in images])


def test_pixels_of_an_image_of_this_size_are_exact() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    levels[0, 0, :2, 0] = 0, 255
    pixels = to_pixels([Image.fromarray(image) for image in levels], 16)
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1.0, 1.0)
    back = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert np.array_equal(back.numpy(), levels)


def test_a_wide_image_of_the_right_height_is_cut_without_resampling() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (8, 14, 3), dtype=np.uint8)
    for image, middle in ((levels, levels[:, 3:11]), (levels.swapaxes(0, 1), None)):
        pixels = to_pixels([Image.fromarray(image)], 8)
        expected = levels[:, 3:11].swapaxes(0, 1) if middle is None else middle
        back = ((pixels[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
        assert np.array_equal(back.numpy(), expected)


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (6, 10), (33, 33)])
def test_other_sizes_are_resized_about_their_centre(size: tuple[int, int]) -> None:
    width, height = size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(55, 200, width)[None]
    ramp[..., 1] = np.linspace(55, 200, height)[:, None]
    pixels = to_pixels([Image.fromarray(ramp)], 16)
    assert pixels.shape == (1, 3, 16, 16)
    assert ((pixels[0, :2].mean((1, 2)) + 1) * 127.5).tolist() == pytest.approx([127.5] * 2, abs=2)
    # the shorter side is seen whole, of the longer one only its middle
    seen = [(pixels[0, 0].mean(0).diff()).sum(), (pixels[0, 1].mean(1).diff()).sum()]
    ratio = min(size) / max(size)
    assert float(min(seen) / max(seen)) == pytest.approx(ratio, rel=0.1)


def test_a_long_strip_is_not_blown_up() -> None:
    assert to_pixels([Image.new("RGB", (2**20, 1))], 64).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("on_bad_row", "expected"), [("error", 1), ("skip", 4)])
def test_images_that_nobody_looks_at_are_not_decoded(
    tmp_path: Path, on_bad_row: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless bad rows are skipped: then the pairs' numbers depend on every image."""
    from inversion_dpo.data import rows as row_parts

    seen = []
    real = row_parts.decode_image
    monkeypatch.setattr(row_parts, "decode_image", lambda d, w: seen.append(w) or real(d, w))
    table = [
        {"jpg_0": solid(2 * k), "jpg_1": solid(2 * k + 1), "label_0": 1.0, "caption": f"no. {k}"}
        for k in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "p.parquet")
    source = open_pairs(tmp_path / "p.parquet", on_bad_row=on_bad_row)
    pairs = list(source.read(1))
    assert [p.caption for p in pairs] == [f"no. {k}" for k in range(4)]
    assert len(seen) == 2 * expected


def solid(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (2, 2), shade).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("rows", "given", "wanted"),
    [(3, {}, True), (4, {}, False), (4, {"limit": 3}, True), (3, {"on_bad_row": "skip"}, False)],
)
def test_only_few_pairs_are_read_twice(tmp_path, monkeypatch, rows, given, wanted):
    """And none where a bad row is found only by decoding its images."""
    monkeypatch.setattr(source, "FEW", 3)
    assert open_pairs(write(tmp_path / "p.parquet", [row()] * rows), **given).quick is wanted
