"""What is said of the pairs before a model is read and pairs are inverted."""

import io
from contextlib import nullcontext

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inversion_dpo.data.images import DataError
from inversion_dpo.data.source import open_pairs
from inversion_dpo.run.fields import Config, DataConfig, ModelConfig
from inversion_dpo.training.beforehand import check_data, check_first


def png(colour: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_shapes_that_no_size_takes_are_told_before_the_inversion(tmp_path, caplog):
    """At 64 pixels no size has the shape 4:3; where every pair is lost, nothing begins."""
    path = tmp_path / "p.parquet"

    def looked_at(squares: int, fit: str = "drop") -> str:
        sizes = [(64, 64)] * squares + [(64, 48)] * 6
        rows = [
            {"jpg_0": png("red", s), "jpg_1": png("blue", s), "label_0": 1.0, "caption": f"{k}"}
            for k, s in enumerate(sizes)
        ]
        pq.write_table(pa.Table.from_pylist(rows), path)
        config = Config(model=ModelConfig(), data=DataConfig(pairs=str(path), fit=fit))
        caplog.clear()
        check_first(config, open_pairs(config.data))
        return caplog.text

    assert "of the first pairs, 6 of 10 pairs are left out" in looked_at(4)
    assert looked_at(0, "crop") == ""
    with pytest.raises(DataError, match="only 3 usable pairs"):
        looked_at(3)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, "row 0: objective.path=known needs the columns seed_0 and seed_1 with whole"),
        ({"seed_0": 1.5, "seed_1": 2.0}, "row 0: .* with whole numbers from 0 on"),
        ({"seed_0": 1.0, "seed_1": 2.0}, ""),
    ],
)
def test_images_without_a_seed_are_refused_before_a_training(
    columns, expected, tiny_config, pair_file, tmp_path
):
    rows = [{**row, **columns} for row in pq.read_table(pair_file).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    config = tiny_config(f"data.pairs={tmp_path / 'pairs.parquet'}", "objective.path=known")
    with pytest.raises(DataError, match=expected) if expected else nullcontext():
        check_data(config, tmp_path)
