"""A run loads, hashes and decodes everything once; a step computes what its loss needs."""

import json
import shutil
from collections import Counter

import pytest
import torch

from inversion_dpo.data import formats, rows, source, tables
from inversion_dpo.models import loading
from inversion_dpo.models.autoencoders import Autoencoder
from inversion_dpo.models.base import ModelError
from inversion_dpo.training import step as training_step
from inversion_dpo.training.generators import generator_for
from inversion_dpo.training.recipe import train
from inversion_dpo.trajectories import fill, key, writing
from tests.sessions import set_up
from tests.slow import slow_but


@pytest.fixture
def calls(monkeypatch):
    """Counts of what costs time, by name."""
    counts = Counter()

    def counted(module, name, label, weight=lambda *_, **__: 1):
        real = getattr(module, name)

        def call(*args, **kwargs):
            counts[label] += weight(*args, **kwargs)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(loading, "load_pipeline", "loads of the model")
    counted(key, "identity_of", "hashes of the weights")
    counted(formats, "_digest", "hashes of the pairs")
    counted(rows, "decode_image", "decoded images")
    counted(source, "decode_image", "decoded images")
    counted(writing, "sha256_of", "verified files")
    counted(Autoencoder, "encode", "encodings")
    return counts


def test_a_run_prepares_once(tiny_config, tmp_path, calls):
    config = tiny_config("training.steps=2")
    train(config, tmp_path)
    assert calls["loads of the model"] == calls["hashes of the weights"] == 1
    assert calls["hashes of the pairs"] == 1
    assert calls["decoded images"] == 2 * 2 * 16  # to look at the files, and to encode them
    assert calls["encodings"] == 1 + 4  # one to announce the cache's size, one for each shard

    calls.clear()
    train(tiny_config("training.steps=4"), tmp_path)
    assert calls["loads of the model"] == calls["hashes of the weights"] == 1
    assert calls["decoded images"] == calls["encodings"] == 0
    assert calls["verified files"] == 4 + 1  # every shard, and the empty prompt, once


def test_the_total_of_the_bar_reads_no_image(tiny_config, tmp_path, monkeypatch):
    pairs = source.open_pairs(tiny_config().data)
    monkeypatch.setattr(tables, "_READ_ROWS", 1)
    wanted = []
    real = tables.pq.ParquetFile.iter_batches

    def noted(self, *args, columns=None, **kwargs):
        wanted.extend(columns)
        return real(self, *args, columns=columns, **kwargs)

    monkeypatch.setattr(tables.pq.ParquetFile, "iter_batches", noted)
    assert pairs.expected() == 16 and wanted == ["label_0"]


@pytest.mark.parametrize(
    "name",
    slow_but(["kto", "sft"], ["inversion_dpo", "diffusion_dpo", "dspo", "sft", "kto"]),
)
def test_only_kto_needs_the_mean_over_all_processes(name, tiny_config, tiny_caches, monkeypatch):
    session = set_up(tiny_config(f"objective.name={name}"), tiny_caches)
    asked = []
    monkeypatch.setattr(training_step, "mean_gain", lambda s, gain: asked.append(s) or gain.mean())
    generators = [generator_for(0, 0, 0, k) for k in (0, 1)]
    training_step.losses(session, [(0, 0), (1, 0)], generators)
    assert bool(asked) is (name == "kto")


@pytest.mark.parametrize("loss", slow_but(["kto"], ["kto", "dspo"]))
def test_another_loss_on_the_trajectory_is_a_setting(loss, tiny_config, tiny_caches, tmp_path):
    config = tiny_config(f"objective.loss={loss}", "objective.beta=100", "training.steps=2")
    session = train(config, tmp_path, tiny_caches)
    assert session.plan.path == "trajectory" and session.cache.inverted


def overflowing(real, part):
    """An autoencoder or network whose third output is no number."""
    made = []

    def call(*args, **kwargs):
        value = real(*args, **kwargs)
        made.append(value)
        return value.index_fill(0, torch.tensor([2]), torch.inf) if len(made) == part else value

    return call


def test_an_autoencoder_that_overflows_is_named_with_its_image(tiny_config, tmp_path, monkeypatch):
    first_is_announced = overflowing(Autoencoder.encode, 2)
    monkeypatch.setattr(Autoencoder, "encode", first_is_announced)
    with pytest.raises(ModelError, match="row 1, winner: its latent has values .* model.dtype"):
        train(tiny_config(), tmp_path)
    assert not list(tmp_path.rglob("shard-*"))


def test_a_path_that_overflows_is_named_with_its_image(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(fill, "guided", overflowing(fill.guided, 3))
    with pytest.raises(ModelError, match="row 1, winner: its inverted path has values"):
        train(tiny_config(), tmp_path)


def test_the_autoencoders_configuration_counts(tiny_config, tmp_path, tiny_pipeline):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "model")
    names = set()
    for scale in (0.2, 0.3):
        file = folder / "vae" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": scale}))
        config = tiny_config(f"model.path={folder}")
        model = loading.load_model(config, torch.device("cpu"))
        names.add(key.key_of(config, source.open_pairs(config.data), model).name())
    assert len(names) == 2
