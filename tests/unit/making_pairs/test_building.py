"""`pairs build` from the configuration to the dataset, with a painter in the model's place."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inversion_dpo.data.images import DataError
from inversion_dpo.graphs.graph import Item, Relation, SceneGraph
from inversion_dpo.graphs.scene_key import SceneKey
from inversion_dpo.making_pairs.build import apportion, build, split_by_hash
from inversion_dpo.making_pairs.candidates import Candidate, Labelled
from inversion_dpo.making_pairs.card import size_category
from inversion_dpo.making_pairs.dataset import leaks, refuse_leaks, refuse_repeats
from inversion_dpo.making_pairs.labelling import WEIGHTS
from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.run.fields import BuildConfig, ModelConfig
from inversion_dpo.world.captions import parse_caption
from inversion_dpo.world.drawing import ground_colour
from inversion_dpo.world.scene_prompts import split_of
from tests.pair_files import write_annotations

SMALL = BuildConfig(
    prompts="scenes",
    mix={"1/0": 1, "2/1": 1},
    splits={"train": 12, "test": 4},
    samples=4,
    guidance_scales=[1.0, 2.0],
    by=["warmth"],
    mining="margin",
    least=0.02,
    once=True,
    name="small",
    licence="apache-2.0",
)
painted, checked = [], []


@pytest.fixture(autouse=True)
def painter(monkeypatch):
    """Plain grounds, warmer from seed to seed; notes what was asked for and checked before."""

    def drawing(sources, details, captions):
        def draw(asked, seeds, source):
            painted.extend(zip([g.caption for g in asked], seeds, strict=True))
            images = []
            for seed in seeds:
                rng = np.random.default_rng(seed)
                image = np.tile(ground_colour(rng.uniform()), (64, 64, 1)).round()
                image[:2, :2] += rng.integers(-9, 9, (2, 2, 3))  # no two the same
                image[32:] -= 6  # not of one colour
                images.append(image.clip(0, 255).astype(np.uint8))
            return images

        return draw

    painted.clear()
    checked.clear()
    monkeypatch.setattr("inversion_dpo.making_pairs.build.drawing", drawing)
    monkeypatch.setattr(
        "inversion_dpo.making_pairs.build.check_sampling", lambda *asked: checked.append(asked)
    )


def settings(**changes):
    return replace(load_config("scenes-pairs", []), build=replace(SMALL, **changes))


def rows_of(folder):
    return [r for f in sorted(folder.glob("*.parquet")) for r in pq.read_table(f).to_pylist()]


def test_a_dataset_in_splits(tmp_path):
    made = build(settings(), tmp_path)
    assert [asked[:2] for asked in checked] == [(settings(), tmp_path)]
    assert made == {"dataset/train/train-00000-of-00001": 12, "dataset/test/test-00000-of-00001": 4}
    for split, count in (("train", 12), ("test", 4)):
        rows = rows_of(tmp_path / "dataset" / split)
        assert {split_of(r["caption"]) for r in rows} == {split}
        sizes = [len(parse_caption(r["caption"]).items) for r in rows]
        assert sizes.count(1) == sizes.count(2) == count / 2 and sizes != sorted(sizes)
        for r in rows:
            first, second = (json.loads(r[f"scores_{k}"])["warmth"] for k in (0, 1))
            assert r["label_0"] == float(first > second) and abs(first - second) >= 0.02
            assert r["source_0"].startswith("reference, guidance ")
    card = (tmp_path / "dataset" / "README.md").read_text()
    assert card.startswith("---\n") and "\nlicense: apache-2.0\n" in card
    assert "| train | 12 |" in card and "| 1 object | 2 objects |" in card
    assert "path: train/*.parquet" in card and str(tmp_path) not in card
    for name in ("pairs.png", "distributions.png", "config.yaml", "SHA256SUMS"):
        assert (tmp_path / "dataset" / name).stat().st_size > 100


def test_the_same_again_and_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr("inversion_dpo.making_pairs.card.write_card", lambda *told: None)
    few = {"splits": {"train": 4, "test": 2}}
    build(settings(**few), tmp_path / "whole")
    sums = (tmp_path / "whole" / "dataset" / "SHA256SUMS").read_text()
    painted.clear()
    build(settings(**few), tmp_path / "whole")
    assert painted == []  # all of it was on disk
    chunks = sorted((tmp_path / "whole" / "candidates").iterdir())
    for chunk in chunks[::2]:
        chunk.unlink()
    build(settings(**few), tmp_path / "whole")
    assert (tmp_path / "whole" / "dataset" / "SHA256SUMS").read_text() == sums and painted
    with pytest.raises(DataError, match="another --output"):
        build(settings(**few, seed=1), tmp_path / "whole")
    build(settings(**few, seed=1), tmp_path / "other")
    assert (tmp_path / "other" / "dataset" / "SHA256SUMS").read_text() != sums


def test_pairs_have_their_prompts_size_and_the_image_that_they_edit(tmp_path, monkeypatch):
    """Sources and sizes of a prompt set reach the sampler, and the sources the pairs."""
    monkeypatch.undo()
    told, asked, files = [], [], [tmp_path / "day.png", tmp_path / "wide.png"]
    for file, size in zip(files, ((64, 64), (128, 64)), strict=True):
        Image.new("RGB", size, "red").save(file)
    rows = [{"prompt": "a", "source": "day.png"}, {"prompt": "b", "source": "wide.png"}]
    rows += [{"prompt": "c", "size": "64x96"}]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))

    class Painter:
        def under(self, **how):
            return self

        def warn_of_cut(self, captions):
            told.extend(captions)

        def draw(self, graphs, seeds, sizes, sources, desc):
            asked.extend(zip([g.caption for g in graphs], sizes, sources, strict=True))
            draws = zip(map(np.random.default_rng, seeds), sizes, strict=True)
            return [rng.integers(0, 255, (*size, 3), np.uint8) for rng, size in draws]

    monkeypatch.setattr("inversion_dpo.making_pairs.build.sampler_of", lambda *_: Painter())
    monkeypatch.setattr("inversion_dpo.making_pairs.build.check_sampling", lambda *_: None)
    few = {"prompts": str(prompts), "splits": {}, "mix": {}, "least": 0, "guidance_scales": []}
    config = settings(**few, by=[])
    config = replace(config, evaluation=replace(config.evaluation, scorer="numpy:mean"))
    monkeypatch.setattr("inversion_dpo.making_pairs.build.scorers_of", lambda *_: Brightness())
    assert build(config, tmp_path / "out") == {"pairs": 6}
    assert told == ["a", "b", "c"]  # all at once, before the first
    assert {c: (z, s and s.size) for c, z, s in asked} == {
        "a": ((64, 64), (64, 64)),
        "b": ((48, 80), (128, 64)),
        "c": ((96, 64), None),
    }
    rows = {r["caption"]: r for r in pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()}
    assert [rows[c]["source_image"] for c in "ab"] == [f.read_bytes() for f in files]
    assert rows["c"]["source_image"] is None
    assert Image.open(io.BytesIO(rows["b"]["jpg_0"])).size == (80, 48)
    Image.new("RGB", (64, 64), "blue").save(files[0])
    with pytest.raises(DataError, match=r"holds samples made with other settings \(prompts\)"):
        build(config, tmp_path / "out")


class Brightness:
    """A scorer of the mean over pixels."""

    def judge(self, images, prompts, graphs):
        return {"mean": np.array([image.mean() for image in images])}, None

    def names(self, prompts):
        return ["mean"]

    def conclude(self):
        pass


def test_what_does_not_come_out_is_said(tmp_path):
    with pytest.raises(DataError, match="test-1-0: only 0 of 2 pairs came out"):
        build(settings(least=5), tmp_path / "a")
    with pytest.raises(ConfigError, match="build.splits.dev is unknown: the embedded world"):
        build(settings(splits={"dev": 3}), tmp_path / "b")
    with pytest.raises(ConfigError, match="build.by: 'beauty' is no score; choose from"):
        build(settings(by=["beauty"]), tmp_path / "c")
    with pytest.raises(ConfigError, match="build.by names warmth twice: give each score once"):
        build(settings(by=["warmth", "sg_iou", "warmth"]), tmp_path / "d")


def test_samples_of_a_model_that_was_trained_further_are_not_gone_on_with(tmp_path, monkeypatch):
    """Half of them would be of the old policy, or all, if the build had ended."""
    monkeypatch.setattr("inversion_dpo.evaluation.sides.check_lora", lambda *_: None)
    weights = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"first")
    config, out = settings(models=[str(weights.parent)]), tmp_path / "out"
    made = build(config, out)
    assert build(config, out) == made
    weights.write_bytes(b"then")
    with pytest.raises(DataError, match=r"made with other settings \(weights of the models\)"):
        build(config, out)
    owner = out / "build.json"  # of an earlier version
    said = json.loads(owner.read_text())
    owner.write_text(json.dumps({k: v for k, v in said.items() if k != WEIGHTS}, sort_keys=True))
    assert build(config, out) == made and WEIGHTS in json.loads(owner.read_text())


def test_models_take_turns_with_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr("inversion_dpo.evaluation.sides.check_lora", lambda *_: None)
    from inversion_dpo.making_pairs.build import sampling_of

    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    first, second = f"{tmp_path}/a/run/", f"{tmp_path}/b/run"
    sampling = sampling_of(settings(models=[first]), tmp_path)
    assert sampling.sources == (
        "reference, guidance 1",
        "reference, guidance 2",
        "run, guidance 1",
        "run, guidance 2",
    )
    with pytest.raises(ConfigError, match="another one is called run; rename it"):
        sampling_of(settings(models=[first, second]), tmp_path)
    with pytest.raises(ConfigError, match="is no model"):
        sampling_of(settings(models=[str(tmp_path)]), tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("build.mining=best", "build.mining=best: give one of"),
        ("build.samples=1", "from 2 to"),
        ("build.mix={3/2: 0}", "build.mix.3/2=0: give a number above 0"),
        ("build.quality=0", "build.quality"),
        ("build.colour=1", "unknown key 'build.colour'"),
    ],
)
def test_settings_that_cannot_be(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("scenes-pairs", [override])


def test_a_kind_of_scene_that_is_none_is_refused_before_anything_is_sampled(tmp_path):
    with pytest.raises(ConfigError, match="build.mix: '3/9'"):
        build(settings(mix={"3/9": 1.0}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def graph(label, relation="above", caption=None):
    items = (Item(0, label), Item(1, "cross", ("large", "red")))
    return SceneGraph(items, (Relation(0, relation, 1),), caption or f"{label} {relation} cross")


def test_scene_graphs_from_a_file_in_splits(tmp_path):
    captions = [
        f"a small {c} {s} above a large red cross"
        for s in ("star", "circle", "square")
        for c in ("red", "blue", "pink", "green", "black", "orange")
    ]
    graphs = [parse_caption(c) for c in captions]
    write_annotations(graphs, tmp_path / "graphs.jsonl")
    how = {"prompts": f"{tmp_path}/graphs.jsonl", "near": -1}
    build(settings(**how, splits={"train": 6, "dev": 4}), tmp_path / "out")
    asked = {
        s: [
            SceneGraph.from_json(r["scene_graph"])
            for r in rows_of(tmp_path / "out" / "dataset" / s)
        ]
        for s in ("train", "dev")
    }
    assert leaks(asked) == [] and {s: len(g) for s, g in asked.items()} == {"train": 6, "dev": 4}
    assert {g.caption for part in asked.values() for g in part} <= set(captions)
    build(settings(**how, splits={}), tmp_path / "flat")
    assert len({r["caption"] for r in rows_of(tmp_path / "flat")}) == 18
    write_annotations([SceneGraph(graphs[0].items)], tmp_path / "graphs.jsonl")
    with pytest.raises(DataError, match="graph has no caption_ori"):
        build(settings(**how, splits={}), tmp_path / "silent")
    (tmp_path / "graphs.jsonl").write_text('{"items": 5}\n')
    with pytest.raises(DataError, match="graphs.jsonl, row 0: items is 5"):
        build(settings(**how, splits={}), tmp_path / "bad")


def test_numbers_of_prompts_give_the_shipped_labellings(tmp_path):
    config = load_config("composition", ["build.prompts=20", "build.samples=3"])
    with pytest.raises(DataError, match="no prompt gave a pair of composition"):
        build(config, tmp_path)  # empty grounds have no composition
    assert len(rows_of(tmp_path)) > 5  # taste was written


def test_splits_by_hash_keep_what_is_the_same_together():
    shares = {"train": 0.8, "test": 0.2}
    graphs = [graph(f"thing {k}") for k in range(500)]
    found = [split_by_hash(g, shares) for g in graphs]
    assert 0.15 < found.count("test") / 500 < 0.25
    back = [SceneGraph(g.items, (Relation(1, "below", 0),)) for g in graphs]
    assert [split_by_hash(g, shares) for g in back] == found
    words = SceneGraph((), (), "A  cat"), SceneGraph((), (), "a cat ")
    assert SceneKey(words[0]) == SceneKey(words[1]) != SceneKey(SceneGraph((), (), "a dog"))


def labelled(asked, *jpgs):
    w, l = (Candidate(asked.caption, asked.to_json(), 0, jpg, {}) for jpg in jpgs)
    return Labelled(w, l, 0.9)


def test_leaks_and_repeated_images_are_refused():
    one, same = graph("star"), SceneGraph(graph("star").items[::-1], graph("star").relations, "x")
    assert leaks({"a": [one, one], "b": [graph("star", "left of")]}) == []
    with pytest.raises(DataError, match="1 scene leaks between splits, the first: 'x' stands in"):
        refuse_leaks({"a": [labelled(one, b"1", b"2")], "b": [labelled(same, b"3", b"4")]})
    refuse_repeats({"a": [labelled(one, b"1", b"2")], "b": [labelled(one, b"3", b"4")]})
    with pytest.raises(DataError, match="1 image stands in more than one pair"):
        refuse_repeats({"a": [labelled(one, b"1", b"2")], "b": [labelled(one, b"3", b"1")]})


def test_apportion_adds_up():
    assert apportion(900, [0.12, 0.25, 0.18, 0.10, 0.35]) == [108, 225, 162, 90, 315]
    assert apportion(10, [1, 1, 1]) == [4, 3, 3] and sum(apportion(7, [0.3, 0.3, 0.4])) == 7


def test_the_hubs_sizes():
    assert [size_category(n) for n in (5, 999, 1000, 5570, 10_000, 10**7)] == [
        "n<1K",
        "n<1K",
        "1K<n<10K",
        "1K<n<10K",
        "10K<n<100K",
        "10M<n<100M",
    ]


def test_another_model_is_asked_for_its_own_prompts(tmp_path):
    config = replace(load_config("taste", []), model=ModelConfig(path="owner/model"))
    with pytest.raises(ConfigError, match="owner/model needs prompts.*--prompts FILE"):
        build(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
