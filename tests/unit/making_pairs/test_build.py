"""From prompts to pairs: chunks, duplicates, quotas, and what a kill leaves."""

import contextlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from inversion_dpo.data.images import DataError, decode_image
from inversion_dpo.graphs.graph import Item, SceneGraph
from inversion_dpo.making_pairs.candidates import Candidate, encode_image
from inversion_dpo.making_pairs.duplicates import Duplicates, dhash
from inversion_dpo.making_pairs.labelling import (
    Cell,
    Labelling,
    Sampling,
    claim,
    fill,
    groups,
    scored_samples,
)
from inversion_dpo.run.config import load_config
from inversion_dpo.run.processes import Team
from tests.pair_files import read_pairs

PROMPTS = [SceneGraph((), (), f"prompt {k}") for k in range(40)]


def draw(graphs, seeds, source):
    """Grey images that brighten with the seed; no two are the same."""
    images = [np.full((16, 16, 3), 20 + s % 230, np.uint8) for s in seeds]
    for image, seed in zip(images, seeds, strict=True):
        image[:8] += np.uint8(seed // 230)
        image[:8, :8] += 8  # not of one colour
    return images


def judge(images, graphs):
    light = np.array([i.mean() for i in images])
    return {"light": light, "dark": -light, "light_too": light}, None


GREY = Sampling(draw, judge, 3)
VOTE = {"pairs": Labelling()}


def made(folder, sampling=GREY, labellings=VOTE, **cell):
    return fill(Cell("c", PROMPTS, **cell), folder, sampling, labellings, Duplicates(-1))


def shown(found):
    return [(p.winner.seed, p.loser.seed, p.preference) for p in found]


def test_every_prompt_gives_a_pair_of_its_own_samples(tmp_path):
    found = made(tmp_path)["pairs"]
    assert [p.winner.caption for p in found] == [g.caption for g in PROMPTS]
    for k, pair in enumerate(found):
        assert {pair.winner.seed, pair.loser.seed} <= {3 * k, 3 * k + 1, 3 * k + 2}
        assert pair.winner.scores["light"] > pair.loser.scores["light"]
        assert pair.preference == pytest.approx(2 / 3)
        assert pair.winner.scene_graph == pair.winner.detected == ""


def test_several_labellings_of_the_same_samples(tmp_path):
    both = {"light": Labelling(("light",), "best_worst"), "dark": Labelling(("dark",), "margin")}
    found = made(tmp_path, labellings=both, quota=5)
    assert [len(pairs) for pairs in found.values()] == [5, 5]
    assert found["light"][0].winner.seed == found["dark"][0].loser.seed


def test_images_of_one_colour_are_in_no_pair_and_named(tmp_path, caplog):
    def hiding(graphs, seeds, source):
        images = draw(graphs, seeds, source)
        return [image * (seed % 3 > 0) for image, seed in zip(images, seeds, strict=True)]

    found = made(tmp_path, Sampling(hiding, judge, 3))["pairs"]
    assert [(p.winner.seed % 3, p.loser.seed % 3) for p in found] == [(2, 1)] * len(PROMPTS)
    assert "40 of 120 samples are of one colour ('prompt 0', seed 0; " in caplog.text
    assert "and 37 more" in caplog.text and "model.dtype=float32" in caplog.text


def test_a_cell_stops_at_its_quota(tmp_path):
    assert shown(made(tmp_path, quota=20)["pairs"]) == shown(made(tmp_path)["pairs"])[:20]
    made(tmp_path / "few", quota=5)
    assert len(list((tmp_path / "few").iterdir())) == 1
    first = made(tmp_path / "moved", first_seed=1000, quota=1)["pairs"][0]
    assert first.winner.seed >= 1000


def test_a_kill_loses_one_chunk_and_changes_nothing(tmp_path):
    whole, asked = shown(made(tmp_path / "whole")["pairs"]), []

    def dying(graphs, seeds, source):
        asked.append(len(graphs))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return draw(graphs, seeds, source)

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "killed", Sampling(dying, judge, 3))
    assert shown(made(tmp_path / "killed", Sampling(dying, judge, 3))["pairs"]) == whole
    assert asked == [48, 48, 48, 24]


def test_a_damaged_chunk_is_made_again(tmp_path):
    whole = shown(made(tmp_path)["pairs"])
    chunk = tmp_path / "c-000001.parquet"
    chunk.write_bytes(chunk.read_bytes()[:-50])
    assert shown(made(tmp_path)["pairs"]) == whole


class InTurn(Exception):
    """Raised where a process would wait for the others."""


@pytest.mark.parametrize("size", [2, 3, 5])
def test_several_processes_share_the_chunks_and_see_the_same(tmp_path, monkeypatch, size):
    """Rank after rank makes its chunk of a round and stops where it would wait; then all read."""

    def seeds(folder, rank, of):
        target = "inversion_dpo.making_pairs.labelling.current_team"
        monkeypatch.setattr(target, lambda: Team(rank, of))
        return [[c.seed for c in group] for group in groups(Cell("c", PROMPTS), folder, GREY)]

    def stop(team):
        made_by.append(len(list(folder.iterdir())))
        if len(made_by) % size:
            raise InTurn

    alone = seeds(tmp_path / "alone", 0, 1)
    folder, made_by = tmp_path / "together", []
    monkeypatch.setattr(Team, "wait", stop)
    for _ in range(3):
        for rank in range(size):
            with contextlib.suppress(InTurn, FileNotFoundError):
                seeds(folder, rank, size)
    assert made_by[0] == 1 and made_by[1] == 2  # one chunk a process, not all by each
    monkeypatch.setattr(Team, "wait", lambda team: None)
    assert [seeds(folder, rank, size) for rank in range(size)] == [alone] * size


def test_sources_take_turns_and_are_told(tmp_path):
    told = []

    def noted(graphs, seeds, source):
        told.append((source, list(seeds)))
        return draw(graphs, seeds, source)

    graph = SceneGraph((Item(0, "cat"),), (), "a cat")
    sampling = Sampling(noted, lambda i, g: (judge(i, g)[0], list(g)), 3, ("one", "two"))
    found = scored_samples([graph, graph], 10, sampling)
    assert told == [("one", [10, 12, 13, 15]), ("two", [11, 14])]
    assert [c.source for c in found] == ["one", "two", "one"] * 2
    assert [c.seed for c in found] == list(range(10, 16))
    assert {c.scene_graph for c in found} == {c.detected for c in found} == {graph.to_json()}
    for c in found:  # scored as stored
        assert c.scores["light"] == np.asarray(decode_image(c.jpg, "here")).mean()


def test_another_build_in_the_folder_is_refused(tmp_path):
    claim(tmp_path, {"seed": 0})
    claim(tmp_path, {"seed": 0})
    with pytest.raises(DataError, match="another --output"):
        claim(tmp_path, {"seed": 1})


def image(seed, caption="a", shift=0, colour=0):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[8:24, 8 + shift : 24 + shift, colour] = 200
    return Candidate(caption, "", seed, encode_image(pixels), {})


def test_duplicates_by_bytes_and_by_looks():
    seen = Duplicates(0)
    assert [c.seed for c in seen.fresh([image(0), image(1), image(2, shift=20)])] == [0, 2]
    assert seen.fresh([image(3, shift=20)]) == [] and seen.dropped == 2
    assert len(seen.fresh([image(4, "b", colour=1)])) == 1  # another caption, another object
    assert seen.fresh([image(5, "b")]) == []  # the very bytes of the first
    by_bytes = Duplicates(-1)
    assert len(by_bytes.fresh([image(0), image(1, colour=1), image(2)])) == 2


def test_a_hash_by_hand():
    from PIL import Image

    grey = np.zeros((8, 9), np.uint8)
    grey[:, 4] = 255  # its left neighbour is darker than it: a bit; its right one is not
    grey[7] = 0
    expected = int("00010000" * 7 + "00000000", 2)
    assert dhash(Image.fromarray(grey)) == expected
    assert dhash(Image.fromarray(grey // 2)) == expected


def test_what_is_built_is_written_and_read(tmp_path):
    from inversion_dpo.making_pairs.build import write_labelled

    config = load_config(None, [])
    assert write_labelled(config, tmp_path, made(tmp_path / "c")) == {"pairs": 40}
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert {r["label_0"] for r in rows} == {0.0, 1.0} and "detected_0" not in rows[0]
    for row in rows:
        assert row["preference_0"] == pytest.approx(2 / 3 if row["label_0"] else 1 / 3)
        first, second = (json.loads(row[f"scores_{k}"])["light"] for k in (0, 1))
        assert (first > second) == bool(row["label_0"])
    assert read_pairs(tmp_path / "pairs.parquet").pairs[0].scene_graph is None
    with pytest.raises(DataError, match="--least"):
        write_labelled(config, tmp_path, {"pairs": []})
