"""Compile the blocks that a network repeats, each kind once (regional compilation).

A block is compiled in its place: names of weights, checkpoints and exports stay what they are.
Source: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator

import torch
from torch import nn

from inversion_dpo.models.base import Condition, DiffusionModel, ModelError, network_of
from inversion_dpo.run.fields import ConfigError

FORMS = 64  # of one block's code: widths, adapters on and off, with and without gradient, sizes
LONG = "a red square to the left of a blue circle"  # a text that is longer than none


def check_compile(how: str, device: torch.device, processes: int = 1) -> None:
    """Refuse compilation that would change nothing, is not tried, or has no compiler.

    Args:
        how: one of ``training.compile`` but ``no``.
        device: where the network computes.
        processes: of the launch.

    Raises:
        ConfigError: names the remedy.
    """
    if processes > 1:
        raise ConfigError(
            f"training.compile={how} is not tried with several processes: set training.compile=no"
        )
    if how == "reduce-overhead" and device.type != "cuda":
        raise ConfigError(
            "training.compile=reduce-overhead records CUDA graphs, and has no effect on this "
            f"device, {device.type}: set training.compile=default or no"
        )
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and not (shutil.which(compiler) or shutil.which("clang++")):
        raise ConfigError(
            f"training.compile={how} needs a C++ compiler, and there is no {compiler}: install one "
            "(Debian: g++), or set training.compile=no"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(f"training.compile={how} needs `pip install triton`, or set it to no")


def compile_model(model: DiffusionModel, how: str, device: torch.device, processes: int) -> None:
    """Check that compilation can be, and have the model's network compiled.

    Args:
        model: with its text encoders.
        how: one of ``training.compile`` but ``no``.
        device: of the network.
        processes: of the launch.
    """
    check_compile(how, device, processes)
    fixed = model.edits != "reads" and one_length(model.empty(), model.condition([LONG]))
    compile_blocks(network_of(model), how, fixed)


def compile_blocks(network: nn.Module, how: str, fixed: bool) -> None:
    """Have a network's blocks compiled at their first use.

    Args:
        network: whose weights stay where they are.
        how: ``default``, or ``reduce-overhead`` for CUDA graphs.
        fixed: whether all texts have one length. Then each size of pictures gets kernels of its
            own; else torch makes one form for all, once it has seen two.

    Raises:
        ModelError: the network repeats no block.
    """
    found = list(blocks(network))
    if not found:
        raise ModelError(f"{type(network).__name__} repeats no block: set training.compile=no")
    from torch._dynamo import config

    config.recompile_limit = max(FORMS, config.recompile_limit)
    for block in found:
        block.compile(mode=how, dynamic=False if fixed else None)


def one_length(empty: Condition, other: Condition) -> bool:
    """Tell from the condition of no text and of another whether all have one length."""
    return bool(empty) and all(empty[k].shape[1:] == other[k].shape[1:] for k in empty)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Find the blocks that diffusers names as repeated, or else those in the network's lists."""
    if names := getattr(network, "_repeated_blocks", None):
        yield from (m for m in network.modules() if type(m).__name__ in names)
        return
    for part in network.children():
        yield from part if isinstance(part, nn.ModuleList) else ()


def seconds_compiling() -> float:
    """Sum the seconds that this process has spent in torch's compiler."""
    from torch._dynamo.utils import cumulative_time_spent_ns as spent

    return sum(spent.get(k, 0.0) for k in ("entire_frame_compile", "entire_backward_compile")) / 1e9
