from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from inversion_dpo.data.images import decode_image
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.making_pairs.build import LABELLINGS
from inversion_dpo.making_pairs.candidates import (
    Candidate,
    Labelled,
    encode_image,
    pair_rows,
    schema_of,
    write_rows,
)
from inversion_dpo.making_pairs.labelling import Labelling, Sampling, pairs_of, scored_samples
from inversion_dpo.world.captions import parse_caption
from inversion_dpo.world.drawing import Scene, sample_scene
from tests.pair_files import check_pairs, read_pairs
from tests.scenes import judge_scenes, score_image
from tools.embedded.painting import render

VERDICT = ("entity_iou", "relation_iou", "sg_iou", "exact", "composition")


def write_pairs(path: Path, pairs: list[tuple[Candidate, Candidate]], seed: int) -> None:
    rows = pair_rows([Labelled(winner, loser, 0.9) for winner, loser in pairs], seed)
    write_rows(path, rows, schema_of(rows))


def made_up(seed: int, scores: dict[str, float] | None = None, caption: str = "a") -> Candidate:
    jpg = encode_image(np.full((64, 64, 3), 10 * seed, np.uint8))
    return Candidate(caption, "{}", seed, jpg, scores or {"warmth": 0.0, "composition": 0.0})


def candidate(graph: SceneGraph, seed: int, image: np.ndarray[Any, Any]) -> Candidate:
    """A sample as a build makes it."""
    sampling = Sampling(lambda *asked: [image], judge_scenes, 1, quality=90)
    return scored_samples([graph], seed, sampling)[0]


def warm_and_cool(count: int) -> list[tuple[Candidate, Candidate]]:
    """Pairs of renders of one graph, the winner warmer by 0.6."""
    rng = np.random.default_rng(0)
    pairs = []
    for k in range(count):
        scene = sample_scene(rng)
        graph, both = scene.graph, []
        for warmth in (0.8, 0.2):
            image = render(Scene(graph, scene.positions, warmth))
            both.append(candidate(graph, 10 * k + round(10 * warmth), image))
        pairs.append((both[0], both[1]))
    return pairs


def table(path: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    return columns


def test_scores_of_an_image() -> None:
    scene = sample_scene(np.random.default_rng(1))
    scores = score_image(scene.graph, render(scene))
    names = "entity_iou relation_iou sg_iou exact shape_quality warmth composition"
    assert set(scores) == set(names.split())
    assert scores["composition"] == scores["exact"] == 1.0
    assert scores["warmth"] == pytest.approx(scene.warmth, abs=0.02)
    nothing = score_image(scene.graph, np.full((64, 64, 3), 220, np.uint8))
    assert nothing["composition"] == nothing["exact"] == 0.0


@pytest.mark.parametrize(("key", "score"), [("taste", "warmth"), ("composition", "composition")])
def test_the_best_meets_the_worst(key: str, score: str) -> None:
    assert set(LABELLINGS) == {"taste", "composition"}
    group = [
        Candidate("a", "{}", seed, b"", {"warmth": w, "composition": c})
        for seed, w, c in ((0, 0.5, 0.2), (1, 0.9, 0.5), (2, 0.1, 0.9))
    ]
    values = [c.scores[score] for c in group]
    (pair,) = pairs_of(group, LABELLINGS[key])
    assert (pair.winner.seed, pair.loser.seed) == (np.argmax(values), np.argmin(values))
    gap = max(values) - min(values)
    assert pair.preference == pytest.approx(1 / (1 + np.exp(-gap)))
    close = Labelling((score,), "best_worst", gap + 0.01)
    assert pairs_of(group, close) == []


def test_the_judge_says_what_it_found() -> None:
    scene = sample_scene(np.random.default_rng(2), 3)
    asked = [scene.graph, parse_caption("a small red star")]
    scores, found = judge_scenes([render(scene)] * 2, asked)
    assert [len(graph.items) for graph in found] == [3, 3]
    assert scores["exact"].tolist() == [1.0, 0.0]
    assert {name: v[0] for name, v in scores.items()} == score_image(scene.graph, render(scene))


def test_a_candidate_is_scored_as_it_is_stored() -> None:
    scene = sample_scene(np.random.default_rng(3))
    noisy = render(scene).astype(int) + np.random.default_rng(0).integers(-40, 40, (64, 64, 3))
    image = noisy.clip(0, 255).astype(np.uint8)
    made = candidate(scene.graph, 7, image)
    stored = np.asarray(decode_image(made.jpg, "here"))
    assert made.scores == score_image(scene.graph, stored) != score_image(scene.graph, image)
    assert (made.caption, made.seed) == (scene.graph.caption, 7)


def test_what_is_written_is_read_with_winners_and_losers_right(tmp_path: Path) -> None:
    pairs = warm_and_cool(20)
    write_pairs(tmp_path / "new" / "pairs.parquet", pairs, seed=0)
    read = read_pairs(tmp_path / "new" / "pairs.parquet").pairs
    assert [p.caption for p in read] == [winner.caption for winner, _ in pairs]
    for pair, (winner, _) in zip(read, pairs, strict=True):
        assert pair.scene_graph is not None
        graph = SceneGraph.from_json(pair.scene_graph)
        assert graph.caption == winner.caption
        for data, warmth in ((pair.winner, 0.8), (pair.loser, 0.2)):
            image = np.asarray(decode_image(data, "here"))
            assert score_image(graph, image)["warmth"] == pytest.approx(warmth, abs=0.05)


def test_the_columns_of_either_image_stay_together(tmp_path: Path) -> None:
    pairs = warm_and_cool(10)
    write_pairs(tmp_path / "pairs.parquet", pairs, seed=0)
    rows = table(tmp_path / "pairs.parquet")
    for k, (winner, loser) in enumerate(pairs):
        shown = (winner, loser) if rows["label_0"][k] == 1.0 else (loser, winner)
        for n, expected in enumerate(shown):
            assert rows[f"seed_{n}"][k] == expected.seed
            assert json.loads(rows[f"scores_{n}"][k]) == expected.scores
            assert rows[f"jpg_{n}"][k] == expected.jpg


@pytest.mark.parametrize("count", [1, 2, 31, 100])
def test_winners_come_first_in_half_of_the_rows(tmp_path: Path, count: int) -> None:
    pairs = [(made_up(0), made_up(1))] * count
    labels = []
    for seed in (0, 1):
        write_pairs(tmp_path / "pairs.parquet", pairs, seed)
        labels.append(table(tmp_path / "pairs.parquet")["label_0"])
        assert labels[-1].count(1.0) + labels[-1].count(0.0) == count
        assert abs(labels[-1].count(1.0) - labels[-1].count(0.0)) <= 1
    if count >= 31:
        assert labels[0] != labels[1]
        assert labels[0] != sorted(labels[0]) and labels[0] != sorted(labels[0], reverse=True)


def test_the_same_pairs_and_seed_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pairs(tmp_path / f"{name}.parquet", warm_and_cool(5), seed=3)
    first, second = read_pairs(tmp_path / "a.parquet"), read_pairs(tmp_path / "b.parquet")
    assert first.fingerprint == second.fingerprint
    write_pairs(tmp_path / "b.parquet", warm_and_cool(6), seed=3)
    assert read_pairs(tmp_path / "b.parquet").fingerprint != first.fingerprint


def test_a_written_file_is_sound_and_small(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.parquet", warm_and_cool(60), seed=0)
    report = check_pairs(tmp_path / "pairs.parquet")
    assert report.ok
    assert (report.counts["pairs"], report.counts["duplicates"], report.first_preferred) == (
        60,
        0,
        0.5,
    )
    assert report.image_sizes == {(64, 64): 120}
    assert (tmp_path / "pairs.parquet").stat().st_size < 60 * 3000


def test_encoding_keeps_the_verdict_of_the_checker() -> None:
    rng = np.random.default_rng(5)
    for scene in [sample_scene(rng) for _ in range(60)]:
        image = render(scene)
        decoded = np.asarray(decode_image(encode_image(image), "here"))
        before, after = score_image(scene.graph, image), score_image(scene.graph, decoded)
        assert [after[name] for name in VERDICT] == [before[name] for name in VERDICT]
        assert after["warmth"] == pytest.approx(before["warmth"], abs=0.05)


def test_colour_is_kept_at_full_resolution() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 0::2], image[:, 1::2] = (214, 39, 40), (35, 80, 215)  # columns, red and blue
    decoded = np.asarray(decode_image(encode_image(image), "here")).astype(int)
    assert np.abs(decoded - image).mean() < 5


def test_quality_trades_bytes_for_fidelity() -> None:
    image = render(sample_scene(np.random.default_rng(0), 4))
    sizes, errors = [], []
    for quality in (50, 90):
        data = encode_image(image, quality)
        sizes.append(len(data))
        errors.append(np.abs(np.asarray(decode_image(data, "here")).astype(int) - image).mean())
    assert sizes[0] < sizes[1]
    assert errors[0] > errors[1]


def test_pairs_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "pairs.parquet"
    with pytest.raises(ValueError, match="no pairs to write"):
        write_pairs(file, [], seed=0)
    with pytest.raises(ValueError, match="pair of two prompts: 'a' and 'b'"):
        write_pairs(file, [(made_up(0), made_up(1, caption="b"))], seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_halfway(writer: Any, table: Any) -> None:
        writer.where.write_bytes(b"PAR1 and no more")
        raise OSError("disk full")

    file = tmp_path / "pairs.parquet"
    write_pairs(file, [(made_up(0), made_up(1))], seed=0)
    before = file.read_bytes()
    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", fail_halfway)
    with pytest.raises(OSError, match="disk full"):
        write_pairs(file, [(made_up(1), made_up(0))], seed=0)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
