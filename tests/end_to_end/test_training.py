"""A whole training on a tiny random pipeline of the genuine diffusers classes."""

import json
import logging
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from inversion_dpo.data.source import open_pairs
from inversion_dpo.maths.methods import METHODS
from inversion_dpo.maths.schedule import step
from inversion_dpo.run.config import load_config, to_yaml
from inversion_dpo.run.processes import Team
from inversion_dpo.training import recipe as session_parts
from inversion_dpo.training import step as training
from inversion_dpo.training.checkpoint import CheckpointError, best_checkpoint
from inversion_dpo.training.checks import StartupError
from inversion_dpo.training.notices import noise_text, round_trip_text, trained_guidance
from inversion_dpo.training.recipe import prepare, train
from inversion_dpo.training.session import pairs_of_step
from inversion_dpo.trajectories import fill as trajectories
from inversion_dpo.trajectories import known
from inversion_dpo.trajectories.sampling_back import round_trip_error
from inversion_dpo.trajectories.writing import damaged_files
from tests.sessions import set_up
from tests.slow import slow_but


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def image_of(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipe(
        "a small red star", num_inference_steps=3, generator=generator, output_type="np"
    ).images


# In `make test`: what changes the loss most.
@pytest.mark.parametrize(
    "overrides",
    slow_but(
        [
            ["objective.target=transition", "objective.beta=20000"],
        ],
        [
            ["objective.target=x0"],
            ["objective.target=transition", "objective.beta=20000"],
            ["objective.name=diffusion_dpo"],
            ["inversion.guidance_scale=2.0"],
            ["inversion.fixed_point_iterations=2"],
            ["inversion.t_start=0.34"],
        ],
    ),
)
def test_starts_at_log_two_and_logs_everything_apart(tiny_config, tiny_caches, tmp_path, overrides):
    train(tiny_config(*overrides, "training.steps=5"), tmp_path, tiny_caches)
    rows = rows_of(tmp_path)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    wanted = {"winner_error", "loser_error", "accuracy", "margin", "grad_norm", "drift"}
    assert wanted <= set(rows[1]) and rows[0]["grad_norm"] > 0
    assert "heldout_accuracy" in rows[-1] and not {"accuracy", "heldout_accuracy"} & set(rows[0])
    assert rows[-1]["heldout_pairs"] >= 1
    assert rows[-1]["heldout_drift"] > 0


def test_learns_the_training_pairs(tiny_config, tiny_caches, tmp_path):
    seldom = ("training.eval_every=100", "training.checkpoint_every=100")
    how = ("training.steps=30", "training.learning_rate=1e-2", "training.batch_size=8")
    train(tiny_config(*how, *seldom), tmp_path, tiny_caches)
    rows = rows_of(tmp_path)
    assert np.mean([r["accuracy"] for r in rows[18:30]]) > 0.8
    assert np.mean([r["loss"] for r in rows[18:30]]) < 0.6


@pytest.mark.slow
def test_sft_lowers_the_winners_error(tiny_config, tmp_path):
    train(
        tiny_config("objective.name=sft", "training.steps=30", "training.learning_rate=3e-3"),
        tmp_path,
    )
    rows = rows_of(tmp_path)
    assert rows[-1]["heldout_winner_error"] < rows[-1]["heldout_winner_error_ref"]
    assert "margin" not in rows[1]


@pytest.mark.parametrize(
    "targets",
    slow_but(
        ["[to_q,to_v,conv1,ff.net.2,proj_in]"],
        ["[to_q,to_out.0]", "[to_q,to_v,conv1,ff.net.2,proj_in]"],
    ),
)
def test_adapter_loads_with_plain_diffusers_and_changes_the_image(
    tiny_config, tiny_caches, tiny_pipeline, tmp_path, targets
):
    """Attention beside other layers too: mixed key styles once lost the attention's weights."""
    overrides = [f"policy.target_modules={targets}", "policy.alpha=8"]
    config = tiny_config(*overrides, "training.learning_rate=1e-2", "training.steps=3")
    session = train(config, tmp_path, tiny_caches)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    before = image_of(pipe)
    pipe.load_lora_weights(tmp_path / "adapter")
    after = image_of(pipe)
    assert np.abs(after - before).max() > 1e-4
    np.testing.assert_allclose(after, image_of(session.model.pipeline), atol=1e-5)


def test_full_fine_tuning_saves_a_pipeline(tiny_config, tiny_caches, tiny_pipeline, tmp_path):
    config = tiny_config("policy.kind=full", "training.learning_rate=1e-4", "training.steps=3")
    train(config, tmp_path, tiny_caches)
    assert rows_of(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "adapter")
    base = DiffusionPipeline.from_pretrained(tiny_pipeline)
    assert np.abs(image_of(tuned) - image_of(base)).max() > 1e-4


class Killed(Exception):
    """Stands for a process that dies."""


FULL = ["policy.kind=full", "training.learning_rate=1e-4"]


# In `make test`: an adapter and all weights; the objectives' resuming is tested below.
@pytest.mark.parametrize("overrides", slow_but([[]], [[], ["objective.name=diffusion_dpo"], FULL]))
def test_killed_and_resumed_ends_in_the_same_bits(
    tiny_config, tiny_run, tiny_caches, tmp_path, monkeypatch, overrides
):
    config, whole = tiny_config(*overrides), tmp_path / "whole" if overrides else tiny_run
    if overrides:
        train(config, whole, tiny_caches)
    real = training.backward

    def dies(session, step):
        if step == 5:
            raise Killed
        return real(session, step)

    monkeypatch.setattr(training, "backward", dies)
    with pytest.raises(Killed):
        train(config, tmp_path / "parts", tiny_caches)
    monkeypatch.setattr(training, "backward", real)
    train(config, tmp_path / "parts", tiny_caches)
    files = list((whole / "checkpoints/step-000008").glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        a, b = load_file(file), load_file(tmp_path / "parts/checkpoints/step-000008" / file.name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    free = {"seconds", "peak_memory_mb"}
    drop = lambda rows: [{k: v for k, v in r.items() if k not in free} for r in rows]  # noqa: E731
    assert drop(rows_of(whole)) == drop(rows_of(tmp_path / "parts"))


FORMS = {  # beside the methods' names
    "adafactor": ["training.optimizer=adafactor"],
    "auto": ["objective.beta=auto", "training.learning_rate=0.1"],
    "gap": ["objective.gap_weighted=true"],
    "known": ["objective.name=diffusion_dpo", "objective.path=known"],
    "line": ["objective.name=kto", "objective.path=line", "objective.coupling=0.6"],
    "moving": ["objective.name=kto", "objective.reference_every=3"],
    "stepped": ["objective.name=kto", "objective.path=stepped"],
    "smpo": ["objective.name=smpo", "objective.soft_labels=true"],
}
OTHERS = METHODS.keys() - {"inversion_dpo", "diffusion_dpo"} | FORMS.keys()  # than above


# In `make test`: a reference that moves and KTO's baseline, and another optimizer.
@pytest.mark.parametrize("name", slow_but(["moving", "adafactor"], sorted(OTHERS)))
def test_every_objective_resumes_in_the_same_bits(
    tiny_config, tiny_caches, soft_pair_file, tmp_path, name, monkeypatch
):
    """What moves: the policy, the optimizer's moments, a beta, a reference between two of them."""
    monkeypatch.setattr(known, "KNOWN_SHARE", 0.0)  # a random model knows no noise
    words = [*FORMS.get(name, [f"objective.name={name}"]), f"data.pairs={soft_pair_file}"]
    words += ["training.checkpoint_every=2", "inversion.steps=3", "data.limit=8"]
    train(tiny_config(*words, "training.steps=4"), tmp_path / "whole", tiny_caches)
    for steps in (2, 4):
        config = tiny_config(*words, f"training.steps={steps}")
        session = train(config, tmp_path / "parts", tiny_caches)
    assert (session.coefficients == {}) == (name != "auto")
    whole, parts = (tmp_path / run / "checkpoints/step-000004" for run in ("whole", "parts"))
    for file in ("policy.safetensors", "optimizer.safetensors"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes()


@pytest.mark.slow
def test_sigkill_at_random_moments_ends_in_the_same_bits(tiny_config, tmp_path):
    """The command itself, killed by the system wherever it is: inverting, training or saving."""
    preset = tmp_path / "run.yaml"
    preset.write_text(to_yaml(tiny_config("training.steps=80")))

    def start(folder):
        words = [sys.executable, "-m", "inversion_dpo", "train", "--config", preset]
        return subprocess.Popen([*words, "--output", tmp_path / folder], stderr=subprocess.DEVNULL)

    begun = time.time()
    assert start("whole").wait() == 0
    seconds, rng = time.time() - begun, np.random.default_rng(0)
    kills = 0
    for _ in range(8):
        process = start("parts")
        try:
            assert process.wait(rng.uniform(0.3, 0.9) * seconds) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            kills += process.wait() == -signal.SIGKILL
    assert start("parts").wait() == 0 and kills >= 3
    name = "adapter/pytorch_lora_weights.safetensors"
    whole, parts = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert [r["step"] for r in rows_of(tmp_path / "parts")] == [*range(80), 80]


def test_label_noise_swaps_training_pairs_only(tiny_config, tiny_caches):
    configs = (tiny_config(f"data.label_noise={share}") for share in (0, 1))
    plain, noisy = (set_up(config, tiny_caches) for config in configs)
    for pair, side in ((plain.train_pairs[0], 1), (plain.heldout_pairs[0], 0)):
        there, here = (c.cache.states([pair], [0], "x0").x_t for c in (noisy, plain))
        torch.testing.assert_close(there[0], here[side])


def test_a_damaged_checkpoint_is_passed_over(tiny_config, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    newest = folder / "checkpoints/step-000008/policy.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    train(tiny_config(), folder)
    steps = [r["step"] for r in rows_of(folder)]
    assert steps == list(range(8)) + [8]


def test_resume_against_another_reference_is_refused(tiny_config, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    with pytest.raises(CheckpointError, match="another --output"):
        train(tiny_config("inversion.steps=2"), folder)


def test_accumulation_equals_one_batch(tiny_config, tiny_caches, tmp_path):
    """1 x 4, 2 x 2 and 4 x 1 see the same pairs at the same states."""
    for parts in (1, 2, 4):
        train(
            tiny_config(f"training.gradient_accumulation={parts}", "training.steps=1"),
            tmp_path / str(parts),
            tiny_caches,
        )
    whole, *split = [rows_of(tmp_path / str(p))[0] for p in (1, 2, 4)]
    for row in split:
        assert row["winner_error"] == pytest.approx(whole["winner_error"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_guidance_in_inversion_is_warned_of_with_both_figures(tiny_config, tmp_path, caplog):
    few = ("data.limit=6", "inversion.steps=3")
    session = set_up(tiny_config("inversion.guidance_scale=3.0", *few), tmp_path)
    errors = [round_trip_error(session.model, session.cache, scale) for scale in (3.0, 1.0)]
    (text,) = [r.getMessage() for r in caplog.records if "guidance_scale=3" in r.getMessage()]
    assert all(f"{error:.4f}" in text for error in errors) and errors[0] != errors[1]


@pytest.mark.slow
def test_fresh_noise_needs_no_other_cache_under_guidance(tiny_config, tmp_path):
    """Its reference is evaluated in each step, so nothing cached depends on the guidance."""
    for name, folders in (("diffusion_dpo", 1), ("inversion_dpo", 2)):
        found = {
            set_up(
                tiny_config(f"objective.name={name}", f"objective.guidance_scale={scale}"),
                tmp_path / name,
            ).cache.folder
            for scale in (1, 2)
        }
        assert len(found) == folders


PATHLESS = [n for n, m in METHODS.items() if not m.inverts]


# In `make test`: one method of each path.
@pytest.mark.parametrize("name", slow_but(["diffusion_dpo"], PATHLESS))
def test_no_path_is_made_that_nobody_looks_at(
    tiny_config, soft_pair_file, tmp_path, monkeypatch, name
):
    """And the training is the same as where the paths are there, for another reason."""
    settings = [f"objective.name={name}", "training.steps=2", "data.limit=8"]
    if name == "smpo":
        settings += ["objective.soft_labels=true", f"data.pairs={soft_pair_file}"]
    train(tiny_config(*settings, "inversion.reconstruct=true"), tmp_path / "inverted")

    def refuse(*args, **more):
        raise AssertionError("inverted")

    monkeypatch.setattr(trajectories, "invert", refuse)
    session = train(tiny_config(*settings, "inversion.t_start=0.34"), tmp_path / "encoded")
    held = set(session.cache.shard(0).keys())
    assert "clean" in held and not held & {"predictions", "x_T_variance"}
    with pytest.raises(AssertionError, match="inverted"):
        set_up(tiny_config("training.steps=2"), tmp_path / "other")
    first, second = (rows_of(tmp_path / folder) for folder in ("inverted", "encoded"))
    free = {"seconds", "peak_memory_mb"}
    for a, b in zip(first, second, strict=True):
        assert {k: v for k, v in a.items() if k not in free} == {
            k: v for k, v in b.items() if k not in free
        }


def test_sampling_under_another_guidance_than_trained_is_said(tiny_config, tiny_caches, caplog):
    caplog.set_level("INFO", "inversion_dpo")
    for trained, sampled, told in ((1, 2, True), (1, 1, False)):
        caplog.clear()
        set_up(
            tiny_config(
                f"objective.guidance_scale={trained}", f"evaluation.guidance_scale={sampled}"
            ),
            tiny_caches,
        )
        text = f"training at guidance {trained}, sampling at evaluation.guidance_scale={sampled}"
        assert (text in caplog.text) == told


def test_a_distilled_network_is_trained_at_the_guidance_that_it_is_told():
    assert trained_guidance(load_config("flux", [])) == 1
    assert trained_guidance(load_config("flux", ["model.guidance_embed=3.5"])) == 3.5
    assert trained_guidance(load_config("sd15", ["objective.guidance_scale=7.5"])) == 7.5


def test_batch_order_covers_every_pair_once_an_epoch():
    pairs = list(range(10, 20))
    drawn = [p for step in range(5) for p in pairs_of_step(pairs, 4, 0, step)]
    seen = [p for p, _ in drawn]
    assert [epoch for _, epoch in drawn] == [0] * 10 + [1] * 10
    assert sorted(seen[:10]) == pairs and sorted(seen[10:]) == pairs
    assert seen[:10] != seen[10:]


# ---- start-up checks


@pytest.mark.parametrize(
    ("far", "beta", "message"),
    [(0.5, 2000, "not the reference"), (1e-3, 1e7, "is .*, where .* log 2 = .*: .* lower obj")],
)
def test_policy_that_is_not_the_reference_is_refused(
    far, beta, message, tiny_config, tiny_caches, tmp_path, monkeypatch
):
    """Also where the errors agree, and beta makes a preference of the rest."""
    real = session_parts.attach

    def spoiled(*model_and_config):
        policy = real(*model_and_config)
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=far)
        return policy

    monkeypatch.setattr(session_parts, "attach", spoiled)
    with pytest.raises(StartupError, match=message):
        train(tiny_config(f"objective.beta={beta}"), tmp_path, tiny_caches)


def test_zero_gradient_is_refused(tiny_config, tiny_caches, tmp_path):
    config = tiny_config("objective.beta=1e-30")
    with pytest.raises(StartupError, match="gradient"):
        train(config, tmp_path, tiny_caches)


def test_a_tensor_that_does_not_move_is_named(tiny_config, tiny_caches, tmp_path):
    still = ["training.learning_rate=1e-30", "training.checkpoint_every=1"]
    refused = pytest.raises(StartupError, match="did not move.*lora_")
    for steps in (2, 8, 8):  # stopped before it can be seen, and repeated after it was
        with nullcontext() if steps == 2 else refused:
            train(tiny_config(*still, f"training.steps={steps}"), tmp_path, tiny_caches)


def test_reference_target_warns_that_it_starts_on_a_saddle(
    tiny_config, tiny_caches, tmp_path, caplog
):
    config = tiny_config("objective.target=reference", "training.steps=1")
    with caplog.at_level(logging.WARNING):
        train(config, tmp_path, tiny_caches)
    assert "saddle" in caplog.text


def test_what_was_recovered_is_judged_in_words():
    assert noise_text(0.9, 0.0).endswith(": good") and noise_text(1.9, 0.1).endswith(": good")
    assert "inversion.t_start=0.2 adds" in noise_text(0.33, 0.1)
    assert "t_start" not in noise_text(0.33, 0.5)  # it is at its largest
    assert "lower inversion.t_start (it is 0.1)" in noise_text(2.13, 0.1)
    assert "guidance_scale=1" in noise_text(2.13, 0.0, 3.0)
    assert "guidance_scale" not in noise_text(2.13, 0.0, 1.0)
    assert round_trip_text(0.05, 1.0).endswith("guidance 1: 0.0500: good")
    assert "fair; more inversion.steps" in round_trip_text(0.2, 1.0)
    assert "the images are unlike" in round_trip_text(0.5, 7.5)


# ---- the cache


def test_cached_equals_uncached_and_survives_interruption(tiny_config, tmp_path):
    config = tiny_config("data.limit=8", "inversion.steps=3")
    session = set_up(config, tmp_path / "a")
    folder = session.cache.folder
    (folder / "manifest.json").unlink()
    (folder / "shard-00001.safetensors").unlink()
    again = set_up(config, tmp_path / "a").cache
    fresh = set_up(config, tmp_path / "b").cache
    for one, two in zip(
        *(vars(c.states([0, 5, 7], [1] * 3, "x0")).values() for c in (again, fresh)), strict=True
    ):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))


def test_a_flipped_bit_in_a_shard_is_detected(tiny_run, tmp_path):
    (manifest,) = shutil.copytree(tiny_run / "cache", tmp_path / "cache").glob("*/manifest.json")
    folder = manifest.parent
    shard = folder / "shard-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(bytes(data))
    assert damaged_files(folder, Team()) == [shard]


def test_points_hold_the_three_targets(tiny_config, tiny_caches):
    cache = set_up(tiny_config(), tiny_caches).cache
    pairs, positions, levels = [2, 7], [0, 3], cache.grid.levels
    i = torch.tensor([1, 4, 1, 4])
    x, clean = cache.states(pairs, positions, "x0").x_t, cache.of_images("clean", pairs)
    x0 = cache.states(pairs, positions, "x0")
    assert torch.equal(x0.x_t, x) and torch.equal(x0.timesteps, cache.grid.timesteps[i])
    landed = step(x, x0.target, levels[i], levels[0], cache.kind)
    torch.testing.assert_close(landed, clean, rtol=1e-3, atol=1e-4)
    transition = cache.states(pairs, positions, "transition").target
    below = torch.where((i == 1)[:, None, None, None], clean, cache.states(pairs, [0, 2], "x0").x_t)
    landed = step(x, transition, levels[i], levels[i - 1], cache.kind)
    torch.testing.assert_close(landed, below, rtol=1e-3, atol=1e-4)
    reference = cache.states(pairs, positions, "reference")
    assert torch.equal(reference.target, reference.reference)


@pytest.mark.slow
def test_kept_states_are_those_of_the_whole_trajectory(tiny_config, tmp_path):
    whole = set_up(tiny_config("objective.t_min=0.3"), tmp_path).cache
    part = set_up(tiny_config("objective.t_min=0.3", "inversion.keep=2"), tmp_path).cache
    assert part.positions(2, 5) == (0, 1)
    for pair in range(16):
        for position in (0, 1):
            found = part.states([pair], [position], "x0")
            i = int(found.level[0])
            assert i in (2 + position, 4 + position)  # neighbours: 2 and 3, or 4 and 5
            same = whole.states([pair], [i - 1], "x0")
            assert torch.equal(found.x_t, same.x_t)
            assert torch.equal(found.reference, same.reference)
    train(tiny_config("inversion.keep=2"), tmp_path / "run")


def test_pairs_that_do_not_come_back_are_left_out(tiny_config, tiny_run, tmp_path):
    caches = shutil.copytree(tiny_run / "cache", tmp_path / "caches")
    back = prepare(tiny_config("inversion.reconstruct=true"), caches).back
    assert len(back.errors) == 16 and min(back.errors) > 0
    limit = sorted(back.errors)[9]
    kept = set_up(tiny_config("inversion.reconstruct=true", f"inversion.max_error={limit}"), caches)
    numbers = kept.train_pairs + kept.heldout_pairs
    assert sorted(numbers) == [k for k, e in enumerate(back.errors) if e <= limit]
    assert kept.cache.folder == back.folder.parent == set_up(tiny_config(), caches).cache.folder


# ---- against diffusers


def test_full_disk_space_is_not_needed_twice(tiny_config, tiny_caches, tmp_path):
    """Old checkpoints go: no more than keep_checkpoints remain, and the best."""
    folder = tmp_path / "checkpoints"
    every = ("training.checkpoint_every=1", "training.keep_checkpoints=2", "training.steps=5")
    train(tiny_config(*every), tmp_path, tiny_caches)
    kept = {p.name for p in folder.iterdir()}
    assert kept == {"step-000004", "step-000005", best_checkpoint(folder).name}
    shutil.rmtree(tmp_path)


# ---- what is decided for each pair


def test_prompt_dropout_replaces_prompt_and_reference(tiny_config, tmp_path):
    """With every prompt dropped, policy and reference both see the empty one: still log 2."""
    config = tiny_config("data.prompt_dropout=1.0", "training.steps=2", "data.limit=8")
    session = set_up(config, tmp_path / "cache")
    condition = session.cache.condition([0, 1])
    training.with_dropout(session, [(0, 0), (1, 0)], condition)
    empty = session.model.condition([""])
    for name, value in condition.items():
        torch.testing.assert_close(value, empty[name].expand_as(value))
    train(config, tmp_path / "run", tmp_path / "cache")
    assert rows_of(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.slow  # what else resumes has a fast test
def test_prompt_dropout_resumes_in_the_same_bits(tiny_config, tmp_path):
    config = tiny_config("data.prompt_dropout=0.5")
    train(config, tmp_path / "whole")
    train(tiny_config("data.prompt_dropout=0.5", "training.steps=4"), tmp_path / "parts")
    train(config, tmp_path / "parts")
    name = "adapter/pytorch_lora_weights.safetensors"
    whole, parts = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_flipped_pairs_are_mirrored_together(tiny_config, tiny_caches, tmp_path):
    """Captions of the scenes that say left or right stay; of the others about half turn."""
    encoded = "objective.name=diffusion_dpo"  # and nothing inverted
    plain = set_up(tiny_config(encoded), tiny_caches).cache
    flipped = set_up(tiny_config(encoded, "data.flip=true"), tmp_path).cache
    assert plain.folder != flipped.folder
    turned = 0
    for pair, source in enumerate(open_pairs(tiny_config().data)):
        same = [
            torch.equal(plain.of_images("clean", [pair])[s], flipped.of_images("clean", [pair])[s])
            for s in (0, 1)
        ]
        assert same[0] == same[1]
        turned += not same[0]
        assert same[0] or not re.search("left|right", source.caption)
    assert turned > 0


def test_what_was_left_out_is_said(tiny_config, pair_file, tmp_path, caplog):
    rows = pq.read_table(pair_file).slice(0, 7).to_pylist()
    rows[2]["label_0"], rows[4]["jpg_0"] = 0.5, rows[4]["jpg_1"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    with caplog.at_level(logging.INFO):
        set_up(tiny_config(f"data.pairs={tmp_path / 'pairs.parquet'}"), tmp_path / "run")
    assert "5 pairs of 7 rows; left out: 1 tie, 1 with identical images" in caplog.text
