"""LPIPS against its authors' module, and diversity over the images of a prompt."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from inversion_dpo.evaluation.diversity import diversity, diversity_text, measure_of
from inversion_dpo.evaluation.samples import write_samples
from inversion_dpo.evaluation.scorers.checkpoint import Checkpoint, ScorerError
from inversion_dpo.evaluation.scorers.lpips import Lpips
from inversion_dpo.run.config import ConfigError, load_config

WIDTHS = (64, 192, 384, 256, 256)


def torchvision_alexnet():
    """The features of torchvision.models.alexnet."""
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("lpips")
    network = {f"features.{k}": v for k, v in torchvision_alexnet().state_dict().items()}
    save_file(network, place / "alexnet.safetensors")
    lin = {f"lin{k}.model.1.weight": torch.rand(1, w, 1, 1) for k, w in enumerate(WIDTHS)}
    save_file(lin, place / "lin.safetensors")
    return place


def lpips_by_hand(folder, one, two):
    """The authors' LPIPS.forward with net=alex, version 0.1, in slices."""
    from safetensors.torch import load_file

    network, lin = torchvision_alexnet(), load_file(folder / "lin.safetensors")
    weights = load_file(folder / "alexnet.safetensors")
    network.load_state_dict({k.removeprefix("features."): v for k, v in weights.items()})
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    value = 0
    with torch.no_grad():
        states = [torch.tensor(i).permute(2, 0, 1)[None] / (255 / 2) - 1 for i in (one, two)]
        states = [(s - shift) / scale for s in states]
        for k, (start, stop) in enumerate([(0, 2), (2, 5), (5, 8), (8, 10), (10, 12)]):
            states = [network[start:stop](s) for s in states]
            unit = [s / (torch.sqrt(torch.sum(s**2, dim=1, keepdim=True)) + 1e-10) for s in states]
            line = nn.functional.conv2d((unit[0] - unit[1]) ** 2, lin[f"lin{k}.model.1.weight"])
            value = value + line.mean([2, 3], keepdim=True)
    return value.item()


def picture(seed, height=64, width=80):
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height)))


def test_lpips_is_its_authors_formula(folder):
    images, measure = [picture(k) for k in range(3)], Lpips(Checkpoint("lpips", str(folder)))
    pairs = [lpips_by_hand(folder, images[a], images[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert measure.spread(images[:2]) == pytest.approx(pairs[0], rel=1e-5)
    assert measure.spread(images) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert measure.spread([images[0]] * 2) == 0 < min(pairs)


def asked(*more):
    return load_config(None, ["evaluation.scorer=lpips", *more])


def test_a_policy_that_draws_one_image_loses_diversity(folder, tmp_path):
    n = 6
    prompts, seeds = [f"p{k // 2}" for k in range(2 * n)], [*range(2 * n)]
    drawn = {"reference": [picture(k) for k in seeds], "policy": [picture(k // 2) for k in seeds]}
    files = [tmp_path / f"{name}.parquet" for name in drawn]
    for file, images in zip(files, drawn.values(), strict=True):
        write_samples(file, prompts, seeds, images, {})
    config = asked("evaluation.seeds=2", f"evaluation.checkpoints.lpips={folder}")
    found = diversity(files, config)
    row = found["diversity"]
    assert (
        row["policy"] == 0 and row["reference"] == pytest.approx(-row["gain"]) and row["gain"] < 0
    )
    kind, text = diversity_text(found | {"n_prompts": n})
    assert kind == "loss" and "less diversity" in text and diversity_text({}) is None
    assert diversity(files, load_config(None, [])) == {}


def test_what_is_missing_is_said_before_images_are_drawn(folder, tmp_path):
    at = f"evaluation.checkpoints.lpips={folder}"
    with pytest.raises(ConfigError, match=r"set evaluation.seeds=4"):
        measure_of(asked(at))
    with pytest.raises(ConfigError, match=r"checkpoints.lpips=FOLDER"):
        measure_of(asked("evaluation.seeds=2"))
    save_file({"features.0.bias": torch.zeros(1)}, tmp_path / "alexnet.safetensors")
    with pytest.raises(ScorerError, match="the folder has no lin.safetensors"):
        measure_of(asked("evaluation.seeds=2", f"evaluation.checkpoints.lpips={tmp_path}"))
    save_file({"lin0.model.1.weight": torch.zeros(1)}, tmp_path / "lin.safetensors")
    with pytest.raises(ScorerError, match=r"features.0.weight is missing"):
        measure_of(asked("evaluation.seeds=2", f"evaluation.checkpoints.lpips={tmp_path}"))
