"""Dirty input, made up by hypothesis: a clear error of our own or a right answer, nothing else.

2,350 cases in all: `make test` has a fifth of them, but every scene graph. Images are of every mode
and format, whole or damaged; captions of any text; labels of any kind; scene graphs any JSON;
configurations any YAML.
"""

from __future__ import annotations

import io
import json
import struct
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from inversion_dpo.data.images import DataError, decode_image
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.run.config import Config, ConfigError, load_config, to_yaml
from tests.pair_files import open_pairs

MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["L", "RGB", "RGBA", "P"],
    "GIF": ["P", "L"],
    "TIFF": ["RGB", "I;16", "F"],
    "BMP": ["RGB", "L"],
}
READ = ("PNG", "JPEG", "WEBP")


def fuzz(count: int) -> Any:
    """So many seeded cases, each as slow as it likes."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=checks,
        database=None,
    )


def some(count: int, strategy: st.SearchStrategy[Any], check: Any) -> Any:
    """A fifth of the cases, for `make test`."""
    return fuzz(count // 5)(given(strategy)(check))


def every(count: int, strategy: st.SearchStrategy[Any], check: Any) -> Any:
    """All of the cases, which take ten seconds and more."""
    return pytest.mark.slow(fuzz(count)(given(strategy)(check)))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


@st.composite
def sound_images(draw: st.DrawFn) -> tuple[bytes, str, tuple[int, int]]:
    """Encoded image, its format and its size once upright."""
    kind = draw(st.sampled_from(list(MODES)))
    mode = draw(st.sampled_from(MODES[kind]))
    size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    image = Image.new(mode, size, draw(st.integers(0, 255)) if mode in "1LPF" else None)
    extra: dict[str, Any] = {}
    turned = kind in ("JPEG", "WEBP", "PNG") and draw(st.booleans())
    if turned:
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        extra["exif"] = exif
    if kind == "GIF" and draw(st.booleans()):
        extra |= {"save_all": True, "append_images": [Image.new(mode, size)]}
    buffer = io.BytesIO()
    image.save(buffer, kind, **extra)
    return buffer.getvalue(), kind, size[::-1] if turned else size


@st.composite
def dirty_images(draw: st.DrawFn) -> bytes:
    """Anything that may stand where an image should."""
    choice = draw(st.integers(0, 5))
    if choice == 0:
        return draw(st.binary(max_size=60))
    if choice == 1:
        return bomb(draw(st.integers(1, 2**31 - 1)), draw(st.integers(2**16, 2**31 - 1)))
    data = bytearray(draw(sound_images())[0])
    if choice == 2:
        return bytes(data[: draw(st.integers(0, len(data) - 1))])
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


def sound_image_is_read(case: tuple[bytes, str, tuple[int, int]]) -> None:
    data, kind, size = case
    if kind not in READ:
        with pytest.raises(DataError, match="row 7"):
            decode_image(data, "row 7")
        return
    image = decode_image(data, "row 7")
    assert (image.mode, image.size) == ("RGB", size)


test_a_sound_image_is_read_upright_in_rgb = some(300, sound_images(), sound_image_is_read)
test_every_sound_image_is_read_upright_in_rgb = every(300, sound_images(), sound_image_is_read)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_grey_level_that_is_transparent_is_laid_over_white(bits: int) -> None:
    levels = np.array([[40, 90]], np.uint8 if bits == 8 else np.uint16) << (bits - 8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG", transparency=int(levels[0, 0]))
    assert np.array_equal(np.asarray(decode_image(buffer.getvalue(), ""))[..., 0], [[255, 90]])


def damaged_image_is_read_or_refused(data: bytes) -> None:
    try:
        image = decode_image(data, "row 7")
    except DataError as error:
        assert str(error).startswith("row 7: ") and "\n" not in str(error)
    else:
        assert image.mode == "RGB" and image.width * image.height <= 2**26


test_a_damaged_image_is_read_or_refused = some(
    600, dirty_images(), damaged_image_is_read_or_refused
)
test_every_damaged_image_is_read_or_refused = every(
    600, dirty_images(), damaged_image_is_read_or_refused
)


TEXTS = st.one_of(
    st.none(),
    st.just(""),
    st.just("   "),
    st.text(max_size=20),
    st.just("x" * 10_000),
    st.sampled_from(
        [
            "🦊🚀 a fox",
            "\u202eright to left\u202c",
            "שלום עולם",
            "a\x00b\x07",
            "<script>alert(1)</script>",
            "'; DROP TABLE pairs; --",
            "line\nbreak\ttab",
            "\ufeffbom",
            "\U0001fae9",
            "\x00\u200b",
        ]
    ),
)
LABELS = st.sampled_from([1.0, 0.0, 0.5, None, float("nan"), float("inf"), -2.0, 2.0, 0.25])


def solid(number: int, shade: int) -> bytes:
    """An image by which its row can be told."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, shade)).save(buffer, "PNG")
    return buffer.getvalue()


@st.composite
def dirty_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of a pair file, of which any cell may be spoiled."""
    rows = []
    for number in range(draw(st.integers(1, 6))):
        row = {
            "jpg_0": solid(number, 0),
            "jpg_1": solid(number, 255),
            "label_0": draw(LABELS),
            "caption": draw(TEXTS),
        }
        if draw(st.integers(0, 3)) == 0:
            row[draw(st.sampled_from(["jpg_0", "jpg_1"]))] = draw(
                st.one_of(st.none(), dirty_images())
            )
        rows.append(row)
    return rows


SCHEMA = pa.schema(
    [
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("caption", pa.string()),
    ]
)


def storable(rows: list[dict[str, Any]]) -> bool:
    """Lone surrogates are no UTF-8: Arrow itself refuses them."""
    return all((r["caption"] or "").isascii() or _encodes(r["caption"]) for r in rows)


def _encodes(text: str) -> bool:
    try:
        return bool(text.encode()) or True
    except UnicodeEncodeError:
        return False


UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")  # an unknown character, as of a new emoji, is text


def pairs_stay_together(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    assume(storable(rows))
    path = tmp_path_factory.getbasetemp() / "fuzz.parquet"
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
    source = open_pairs(path, on_bad_row="skip")
    try:
        pairs = list(source)
    except DataError as error:
        assert "fuzz.parquet" in str(error)
        pairs = []
    for pair in pairs:
        row = rows[pair.row]
        first = row["label_0"] == 1.0
        assert pair.caption == row["caption"] and row["label_0"] in (0.0, 1.0)
        assert pair.winner == row["jpg_0" if first else "jpg_1"]
        assert pair.loser == row["jpg_1" if first else "jpg_0"]
    clean = [
        k
        for k, r in enumerate(rows)
        if r["label_0"] in (0.0, 1.0)
        and not all(unicodedata.category(c) in UNSEEN for c in r["caption"] or "")
        and r["jpg_0"] == solid(k, 0)
        and r["jpg_1"] == solid(k, 255)
    ]
    assert {p.row for p in pairs} >= set(clean)
    if pairs:
        counts = source.counts
        parts = (counts[k] for k in ("pairs", "ties", "identical", "skipped"))
        assert sum(parts) == counts["rows"] == len(rows)


test_pairs_stay_together_whatever_is_left_out = some(450, dirty_rows(), pairs_stay_together)
test_pairs_stay_together_in_every_case = every(450, dirty_rows(), pairs_stay_together)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.sampled_from(
                    [
                        "items",
                        "relations",
                        "item_id",
                        "label",
                        "attributes",
                        "item1",
                        "item2",
                        "relation",
                    ]
                ),
                st.text(max_size=4),
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@fuzz(500)
@given(st.one_of(JSON.map(json.dumps), st.text(max_size=40)))
def test_a_scene_graph_is_read_or_refused(text: str) -> None:
    try:
        graph = SceneGraph.from_json(text)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)[:200]
    else:
        assert isinstance(graph, SceneGraph)


KEYS = ["model", "data", "training", "training.steps", "objective", "steps", "beta", "path", "seed"]
YAML = st.one_of(
    st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=5)), JSON, max_size=3).map(
        yaml.safe_dump
    ),
    st.dictionaries(
        st.sampled_from(["training", "objective", "inversion", "data"]),
        st.dictionaries(
            st.sampled_from(["steps", "beta", "batch_size", "name", "fit"]), JSON, max_size=2
        ),
        max_size=2,
    ).map(yaml.safe_dump),
    st.text(max_size=30),
    st.sampled_from(
        [
            "a: [",
            "a: b: c",
            "!!python/object/apply:os.system ['true']",
            "- 1\n- 2",
            "${oc.env:HOME}",
            "training: ${nowhere}",
            "&a [*a]",
            "\t",
            "model: {path: ${oc.env:HOME}}",
        ]
    ),
)


def configuration_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        config = load_config(str(path), [])
    except ConfigError as error:
        assert str(error)
    else:
        assert isinstance(config, Config) and to_yaml(config)


test_a_configuration_is_read_or_refused = some(500, YAML, configuration_is_read_or_refused)
test_every_configuration_is_read_or_refused = every(500, YAML, configuration_is_read_or_refused)
