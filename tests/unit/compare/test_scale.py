"""benchmarks/scale.py: what its rounds train on is what the package trains on, without a GPU."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inversion_dpo.compare.runs import seeded
from inversion_dpo.evaluation.prompt_sets import read_prompts
from inversion_dpo.run.config import load_config
from inversion_dpo.run.fields import PolicyConfig
from tests.sessions import sampled
from tests.slow import slow_but

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))  # its processes import it too
SCRIPT: Any = importlib.import_module("scale")
sys.path.pop(0)


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    made = SCRIPT.make_world(workers=1)
    yield made
    made.checkers.shutdown()


@pytest.fixture(scope="module")
def settings() -> Any:
    return SCRIPT.Settings(prompts=6, samples=4, steps=2, batch=2, rate=1e-3, least=0.05)


@pytest.fixture(scope="module")
def pairs(world: Any, settings: Any) -> Any:
    return SCRIPT.make_pairs(world, settings, 7, guidance=2.0)[0]


def test_prompts_are_distinct_and_as_hard_as_asked() -> None:
    found = SCRIPT.asked(40, 0.25, 3)
    assert len({g.caption for g in found}) == 40
    assert sum(len(g.items) > 2 for g in found) == 10
    assert min(len(g.items) for g in found) == 2


def test_samples_are_those_of_the_pipeline(world: Any) -> None:
    """The same noise and guidance give the pipeline's own pictures."""
    (graph,) = SCRIPT.asked(1, 0.0, 3)
    noise = SCRIPT.normal(1, 5)
    for guidance in (1.0, 2.0):
        (image,), scores = world.draw([graph], noise, guidance, stored=False)
        expected = world.model.pipeline(
            graph.caption,
            latents=noise,
            num_inference_steps=10,
            guidance_scale=guidance,
            output_type="np",
        ).images[0]
        assert abs(image / 255 - expected).max() < 0.005
        assert 0 <= scores["composition"][0] <= 1


@pytest.mark.parametrize("kind", slow_but([], ["trajectory", "noise"]))
def test_the_reference_is_as_wrong_as_it_is_said_to_be(
    world: Any, settings: Any, pairs: Any, kind: str
) -> None:
    """The network itself has exactly the reference's errors at the points of any batch."""
    points = (
        SCRIPT.trajectory_points(world, settings, pairs, 7)
        if kind == "trajectory"
        else SCRIPT.noise_points(world, settings, pairs)
    )
    level = torch.tensor([points.low, points.high, points.low + 1])
    pair = torch.tensor([1, 0, 1])
    x_t, t, target, scale, e_ref = points.at(level, pair)
    condition = {"encoder_hidden_states": pairs.hidden[pairs.prompt[pair]].repeat(2, 1, 1)}
    with torch.no_grad():
        found = world.model.predict(world.model.pipeline.unet, x_t, t, condition)
    error = scale * (target - found).square().flatten(1).mean(1)
    assert torch.allclose(error, e_ref, rtol=1e-3)
    assert e_ref.min() > 0
    # x_t and the target lie on a line through the clean images, winners first
    alpha = world.model.schedule.levels.alpha[t.clamp(max=999)].float().reshape(-1, 1, 1, 1)
    clean = alpha * x_t - (1 - alpha**2).sqrt() * target
    assert torch.allclose(clean, pairs.x_0[:, pair].flatten(0, 1), atol=1e-3)


@pytest.mark.slow  # by default it is enough that the script samples as the pipeline does
@pytest.mark.parametrize(
    ("method", "loss", "start"), [("x0", "dpo", math.log(2)), ("kto", "kto", 0.5)]
)
def test_training_starts_at_the_reference_and_moves(
    world: Any,
    settings: Any,
    pairs: Any,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    loss: str,
    start: float,
) -> None:
    losses, real = [], getattr(SCRIPT, loss)

    def told(errors: Any, s: Any) -> Any:
        output = real(errors, s)
        losses.append(output.loss.mean().item())
        return output

    monkeypatch.setattr(SCRIPT, loss, told)
    settings = replace(settings, method=method)
    points = (
        SCRIPT.trajectory_points(world, settings, pairs, 7)
        if method == "x0"
        else SCRIPT.noise_points(world, settings, pairs)
    )
    policy = SCRIPT.LoraPolicy(
        world.model, PolicyConfig(rank=2, alpha=2, target_modules=["to_q"]), 0
    )
    before = {n: p.detach().clone() for n, p in policy.trainable().items()}
    try:
        SCRIPT.train(world, settings, pairs, policy, points, 7)
        assert len(losses) == 2 and losses[0] == pytest.approx(start, abs=1e-3)
        assert any(not torch.equal(p, before[n]) for n, p in policy.trainable().items())
    finally:
        policy.network.unload_lora()


@pytest.mark.slow  # trains and samples
def test_held_out_scores_are_those_of_the_program(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample as ``evaluate`` draws it, the best of two as ``compare`` draws its samples."""
    config = load_config("composition", ["evaluation.limit=3"])
    monkeypatch.setattr(SCRIPT, "NOISES", 2)
    monkeypatch.setattr(SCRIPT, "CONFIG", config)
    prompts = read_prompts(config.evaluation.prompts, 3)
    drawn = [
        sampled(seeded(config, offset), None, tmp_path, prompts, "held out", repeats=2)[1]
        for offset in (0, 100_000)
    ]
    one, best = (SCRIPT.held_out(world, config.evaluation.prompts, n) for n in (1, 2))
    for name, values in one.items():
        assert values == pytest.approx(drawn[0][name].reshape(3, 2), abs=1e-3)
    expected = np.maximum(*(d["composition"] for d in drawn)).reshape(3, 2)
    assert best["composition"] == pytest.approx(expected, abs=1e-3)
    found = SCRIPT.summary(one)
    assert found["by noise"] == pytest.approx(one["composition"].mean(0))
    assert found["by prompt"] == pytest.approx(one["composition"].mean(1))


def test_table_has_intervals_over_seeds_and_the_difference_over_prompts() -> None:
    def scores(*by_prompt: float) -> dict[str, Any]:
        mean = sum(by_prompt) / 2
        same = dict.fromkeys(("sg_iou", "exact", "warmth"), 0.5)
        return same | {"composition": mean, "by prompt": by_prompt, "by noise": [mean, mean]}

    seeds = [[{"round": 1, "pairs": 10, "p": scores(*c)}] for c in ((0.6, 0.8), (0.7, 0.9))]
    base = {"p": {"1": scores(0.5, 0.5), "4": scores(0.6, 0.7)}}
    table = SCRIPT.table(seeds, base, "p")
    assert "| round 1 | 10 | 0.750 [0.115, 1.385] |" in table
    assert "| reference, best of 4 | | 0.650 [0.650, 0.650] | 0.500 |" in table
    # by prompt .65 and .85, less .6 and .7: .1 with a standard error of .05, t of 12.706
    assert "over prompts: 0.100 [-0.535, 0.735]" in table
    assert "| round 1 | 10 | 0.700 |" in SCRIPT.table(seeds[:1], base, "p")
