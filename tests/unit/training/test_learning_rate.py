"""The learning rate of every step, against diffusers' own schedulers."""

import pytest
import torch
from diffusers.optimization import get_scheduler

from inversion_dpo.run.config import ConfigError, load_config
from inversion_dpo.run.fields import TrainingConfig
from inversion_dpo.training.recipe import rate_at

DIFFUSERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize("name", DIFFUSERS)
@pytest.mark.parametrize(("steps", "warmup"), [(50, 8), (30, 0), (6, 10)])
def test_rates_are_those_of_diffusers(name: str, steps: int, warmup: int) -> None:
    """Equal after the warm-up; in it ours is one step ahead, so as not to begin at 0."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler(
        DIFFUSERS[name], optimizer, num_warmup_steps=warmup, num_training_steps=steps
    )
    t = TrainingConfig(steps=steps, warmup=warmup, learning_rate=0.3, lr_scheduler=name)
    expected = []
    for _ in range(steps + 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = [rate_at(step, t) for step in range(steps)]
    assert ours[warmup:] == pytest.approx(expected[warmup:steps])
    rising = max(0, min(warmup, steps) - 1)
    assert ours[:rising] == pytest.approx(expected[1 : rising + 1])


def test_hand_computed_rates() -> None:
    """Four steps after two of warm-up, by hand."""
    t = TrainingConfig(steps=6, warmup=2, learning_rate=1.0, lr_scheduler="linear")
    assert [rate_at(s, t) for s in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_an_unknown_scheduler_is_refused() -> None:
    """By the key's name and what there is."""
    with pytest.raises(ConfigError, match=r"training\.lr_scheduler.*constant, linear, cosine"):
        load_config("composition", ["training.lr_scheduler=cosin"])
