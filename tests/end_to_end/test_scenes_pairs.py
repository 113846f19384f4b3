"""The dataset that lies in datasets/scenes-pairs is what its card says."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from inversion_dpo.data.images import decode_image
from inversion_dpo.graphs.graph import SceneGraph, agreement
from inversion_dpo.making_pairs.dataset import leaks
from inversion_dpo.run.config import load_config
from inversion_dpo.world.captions import parse_caption, with_entailed
from inversion_dpo.world.checker import detect
from inversion_dpo.world.scene_prompts import split_of
from tests.pair_files import check_pairs, open_pairs
from tests.scenes import score_image

FOLDER = Path(__file__).parents[2] / "datasets" / "scenes-pairs"
SPLITS = {"train": 4270, "validation": 400, "test": 900}


@pytest.fixture(scope="module")
def rows():
    return {
        split: [r for f in sorted((FOLDER / split).iterdir()) for r in pq.read_table(f).to_pylist()]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def everything(rows):
    return [row for part in rows.values() for row in part]


def test_files_are_whole_and_small():
    listed = {}
    for line in (FOLDER / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        listed[name] = digest
    files = [f for f in FOLDER.rglob("*") if f.is_file() and f.name != "SHA256SUMS"]
    assert set(listed) == {f.relative_to(FOLDER).as_posix() for f in files}
    for file in files:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert digest == listed[file.relative_to(FOLDER).as_posix()], file
    assert sum(f.stat().st_size for f in files) < 25e6


def test_counts(rows, everything):
    assert {split: len(part) for split, part in rows.items()} == SPLITS
    assert len(everything) == 5570
    images = [row[f"jpg_{k}"] for row in everything for k in (0, 1)]
    assert len(images) == len(set(images)) == 11_140
    asked = [SceneGraph.from_json(row["scene_graph"]) for row in everything]
    complex_ones = sum(len(g.items) >= 3 and len(g.relations) >= 3 for g in asked)
    assert complex_ones / len(asked) >= 0.4
    tested = Counter(len(parse_caption(row["caption"]).items) for row in rows["test"])
    assert set(tested) == {1, 2, 3, 4} and min(tested.values()) >= 100
    first = sum(row["label_0"] for row in everything)
    assert first == pytest.approx(len(everything) / 2, abs=2)


@pytest.mark.slow
def test_no_scene_leaks_and_splits_are_those_of_the_prompts(rows):
    graphs = {s: [SceneGraph.from_json(r["scene_graph"]) for r in part] for s, part in rows.items()}
    assert leaks(graphs) == []
    for split, part in rows.items():
        assert {split_of(row["caption"]) for row in part} == {split}


@pytest.mark.slow
def test_every_row_is_valid(everything):
    for row in everything:
        graph = SceneGraph.from_json(row["scene_graph"])
        assert graph == with_entailed(parse_caption(row["caption"]))
        scores = [json.loads(row[f"scores_{k}"]) for k in (0, 1)]
        gap = scores[0]["composition"] - scores[1]["composition"]
        assert abs(gap) >= 0.2 and row["label_0"] == float(gap > 0)
        assert row["preference_0"] == pytest.approx(1 / (1 + np.exp(-gap)))
        for k in (0, 1):
            found = agreement(graph, SceneGraph.from_json(row[f"detected_{k}"]))
            assert scores[k]["sg_iou"] == pytest.approx(found.sg_iou)
            assert scores[k]["entity_iou"] == pytest.approx(found.entity_iou)
            assert row[f"source_{k}"] in ("reference, guidance 1", "reference, guidance 2")


def test_stored_images_have_the_scores_and_graphs_that_are_told(everything):
    for row in everything[::100]:
        for k in (0, 1):
            image = np.asarray(decode_image(row[f"jpg_{k}"], ""))
            scores = score_image(SceneGraph.from_json(row["scene_graph"]), image)
            assert scores == pytest.approx(json.loads(row[f"scores_{k}"]), abs=1e-6)
            assert detect(image).graph() == SceneGraph.from_json(row[f"detected_{k}"])


def test_our_reader_and_plain_datasets_read_it(tmp_path):
    import datasets

    report = check_pairs(FOLDER / "validation")
    assert report.ok and report.counts["pairs"] == 400 and report.counts["duplicates"] == 0
    assert len(report.graphs.items) == 400
    pair = next(iter(open_pairs(FOLDER / "train")))
    assert 0.5 < pair.preference < 1 and pair.scene_graph
    files = {split: f"{FOLDER}/{split}/*.parquet" for split in SPLITS}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    assert {split: len(part) for split, part in loaded.items()} == SPLITS


def test_the_preset_is_the_one_it_was_built_with():
    kept, preset = (load_config(c, []) for c in (str(FOLDER / "config.yaml"), "scenes-pairs"))
    assert kept.build == preset.build and kept.model == preset.model
    assert kept.evaluation == preset.evaluation
    assert "license: apache-2.0" in (FOLDER / "README.md").read_text()
