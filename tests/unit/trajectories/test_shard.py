"""What a shard has besides latents and paths: sources, regions, known noise; and who writes it."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from inversion_dpo.data.buckets import Place
from inversion_dpo.data.images import DataError
from inversion_dpo.models.base import ModelError
from inversion_dpo.run.processes import Team
from inversion_dpo.trajectories import fill as module
from inversion_dpo.trajectories.fill import (
    Inverter,
    Job,
    conditions,
    fill,
    invert_pairs,
    noise_variance,
    predictions,
)
from inversion_dpo.trajectories.jobs import text_of
from inversion_dpo.trajectories.key import NOWHERE
from inversion_dpo.trajectories.storing import check_finite
from tests.by_hand import GRID
from tests.unit.trajectories.test_fill import (
    CPU,
    KEY,
    SIDE,
    Pipeline,
    Source,
    filled,
    jobs,
    pair,
    picture,
    red,
)

ENCODED = replace(KEY, extent=NOWHERE)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


RED, DARK = png(picture(255, 255)), png(picture(51, 51))


class Editor(Pipeline):
    """Its text encoder reads the source, too: the prompt's number is 100 more for each level."""

    def __init__(self, edits="reads"):
        super().__init__()
        self.edits = edits

    @staticmethod
    def source_size(size):
        return size

    def condition(self, prompts, graphs=None, sources=()):
        found = super().condition(prompts, graphs)
        levels = [source.getpixel((0, 0))[0] for source in sources]
        return {"prompt": found["prompt"] + 100 * torch.tensor(levels or [0])[:, None]}


def editing(*sources, size=SIDE):
    """Pairs of one caption, each with a source."""
    place = Place((size, size), "crop")
    return [Job(k, replace(pair(0), source=source), place) for k, source in enumerate(sources)]


def how_of(model, key=ENCODED):
    return Inverter(model, key, GRID, CPU)


# ---- sources


def test_a_source_is_stored_once_a_pair_and_not_mirrored_alone():
    shard = invert_pairs(how_of(Editor("must")), editing(RED, DARK, RED))
    wanted = torch.tensor([red(255), red(51), red(255)])
    torch.testing.assert_close(shard["pair.source"][:, 0, 0, 0], wanted)
    assert len(shard["clean"]) == 6 and "pair.source" not in invert_pairs(
        how_of(Editor("must")), jobs(2)
    )


def test_the_network_sees_the_source_of_each_image():
    model, seen = Editor("must"), []
    predict = model.predict
    model.predict = lambda n, x, t, c: seen.append(c["source"]) or predict(n, x, t, c)
    invert_pairs(how_of(model, KEY), editing(RED, DARK))
    wanted = torch.tensor([red(255)] * 2 + [red(51)] * 2)
    torch.testing.assert_close(seen[0][:, 0, 0, 0], wanted)


def test_an_encoder_that_reads_the_source_has_a_condition_for_each():
    job = editing(RED, DARK, RED)
    given = [[Image.new("RGB", (1, 1), (level, 0, 0))] for level in (2, 1, 2)]
    found = conditions(how_of(Editor()), job, given)["prompt"]
    assert found.flatten().tolist() == [201, 101, 201]
    other = conditions(how_of(Editor("must")), job, given)["prompt"]
    assert other.flatten().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("edits", "change", "same"),
    [
        ("reads", {}, True),
        ("reads", {"pair": {"source": DARK}}, False),
        ("reads", {"place": Place((4, 4), "crop")}, False),
        ("reads", {"place": Place((SIDE, SIDE), "pad")}, False),
        ("must", {"pair": {"source": DARK}, "place": Place((4, 4), "pad")}, True),
        ("must", {"pair": {"caption": "b"}}, False),
    ],
)
def test_a_text_is_what_the_encoder_reads(edits, change, same):
    (job,) = editing(RED)
    how = how_of(Editor(edits))
    other = replace(job, number=7, **change | {"pair": replace(job.pair, **change.get("pair", {}))})
    assert (text_of(job, how) == text_of(other, how)) == same


def test_a_graph_is_part_of_a_text_where_it_is_read():
    one, other = (Job(0, replace(pair(0), scene_graph=g), Place((2, 2), "pad")) for g in "ab")
    for graph, same in (("new 4", False), (None, True)):
        how = how_of(Pipeline(), replace(KEY, scene_graph=graph))
        assert (text_of(one, how) == text_of(other, how)) == same


def test_a_source_that_is_not_finite_is_refused_by_its_row():
    pairs = [replace(pair(k), where=f"row {k}") for k in range(2)]
    shard = {"clean": torch.zeros(4, 2), "pair.source": torch.zeros(2, 1, 2)}
    check_finite(shard, pairs)
    shard["pair.source"][1, 0, 1] = torch.inf
    with pytest.raises(ModelError, match="row 1, source: its latent has values that are not"):
        check_finite(shard, pairs)


# ---- regions and known noise


def masked(*masks):
    return [
        Job(k, replace(pair(0), mask=mask, decoded=(picture(9, 9),) * 2), Place((2, 2), "crop"))
        for k, mask in enumerate(masks)
    ]


LEFT, TOP = (np.array(rows, np.uint8) * 255 for rows in ([[1, 0]] * 2, [[1, 1], [0, 0]]))


def test_a_shard_has_the_region_of_each_mask():
    given = masked(*(png(Image.fromarray(mask)) for mask in (LEFT, TOP)))
    shard = invert_pairs(how_of(Pipeline()), given)
    assert shard["region"].tolist() == [[[[2, 0], [2, 0]]], [[[2, 2], [0, 0]]]]
    assert "region" not in invert_pairs(how_of(Pipeline()), masked(None, None))


def test_a_shard_has_the_region_where_images_differ():
    one, other = picture(100, 100), picture(100, 200)
    job = Job(0, replace(pair(0), decoded=(one, other)), Place((2, 2), "crop"))
    shard = invert_pairs(how_of(Pipeline(), replace(ENCODED, mask="differ")), [job])
    assert shard["region"].tolist() == [[[[0, 2], [0, 2]]]]


def test_known_noise_takes_no_path(monkeypatch):
    """Asked for all pairs of a part, with their latents; stored in 16 bits."""
    asked = []

    def known(how, x_0, condition, of):
        asked.append((len(x_0), condition["prompt"].flatten().tolist(), [job.number for job in of]))
        return {"endpoint": x_0 + 1}

    monkeypatch.setattr(module, "known_noise", known)
    model = Pipeline()
    shard = invert_pairs(how_of(model, replace(ENCODED, endpoint="known")), jobs(2))
    assert asked == [(4, [1, 1, 2, 2], [0, 1])] and model.calls == 0
    assert shard["clean"].dtype == shard["endpoint"].dtype == torch.float16
    plain = invert_pairs(how_of(model), jobs(2))["clean"]
    assert torch.equal(shard["endpoint"], (plain + 1).half())


def test_without_guidance_the_empty_prompt_is_not_encoded():
    model = Pipeline()
    model.empty = lambda: pytest.fail("encoded")
    predictions(model, {}, 1.0, 1.0)


def test_the_variance_is_a_number(tmp_path):
    assert isinstance(noise_variance(filled(tmp_path)), float)


# ---- who fills a cache, and what is left out


class Wide(Source):
    """Five pairs, of which the second and the fourth are of an odd shape."""

    config = SimpleNamespace(pairs="some.csv")

    def __init__(self, odd=(1, 3)):
        super().__init__()
        for k in odd:
            picture = Image.new("RGB", (90, 10))
            self.pairs[k] = replace(self.pairs[k], decoded=(picture,) * 2)


def test_pairs_that_are_left_out_are_counted_and_listed(tmp_path):
    cache = fill(tmp_path, Pipeline(), Wide(), replace(KEY, fit="drop"))
    assert cache.counts == {"rows": 6, "pairs": 5, "ties": 1, "odd_shapes": 2}
    assert cache.left_out == [1, 3] and cache.pairs == 3
    assert cache.digests == [pair(k).digest for k in (0, 2, 4)]


def test_steps_are_those_of_the_schedule_at_the_square(tmp_path):
    model, asked = Pipeline(), []
    model.schedule_at = lambda size: asked.append(size) or model.schedule
    fill(tmp_path, model, Source(), replace(KEY, resolution=32, fit="crop"))
    assert set(asked) == {(32, 32)} and all(isinstance(size, tuple) for size in asked)


def test_no_pair_that_fits_is_an_error_with_a_remedy(tmp_path):
    source, key = Wide(range(5)), replace(KEY, fit="drop")
    with pytest.raises(DataError, match=r"some\.csv: 5 of 5 pairs are left out.*data\.fit=crop"):
        fill(tmp_path, Pipeline(), source, key)
    assert not (tmp_path / key.name() / "manifest.json").exists()


@pytest.fixture
def unwaiting(monkeypatch):
    """Processes that need not wait for one another."""
    monkeypatch.setattr(Team, "wait", lambda self: None)
    monkeypatch.setattr(Team, "collect", lambda self, found: found)


def test_the_first_process_alone_counts_announces_and_joins(tmp_path, unwaiting, capsys):
    """The other one writes its shard and shows no bar."""
    source, root = Source(), tmp_path / "new"
    source.expected = lambda: pytest.fail("counted")
    (root / KEY.name()).mkdir(parents=True)  # by the first process
    model = Pipeline()
    with pytest.raises(FileNotFoundError):  # the manifest, for which it would have waited
        fill(root, model, source, KEY, team=Team(1, 2))
    names = sorted(p.name for p in (root / KEY.name()).iterdir())
    assert names == ["shard-00001.json", "shard-00001.safetensors"]
    assert model.calls == 4 * 4 and not capsys.readouterr().err
    fill(root, model, Source(), KEY, team=Team(0, 2))
    assert model.calls == 4 * 4 + 4 + (4 + 2) * 4  # the trial of a batch, and two shards


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(64, 1, 8), (6, 1, 6), (6, 2, 3), (2, 4, 1), (None, 1, 1)]
)
def test_processes_share_the_cores_that_decode(
    tmp_path, monkeypatch, unwaiting, cores, processes, threads
):
    asked, real = [], module.ThreadPoolExecutor
    monkeypatch.setattr(module.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(
        module, "ThreadPoolExecutor", lambda most, name: asked.append(most) or real(most, name)
    )
    team = Team(0, processes)
    module._write_missing(tmp_path, how_of(Pipeline()), Source(), team, [])
    assert asked == [threads]


@pytest.mark.parametrize(("key", "doing"), [(KEY, "invert"), (ENCODED, "encode")])
def test_the_bar_says_what_is_done_and_of_how_many(tmp_path, capsys, key, doing):
    filled(tmp_path / "new" / "folder", key)
    shown = capsys.readouterr().err
    assert f"{doing}:   0%" in shown and "5/5" in shown
