"""Pickled checkpoints become safetensors in a process of their own, and code in them never runs."""

import os

import pytest
import torch
from safetensors.torch import load_file

from tools.convert import convert


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
def test_tensors_are_converted(tmp_path, wrap):
    state = {"scoring_head.0.weight": torch.randn(3, 2), "scoring_head.0.bias": torch.zeros(3)}
    torch.save(wrap(state), tmp_path / "head.pth")
    assert convert(tmp_path / "head.pth", tmp_path / "new" / "head.safetensors") == "2 tensors"
    found = load_file(tmp_path / "new" / "head.safetensors")
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in state.items()}


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    torch.save({"a": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb.pth is no checkpoint of tensors alone \("):
        convert(tmp_path / "bomb.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], {"a": {"b": "text"}}])
def test_what_is_no_checkpoint_is_one_line(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="more than named tensors") as error:
        convert(tmp_path / "x.pth", tmp_path / "out.safetensors")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="new .safetensors file"):
        convert(tmp_path / "x.pth", tmp_path / "x.pth")
