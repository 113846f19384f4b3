"""What a training step costs, in one run: ``python benchmarks/step_cost.py``.

Times, in turn and on the same batch size: the bare policy forward and backward, our step on
cached trajectories, and our Diffusion-DPO step (which evaluates the reference). Prints medians
and ratios, then the peak memory of a step for several numbers of inversion steps N.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from inversion_dpo.run.config import Config, load_config
from inversion_dpo.training import step as training
from inversion_dpo.training.recipe import prepare, set_up
from inversion_dpo.training.session import Session

PAIRS = 32


def session_of(root: Path, *overrides: str) -> Session:
    """Make a ready session on the embedded pipeline and a few of its pairs."""
    config = config_of(*overrides)
    return set_up(config, prepare(config, root))


def config_of(*overrides: str) -> Config:
    """Load the taste preset, on few pairs."""
    settings = ["data.limit=96", f"training.batch_size={PAIRS}", *overrides]
    return load_config("taste", settings)


def bare(session: Session) -> Callable[[int], None]:
    """Policy forward and backward on tensors in memory, and the optimizer's step."""
    pairs = session.train_pairs[:PAIRS]
    points = session.cache.states(pairs, [5] * PAIRS, "x0")
    condition = session.cache.condition(pairs)

    def step(_: int) -> None:
        session.optimizer.zero_grad()
        eps = session.model.predict(session.network, points.x_t, points.timesteps, condition)
        (eps - points.target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(session.policy.trainable().values(), 1.0)
        session.optimizer.step()

    return step


def whole(session: Session) -> Callable[[int], None]:
    """Take the trainer's own step, everything included."""

    def step(number: int) -> None:
        training.step(session, number, 1e-5)

    return step


def compare(root: Path, repeats: int) -> None:
    """Interleave the three steps and print medians and ratios."""
    inversion = session_of(root)
    diffusion = session_of(root, "objective.name=diffusion_dpo")
    steps = {
        "bare forward + backward": bare(session_of(root)),
        "inversion-dpo step": whole(inversion),
        "diffusion-dpo step": whole(diffusion),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step(number)
            if number >= 2:
                times[name].append(time.perf_counter() - start)
    for name, values in times.items():
        low, mid, high = (f(values) * 1e3 for f in (min, statistics.median, max))
        print(f"{name:26s} median {mid:7.1f} ms (min {low:.1f}, max {high:.1f}, n {len(values)})")
    ours, base, theirs = (
        times[k] for k in ("inversion-dpo step", "bare forward + backward", "diffusion-dpo step")
    )
    for label, other in (("bare", base), ("diffusion-dpo", theirs)):
        ratio = statistics.median(a / b for a, b in zip(ours, other, strict=True))
        print(f"inversion-dpo / {label}: {ratio:.3f} (median of paired ratios)")


def peak(steps: int) -> None:
    """Print this process's peak memory growth over a few training steps at N inversion steps."""
    with tempfile.TemporaryDirectory() as folder:
        session = session_of(Path(folder), f"inversion.steps={steps}", "data.limit=48")
        run = whole(session)
        gc.collect()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(4):
            run(number)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"N = {steps:3d}: peak {after / 1024:.0f} MiB, of which training added "
            f"{(after - before) / 1024:.0f} MiB"
        )


def main() -> None:
    """Run all, or one memory measurement in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--peak", type=int, help="only: peak memory at this N")
    args = parser.parse_args()
    if args.peak:
        return peak(args.peak)
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), args.repeats)
    for steps in (10, 20, 80):
        subprocess.run([sys.executable, __file__, "--peak", str(steps)], check=True)


if __name__ == "__main__":
    main()
