"""Filling a cache, with an autoencoder and a network that can be worked out by hand."""

import errno
import json
import logging
import shutil
from collections import Counter
from dataclasses import asdict, replace
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from inversion_dpo.data.buckets import Place
from inversion_dpo.data.source import Pair
from inversion_dpo.data.transforms import flips
from inversion_dpo.maths.inversion import compared, invert
from inversion_dpo.maths.records import Extent, Grid, Levels
from inversion_dpo.maths.schedule import KINDS, Schedule, add_noise, step
from inversion_dpo.maths.targets import target_prediction
from inversion_dpo.models.base import ModelError, plain_guidance
from inversion_dpo.run.fields import ConfigError, InversionConfig
from inversion_dpo.run.folder import BusyError, alone_at
from inversion_dpo.run.processes import Team
from inversion_dpo.trajectories import fill as module
from inversion_dpo.trajectories import jobs as grouping
from inversion_dpo.trajectories import writing
from inversion_dpo.trajectories.fill import (
    Inverter,
    Job,
    conditions,
    fill,
    invert_pairs,
    noise_variance,
    pair_noise,
    predictions,
)
from inversion_dpo.trajectories.jobs import grouped, pictures
from inversion_dpo.trajectories.key import NOWHERE, CacheKey
from inversion_dpo.trajectories.reading import SHARD
from inversion_dpo.trajectories.sampling_back import sampled_back
from inversion_dpo.trajectories.storing import check_finite
from tests.by_hand import GRID, Model, Scaled

CPU, SIDE, KIND = torch.device("cpu"), 2, "v_prediction"
KEY = CacheKey(
    pairs="five",
    fit="pad",
    flip_seed=None,
    model="m" * 64,
    schedule="{}",
    resolution=f"{SIDE}x{SIDE}",
    guidance_embed=1.0,
    steps=3,
    spacing="sampler",
    guidance_scale=1.0,
    extent=Extent(last=3),
    pairs_per_shard=2,
    keep=None,
    precision="float32 no",
    prompt_chunks=1,
    scene_graph=None,
    reference_guidance=1.0,
)


class Pipeline(Model):
    """Latents are twice the red channel; the prompt's number is its length, 0 for none."""

    def __init__(self):
        super().__init__(Scaled(0.1))
        self.pipeline.tokenizer, self.reads = Tokenizer(), {"tokenizer": 4}
        self.graphs, self.edits = [], "never"

    def encode(self, images):
        return 2 * images[:, :1]

    def empty(self):
        return self.condition([""])

    def condition(self, prompts, graphs=None):
        self.graphs.append(graphs)
        return {"prompt": torch.tensor([[float(len(p))] for p in prompts])}

    def framing(self, framings):
        return {"size": torch.tensor([[float(f.original[0])] for f in framings])}


class Tokenizer:
    def __call__(self, prompt, **_):
        return SimpleNamespace(input_ids=list(prompt))


def picture(left, right, side=SIDE):
    """Red of two columns."""
    image = Image.new("RGB", (side, side), (left, 0, 0))
    image.paste((right, 0, 0), (side // 2, 0, side, side))
    return image


def pair(number):
    """A pair whose caption has number + 1 letters; the loser is the darker one."""
    images = picture(200 + 10 * number, 100), picture(60 + 10 * number, 30, 2 * SIDE)
    data = [f"{number} {side}".encode() for side in "wl"]
    return Pair(number, "abcdefg"[: number + 1], *data, None, "here", 1 - number / 10, images)


class Source:
    """Five pairs, counted as they are read."""

    counts, edits, quick = Counter(rows=6, pairs=5, ties=1), False, True

    def __init__(self, count=5):
        self.pairs, self.decoded = [pair(k) for k in range(count)], None

    def expected(self):
        return len(self.pairs)

    def shapes(self, most):
        return [p.sizes for p in self.pairs[:most]]

    def read(self, decoded=0):
        self.decoded = decoded
        yield from self.pairs


def filled(tmp_path, key=KEY, model=None):
    return fill(tmp_path, model or Pipeline(), Source(), key)


def test_the_next_pictures_are_decoded_while_these_are_inverted(tmp_path, monkeypatch):
    """And nothing is decoded for a shard that is there."""
    decoded, waited = [Event() for _ in range(5)], []

    def decode(model, job, key):
        decoded[job.number].set()
        return pictures(model, job, key)

    def invert(how, these, *more):
        waited.append(decoded[min(these[-1].number + 1, 4)].wait(timeout=30))
        return invert_pairs(how, these, *more)

    monkeypatch.setattr(module, "pictures", decode)
    monkeypatch.setattr(module, "invert_pairs", invert)
    cache = filled(tmp_path)
    assert waited == [True] * 3
    (cache.folder / "manifest.json").unlink()
    (cache.folder / SHARD.format(1)).unlink()
    decoded = [Event() for _ in range(5)]
    monkeypatch.setattr(module, "invert_pairs", invert_pairs)
    filled(tmp_path)
    assert [event.is_set() for event in decoded] == [False, False, True, True, False]


def red(value):
    """A red value as the latent that it becomes."""
    return 2 * (value / 127.5 - 1)


def prediction(x, i, prompt):
    return 0.1 * x + prompt + GRID.timesteps[i] / 10


# ---- a whole cache


def test_every_number_of_a_cache_by_hand(tmp_path):
    cache = filled(tmp_path)
    assert cache.folder == tmp_path / KEY.name() and cache.pairs == 5
    assert cache.counts == {"rows": 6, "pairs": 5, "ties": 1}
    assert cache.overlong == {"tokenizer": 1}  # abcde has five letters
    assert cache.digests == [p.digest for p in Source().pairs] and cache.errors == []
    assert cache.preference(range(5)).tolist() == pytest.approx([1, 0.9, 0.8, 0.7, 0.6])
    condition = cache.condition([4, 1])
    assert condition["prompt"].flatten().tolist() == [5, 2, 5, 2]
    assert condition["size"].flatten().tolist() == [2, 2, 4, 4]  # the losers came larger
    for k in range(5):
        for side, left in enumerate((200 + 10 * k, 60 + 10 * k)):
            x = cache.of_images("clean", [k])[side, 0]
            close = 0.1 if side else 1e-5  # the losers are resampled
            assert x[0, 0].item() == pytest.approx(red(left), abs=close)
            for i in (1, 2, 3):  # each state follows the prediction below it
                x = step(x, prediction(x, i - 1, k + 1), GRID.levels[i - 1], GRID.levels[i], KIND)
                found = cache.states([k], [i - 1], "x0").x_t[side, 0]
                torch.testing.assert_close(found, x)
                found = cache.states([k], [i - 1], "x0").reference[side, 0]
                torch.testing.assert_close(found, prediction(x, i, k + 1))
    assert [sorted(p.name for p in cache.folder.glob("shard*"))[n] for n in (0, 5)] == [
        "shard-00000.json",
        "shard-00002.safetensors",
    ]


def test_a_whole_cache_is_only_opened(tmp_path):
    filled(tmp_path)
    model = Pipeline()
    again = fill(tmp_path, model, None, KEY)
    assert again.pairs == 5 and model.calls == 0


def test_more_steps_than_the_schedule_has_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="inversion.steps=9: .* takes 1 to 3 steps, not 9"):
        filled(tmp_path, replace(KEY, steps=9))


def test_only_a_damaged_shard_is_made_again(tmp_path, caplog):
    cache = filled(tmp_path)
    shards = sorted(cache.folder.glob("*.safetensors"))
    whole = [p.read_bytes() for p in shards]
    shards[2].write_bytes(whole[2][:-1] + bytes([whole[2][-1] ^ 1]))
    model = Pipeline()
    with caplog.at_level(logging.WARNING):
        filled(tmp_path, model=model)
    assert "shard-00001.safetensors is missing or damaged" in caplog.text
    assert [p.read_bytes() for p in shards] == whole
    assert model.calls == 4 + 4 * 4  # the trial of a batch, and four images at four levels


def test_an_interrupted_run_goes_on_with_what_is_missing(tmp_path):
    cache = filled(tmp_path)
    (cache.folder / "manifest.json").unlink()
    (cache.folder / "shard-00002.json").unlink()  # without its entry a shard counts as missing
    model = Pipeline()
    filled(tmp_path, model=model)
    assert model.calls == 2 + 2 * 4  # a last shard of one pair, timed first


def test_a_shard_of_other_pairs_or_bytes_is_made_again(tmp_path, caplog):
    cache = filled(tmp_path)
    for change in ({"digests": ["x", "y"]}, {"sha256": "0" * 64}):
        (cache.folder / "manifest.json").unlink()
        path = cache.folder / "shard-00000.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        caplog.clear()
        filled(tmp_path)
        assert "shard-00000.safetensors is damaged or of other pairs" in caplog.text
    assert "shard-00001" not in caplog.text


def test_processes_share_the_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(Team, "wait", lambda self: None)
    monkeypatch.setattr(Team, "collect", lambda self, found: found)
    folder = tmp_path / KEY.name()
    folder.mkdir(parents=True)
    sources = [Source(), Source()]
    for rank in (1, 0):
        how = Inverter(Pipeline(), KEY, GRID, CPU)
        assert module._write_missing(folder, how, sources[rank], Team(rank, 2), []) == (3, {})
        names = sorted(p.name for p in folder.glob("*.safetensors"))
        assert names == [f"shard-{k:05d}.safetensors" for k in ([1] if rank else [0, 1, 2])]
    assert sources[0].decoded == sources[1].decoded == 0  # only shards to be made are decoded


def more(**changes):
    """Seven pairs: the five, of which some differ in what their caption and images do not say."""
    source = Source(7)
    for number, change in changes.items():
        source.pairs[int(number[1:])] = replace(source.pairs[int(number[1:])], **change)
    return source


@pytest.mark.parametrize(
    ("source", "key", "again"),
    [
        (more(), {}, [4, 5, 6]),  # rows were added: the last shard was not full
        (more(p2={"preference": 0.5}), {}, [2, 3, 4, 5, 6]),
        (more(p0={"seeds": (1, 2)}), {}, [0, 1, 4, 5, 6]),
        (more(p3={"scene_graph": "{}"}), {}, [2, 3, 4, 5, 6]),
        (more(p1={"caption": "abz"}), {}, [0, 1, 4, 5, 6]),
        (more(p1={"caption": "abc"}), {}, range(7)),  # now the caption of 2 is stored with 1
        (more(), {"fit": "crop"}, range(7)),
    ],
)
def test_what_another_cache_has_is_not_made_again(tmp_path, monkeypatch, source, key, again):
    filled(tmp_path)
    key, made = replace(KEY, pairs="seven", **key), []
    monkeypatch.setattr(
        module,
        "invert_pairs",
        lambda how, jobs, *rest: (
            made.extend(job.number for job in jobs) or invert_pairs(how, jobs, *rest)
        ),
    )
    cache = fill(tmp_path, Pipeline(), source, key, reuse=True)
    assert made == list(again)
    plain = fill(tmp_path / "new", Pipeline(), source, key)
    for one, other in zip(*(sorted(c.folder.glob("shard*")) for c in (cache, plain)), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert cache.digests == plain.digests and cache.texts == plain.texts


def test_nothing_is_taken_over_unless_that_is_asked_for(tmp_path, monkeypatch, caplog):
    first, model = Pipeline(), Pipeline()
    there = filled(tmp_path, model=first).folder
    caplog.set_level(logging.INFO)
    fill(tmp_path, model, Source(), replace(KEY, pairs="again"))
    assert model.calls == first.calls
    monkeypatch.setattr(module, "invert_pairs", None)  # everything is there
    assert "taken over" not in caplog.text
    shutil.rmtree(tmp_path / replace(KEY, pairs="again").name())
    fill(tmp_path, Pipeline(), Source(), replace(KEY, pairs="third"), reuse=True)
    assert caplog.text.count(f"what {there} has of these pairs is taken over") == 1  # of 3 shards


def test_neighbours_differ_by_their_pairs_alone(tmp_path):
    """A cache of another model has other numbers, whatever pairs and captions it is of."""
    keys = {"own": KEY, "pairs": replace(KEY, pairs="other"), "model": replace(KEY, model="other")}
    for name, key in keys.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "key.json").write_text(json.dumps(asdict(key)))
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "key.json").write_text("[]")
    assert writing.neighbours(KEY, tmp_path / "own") == [tmp_path / "pairs"]


def test_a_damaged_shard_is_taken_from_no_cache(tmp_path, monkeypatch, caplog):
    """It is another cache's, which will say so itself: here the pairs are inverted again."""
    first = filled(tmp_path)
    shard = first.folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    second = fill(tmp_path, Pipeline(), Source(), replace(KEY, pairs="again"), reuse=True)
    here = sorted(second.folder.glob("shard*.safetensors"))
    assert [f.samefile(first.folder / f.name) for f in here] == [True, False, True]
    assert "making it again" not in caplog.text


def test_a_cache_whose_key_is_cut_short_is_named(tmp_path, caplog):
    first = filled(tmp_path)
    (first.folder / "key.json").write_bytes((first.folder / "key.json").read_bytes()[:50])
    fill(tmp_path, Pipeline(), Source(), replace(KEY, pairs="again"), reuse=True)
    assert "key.json is damaged" in caplog.text and "Nothing is taken over from" in caplog.text


def test_without_links_what_another_cache_has_is_copied(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(writing.os, "link", refused)
    first = filled(tmp_path)
    monkeypatch.setattr(module, "invert_pairs", None)  # everything is there
    second = fill(tmp_path, Pipeline(), Source(), replace(KEY, pairs="again"), reuse=True)
    for file in first.folder.glob("shard*"):
        copy = second.folder / file.name
        assert copy.read_bytes() == file.read_bytes() and not copy.samefile(file)


def test_a_cache_that_another_run_fills_is_left_alone(tmp_path):
    tmp_path.joinpath(KEY.name()).mkdir()
    with alone_at(tmp_path / KEY.name()), pytest.raises(BusyError, match="is being written"):
        filled(tmp_path)


def test_pairs_that_need_no_path_are_encoded_only(tmp_path, caplog):
    model = Pipeline()
    with caplog.at_level(logging.INFO):
        cache = filled(tmp_path, replace(KEY, extent=NOWHERE), model)
    assert model.calls == 0 and not cache.inverted
    assert set(cache.shard(0).keys()) == {"clean", "preference", "condition.prompt", "framing.size"}
    assert "encoding pairs, none is inverted" in caplog.text


def test_a_shard_is_of_one_size_and_numbers_follow_the_stream():
    """Widths 2, 4, 2, 4, 2 at height 2, and the third pair has a picture of each."""
    sizes, key = [(2, 2), (2, 4)], replace(KEY, resolution="2x2", pairs_per_shard=2)
    wide = [
        replace(pair(k), decoded=(Image.new("RGB", (2 + 2 * (k % 2), 2)),) * 2) for k in range(5)
    ]
    wide[2] = replace(wide[2], decoded=(wide[0].decoded[0], wide[1].decoded[0]))
    left_out = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "buckets", lambda *_: sizes)
        found = list(grouped(wide, replace(key, fit="drop"), left_out))
    assert [[(j.number, j.place.size) for j in chunk] for chunk in found] == [
        [(1, (2, 4)), (2, (2, 4))],
        [(0, (2, 2)), (3, (2, 2))],
    ]
    assert left_out == {2: "mixed_shapes"}


# ---- one shard


def test_a_start_with_noise_has_each_pairs_own(tmp_path):
    cache = filled(tmp_path, replace(KEY, extent=Extent(start=1, last=3)))
    for k in (0, 3):
        noise = torch.randn(1, SIDE, SIDE, generator=torch.Generator().manual_seed(k))
        clean = cache.of_images("clean", [k])
        wanted = add_noise(clean, torch.stack([noise, noise]), GRID.levels[1])
        torch.testing.assert_close(cache.states([k], [0], "x0").x_t, wanted)


def test_the_noise_of_pairs_is_their_numbers():
    found = pair_noise([7, 8], torch.Size([4, 1, 2]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(pair_noise([8], torch.Size([2, 1, 2]))[0], found[2])


def test_kept_states_are_rows_of_the_whole(tmp_path):
    whole = filled(tmp_path)
    part = filled(tmp_path, replace(KEY, keep=(2, 1, 3)))
    for k in range(5):
        kept = part.of_pairs("steps", [k])[0].tolist()
        for place, i in enumerate(kept):
            same(part.states([k], [place], "x0"), whole.states([k], [i - 1], "x0"))


def same(one, two):
    """Two states have the same bits."""
    for name in ("level", "x_t", "target", "reference"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"reference_guidance": 7.3},
        {"guidance_scale": 2.0},
        {"guidance_scale": 2.0, "extent": Extent(first=2, last=4, iterations=1)},
        {"extent": Extent(start=2, last=5)},
        {"extent": Extent(start=2, first=3, last=5, iterations=2)},
        {"extent": Extent(start=3, first=2, last=4), "reference_guidance": 7.3},
    ],
)
@pytest.mark.parametrize(
    ("kind", "keep"),
    [(kind, keep) for k, kind in enumerate(KINDS) for keep in (None, (1, 2, 4)[k])],
)
def test_states_from_the_disk_are_those_of_the_inversion_to_the_bit(tmp_path, kind, change, keep):
    """The network answers in bfloat16, as one under autocast does."""
    steps = torch.arange(6)
    alpha = 0.99 - steps.double() / 7  # as in Stable Diffusion 1, the clean end is not quite clean
    sigma = 1 - alpha if kind == "flow_prediction" else (1 - alpha**2).sqrt()
    grid = Grid(10 * steps, Levels(alpha, sigma))
    model = Pipeline()
    model.schedule = Schedule(kind, grid.timesteps, grid.levels, lambda _: grid)
    real = model.predict
    model.predict = lambda *a: torch.tanh(real(*a) / 9).bfloat16().float()
    key = replace(KEY, steps=5, **{"extent": Extent(last=5)} | change)
    first, last = key.extent.first, key.extent.last
    key = replace(key, keep=(keep, first, last) if keep else None)
    cache = filled(tmp_path, key, model)
    how = Inverter(model, key, grid, CPU)
    for chunk in (jobs(5)[:2], jobs(5)[2:4], jobs(5)[4:]):  # what was inverted at once
        condition = conditions(how, chunk, [()] * len(chunk))
        per_image = {k: v.repeat_interleave(2, 0) for k, v in condition.items()}
        numbers = [job.number for job in chunk]
        order = torch.arange(2 * len(chunk)).reshape(-1, 2).T.flatten()  # winners first
        x_0 = torch.empty(2 * len(chunk), 1, SIDE, SIDE)
        x_0[order] = cache.of_images("clean", numbers)
        scales = key.guidance_scale, key.reference_guidance
        predict, compare = predictions(model, per_image, *scales)
        noise = pair_noise(numbers, x_0.shape) if key.extent.start else None
        path = invert(x_0, grid, predict, kind, noise=noise, extent=key.extent)
        path = compared(path, compare, first) if compare else path
        low, high = cache.positions(first, last)
        for position in range(low, high + 1):
            positions = [position, high + low - position][: len(chunk)]
            found = cache.states(numbers, positions, "transition")
            i, rows = found.level, order
            assert torch.equal(found.x_t, path.states[i, rows])
            assert torch.equal(found.reference, path.reference[i, rows])
            if not keep:
                below = path.states[i - 1, rows]
                states = path.states[0, rows], below, found.x_t
                levels = grid.levels
                wanted = target_prediction("transition", i, states, found.reference, levels, kind)
                assert torch.equal(found.target, wanted)
    stored = cache.shard(0).get_slice("predictions").get_dtype()
    assert stored == ("F32" if key.reference_guidance != 1 else "BF16")
    sizes = {p.stat().st_size for p in cache.folder.glob("shard-0000[01].safetensors")}
    few = 2 * (KEY.pair_size(SIDE * SIDE, 4) - KEY.pair_size(SIDE * SIDE, 0))
    wanted = 2 * replace(key, precision="bf16").pair_size(SIDE * SIDE, 4)
    assert few == 8 and all(0 < size - wanted < 1200 for size in sizes)  # the rest is the header


class Alone(Source):
    """Five single images, each given twice."""

    def __init__(self):
        super().__init__()
        self.pairs = [
            replace(p, loser=p.winner, decoded=(p.images[0],) * 2, single=True) for p in self.pairs
        ]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"keep": (2, 1, 3)},
        {"extent": Extent(start=2, last=3), "guidance_scale": 2.0},
        {"extent": Extent(last=3, first=3), "endpoint": "recovered"},
        {"extent": NOWHERE},
    ],
)
def test_a_single_image_is_made_and_stored_once_and_has_the_same_bits(
    tmp_path, change, monkeypatch
):
    """What a step reads of it, in memory and read ahead, and what is sampled back."""
    monkeypatch.setattr("inversion_dpo.trajectories.cache.SMALL", 0)
    model, caches, keys = Pipeline(), [], [replace(KEY, **change, single=s) for s in (False, True)]
    encoded = {False: 0, True: 0}

    def encode(images):
        encoded[key.single] += len(images)
        return Pipeline.encode(model, images)

    model.encode = encode
    for key in keys:
        cache = fill(tmp_path, model, Alone(), key)
        caches.append((cache, sampled_back(model, cache, InversionConfig(steps=3))))
    assert encoded == {False: 11, True: 6}  # of five pairs, and one for the time that they take
    (twice, back), (once, back_once) = caches
    pairs, names = [3, 1], ["clean", *["endpoint"] * bool(once.endpoint)]
    for ahead in (False, True):
        for name in names:
            assert torch.equal(twice.of_images(name, pairs), once.of_images(name, pairs))
        a, b = (c.condition(pairs) for c in (twice, once))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        if once.inverted and not once.endpoint:
            low, high = twice.positions(1, 3)
            for positions in ([low, high], [high, low]):
                if ahead:
                    once.read_ahead(pairs, positions)
                same(*(c.states(pairs, positions, "transition") for c in (twice, once)))
    again = [c.of_images("reconstructed", pairs) for c in (back, back_once)]
    assert torch.equal(*again) and back.errors == back_once.errors
    kept = [
        sum(t.nbytes for t in load_file(c.folder / "shard-00000.safetensors").values())
        for c in (twice, once)
    ]
    assert kept[1] < 0.7 * kept[0] and keys[1].pair_size(8, 0) == keys[0].pair_size(8, 0) // 2


def test_a_text_is_stored_once_in_the_first_shard_that_has_it(tmp_path):
    class Repeating(Source):
        def __init__(self):
            super().__init__()
            for k, caption in enumerate(("aa", "b", "aa", "aa", "cccc")):
                self.pairs[k] = replace(self.pairs[k], caption=caption)

    model = Pipeline()
    cache = fill(tmp_path, model, Repeating(), KEY)
    assert cache.texts == [(0, 0), (0, 1), (0, 0), (0, 0), (2, 0)]
    assert "condition.prompt" not in set(cache.shard(1).keys())
    assert cache.condition([4, 3, 1])["prompt"].flatten().tolist() == [4, 2, 1] * 2
    (cache.folder / "manifest.json").unlink()
    (cache.folder / "shard-00000.json").unlink()
    again = fill(tmp_path, model, Repeating(), KEY)
    assert again.texts == cache.texts
    assert again.condition([2])["prompt"].flatten().tolist() == [2, 2]


def test_a_straight_line_stores_one_noise_an_image_in_16_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("inversion_dpo.trajectories.cache.SMALL", 0)
    extent = Extent(last=3, first=3)
    cache = filled(tmp_path, replace(KEY, extent=extent, endpoint="recovered"))
    whole = filled(tmp_path)
    stored = cache.shard(0)
    kept = {"clean", "endpoint", "preference", "x_T_variance", "condition.prompt", "framing.size"}
    assert set(stored.keys()) == kept
    x_0, x_T = whole.of_images("clean", [3, 1]), whole.states([3, 1], [2, 2], "x0").x_t
    top = GRID.levels[3]
    noise = (x_T - float(top.alpha) * x_0) / float(top.sigma)
    cache.read_ahead([3, 1], None)  # as a step does
    assert torch.equal(cache.of_images("clean", [3, 1]), x_0.half())
    torch.testing.assert_close(cache.of_images("endpoint", [3, 1]), noise.half())
    assert stored.get_tensor("x_T_variance").shape == (4,)
    per_pair = sum(stored.get_tensor(n).nbytes for n in ("clean", "endpoint")) / 2
    assert replace(KEY, endpoint="recovered").pair_size(4, 7) == per_pair + 7


def test_the_variance_is_that_of_the_recovered_noise(tmp_path):
    cache = filled(tmp_path)
    top, clean = cache.states([0, 1], [2, 2], "x0").x_t, cache.of_images("clean", [0, 1])
    noise = (top - GRID.levels.alpha[3] * clean) / GRID.levels.sigma[3]  # x_3 = a x_0 + s eps
    assert noise_variance(cache) == pytest.approx(noise.square().mean().item(), rel=1e-5)


def jobs(count):
    """The first pairs, as they are."""
    return [Job(k, pair(k), Place((SIDE, SIDE), "crop")) for k in range(count)]


def latents(key):
    return invert_pairs(Inverter(Pipeline(), key, GRID, CPU), jobs(1))["clean"]


def test_a_mirrored_pair_is_mirrored_whole():
    seed = next(s for s in range(20) if flips("a", s, pair(0).digest))
    plain, mirrored = (latents(replace(KEY, flip_seed=s)) for s in (None, seed))
    assert torch.equal(mirrored, plain.flip(-1)) and not torch.equal(mirrored, plain)
    other = next(s for s in range(20) if not flips("a", s, pair(0).digest))
    assert torch.equal(latents(replace(KEY, flip_seed=other)), plain)


def test_scene_graphs_are_read_where_the_model_takes_them():
    model = Pipeline()
    for graph in (None, "new 4"):
        how = Inverter(model, replace(KEY, scene_graph=graph, extent=NOWHERE), GRID, CPU)
        invert_pairs(how, jobs(2))
    assert model.graphs == [None, None, [None], [None]]


def test_a_number_that_is_not_finite_is_refused_by_its_image():
    pairs = [replace(pair(k), where=f"row {k}") for k in range(2)]
    shard = {"clean": torch.zeros(4, 2), "steps": torch.tensor([[1, 2], [2, 3]])}
    shard |= {name: torch.zeros(4, 2, 2) for name in ("predictions", "anchors")}
    shard["moves"] = torch.zeros(2, 2, 2, dtype=torch.bfloat16)
    check_finite(shard, pairs)
    for name, place, what in (
        ("clean", (2, 1), "row 1, winner: its latent"),
        ("anchors", (1, 1, 0), "row 0, loser: its inverted path"),
        ("predictions", (2, 0, 1), "row 1, winner: its inverted path"),
        ("moves", (1, 1, 1), "row 1, loser: its inverted path"),
    ):
        bad = shard | {name: shard[name].clone()}
        bad[name][place] = torch.nan
        with pytest.raises(ModelError, match=what):
            check_finite(bad, pairs)


def test_a_caption_that_is_not_finite_is_refused_by_its_row(monkeypatch):
    """A text encoder overflows in float16; the loss of every step would be no number."""
    model = Pipeline()
    broken = {"text": torch.tensor([[0.0, torch.inf]]), "length": torch.tensor([[2]])}
    monkeypatch.setattr(model, "condition", lambda prompts, **_: broken)
    with pytest.raises(ModelError, match="its encoded caption has .* Set model.dtype=float32"):
        invert_pairs(Inverter(model, replace(KEY, extent=NOWHERE), GRID, CPU), jobs(2))


# ---- guidance


@pytest.mark.parametrize(
    ("along", "wanted"), [(1.0, 1.0), (2.0, 2.0), (2.0, 1.0), (1.0, 3.0), (2.0, 5.0), (5.0, 2.0)]
)
def test_stored_predictions_have_the_guidance_that_is_wanted(along, wanted):
    """A prompt's number is added to the prediction: s times it under guidance s, 0 if empty."""
    model, x, t = Pipeline(), torch.randn(2, 1, 2, 2), torch.tensor([10, 10])
    prompts = torch.tensor([3.0, 4.0]).reshape(2, 1, 1, 1)
    predict, compare = predictions(model, {"prompt": prompts.reshape(2, 1)}, along, wanted)
    followed = predict(x, t)
    torch.testing.assert_close(followed, 0.1 * x + 1 + along * prompts)
    assert (compare is None) == (along == wanted)
    if compare:
        before = model.calls
        torch.testing.assert_close(compare(x, t, followed), 0.1 * x + 1 + wanted * prompts)
        assert model.calls == before + 2  # one evaluation for each image, not two


@pytest.mark.parametrize(
    ("along", "wanted", "evaluations"), [(2.0, 1.0, 1), (1.0, 3.0, 1), (2.0, 3.0, 2)]
)
def test_rescaled_guidance_is_that_of_both_predictions(along, wanted, evaluations):
    """A family that brings the guided prediction to the length of the other, as Qwen's does."""
    model, x, t = Pipeline(), torch.ones(1, 1, 2, 2), torch.tensor([10])

    def combine(p_u, p_c, scale):
        mixed = plain_guidance(p_u, p_c, scale)
        return mixed * p_c.norm() / mixed.norm() / 2

    model.combine = combine
    predict, compare = predictions(model, {"prompt": torch.tensor([[3.0]])}, along, wanted)
    p_u, p_c = (0.1 * x + 1 + prompt for prompt in (0, 3))
    followed, before = predict(x, t), model.calls + evaluations
    torch.testing.assert_close(followed, combine(p_u, p_c, along) if along != 1 else p_c)
    expected = combine(p_u, p_c, wanted) if wanted != 1 else p_c
    torch.testing.assert_close(compare(x, t, followed), expected)
    assert model.calls == before


@pytest.mark.parametrize("change", [{}, {"extent": Extent(1, 1, 3), "keep": (2, 1, 3)}])
def test_a_shard_made_in_parts_is_the_same_to_the_bit(change, monkeypatch, caplog):
    """Memory for three pairs at once, of five: they are encoded and inverted two by two."""
    key = replace(KEY, pairs_per_shard=5, **change)
    whole = invert_pairs(Inverter(Pipeline(), key, GRID, CPU), jobs(5))
    model = Pipeline()
    encode, predict = model.encode, model.predict

    def scarce(work, images):
        if images > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work()

    model.encode = lambda x: scarce(lambda: encode(x), len(x))
    model.predict = lambda n, x, t, c: scarce(lambda: predict(n, x, t, c), len(x))
    parts = invert_pairs(Inverter(model, key, GRID, CPU), jobs(5))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert caplog.text.count("memory ran out: computing at most 3 pairs at once") == 2
