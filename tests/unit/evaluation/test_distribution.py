"""FID and KID against their formulas in NumPy."""

import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn

from inversion_dpo.evaluation.distribution import (
    BATCH,
    ClipFeatures,
    Images,
    distances,
    images_in,
    measure,
    read_images,
)
from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint
from inversion_dpo.evaluation.scorers.clip import ClipScorer
from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.run.folder import BusyError, occupied
from tools.tiny.scorers import write_tiny_scorer

pytest.importorskip("torchmetrics")


class Quarters(nn.Module):
    """Mean of each quarter's red and green: eight features."""

    def forward(self, images):
        x = images.float() / 255
        return nn.functional.adaptive_avg_pool2d(x[:, :2], 2).flatten(1)


def pictures(seed, count, low=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(low, 256, (8, 8, 3), dtype=np.uint8) for _ in range(count)]


def features(images):
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return Quarters()(stacked).numpy().astype(np.float64)


def test_fid_is_its_formula():
    real, made = pictures(0, 60), pictures(1, 50, low=60)
    x, y = features(real), features(made)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    found = distances(real, made, Quarters())
    assert found["fid"] == pytest.approx(expected, rel=1e-3)


def test_kid_is_its_formula():
    """With as many images as a subset holds, every subset is the whole set."""
    real, made = pictures(2, 40), pictures(3, 40, low=60)
    x, y = features(real), features(made)
    k = [(p @ q.T / 8 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y))]
    n = 40
    within = sum((m.sum() - np.trace(m)) / (n * (n - 1)) for m in k[:2])
    found = distances(real, made, Quarters())
    assert found["kid"] == pytest.approx(within - 2 * k[2].mean(), rel=1e-3)
    assert found["kid_std"] == pytest.approx(0, abs=1e-6)


def test_the_same_images_are_at_distance_zero():
    real = pictures(4, 50)
    assert distances(real, real, Quarters())["fid"] == pytest.approx(0, abs=1e-3)


def test_images_of_several_sizes(tmp_path):
    folder = write_tiny_scorer("clip", tmp_path / "clip")
    extractor = ClipFeatures(ClipScorer(Checkpoint("clip", str(folder))))
    mixed = [*pictures(5, 3), *[np.tile(p, (2, 3, 1)) for p in pictures(6, 3)], *pictures(7, 2)]
    found = distances(mixed, pictures(8, 6), extractor)
    assert np.isfinite(list(found.values())).all()


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="two images"):
        distances(pictures(0, 1), pictures(0, 5), Quarters())
    with pytest.raises(ConfigError, match=r"torchmetrics\[image\]"):
        distances(pictures(0, 3), pictures(0, 5), 2048)
    with pytest.raises(ConfigError, match="holds no PNG"):
        images_in(tmp_path)
    with pytest.raises(ConfigError, match="none is no folder: give one with real images"):
        images_in(tmp_path / "none")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="clip, inception"):
        measure(tmp_path, None, tmp_path, "vgg")
    with pytest.raises(ConfigError, match=r"torchmetrics\[image\]"):  # before it samples
        measure(tmp_path, load_config("taste", []), tmp_path, "inception")


def test_hidden_files_are_left_out_and_counted(tmp_path, caplog):
    Image.fromarray(pictures(0, 1)[0]).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"Mac OS X")
    assert [image.shape for image in read_images(images_in(tmp_path))] == [(8, 8, 3)]
    assert "1 hidden file left out" in caplog.text


def test_a_run_in_use_is_not_sampled_at_the_same_time(tmp_path, monkeypatch):
    module = "inversion_dpo.evaluation.distribution"
    for name in ("settled", "side", "read_prompts"):
        monkeypatch.setattr(f"{module}.{name}", lambda config, *_: config)
    monkeypatch.setattr(f"{module}.sampled_file", None)
    clip = write_tiny_scorer("clip", tmp_path / "clip")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    config = load_config("taste", [f"evaluation.checkpoints.clip={clip}"])
    (tmp_path / "run").mkdir()
    with occupied(tmp_path / "run"), pytest.raises(BusyError, match="in use by another run"):
        measure(tmp_path / "run", config, tmp_path, "clip")


def test_images_are_decoded_a_batch_at_a_time_and_count_the_same():
    made, alive = pictures(1, 6 * BATCH, low=60), []

    def decoded():
        for number, image in enumerate(made):
            alive.append(weakref.ref(copy := image.copy()))
            assert sum(ref() is not None for ref in alive) <= 2 * BATCH + 2, number
            yield copy
            del copy

    real = pictures(0, 60)
    found = distances(real, Images(len(made), decoded), Quarters())
    assert found["fid"] == distances(real, made, Quarters())["fid"]
