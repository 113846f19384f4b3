"""What else changed: traits of the policy's images against the reference's, in their order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from inversion_dpo.evaluation.changes import changes
from inversion_dpo.evaluation.samples import write_pictures, write_samples
from inversion_dpo.evaluation.wording import lines, statements
from inversion_dpo.run.config import load_config


def written(path: Path, shades: list[tuple[int, int, int]]) -> Path:
    images = [np.full((8, 8, 3), shade, np.uint8) for shade in shades]
    write_samples(path, [f"p{k}" for k in range(len(shades))], list(range(len(shades))), images, {})
    return path


def test_the_list_of_prompts_cannot_command_a_terminal(tmp_path):
    files = [tmp_path / "reference.parquet", tmp_path / "policy.parquet"]
    for file in files:
        write_samples(file, ["a\x1b[2J red\nstar"], [1], [np.zeros((4, 4, 3), np.uint8)], {})
    write_pictures(tmp_path / "images", files, load_config(None, []))
    assert (tmp_path / "images" / "prompts.txt").read_text() == "000 a\\x1b[2J red star\n"


def test_policy_against_reference_image_by_image(tmp_path: Path) -> None:
    """Of 100 images 75 become warmer, 25 colder; none differs in contrast or sharpness."""
    grey, warm, cold = (90, 90, 90), (120, 90, 90), (90, 90, 120)
    reference = written(tmp_path / "r.parquet", [grey] * 100)
    policy = written(tmp_path / "p.parquet", ([warm] * 3 + [cold]) * 25)
    found = changes(reference, policy)["traits"]
    assert list(found) == ["brighter", "more colourful", "warmer"]
    assert found["warmer"]["share"] == 0.75
    assert found["brighter"]["share"] == 1.0
    high = found["warmer"]["high"]  # Wilson's end lies z standard errors of its own away
    assert high - 0.75 == pytest.approx(2.576 * (high * (1 - high) / 100) ** 0.5, rel=1e-3)
    back = changes(policy, reference)["traits"]
    assert back["warmer"]["share"] == 0.25


def test_the_same_images_and_few_images_say_nothing(tmp_path: Path) -> None:
    many = written(tmp_path / "a.parquet", [(k, 0, 0) for k in range(40)])
    few = written(tmp_path / "b.parquet", [(9, 9, 9)] * 5)
    assert changes(many, many)["traits"] == {}
    assert changes(few, written(tmp_path / "c.parquet", [(0, 0, 0)] * 5))["traits"] == {}


def test_samples_of_one_colour_are_counted_and_named(tmp_path: Path) -> None:
    black, noise = np.zeros((8, 8, 3), np.uint8), np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    files = [tmp_path / "r.parquet", tmp_path / "p.parquet"]
    for file, images in zip(files, ([noise, noise], [noise, black]), strict=True):
        write_samples(file, ["a star", "a cross"], [3, 4], images, {})
    found = changes(*files)
    assert found["one_colour"] == {"reference": [], "policy": ["'a cross', seed 4"]}
    metrics = {"n_prompts": 2, "seeds": 1, **found}
    told = "policy: 1 of 2 samples are of one colour ('a cross', seed 4): a safety checker"
    assert told in "".join(lines(metrics))
    assert statements(metrics, "warmth")[0][1].startswith(told)
    assert "one_colour" not in changes(files[0], files[0])
