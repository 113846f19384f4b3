"""The same surroundings for every test: no network, and a fixed number of threads.

OMP_NUM_THREADS says how many; without it there are two, or one in each worker of pytest-xdist.
"""

import gc
import os

gc.disable()  # while modules are imported and tests are collected; see below
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Without it MKL's sums depend, on Xeons with AMX, on where in memory a tensor happens to lie.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes that a test starts obey it too

import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

import io  # noqa: E402
import itertools  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
from functools import cache, partial  # noqa: E402

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402


def pytest_collection_finish(session):
    """Look for garbage again, but no more among what is there for good: a fifth of all the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


SIGTERM = signal.getsignal(signal.SIGTERM)


@pytest.fixture(autouse=True)
def sigterm():
    """A command that a test calls takes SIGTERM for its own: afterwards it ends the tests again."""
    yield
    signal.signal(signal.SIGTERM, SIGTERM)


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """Call with a name and what makes it at a path: the first worker that asks makes it for all."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "shared"
    shared.mkdir(exist_ok=True)

    def of(name, make):
        path, part = shared / name, shared / f"{name}.part"
        with FileLock(shared / f"{name}.lock"):
            if not path.exists():
                make(part)
                part.rename(path)
        return path

    return of


@pytest.fixture(scope="session")
def tiny_pipeline(once):
    """A StableDiffusionPipeline folder of the genuine classes with tiny random weights."""
    return once("pipeline", write_pipeline)


def write_pipeline(folder):
    """Four parts of the genuine classes; small, and only two levels deep."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from tools.embedded.architecture import MAX_TOKENS, build_tokenizer
    from tools.stages import publish

    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder.with_name("tokenizer"))
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    publish(folder, vae, unet, text, tokenizer)


@pytest.fixture(scope="session")
def tiny(once):
    """family -> its folder of ``tools.tiny.pipelines``, written once; read only."""
    from tools.tiny.pipelines import write_tiny

    return cache(lambda family: once(family, partial(write_tiny, family)))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Call with kind, name, folder (and revision, commit): it then lies in an offline hub cache."""
    from hashlib import sha256

    from huggingface_hub import constants

    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))

    def put(kind, name, folder, revision="main", commit="a" * 40):
        repository = root / f"{kind}--{name.replace('/', '--')}"
        for file in (f for f in folder.rglob("*") if f.is_file()):
            blob = repository / "blobs" / sha256(file.read_bytes()).hexdigest()
            link = repository / "snapshots" / commit / file.relative_to(folder)
            for path in (blob, link, repository / "refs" / revision):
                path.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(file.read_bytes())
            link.symlink_to(os.path.relpath(blob, link.parent))
        (repository / "refs" / revision).write_text(commit)

    return put


def encode_png(image):
    """uint8 image -> PNG bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def pair_rows(count):
    """Rows of a pair file: warm scenes preferred to cool ones."""
    from dataclasses import replace

    from inversion_dpo.world.scene_prompts import scenes
    from tools.embedded.painting import render

    rows = []
    for k, scene in enumerate(itertools.islice(scenes("train", 3), count)):
        images = [encode_png(render(replace(scene, warmth=w))) for w in (0.9, 0.1)]
        first = k % 2
        rows.append(
            {
                "jpg_0": images[1 - first],
                "jpg_1": images[first],
                "label_0": float(first),
                "caption": scene.graph.caption,
                "scene_graph": scene.graph.to_json(),
            }
        )
    return rows


@pytest.fixture(scope="session")
def write_pairs():
    """Call with a path and a count: warm-against-cool pairs in Parquet."""

    def write(path, count):
        pq.write_table(pa.Table.from_pylist(pair_rows(count)), path)
        return path

    return write


@pytest.fixture(scope="session")
def pair_file(once, write_pairs):
    """Sixteen warm-against-cool pairs in Parquet."""
    return once("pairs.parquet", lambda path: write_pairs(path, 16))


@pytest.fixture(scope="session")
def soft_pair_file(once):
    """The pairs of ``pair_file`` with seeds, and soft labels: mostly 0.9 for the winner."""
    rows = pair_rows(16)
    for k, row in enumerate(rows):
        gap = 0.8 if k % 4 else 0.2
        row |= {"preference_0": 0.5 + gap * (row["label_0"] - 0.5), "seed_0": k, "seed_1": 99 - k}
    return once("soft.parquet", lambda path: pq.write_table(pa.Table.from_pylist(rows), path))


@pytest.fixture(scope="session")
def tiny_config(once, tiny_pipeline, pair_file):
    """Overrides that make a run of seconds; call with further ones."""
    from inversion_dpo.run.config import load_config

    captions = "\n".join(r["caption"] for r in pair_rows(4))
    prompts = once("prompts.txt", lambda path: path.write_text(captions))

    def make(*overrides):
        return load_config(
            None,
            [
                f"model.path={tiny_pipeline}",
                f"data.pairs={pair_file}",
                "data.holdout=0.25",
                "inversion.steps=5",
                "inversion.batch_size=8",
                "policy.rank=4",
                "policy.alpha=4",
                "training.steps=8",
                "training.batch_size=4",
                "training.checkpoint_every=3",
                "training.eval_every=4",
                "training.learning_rate=1e-3",
                "evaluation.sample_steps=3",
                "evaluation.limit=4",
                "evaluation.preference=warmth",
                f"evaluation.prompts={prompts}",
                *overrides,
            ],
        )

    return make


@pytest.fixture(scope="session")
def tiny_run(once, tiny_config):
    """A whole run of ``tiny_config``, with snapshots; copy it before writing to it."""
    from inversion_dpo.training.recipe import train

    return once("run", partial(train, tiny_config("training.snapshot_every=4")))


@pytest.fixture(scope="session")
def tiny_caches(tiny_run, tmp_path_factory):
    """A folder of caches, ``tiny_run``'s among them; change no file in it."""
    return shutil.copytree(tiny_run / "cache", tmp_path_factory.mktemp("caches") / "all")
