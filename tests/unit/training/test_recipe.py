"""The recipe's parts, with everything around them made up."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from accelerate.utils import DistributedType

from inversion_dpo.data.images import DataError
from inversion_dpo.models.prompts import overlong_text
from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.run.faults import Terminated
from inversion_dpo.run.processes import Team, current_team
from inversion_dpo.training import beforehand, recipe
from inversion_dpo.training.beforehand import check_usable
from inversion_dpo.training.checkpoint import Progress
from inversion_dpo.training.notices import (
    counts_text,
    guidance_text,
    known_prompts_text,
    leak_text,
    rare_text,
)
from inversion_dpo.training.recipe import (
    Prepared,
    finish,
    make_accelerator,
    only_network_stays,
    prepare,
    rate_at,
    reproducible,
    run_steps,
    set_up,
    train,
)
from tests.by_hand import Accelerator, Model, Scaled, make_plan, make_session, write_cache


def config(*overrides):
    return load_config(None, ["inversion.steps=3", *overrides])


@pytest.fixture
def cache(tmp_path):
    return write_cache(tmp_path / "cache")


# ---- pairs


def test_pairs_that_do_not_come_back_are_left_out(cache, caplog, monkeypatch):
    prepared = Prepared(Accelerator(), Model(), cache, back=cache)
    assert reproducible(prepared, None) == [0, 1, 2, 3, 4]
    with caplog.at_level(logging.INFO):
        assert reproducible(prepared, 0.4) == [0, 2, 3, 4]  # errors .1 .5 .2 .4 .3
    assert "inversion.max_error leaves out 1 of 5 pairs" in caplog.text
    with pytest.raises(DataError, match="max_error=0.3 leaves only 3 pairs"):
        reproducible(prepared, 0.3)


# ---- what is refused


def refused(cache, *overrides, team=None, monkeypatch, **plan):
    monkeypatch.setattr(beforehand, "current_team", lambda: team or Team())
    check_usable(config(*overrides), cache, make_plan(**plan))


def test_single_images_need_a_loss_without_preference(cache, monkeypatch):
    cache.counts["single"] = 2
    with pytest.raises(DataError, match="objective.name=denoising"):
        refused(cache, monkeypatch=monkeypatch)
    for name in ("sft", "denoising"):
        refused(cache, f"objective.name={name}", monkeypatch=monkeypatch, name=name)
    cache.counts["single"] = 0
    refused(cache, monkeypatch=monkeypatch)


def test_soft_labels_need_one_soft_label(cache, monkeypatch):
    refused(cache, monkeypatch=monkeypatch, soft_labels=True)
    cache.preference = lambda pairs: torch.ones(len(pairs))
    with pytest.raises(DataError, match="no pair has a preference_0"):
        refused(cache, monkeypatch=monkeypatch, soft_labels=True)
    refused(cache, monkeypatch=monkeypatch)


def test_a_batch_holds_a_pair_for_each_part_of_each_process(cache, monkeypatch):
    refused(cache, team=Team(0, 2), monkeypatch=monkeypatch, batch_size=6, accumulation=3)
    with pytest.raises(ConfigError, match="2 processes in .*=3 parts need at least 6"):
        refused(cache, team=Team(0, 2), monkeypatch=monkeypatch, batch_size=5, accumulation=3)


def test_noise_is_looked_at_where_there_are_trajectories(cache, monkeypatch, caplog):
    monkeypatch.setattr(beforehand, "noise_variance", lambda cache: 0.1)
    refused(cache, monkeypatch=monkeypatch, name="diffusion_dpo")
    assert "variance" not in caplog.text
    refused(cache, monkeypatch=monkeypatch)
    assert "has variance 0.10" in caplog.text
    refused(cache, "inversion.t_start=0.2", monkeypatch=monkeypatch)
    assert "(it is 0.2)" in caplog.text


def test_another_guidance_in_sampling_is_said(cache, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    same = ["objective.guidance_scale=3", "evaluation.guidance_scale=3"]
    refused(cache, *same, monkeypatch=monkeypatch)
    assert "training at guidance" not in caplog.text
    refused(cache, "evaluation.guidance_scale=3", monkeypatch=monkeypatch)
    assert "training at guidance 1, sampling at evaluation.guidance_scale=3:" in caplog.text
    caplog.clear()  # a distilled network is trained at what it is told
    embedded = ["model.guidance_embed=3", "evaluation.guidance_scale=3"]
    refused(cache, *embedded, monkeypatch=monkeypatch)
    assert "training at guidance" not in caplog.text


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.NO])
def test_merging_is_refused_under_fsdp_alone(merge, kind, monkeypatch):
    asked = []
    engine = SimpleNamespace(distributed_type=kind)
    monkeypatch.setattr(recipe, "Accelerator", lambda **given: asked.append(given) or engine)
    settings = config(f"policy.merge={merge}".lower(), "training.mixed_precision=bf16")
    if merge and kind == DistributedType.FSDP:
        with pytest.raises(ConfigError, match="policy.merge=true does not work under FSDP"):
            recipe.make_accelerator(settings)
    else:
        assert recipe.make_accelerator(settings) is engine
    assert asked == [{"mixed_precision": "bf16"}]


@pytest.mark.parametrize("processes", [1, 2])
def test_offloading_is_for_one_process(processes, monkeypatch):
    engine = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=processes)
    monkeypatch.setattr(recipe, "Accelerator", lambda **given: engine)
    if processes == 1:
        assert recipe.make_accelerator(config("model.offload=true")) is engine
    else:
        with pytest.raises(ConfigError, match="model.offload=true is for one process"):
            recipe.make_accelerator(config("model.offload=true"))


def test_a_policy_stays_on_the_device_and_the_rest_leaves(monkeypatch):
    moved, emptied = [], []

    class Part(torch.nn.Module):
        def to(self, device):
            moved.append((self, device))

    unet, vae, text = Part(), Part(), Part()
    parts = {"unet": unet, "vae": vae, "text_encoder": text, "tokenizer": object()}
    model = SimpleNamespace(component="unet", pipeline=SimpleNamespace(components=parts))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        moved.clear()
        only_network_stays(model)
        assert moved == [(text, "cpu"), (vae, "cpu")] and len(emptied) == there


# ---- what is prepared


class Prepares:
    """Stands for loading, reading and filling."""

    def __init__(self, monkeypatch, cache, *, guidance=1.0, main=True):
        self.filled, self.asked, self.looked = [], [], []
        self.model = Model()
        self.key = SimpleNamespace(guidance_scale=guidance, prompt_chunks=2, name=lambda: "key")
        self.key.pairs, self.key.model, self.same = "pairs", "model", []
        self.model.reads, self.model.edits = {"tokenizer": 150}, "never"

        def fill(root, model, pairs, key, *, team, reuse):
            self.reuse = reuse
            self.filled.append((root, model, pairs, key, team))
            return cache

        def error(model, cache, scale):
            self.asked.append(scale)
            return scale / 10

        team, pairs = (
            Team(0 if main else 1, 1),
            SimpleNamespace(
                config=SimpleNamespace(pairs="made up"), edits=False, fingerprint="f" * 64
            ),
        )
        for name, value in {
            "make_accelerator": lambda config: Accelerator(),
            "current_team": lambda: team,
            "load_model": lambda config, device: self.model,
            "open_pairs": lambda config, alone: pairs,
            "key_of": lambda config, pairs, model: self.key,
            "check_together": lambda folder, values: self.same.append((folder, values)),
            "fill": fill,
            "refuse_giveaways": lambda pairs, memo: self.looked.append(memo),
            "round_trip_error": error,
        }.items():
            monkeypatch.setattr(recipe, name, value)


def test_preparing_fills_once_and_says_what_there_is(cache, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    made = Prepares(monkeypatch, cache)
    prepared = prepare(config(), tmp_path / "root")
    assert prepared.cache is cache and prepared.model is made.model
    assert len(made.filled) == 1 and made.filled[0][0] == tmp_path / "root" and not made.reuse
    same = {"data.pairs": "pairs", "the model's weights": "model", "the cache": "key"}
    assert made.same == [(tmp_path / "root", same)]
    assert made.asked == [] and made.looked == [tmp_path / f"root/giveaways-{'f' * 16}.json"]
    assert caplog.messages == ["5 pairs of 7 rows; left out: 2 ties"]


@pytest.mark.parametrize(
    ("given", "setting", "root", "reuse"),
    [(None, "null", "run/cache", True), (None, "all", "all", True), ("own", "all", "own", False)],
)
def test_where_a_cache_lies_and_whether_it_takes_from_others(
    monkeypatch, tmp_path, given, setting, root, reuse
):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        recipe, "prepare", lambda c, root, reuse: asked.append((root, reuse)) or Mock()
    )
    monkeypatch.setattr(recipe, "sketch_of", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        recipe.train(config(f"inversion.cache={setting}"), Path("run"), given and Path(given))
    assert asked == [(Path(root), reuse)]


@pytest.mark.parametrize(("guidance", "main", "asked"), [(2.0, True, [1.0, 2.0]), (2.0, False, [])])
def test_inverting_under_guidance_is_measured_by_the_first_process(
    cache, tmp_path, monkeypatch, caplog, guidance, main, asked
):
    made = Prepares(monkeypatch, cache, guidance=guidance, main=main)
    prepare(config(), tmp_path)
    assert made.asked == asked
    assert ("by 0.2000 of their norm, and by 0.1000 at guidance 1" in caplog.text) == main


def test_captions_that_are_cut_are_counted(cache, tmp_path, monkeypatch, caplog):
    cache.overlong = {"tokenizer": 3}
    Prepares(monkeypatch, cache)
    prepare(config(), tmp_path)
    assert "of 5 captions the end is cut: 3 by tokenizer (reads 150 tokens)" in caplog.text
    assert "model.prompt_chunks=3 reads 75 more" in caplog.text


@pytest.mark.parametrize(("pairs", "enough"), [(3, False), (4, True)])
def test_fewer_than_four_pairs_are_refused(cache, tmp_path, monkeypatch, pairs, enough):
    cache.pairs = pairs
    Prepares(monkeypatch, cache)
    if enough:
        prepare(config(), tmp_path)
    else:
        with pytest.raises(DataError, match="made up: only 3 usable pairs; give at least 4"):
            prepare(config(), tmp_path)


def test_held_out_pairs_that_share_an_image_with_trained_ones_are_counted():
    images = [["a", "b"], ["c", "d"], ["b", "e"], ["f", "f"]]
    assert leak_text(images, [0, 1], [2, 3]).startswith("1 of 2 held-out pairs have an image that")
    one = leak_text([["a"], ["b"], ["a"], ["c"]], [0, 1], [2, 3], single=True)
    assert one.startswith("1 of 2 held-out images are trained on too, in another row")
    known = known_prompts_text([(0, 0), (0, 1), (0, 0)], [0], [1, 2], single=True)
    assert known == "1 of 2 held-out images have a prompt that is trained on too"
    assert leak_text(images, [0, 1], [3]) == leak_text([], [0, 1], [2]) == ""


def test_texts():
    counts = {"rows": 9, "pairs": 3, "ties": 2, "identical": 0}
    counts |= {"skipped": 4, "bad_rows": 4, "duplicates": 1, "mixed_shapes": 1}
    counted = SimpleNamespace(pairs=3, single=False, counts=counts)
    left = "2 ties, 4 damaged rows, 1 pair of two shapes"
    assert counts_text(counted) == f"3 pairs of 9 rows; left out: {left}"
    assert counts_text(SimpleNamespace(pairs=0, single=False, counts={})) == "0 pairs of 0 rows"
    assert "guidance_scale=2: " in guidance_text(2.0, 0.125, 0.5)
    assert "by 0.5000 of their norm, and by 0.1250" in guidance_text(2.0, 0.125, 0.5)
    reads = {"tokenizer": 150, "tokenizer_2": 100}
    cut, chunked = {"tokenizer": 0, "tokenizer_2": 2}, SimpleNamespace(reads=reads, chunked=True)
    text = overlong_text(cut, chunked, 2, "5 captions")
    assert text == (
        "of 5 captions the end is cut: 2 by tokenizer_2 (reads 100 tokens); "
        "model.prompt_chunks=3 reads 75 more"
    )


# ---- what is set up


@pytest.fixture
def prepared(cache, monkeypatch):
    """A prepared run whose policy is one number."""
    network = Scaled()
    network.calls = []
    network.enable_gradient_checkpointing = lambda: network.calls.append("checkpointing")
    network.train = lambda mode=True: network.calls.append("train")
    policy = SimpleNamespace(network=network, trainable=lambda: {"weight": network.weight})
    accelerator = Accelerator()
    accelerator.prepare = lambda *both: both
    monkeypatch.setattr(recipe, "attach", lambda model, config: policy)
    monkeypatch.setattr(recipe, "only_network_stays", lambda model: None)
    return Prepared(accelerator, Model(network), cache)


def test_a_session_holds_the_settings_and_swaps_training_labels_only(prepared):
    extra = ["data.holdout=0.4", "data.label_noise=1", "training.max_grad_norm=0.5"]
    counts = ["training.max_skipped=7", "training.keep_checkpoints=9"]
    session = set_up(config(*extra, *counts), prepared)
    assert len(session.heldout_pairs) == 2 and len(session.train_pairs) == 3
    assert prepared.cache._swapped == set(session.train_pairs)
    assert (session.clip, session.max_skipped, session.keep_checkpoints) == (0.5, 7, 9)
    assert session.plan.high == 3 and session.skipped == 0
    assert prepared.model.pipeline.unet.calls == []


def test_checkpointing_is_done_where_asked(prepared):
    set_up(config("training.gradient_checkpointing=true"), prepared)
    assert prepared.model.pipeline.unet.calls == ["checkpointing", "train"]


@pytest.mark.parametrize("name", ["leak_text", "known_prompts_text", "rare_text"])
@pytest.mark.parametrize("text", ["", "look at these pairs"])
def test_what_a_notice_says_is_logged_if_it_says_anything(
    prepared, monkeypatch, caplog, name, text
):
    caplog.set_level(logging.INFO)
    for each in ("leak_text", "known_prompts_text", "rare_text"):
        monkeypatch.setattr(recipe, each, lambda *_, said=text * (each == name), **__: said)
    set_up(config("data.holdout=0.4"), prepared)
    assert [r.message for r in caplog.records if r.message in ("", text)] == [text] * bool(text)


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("objective.name=kto", ["balanced"]),
        ("objective.gap_weighted=true", ["with_gap"]),
        ("objective.beta=7", []),
    ],
)
def test_what_a_plan_asks_of_the_pairs_is_measured(prepared, monkeypatch, given, asked):
    told = []
    for name in ("with_gap", "balanced"):
        noted = lambda plan, *_, name=name: told.append(name) or plan  # noqa: E731
        monkeypatch.setattr(recipe, name, noted)
    monkeypatch.setattr(recipe, "check_usable", lambda *_: None)
    set_up(config("data.holdout=0.4", given), prepared)
    assert told == asked


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize(("name", "all_of_them"), [("sft", False), ("kto", True)])
def test_of_single_images_sft_takes_those_that_are_liked(
    prepared, monkeypatch, single, name, all_of_them
):
    cache = prepared.cache
    monkeypatch.setattr(cache, "single", single)
    monkeypatch.setattr(cache, "liked", lambda pairs: torch.tensor([p % 2 == 0 for p in pairs]))
    monkeypatch.setattr(recipe, "check_usable", lambda *_: None)
    session = set_up(config("data.holdout=0.4", f"objective.name={name}"), prepared)
    whole = [0, 1, 2, 3, 4] if all_of_them or not single else [0, 2, 4]
    assert sorted(session.train_pairs + session.heldout_pairs) == whole


# ---- the steps


class Steps:
    """Stands for what a step does; keeps what was called, and with what."""

    def __init__(self, monkeypatch, stop_after=None, looks=None):
        self.rows, self.saved, self.snapshots, self.rates = [], [], [], []
        self.looks = 0

        def heldout(session):
            self.looks += 1
            return {"heldout_accuracy": float(self.looks)}

        def taken(session, number, rate):
            self.rates.append(rate)
            return {"loss": 0.5, "grad_norm": 1.0}

        def save(session, folder, *, step, seconds, looked):
            self.saved.append((step, looked["heldout_accuracy"], seconds))

        def asked(session, stopping):
            return stop_after is not None and len(self.rates) >= stop_after

        clock = iter(range(1000))
        for name, value in {
            "heldout": heldout,
            "Watch": lambda: SimpleNamespace(see=lambda row: None),
            "step": taken,
            "check_step": lambda session, number, row: None,
            "append_row": lambda folder, row: self.rows.append(row),
            "save_session": save,
            "save_policy": lambda session, target: self.snapshots.append(target.name),
            "asked_to_stop": asked,
            "time": SimpleNamespace(time=lambda: next(clock)),
        }.items():
            monkeypatch.setattr(recipe, name, value)


def run(cache, tmp_path, *overrides, start=0, seconds=0.0, team=None):
    session = make_session(cache, team=team or Team())
    t = config("training.steps=7", *overrides).training
    progress = Progress(start, seconds, "of the cache")
    return run_steps(session, t, tmp_path, progress, lambda: False), session


EVERY = ("training.eval_every=4", "training.checkpoint_every=3")


def test_measured_and_saved_when_it_is_due(cache, tmp_path, monkeypatch):
    made = Steps(monkeypatch)
    last, session = run(cache, tmp_path, *EVERY)
    assert [r["step"] for r in made.rows] == list(range(7))
    looked = [r["step"] for r in made.rows if "heldout_accuracy" in r]
    assert looked == [4]  # at step 0 the policy is the reference
    assert [(step, look) for step, look, _ in made.saved] == [(3, 1.0), (6, 3.0), (7, 4.0)]
    assert last["step"] == 7 and last["heldout_accuracy"] == 4.0  # measured at the end, once
    assert made.looks == 4 and made.snapshots == []
    # the clock ticks once at the beginning and once a step
    assert [r["seconds"] for r in made.rows] == [float(k) for k in range(1, 8)]
    assert [number for number, _ in session.accelerator.logged] == list(range(7))
    assert last["seconds"] == made.saved[-1][2] == 7.0


def test_one_look_serves_a_checkpoint_and_the_row_after_it(cache, tmp_path, monkeypatch):
    made = Steps(monkeypatch)
    run(cache, tmp_path, "training.eval_every=3", "training.checkpoint_every=3")
    looks = {r["step"]: r["heldout_accuracy"] for r in made.rows if "heldout_accuracy" in r}
    assert looks == {3: 1.0, 6: 2.0} and made.looks == 3
    assert [(step, look) for step, look, _ in made.saved] == [(3, 1.0), (6, 2.0), (7, 3.0)]


def test_a_run_goes_on_where_it_stood(cache, tmp_path, monkeypatch):
    made = Steps(monkeypatch)
    run(cache, tmp_path, *EVERY, start=5, seconds=100.0)
    assert [r["step"] for r in made.rows] == [5, 6]
    assert [r["seconds"] for r in made.rows] == [101.0, 102.0]


def test_a_finished_run_only_measures(cache, tmp_path, monkeypatch):
    made = Steps(monkeypatch)
    last, _ = run(cache, tmp_path, *EVERY, start=7)
    assert made.rows == [] and last["heldout_accuracy"] == 1.0 and made.saved == []


def test_snapshots_are_kept_every_so_often(cache, tmp_path, monkeypatch):
    made = Steps(monkeypatch)
    run(cache, tmp_path, *EVERY, "training.snapshot_every=2")
    assert made.snapshots == ["step-000002", "step-000004", "step-000006"]


def test_a_kill_beside_a_checkpoint_loses_no_snapshot(cache, tmp_path, monkeypatch):
    """The run goes on from the checkpoint, so that what it kept of that step is written before."""
    made = Steps(monkeypatch)
    made.saved = made.snapshots
    run(cache, tmp_path, "training.checkpoint_every=4", "training.snapshot_every=4")
    assert made.snapshots[0] == "step-000004" and made.snapshots[1][0] == 4


def test_a_stop_saves_first(cache, tmp_path, monkeypatch):
    made = Steps(monkeypatch, stop_after=2)
    with pytest.raises(Terminated, match="after step 2 of 7"):
        run(cache, tmp_path, *EVERY)
    assert [step for step, *_ in made.saved] == [2] and len(made.rows) == 2


def test_only_the_first_process_writes(cache, tmp_path, monkeypatch, capsys):
    made = Steps(monkeypatch)
    run(cache, tmp_path, *EVERY, team=Team(1, 2))
    assert made.rows == [] and len(made.saved) == 3
    assert capsys.readouterr().err == ""  # nor does it draw a bar
    run(cache, tmp_path, *EVERY)
    assert "loss=0.500" in capsys.readouterr().err


def test_each_step_has_its_own_rate(cache, tmp_path, monkeypatch):
    made = Steps(monkeypatch)
    overrides = ["training.warmup=2", "training.lr_scheduler=cosine", "training.learning_rate=1"]
    run(cache, tmp_path, *EVERY, *overrides)
    decay = [(1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)]
    assert made.rates == pytest.approx([0.5, 1.0, *decay])
    t = config("training.steps=2", "training.warmup=2", "training.lr_scheduler=linear").training
    assert rate_at(1, t) == t.learning_rate  # a warm-up as long as the run


# ---- the end


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("main", [False, True])
def test_the_end_writes_the_policy(cache, tmp_path, monkeypatch, merge, main):
    rows, saved, merged, ended = [], [], [], []
    monkeypatch.setattr(recipe, "append_row", lambda folder, row: rows.append(row))
    monkeypatch.setattr(recipe, "save_policy", lambda session, target: saved.append(target.name))
    monkeypatch.setattr(recipe, "peak_memory", lambda device: 123.6)
    monkeypatch.setattr(Team, "wait", lambda self: ended.append("wait"))
    session = make_session(cache, team=Team(0 if main else 1, 2))
    session.policy.merge = lambda folder: folder.mkdir() or merged.append(folder.name)
    tracker = SimpleNamespace(finish=lambda: ended.append("tracker"))
    session.accelerator.trackers = [tracker]
    best = []
    monkeypatch.setattr(recipe, "save_best", lambda session, folder, steps: best.append(steps))
    settings = config(f"policy.merge={merge}".lower(), "training.steps=7")
    finish(session, settings, tmp_path, {"step": 7})
    assert rows == [{"step": 7, "peak_memory_mb": 124, "pairs": 5}] * main and best == [7]
    assert saved == ["adapter"] and merged == ["merged.partial"] * (merge and main)
    assert ended == ["tracker", "wait"]


def test_the_seconds_of_compilation_are_written_to_a_tenth(cache, tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(recipe, "append_row", lambda folder, row: rows.append(row))
    monkeypatch.setattr(recipe, "save_policy", lambda session, target: None)
    monkeypatch.setattr(recipe, "seconds_compiling", lambda: 1.26)
    finish(make_session(cache), config("training.compile=default"), tmp_path, {"step": 7})
    assert rows[0]["compile_seconds"] == 1.3


def test_the_accuracy_of_the_first_step_is_rounding_and_not_written(cache, tmp_path, monkeypatch):
    made = Steps(monkeypatch)
    row = {"loss": 0.5, "accuracy": 0.75}
    monkeypatch.setattr(recipe, "step", lambda session, number, rate: dict(row))
    run(cache, tmp_path, *EVERY)
    assert ["accuracy" in r for r in made.rows] == [False] + [True] * 6


def test_seconds_are_written_to_a_thousandth(cache, tmp_path, monkeypatch):
    made, ticks = Steps(monkeypatch), iter(1000 + k / 7 for k in range(1000))
    monkeypatch.setattr(recipe, "time", SimpleNamespace(time=lambda: next(ticks)))
    last, _ = run(cache, tmp_path, *EVERY)
    assert [r["seconds"] for r in made.rows[:3]] == [0.143, 0.286, 0.429]
    assert last["seconds"] == 1.0


def test_train_is_these_parts_in_this_order(tmp_path, monkeypatch):
    called = []
    session = SimpleNamespace(accelerator="accelerator")

    def part(name, result=None):
        def made(*given, **named):
            called.append((name, (*given, *named.values())))
            return result

        monkeypatch.setattr(recipe, name, made)

    progress = Progress(5, 1.0, "x")
    prepared = SimpleNamespace(model=SimpleNamespace(pipeline="pipeline"))
    for name, result in {
        "tracker_of": None,
        "prepare": prepared,
        "sketch_of": "weights",
        "set_up": session,
        "resume": progress,
        "begin_tracker": None,
        "run_steps": {"step": 8},
        "finish": None,
    }.items():
        part(name, result)
    settings, folder = config(), tmp_path / "a" / "b"
    assert train(settings, folder) is session and folder.is_dir()
    given = dict(called)
    assert list(given) == [
        "tracker_of",
        "prepare",
        "sketch_of",
        "set_up",
        "resume",
        "begin_tracker",
        "run_steps",
        "finish",
    ]
    assert given["prepare"] == (settings, folder / "cache", True)
    assert given["sketch_of"] == ("pipeline",) and given["set_up"] == (settings, prepared)
    assert given["begin_tracker"][-1] == 5 and given["run_steps"][3] is progress
    assert given["finish"] == (session, settings, folder, {"step": 8})
    train(settings, folder, tmp_path / "caches")
    assert called[9] == ("prepare", (settings, tmp_path / "caches", False))


def test_a_batch_of_more_pairs_than_there_are_is_said():
    few, enough = (config(f"training.batch_size={n}").training for n in (9, 4))
    assert "training.batch_size=9 is more than the 8 pairs" in rare_text(
        {(64, 64): 5, (48, 80): 3}, few
    )
    assert rare_text({(64, 64): 8}, enough) == ""


def test_sizes_too_rare_for_a_batch_are_said_with_the_commonest():
    one = config("training.batch_size=4", "training.steps=2").training
    text = rare_text({(48, 80): 1, (80, 64): 7}, one)
    assert "not trained on: 1 pair of 1 size" in text and text.endswith("resolution=64x80")


def test_two_trainings_of_one_process_may_have_two_precisions():
    """As in a notebook; accelerate keeps the first one's."""
    for precision in ("no", "bf16", "bf16", "no"):  # others go on at "no"
        made = make_accelerator(config(f"training.mixed_precision={precision}"))
        assert made.mixed_precision == precision
    assert current_team().size == 1
