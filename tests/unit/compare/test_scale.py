"""benchmarks/scale.py: what its rounds train on is what the package trains on, without a GPU."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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
    return SCRIPT.Settings(prompts=6, samples=4, steps=2, batch=2, rate=1e-3, least=0.05, watch=1)


@pytest.fixture(scope="module")
def pairs(world: Any, settings: Any) -> Any:
    return SCRIPT.make_pairs(world, settings, seed=7)[0]


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
            graph.caption, latents=noise, num_inference_steps=10, guidance_scale=guidance,
            output_type="np",
        ).images[0]  # fmt: skip
        assert abs(image / 255 - expected).max() < 0.005
        assert 0 <= scores["composition"][0] <= 1


@pytest.mark.parametrize("kind", ["trajectory", "noise"])
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


@pytest.mark.parametrize(
    ("method", "loss", "start"), [("x0", "dpo", math.log(2)), ("kto", "kto", 0.5)]
)
def test_training_starts_at_the_reference_and_keeps_the_best(
    world: Any, settings: Any, pairs: Any, monkeypatch: pytest.MonkeyPatch, method: str, loss: str,
    start: float,
) -> None:  # fmt: skip
    """Of two looks the first thinks better: the policy after one step is what remains."""
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
    policy = SCRIPT.LoraPolicy(world.model, 2, 2, ["to_q"], 0)
    seen: list[dict[str, torch.Tensor]] = []

    def judge() -> float:
        seen.append({n: p.detach().clone() for n, p in policy.trainable().items()})
        return -float(len(seen))

    try:
        thought = SCRIPT.train(world, settings, pairs, policy, points, 7, judge)
        assert thought == [-1.0, -2.0]
        assert losses[0] == pytest.approx(start, abs=1e-3)
        assert any(not torch.equal(seen[0][n], seen[1][n]) for n in seen[0])
        assert all(torch.equal(p, seen[0][n]) for n, p in policy.trainable().items())
    finally:
        policy.network.unload_lora()


def test_table_has_intervals_over_seeds() -> None:
    row = {"round": 1, "pairs": 10, "p": dict.fromkeys(("sg_iou", "exact", "warmth"), 0.5)}
    rows = [[row | {"p": row["p"] | {"composition": c}}] for c in (0.7, 0.8)]
    last = SCRIPT.table(rows, "p").splitlines()[-1]
    assert last.startswith("| 1 | 10 | 0.750 [0.115, 1.385] |")
    assert SCRIPT.table(rows[:1], "p").splitlines()[-1].startswith("| 1 | 10 | 0.700 |")
