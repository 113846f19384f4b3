"""Two processes on gloo against one: the same gradients, metrics, caches and policies.

Every process imports torch and diffusers anew and trains each case, which is why only some of the
cases are fast: LoRA under DDP and under FSDP2, and KTO, whose loss needs all processes' images.
"""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from inversion_dpo.run.config import load_config, to_yaml
from inversion_dpo.run.folder import claim
from inversion_dpo.training.checkpoint import latest_checkpoint
from inversion_dpo.training.recipe import train
from inversion_dpo.training.run_files import read_rows
from tests.end_to_end import launched
from tests.pair_files import write_shapes
from tests.slow import slow_but

SCRIPT = Path(__file__).with_name("launched.py")
ROOT = SCRIPT.parents[2]
LAUNCH = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]
COMMON = [
    "training.steps=4",
    "training.batch_size=5",
    "training.eval_every=2",
    "training.checkpoint_every=2",
    "objective.t_min=0.2",
    "training.warmup=1",
    "evaluation.limit=3",
    "evaluation.batch_size=1",
    "evaluation.sample_steps=2",
]
CASES = {
    "ddp-lora": ["data.prompt_dropout=0.5"],
    "ddp-noise": ["objective.name=diffusion_dpo", "training.batch_size=6"],
    "ddp-kto": ["objective.name=kto"],  # its baseline is a mean over both processes' images
    "ddp-shapes": ["data.pairs=SHAPES"],  # pictures of three shapes
    "ddp-line": ["objective.name=diffusion_dpo", "objective.path=line", "objective.beta=auto"],
    "ddp-known": ["objective.name=kto", "objective.path=known", "objective.coupling=0.6"],
    "ddp-moving": ["objective.name=diffusion_dpo", "objective.reference_every=2"],
    "fsdp-moving": ["objective.name=diffusion_dpo", "objective.reference_every=2"],
    "ddp-full": ["policy.kind=full", "training.learning_rate=1e-4"],
    "fsdp-lora": ["data.prompt_dropout=0.5"],
    "fsdp-noise": ["objective.name=diffusion_dpo", "training.batch_size=6"],
    "fsdp-full": ["policy.kind=full", "training.learning_rate=1e-4"],
}

FAST = ["ddp-kto", "fsdp-lora"]
NAMES = slow_but(FAST, CASES)


def surroundings(**more):
    """The environment of a started process."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",  # tests.sessions, and this checkout
        **more,
    }


def launch(count, *words, timeout=600):
    """Run a script or module in so many processes, as ``accelerate launch`` does with GPUs."""
    done = subprocess.run(
        [sys.executable, *LAUNCH, "--num_processes", str(count), *map(str, words)],
        env=surroundings(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, "\n".join(
        line for line in done.stderr.splitlines() if "[rank" in line or "rror" in line
    )
    return done


def start_two(folder, timeout=600):
    """Run the script in two processes as the launcher would, without its own imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder],
        env=surroundings(**shared),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(once, tiny_pipeline, soft_pair_file):
    """Call with a case: folders of the fast or the slow cases, by the number of processes."""

    def of(name):
        fast = name in FAST
        names = [c for c in CASES if (c in FAST) == fast]
        make = partial(run_cases, names=names, model=tiny_pipeline, pairs=soft_pair_file)
        root = once(f"processes-{'fast' if fast else 'slow'}", make)
        return {count: root / f"{count}" for count in (1, 2)}

    return of


def run_cases(root, names, model, pairs):
    """Fill folders of the same cases in one process and in two."""
    base = [
        f"model.path={model}",
        f"data.pairs={pairs}",
        "data.holdout=0.25",
        "inversion.steps=5",
        "inversion.batch_size=8",
        "policy.rank=4",
        "policy.alpha=4",
        "training.learning_rate=1e-3",
        "evaluation.prompts=asset:prompts-validation.txt",
        "evaluation.preference=warmth",
        *COMMON,
    ]
    root.mkdir()
    shapes = write_shapes(root.with_name("shapes.parquet"), 40)
    for count in (1, 2):
        folder = root / f"{count}"
        folder.mkdir()
        for name in names:
            own = [word.replace("SHAPES", str(shapes)) for word in CASES[name]]
            config = load_config(None, [*base, *own])
            if config.training.batch_size == 6:  # so that 3 pairs come in parts of 1 and 2
                config.training.gradient_accumulation = count
            (folder / f"{name}.yaml").write_text(to_yaml(config))
    start_two(root / "2")
    launched.main(root / "1")


def same_numbers(a, b):
    """Whether two files of a cache hold the same, to rounding: processes have other threads."""
    if a.suffix == ".json":
        one, two = (json.loads(p.read_text()) for p in (a, b))
        return all(one[k] == two[k] for k in one if k != "shards")
    one, two = load_file(a), load_file(b)
    return one.keys() == two.keys() and all(
        torch.allclose(one[k], two[k], rtol=1e-4, atol=1e-5) for k in one
    )


def cache_in(folder):
    """The one cache in a folder of caches, which also says what was found about giveaways."""
    (manifest,) = folder.glob("*/manifest.json")
    return manifest.parent


def facts(results, count, name):
    return json.loads((results(name)[count] / f"{name}.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_the_forward_goes_through_the_prepared_model(results, name):
    expected = "DistributedDataParallel" if name.startswith("ddp") else "FSDPUNet2DConditionModel"
    assert facts(results, 2, name)["type"] == expected


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_read_different_pairs_uneven_batch_and_all(results, name):
    one, two = facts(results, 1, name)["seen"][0], facts(results, 2, name)["seen"]
    assert [len(part) for part in two] == ([3, 3] if "noise" in name else [2, 3])
    assert two[0] + two[1] == one and len({pair for pair, _ in one}) == len(one)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_gradients_of_one(results, name):
    one, two = (load_file(results(name)[k] / f"{name}.safetensors") for k in (1, 2))
    assert one.keys() == two.keys() and one
    norm = sum(float(g.square().sum()) for g in one.values()) ** 0.5
    apart = sum(float((one[k] - two[k]).square().sum()) for k in one) ** 0.5
    assert norm > 0 and apart < 1e-4 * norm


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_means_over_all_processes(results, name):
    one, two = facts(results, 1, name), facts(results, 2, name)
    for part in ("row", "heldout"):
        assert one[part].keys() == two[part].keys()
        for key, value in one[part].items():
            near = 1e-5 if key.endswith("margin") else 1e-6  # beta times a difference of errors
            assert two[part][key] == pytest.approx(value, rel=1e-4, abs=near), key


def test_the_baseline_of_kto_is_a_mean_over_all_images(results):
    """Shares of two and of three pairs: the mean of their means would be another."""
    (one,), (two,) = (facts(results, k, "ddp-kto")["baselines"] for k in (1, 2))
    assert abs(one) > 1e-5 and two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_the_policy_of_one(results, name):
    rows = [read_rows(results(name)[k] / name / "metrics.jsonl") for k in (1, 2)]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]] == [0, 1, 2, 3, 4]
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        for key in {"loss", "grad_norm", "heldout_winner_error"} & one.keys():
            assert two[key] == pytest.approx(one[key], rel=2e-3), key
    weights = [
        load_file(latest_checkpoint(results(name)[k] / name / "checkpoints") / "policy.safetensors")
        for k in (1, 2)
    ]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_filled_by_two_is_that_of_one(results, name):
    one, two = (cache_in(results(name)[k] / f"cache-{name}") for k in (1, 2))
    assert one.name == two.name
    manifests = [json.loads((f / "manifest.json").read_text()) for f in (one, two)]
    assert manifests[0]["digests"] == manifests[1]["digests"]
    for file in sorted(one.glob("shard-*.safetensors")):
        a, b = load_file(file), load_file(two / file.name)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


def test_two_processes_evaluate_as_one(results):
    one, two = (results("ddp-kto")[k] / "ddp-kto" for k in (1, 2))
    tables = [pq.read_table(f / "per_prompt.parquet").to_pydict() for f in (one, two)]
    assert len(tables[0]["prompt"]) == 3 and tables[0]["prompt"] == tables[1]["prompt"]
    for side in ("reference", "policy"):
        np.testing.assert_allclose(*(t[f"{side}.warmth"] for t in tables), atol=0.02)
    assert [len(list((f / "samples").iterdir())) for f in (one, two)] == [2, 2]


@pytest.mark.parametrize("name", slow_but(["fsdp-lora"], ["fsdp-lora", "fsdp-full"]))
def test_a_sharded_policy_is_saved_whole(results, tiny_pipeline, name):
    def picture(pipe):
        pipe.set_progress_bar_config(disable=True)
        seeded = torch.Generator().manual_seed(3)
        return pipe("a red star", num_inference_steps=3, generator=seeded, output_type="np").images

    base = picture(DiffusionPipeline.from_pretrained(tiny_pipeline))
    found = []
    for count in (1, 2):
        folder = results(name)[count] / name / "adapter"
        full = (folder / "model_index.json").exists()
        pipe = DiffusionPipeline.from_pretrained(folder if full else tiny_pipeline)
        if not full:
            pipe.load_lora_weights(folder)
        found.append(picture(pipe))
    assert np.abs(found[0] - base).max() > 1e-5
    np.testing.assert_allclose(found[1], found[0], atol=2e-3)


@pytest.mark.parametrize("name", slow_but(["fsdp-lora"], ["ddp-lora", "fsdp-lora", "fsdp-full"]))
def test_a_run_of_two_processes_goes_on_in_one(results, name, tmp_path):
    """The checkpoint is whole, whatever wrote it; rounding aside the end is the same."""
    run = results(name)[2] / name
    config = load_config(str(results(name)[1] / f"{name}.yaml"), ["training.steps=6"])
    train(config, run, results(name)[2] / f"cache-{name}")
    train(config, tmp_path / "one", results(name)[1] / f"cache-{name}")
    one, two = (read_rows(f / "metrics.jsonl") for f in (tmp_path / "one", run))
    assert [r["step"] for r in two] == list(range(7))
    assert two[-1]["heldout_winner_error"] == pytest.approx(
        one[-1]["heldout_winner_error"], rel=2e-3
    )


@pytest.mark.slow  # it launches two processes twice, to train and to evaluate
def test_the_commands_run_on_two_processes_as_on_one(tiny_config, tmp_path):
    """train and evaluate as typed: one policy, one table of samples, nothing written twice.

    The run was begun by one process, with half of the cache, and is taken up by two.
    """
    preset = tmp_path / "run.yaml"
    settings = ["evaluation.batch_size=1", "evaluation.guidance_scale=1"]  # as it is trained
    preset.write_text(to_yaml(tiny_config(*COMMON, *settings)))
    run = load_config(str(preset), ["training.steps=2"])
    claim(tmp_path / "two", run)
    train(run, tmp_path / "two")
    cache = cache_in(tmp_path / "two/cache")
    shards = sorted(cache.glob("shard-*.safetensors"))
    assert len(shards) == 4
    for path in (cache / "manifest.json", shards[1], shards[2], shards[2].with_suffix(".json")):
        path.unlink()
    before = {p: p.stat().st_mtime_ns for p in (shards[0], shards[3])}
    for words in (["train", "-c", preset, "-o", tmp_path / "two"], ["evaluate", tmp_path / "two"]):
        done = launch(2, "-m", "inversion_dpo", *words)
    assert done.stdout.count("win rate") == 1
    assert {p: p.stat().st_mtime_ns for p in before} == before  # whole ones were left alone
    train(load_config(str(preset), []), tmp_path / "one")
    one = cache_in(tmp_path / "one/cache")
    for path in [cache / "manifest.json", *shards]:
        assert same_numbers(path, one / path.name), path.name
    adapters = [
        load_file(tmp_path / run / "adapter/pytorch_lora_weights.safetensors")
        for run in ("one", "two")
    ]
    for key, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][key], value, rtol=1e-3, atol=2e-4)
    metrics = json.loads((tmp_path / "two/metrics.json").read_text())
    assert metrics["n_prompts"] == 3 and len(list((tmp_path / "two/samples").iterdir())) == 2
    assert [r["step"] for r in read_rows(tmp_path / "two/metrics.jsonl")] == [0, 1, 2, 3, 4]
