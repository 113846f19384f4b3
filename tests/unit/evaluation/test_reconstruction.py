"""The picture of the worst reconstructions."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from inversion_dpo.evaluation.reconstruction import captioned, write_reconstruction
from inversion_dpo.run.disk import read_json


def test_every_row_stands_above_its_numbers_and_small_images_are_enlarged():
    rows = [
        (f"pair {k}, winner: {k} dB", torch.full((3, 8, 16), v)) for k, v in enumerate((-1.0, 0.5))
    ]
    sheet = np.asarray(captioned(rows))
    assert sheet.shape == (22 + 2 * (8 * 32 + 22), 512, 3)
    assert (sheet[22 : 22 + 256] == 0).all() and (sheet[300:556] == 191).all()
    for top in (0, 22 + 256, 300 + 256):
        text = sheet[top : top + 22]
        assert text.min() < 100 and (text == 255).mean() > 0.8


@dataclass
class Cache:
    """Images that are 0, and come back as 1/2, 1/4, 1/8 ...; a single one is there twice."""

    sides: int
    of_shard: tuple = ((1, 0), (2,))
    digests: tuple = ("a", "b", "c")
    errors: list = field(default_factory=lambda: [0.1, 0.2, 0.3])

    @property
    def single(self):
        return self.sides == 1

    def of_images(self, name, pairs):
        values = [0.5 ** (1 + p + 3 * s * (self.sides - 1)) for s in (0, 1) for p in pairs]
        return torch.stack([torch.full((3, 8, 8), v * (name != "clean")) for v in values])


@pytest.mark.parametrize(
    ("sides", "images"),
    [
        (1, ["x, row 0", "x, row 7", "x, row 9"]),
        (2, [f"x, row {row}, {side}" for side in ("winner", "loser") for row in (0, 7, 9)]),
    ],
)
def test_the_worst_images_are_named_by_their_rows(sides, images, tmp_path):
    """The PSNR of an error e in [-1, 1] is 20 log10 (2 / e): 12.04, 18.06, 24.08 ... dB."""
    rows = {"a": 0, "?": 3, "b": 7, "c": 9}
    given = [SimpleNamespace(digest=d, where=f"x, row {k}", caption=d) for d, k in rows.items()]
    model = SimpleNamespace(decode=lambda x: x)
    text = write_reconstruction(tmp_path, model, Cache(sides), Cache(sides), iter(given))
    report = read_json(tmp_path / "reconstruction.json")
    decibels = [round(20 * np.log10(2 * 2 ** (k + 1)), 2) for k in range(3 * sides)]
    assert [r["image"] for r in report["worst"]] == images
    assert [r["prompt"] for r in report["worst"]] == ["a", "b", "c"] * sides
    assert [r["psnr_db"] for r in report["worst"]] == decibels
    assert report["psnr_db"]["median"] == pytest.approx(np.median(decibels), abs=0.01)
    assert "worst 12.0 dB" in text
