"""Pairs that are sampled for people: complete, named where they are not, and kept as they come."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inversion_dpo.data.images import DataError
from inversion_dpo.evaluation.prompt_sets import PromptSet
from inversion_dpo.labels.asking import sample_pairs
from inversion_dpo.labels.questions import WebError
from inversion_dpo.run.config import load_config
from inversion_dpo.run.faults import OutOfMemoryError, Terminated

PROMPTS = PromptSet(["a", "b"], ["", ""], [None, None])
MANY = PromptSet([f"{k}" for k in range(7)], [""] * 7, [None] * 7)
STEPS = ["evaluation.sample_steps=2"]
CONFIG = load_config(None, ["model.resolution=64", "evaluation.batch_size=3"])


class Painter:
    """A sampler whose images are black for the seeds that it is given."""

    def __init__(self, *black, ends_at=None, error=Terminated):
        self.black, self.ends_at, self.error, self.drawn = black, ends_at, error, []

    def warn_of_cut(self, prompts):
        pass

    def draw(self, prompts, seeds, sizes, sources):
        if self.ends_at in seeds:
            raise self.error("out of memory")
        self.drawn.append(seeds)
        self.asked = list(zip(sizes, sources, strict=True))
        ramp = np.arange(64 * 3, dtype=np.uint8).reshape(8, 8, 3)
        return [(ramp + seed) * (seed not in self.black) for seed in seeds]


@pytest.fixture
def by(monkeypatch):
    """Call with a painter and the arguments of ``sample_pairs``."""

    def sample(painter, *arguments):
        monkeypatch.setattr("inversion_dpo.labels.asking.sampler_of", lambda *_: painter)
        return sample_pairs(*arguments)

    return sample


def test_samples_of_one_colour_are_left_out_and_named(by, tmp_path, caplog):
    assert by(Painter(1), tmp_path / "p.parquet", CONFIG, PROMPTS, 0) == 1
    (row,) = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert (row["caption"], row["seed_0"], row["seed_1"]) == ("b", 2, 3)
    assert "1 of 4 samples are of one colour ('a', seed 1)" in caplog.text
    with pytest.raises(WebError, match="every pair has an image of one colour"):
        by(Painter(0, 3), tmp_path / "none.parquet", CONFIG, PROMPTS, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


def test_a_whole_file_is_kept_and_no_other_is_replaced(by, tmp_path):
    """Labels are of its pictures; typed again the command has nothing to do."""
    file, painter = tmp_path / "p.parquet", Painter()
    assert by(painter, file, CONFIG, PROMPTS, 0) == 2
    whole, drawn = file.read_bytes(), len(painter.drawn)
    assert by(painter, file, CONFIG, PROMPTS, 0) == 2
    other = load_config(None, ["model.resolution=64", "evaluation.guidance_scale=3"])
    for changed in ((CONFIG, PROMPTS, 1), (CONFIG, MANY, 0), (other, PROMPTS, 0)):
        with pytest.raises(
            DataError, match="p.parquet is there, and was not made with these settings"
        ):
            by(painter, file, *changed)
    assert file.read_bytes() == whole and len(painter.drawn) == drawn
    for mine in (b"mine", b""):
        file.write_bytes(mine)
        with pytest.raises(DataError, match="is there, and was not made with these"):
            by(painter, file, CONFIG, PROMPTS, 0)
        assert file.read_bytes() == mine
    pq.write_table(pa.table({"mine": [1]}), file)
    with pytest.raises(DataError, match="choose another --output, or delete it"):
        by(painter, file, CONFIG, PROMPTS, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


def test_samples_have_the_size_and_the_source_that_the_prompts_say(by, tmp_path):
    Image.new("RGB", (128, 64), "red").save(tmp_path / "wide.png")
    asked = replace(PROMPTS, sizes=[(96, 64), None], sources=[None, tmp_path / "wide.png"])
    painter, config = Painter(), load_config(None, ["model.resolution=64"])
    assert by(painter, tmp_path / "p.parquet", config, asked, 0) == 2
    assert [(size, source and source.size) for size, source in painter.asked] == [
        *[((96, 64), None)] * 2,
        *[((48, 80), (128, 64))] * 2,
    ]
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [r["source_image"] for r in rows] == [None, (tmp_path / "wide.png").read_bytes()]


def test_a_killed_sampling_goes_on_to_the_same_bytes(by, tmp_path, caplog):
    """Each image is drawn once, and one of one colour is named whenever it was drawn."""
    whole, parts = tmp_path / "whole.parquet", tmp_path / "parts.parquet"
    at_once = Painter(1)
    assert by(at_once, whole, CONFIG, MANY, 0) == 6
    painters = [Painter(1, ends_at=at) for at in (4, 10, None)]
    for painter in painters[:2]:
        with pytest.raises(Terminated):
            by(painter, parts, CONFIG, MANY, 0)
        assert not parts.exists()
    (tmp_path / "parts.samples" / "00000003-3.parquet").write_bytes(b"damaged")
    caplog.clear()
    assert by(painters[2], parts, CONFIG, MANY, 0) == 6 and "'0', seed 1" in caplog.text
    assert parts.read_bytes() == whole.read_bytes()
    drawn = [seeds for painter in painters for seeds in painter.drawn]
    assert drawn == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [3, 4, 5], [9, 10, 11], [12, 13]]
    assert {path.name for path in tmp_path.iterdir()} == {"whole.parquet", "parts.parquet"}
    rows = pq.read_table(whole).to_pylist()
    assert [row["caption"] for row in rows] == list("123456")
    assert all(b["seed_0"] == a["seed_1"] + 1 for a, b in pairwise(rows))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"asked": PROMPTS}, "prompts"),
        ({"config": load_config(None, ["model.resolution=128", *STEPS])}, "model, steps"),
    ],
)
def test_samples_of_another_command_are_not_mixed_in(by, tmp_path, change, named):
    given = {"config": CONFIG, "asked": MANY, "seed": 0}
    with pytest.raises(Terminated):
        by(Painter(ends_at=4), tmp_path / "p.parquet", *given.values())
    with pytest.raises(DataError, match=rf"p.samples holds .* other settings \({named}\): repeat"):
        by(Painter(), tmp_path / "p.parquet", *(given | change).values())


def test_other_files_and_an_unreadable_source_are_refused_before_sampling(by, tmp_path):
    (tmp_path / "p.samples").mkdir()
    (tmp_path / "p.samples" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="holds files of other origin: choose another --output"):
        by(None, tmp_path / "p.parquet", CONFIG, PROMPTS, 0)
    assert (tmp_path / "p.samples" / "mine.txt").exists()
    (tmp_path / "bad.png").write_text("bad")
    with pytest.raises(DataError, match="bad.png"):
        edits = replace(PROMPTS, sources=[None, tmp_path / "bad.png"])
        by(None, tmp_path / "q.parquet", CONFIG, edits, 0)


def test_memory_that_runs_out_names_the_setting(by, tmp_path):
    with pytest.raises(OutOfMemoryError, match="evaluation.batch_size"):
        by(Painter(ends_at=0, error=MemoryError), tmp_path / "p.parquet", CONFIG, PROMPTS, 0)
