"""Broken numbers, full disks, stops and second runs: said in one line, and nothing lost."""

import errno
import json
import os
import shutil
import signal
import stat
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock

from inversion_dpo import api
from inversion_dpo.cli import main as cli
from inversion_dpo.compare.beforehand import Plan, claim_folder
from inversion_dpo.data.images import decode_image
from inversion_dpo.models.loading import check_model, load_pipeline
from inversion_dpo.run import disk
from inversion_dpo.run.config import ConfigError, to_yaml
from inversion_dpo.run.disk import (
    DiskError,
    atomic_folder,
    atomic_text,
    checksum_of,
    steady_header,
    writing,
)
from inversion_dpo.run.faults import (
    OutOfMemoryError,
    Terminated,
    memory_advice,
    stop_requests,
)
from inversion_dpo.run.fields import ModelConfig
from inversion_dpo.run.folder import LOCK, BusyError, going_on, occupied
from inversion_dpo.run.processes import Team, share
from inversion_dpo.training import recipe
from inversion_dpo.training import step as training
from inversion_dpo.training.checkpoint import (
    CheckpointError,
    Progress,
    best_checkpoint,
    better_checkpoint,
    latest_checkpoint,
)
from inversion_dpo.training.checks import NotFiniteError
from inversion_dpo.training.recipe import train
from inversion_dpo.training.run_files import (
    read_rows,
    resume,
    save_best,
    save_session,
    summary,
)
from inversion_dpo.training.split import split_pairs
from inversion_dpo.trajectories.writing import damaged_files
from tests.sessions import set_up


def spoil_pair(monkeypatch, pairs):
    """The losses of these pairs are not numbers."""
    real = training.losses

    def spoiled(session, batch, *rest, **more):
        output, errors, drift = real(session, batch, *rest, **more)
        factor = torch.tensor([float("nan") if pair in pairs else 1.0 for pair, _ in batch])
        return type(output)(output.loss * factor, output.margin), errors, drift

    monkeypatch.setattr(training, "losses", spoiled)


def test_a_pair_without_a_number_is_left_out_and_named(
    tiny_config, tiny_caches, tmp_path, monkeypatch, caplog
):
    pair = split_pairs(list(range(16)), 0.25)[0][3]
    spoil_pair(monkeypatch, {pair})
    session = train(tiny_config("training.eval_every=100"), tmp_path / "run", tiny_caches)
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    hit = [r for r in rows[:-1] if r["loss"] != r["loss"]]
    assert 2 <= len(hit) <= 3  # 32 pairs of 12 were drawn
    assert [r["skipped"] for r in hit] == list(range(1, len(hit) + 1))
    assert session.skipped == len(hit)
    assert f"pairs {pair} ({session.cache.digests[pair][:16]})" in caplog.text
    for parameter in session.policy.trainable().values():
        assert parameter.isfinite().all()
    state = latest_checkpoint(tmp_path / "run/checkpoints") / "state.json"
    assert json.loads(state.read_text())["skipped"] == len(hit)


def test_too_many_broken_steps_stop_the_run(tiny_config, tiny_caches, tmp_path, monkeypatch):
    spoil_pair(monkeypatch, set(range(16)))
    with pytest.raises(NotFiniteError, match=r"pairs \d+ \([0-9a-f]{16}\).*max_skipped=2"):
        train(tiny_config("training.max_skipped=2"), tmp_path, tiny_caches)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize(
    ("error", "stage", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "training", "gradient_accumulation"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "inversion",
            "a single pair, does not fit: set model.offload=true",
        ),
        (MemoryError(), "sampling", "evaluation.batch_size"),
    ],
)
def test_out_of_memory_names_the_settings(error, stage, advice):
    with pytest.raises(OutOfMemoryError, match=advice), memory_advice(stage):
        raise error


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="shapes"), memory_advice("training"):
        raise RuntimeError("shapes do not fit")


# ---- stopping


def test_sigterm_saves_stops_and_resumes_in_the_same_bits(
    tiny_config, tiny_run, tiny_caches, tmp_path, monkeypatch
):
    real = training.backward

    def stopped(session, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(session, step)

    monkeypatch.setattr(training, "backward", stopped)
    with pytest.raises(Terminated, match="after step 5 of 8"):
        train(tiny_config(), tmp_path / "parts", tiny_caches)
    assert latest_checkpoint(tmp_path / "parts/checkpoints").name == "step-000005"
    monkeypatch.setattr(training, "backward", real)
    train(tiny_config(), tmp_path / "parts", tiny_caches)
    name = "adapter/pytorch_lora_weights.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tiny_run / name).read_bytes()


def test_a_policy_that_could_not_be_written_is_missed(
    tiny_config, tiny_run, tiny_caches, tmp_path, monkeypatch
):
    """A training that went on is not whole before its policy: that of before still lies there."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = tiny_config("training.steps=9")
    monkeypatch.setattr(recipe, "save_policy", Mock(side_effect=DiskError("no room")))
    with pytest.raises(DiskError, match="no room"):
        train(config, run, tiny_caches)
    (run / "config.yaml").write_text(to_yaml(config))
    assert going_on(run).startswith(f"{run} is trained to step 9 of 9, and adapter/ is from before")


def test_a_training_that_was_killed_before_it_went_on_is_not_called_longer(
    tiny_config, tiny_run, tmp_path, monkeypatch, caplog
):
    """Its settings say more steps, or others altogether, and its card would."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for steps, text in ((8, ""), (80, f"{run} is trained to step 8 of 80, and adapter/ is from")):
        (run / "config.yaml").write_text(to_yaml(tiny_config(f"training.steps={steps}")))
        assert going_on(run).startswith(text) and bool(going_on(run)) == bool(text)
    merged = shutil.copytree(tiny_config().model.path, run / "merged")
    for setting in (f"model.lora={run / 'adapter'}", f"model.path={merged}"):  # of the next run
        caplog.clear()
        check_model(tiny_config(setting).model)
        assert text in caplog.text
    shutil.rmtree(run / "checkpoints")
    monkeypatch.setattr(recipe, "prepare", Mock(side_effect=DiskError("no room")))
    with pytest.raises(DiskError, match="no room"):
        train(tiny_config(), run, tmp_path)
    assert going_on(run).startswith(
        f"{run} is trained to step 0 of 80, and adapter/ is from before"
    )


def test_what_an_earlier_training_left_is_not_taken_for_this_ones(
    tiny_config, tiny_run, tiny_caches, tmp_path, caplog
):
    """After its checkpoints were deleted, to train anew; a copy of a checkpoint is nobody's."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    held = [p.name for p in sorted((run / "snapshots").iterdir())]
    assert held == ["step-000004", "step-000008"]
    shutil.rmtree(run / "checkpoints")
    mine = run / "checkpoints" / "step-000008-mine"
    mine.mkdir(parents=True)
    (run / "merged").mkdir()
    train(tiny_config("training.steps=5", "training.snapshot_every=2"), run, tiny_caches)
    assert sorted(p.name for p in (run / "snapshots").iterdir()) == ["step-000002", "step-000004"]
    assert f"{run / 'merged'} is of an earlier training" in caplog.text and mine.is_dir()


def test_the_command_exits_with_zero_on_sigterm(tiny_config, tmp_path, monkeypatch, capsys):
    preset = tmp_path / "run.yaml"
    preset.write_text(to_yaml(tiny_config()))

    def killed(*rest):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("inversion_dpo.training.recipe.load_model", killed)
    with pytest.raises(SystemExit) as stop:
        cli.main(["invert", "-c", str(preset), "-o", str(tmp_path / "run")])
    assert stop.value.code == 0 and "run the same command again" in capsys.readouterr().err


def test_stop_requests_puts_the_old_handler_back_and_spares_threads():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as stopping:
        assert not stopping()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping()
    assert signal.getsignal(signal.SIGTERM) is before
    answers = []

    def elsewhere():
        with stop_requests() as asked:
            answers.append(asked())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert answers == [False]


# ---- two runs, and disks


def test_a_second_run_is_refused_and_a_stale_lock_is_not(tmp_path):
    with occupied(tmp_path / "run"), pytest.raises(BusyError, match="write to another place"):
        with occupied(tmp_path / "run"):
            pass
    (tmp_path / "run" / LOCK).touch()
    with occupied(tmp_path / "run"):
        assert FileLock(tmp_path / "run" / LOCK, is_singleton=False).is_locked is False


def test_a_second_comparison_or_call_from_python_is_refused_too(tmp_path, capsys):
    claim_folder(tmp_path, Plan("taste", ("sft",), 1))
    with occupied(tmp_path, run=False):
        with pytest.raises(SystemExit) as stop:
            cli.main(["compare", "-o", str(tmp_path), "--seeds", "1", "--methods", "sft"])
        assert stop.value.code == 2 and "in use by another run" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    with occupied(tmp_path / "run"), pytest.raises(BusyError, match="in use by another run"):
        api.align("taste", tmp_path / "run")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_in_one_line(tmp_path, monkeypatch, number):
    def none(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(BusyError, match="cannot be locked .*work on a file system with"):
        with occupied(tmp_path / "run"):
            pass


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    atomic_text("old", path)

    def full(*rest):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(DiskError, match="cannot write .*file.txt: No space left on device"):
        atomic_text("new", path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_safetensors_words_for_a_full_disk_are_understood(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(DiskError, match="No space left"), writing(tmp_path / "x"):
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tmp_path, tiny_config, capsys):
    preset = tmp_path / "run.yaml"
    preset.write_text(to_yaml(tiny_config()))
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "-c", str(preset), "-o", str(tmp_path / "run")])
    tmp_path.chmod(stat.S_IRWXU)
    assert stop.value.code == 2 and "Permission denied" in capsys.readouterr().err


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "adapter"
    for text in ("one", "two"):
        atomic_folder(target, lambda f, t=text: (f.mkdir(), (f / "a").write_text(t)))
        assert (target / "a").read_text() == text

    def fails(folder):
        folder.mkdir()
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(DiskError):
        atomic_folder(target, fails)
    assert (target / "a").read_text() == "two" and len(list(tmp_path.iterdir())) == 1


def test_metadata_is_written_in_a_steady_order(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}
    metadata = {key: "é" + key for key in "zyxwvu"}
    files = []
    for k in range(4):
        save_file(tensors, tmp_path / f"{k}", metadata=metadata)
        steady_header(tmp_path / f"{k}")
        files.append((tmp_path / f"{k}").read_bytes())
    assert len(set(files)) == 1
    with safe_open(tmp_path / "0", framework="pt") as handle:
        assert handle.metadata() == metadata
        assert all(torch.equal(handle.get_tensor(k), v) for k, v in tensors.items())


# ---- damage


def test_a_damaged_shard_is_named_and_made_again_alone(tiny_config, tiny_run, tmp_path, caplog):
    (manifest,) = shutil.copytree(tiny_run / "cache", tmp_path / "caches").glob("*/manifest.json")
    folder = manifest.parent
    shards = sorted(folder.glob("shard-*.safetensors"))
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in shards}
    shards[1].write_bytes(before[shards[1]][0][:-9])
    assert damaged_files(folder, Team()) == [shards[1]]
    set_up(tiny_config(), tmp_path / "caches")
    assert "shard-00001.safetensors is missing or damaged" in caplog.text
    assert all(p.read_bytes() == before[p][0] for p in shards)
    untouched = [p for p in shards if p.stat().st_mtime_ns == before[p][1]]
    assert untouched == [shards[0], *shards[2:]]


@pytest.mark.parametrize("file", ["state.json", "policy.safetensors", "optimizer.safetensors"])
def test_any_flipped_bit_of_a_checkpoint_is_seen(tiny_run, tmp_path, file, caplog):
    shutil.copytree(tiny_run / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints/step-000008"
    data = (newest / file).read_bytes()
    for place in range(0, len(data), max(1, len(data) // 9)):
        spoiled = bytearray(data)
        spoiled[place] ^= 2
        (newest / file).write_bytes(bytes(spoiled))
        assert latest_checkpoint(tmp_path / "checkpoints").name == "step-000006"
    assert "step-000008 is damaged" in caplog.text


def test_a_reference_of_other_weights_is_refused_by_its_hash(tiny_config, tiny_caches, tmp_path):
    from inversion_dpo.training.checkpoint import load_checkpoint

    session = train(tiny_config("training.steps=1"), tmp_path, tiny_caches)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    parameters, identity = session.policy.trainable(), session.cache.folder.name
    inner = session.optimizer.optimizer
    load_checkpoint(checkpoint, parameters, inner, identity, session.cache.reference)
    with pytest.raises(CheckpointError, match="weights hash to"):
        load_checkpoint(checkpoint, parameters, inner, identity, "0" * 16)


def test_the_policy_of_the_best_checkpoint_is_kept(tiny_config, tiny_caches, tmp_path, caplog):
    def settings(*more):
        every = [f"training.{name}_every=1" for name in ("checkpoint", "eval", "snapshot")]
        return tiny_config(*every, "training.learning_rate=5e-3", *more)

    config = settings()
    session = train(config, tmp_path, tiny_caches)
    rows = read_rows(tmp_path / "metrics.jsonl")
    scores = {r["step"]: r["heldout_accuracy"] for r in rows if r["step"] > 0}
    best = int(best_checkpoint(tmp_path / "checkpoints").name[5:])
    assert scores[best] == max(scores.values())
    best, kept = config.training.steps - 1, tmp_path / "best"
    checkpoint = tmp_path / f"checkpoints/step-{best:06d}"
    told = json.loads((checkpoint / "state.json").read_text()) | {"score": 2.0}
    del told["checksum"]
    told["checksum"] = checksum_of(told)
    (checkpoint / "state.json").write_text(json.dumps(told))
    save_best(session, tmp_path, config.training.steps)
    name = "pytorch_lora_weights.safetensors"
    of_step = tmp_path / f"snapshots/step-{best:06d}"
    assert (kept / name).read_bytes() == (of_step / name).read_bytes()
    assert (kept / name).read_bytes() != (tmp_path / "adapter" / name).read_bytes()
    said = summary(tmp_path, config)
    assert (
        f"best held-out score: at step {best}, above the last one's; that policy is {kept}" in said
    )
    shutil.rmtree(kept)
    weights = checkpoint / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    save_best(session, tmp_path, config.training.steps)
    assert f"{checkpoint}, the best checkpoint, is damaged" in caplog.text
    assert not kept.exists() and "best held-out" not in summary(tmp_path, config)
    kept.mkdir()
    save_best(session, tmp_path, best)  # as if it were the last
    assert not kept.exists()


def test_a_last_checkpoint_as_good_as_the_best_has_no_other_beside_it(tmp_path):
    for step, score in ((3, 0.5), (6, 0.75), (8, 0.75), (9, None)):
        state = asdict(Progress(step, 1.0, "same", score=score)) | {"files": {}}
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        told = state | {"checksum": checksum_of(state)}
        (folder / "state.json").write_text(json.dumps(told))
    assert best_checkpoint(tmp_path).name == "step-000006"
    assert better_checkpoint(tmp_path, 8) is None
    assert better_checkpoint(tmp_path, 3).name == better_checkpoint(tmp_path, 9).name
    assert better_checkpoint(tmp_path / "none", 8) is None


# ---- small parts


@pytest.mark.parametrize("count", [1, 5, 8, 13])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_shares_are_even_and_leave_nothing_out(count, parts):
    items = list(range(count))
    shares = [share(items, parts, k) for k in range(parts)]
    assert [i for s in shares for i in s] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_batch_smaller_than_the_processes_is_refused(tiny_config, tiny_caches, monkeypatch):
    from inversion_dpo.run.processes import Team
    from inversion_dpo.training import beforehand

    config = tiny_config()
    session = set_up(config, tiny_caches)
    monkeypatch.setattr(beforehand, "current_team", lambda: Team(0, 8))
    with pytest.raises(ConfigError, match="batch_size=4 counts the pairs of a step over all"):
        beforehand.check_usable(config, session.cache, session.plan)


def test_merging_under_fsdp_is_refused_before_anything_is_inverted(tiny_config, monkeypatch):
    from accelerate.utils import DistributedType

    from inversion_dpo.training import recipe as session_parts

    engine = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(session_parts, "Accelerator", lambda **settings: engine)
    assert session_parts.make_accelerator(tiny_config()) is engine
    with pytest.raises(ConfigError, match="policy.merge=true does not work under FSDP"):
        session_parts.make_accelerator(tiny_config("policy.merge=true"))


def test_the_scale_of_fp16_goes_on_where_it_was(tiny_config, tiny_caches, tmp_path):
    """A scaler that begins anew would skip other steps than the run that was not interrupted."""
    first, second = (set_up(tiny_config(), tiny_caches) for _ in range(2))
    scaler = first.accelerator.scaler = torch.amp.GradScaler("cpu", 1024.0, growth_interval=3)
    loss = first.policy.trainable().values().__iter__().__next__().sum()
    scaler.scale(loss).backward()
    for scale in (float("inf"), 1.0):  # one step is skipped and halves the scale, one is counted
        for parameter in first.policy.trainable().values():
            parameter.grad = torch.full_like(parameter, scale)
        scaler.step(first.optimizer.optimizer)
        scaler.update()
    save_session(first, tmp_path, step=2, seconds=0.0, looked={"heldout_accuracy": 0.5})
    second.accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    assert resume(second, tmp_path).step == 2
    assert second.accelerator.scaler.state_dict() == scaler.state_dict()
    assert scaler.get_scale() == 512.0 and scaler.state_dict()["_growth_tracker"] == 1


def test_a_stop_is_not_taken_for_a_damaged_image_or_folder(monkeypatch, tmp_path):
    def stopped(*_, **__):
        raise Terminated("stopped by SIGTERM")

    monkeypatch.setattr("PIL.Image.open", stopped)
    with pytest.raises(Terminated):
        decode_image(b"any", "row 0")
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", stopped)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(Terminated):
        load_pipeline(ModelConfig(str(tmp_path)))


def test_a_process_whose_peer_ended_says_so_in_one_line(monkeypatch, capsys):
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    for text, left in ((f"{gloo} [127.0.0.1]:22", True), ("a bug", False)):
        monkeypatch.setattr(cli, "app", Mock(side_effect=RuntimeError(text)))
        with pytest.raises(SystemExit if left else RuntimeError):
            cli.main(["train"])
        told = capsys.readouterr().err
        said = "error: another process of this launch has ended; its own message says why\n"
        assert told == (said if left else "")
