"""Where a single process computes."""

from types import SimpleNamespace

import accelerate
import pytest
import torch

from inversion_dpo.run.processes import current_team


@pytest.mark.parametrize(
    ("device", "asked", "cpu"),
    [(None, None, 1), ("mps", None, 1), ("mps", "false", 0), ("cuda", None, 0), ("xpu", None, 0)],
)
def test_apples_gpu_is_left_out(monkeypatch, device, asked, cpu):
    """It has no float64; ACCELERATE_USE_CPU=false tries it all the same."""
    given = []

    def state(cpu):
        given.append(cpu)
        return SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if asked:
        monkeypatch.setenv("ACCELERATE_USE_CPU", asked)
    monkeypatch.setattr(accelerate, "PartialState", state)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: device is not None)
    found = device and torch.device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    assert (current_team().size, given) == (1, [cpu])
