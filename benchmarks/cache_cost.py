"""What does a cache cost, in bytes and in time? ``python benchmarks/cache_cost.py``.

Sizes, for networks of published configurations: bytes of a pair as the cache was first stored
(every state and every prediction in float32, one condition for each pair) and as it is now; and
for ``objective.path=line``, which keeps the image and its recovered noise alone. One
pair of that shape is inverted under a stand-in for the network that answers in bfloat16, stored,
weighed, and read again: its states must have the same bits.

Times (``--times``): a step of the embedded model with the cache on the disk, out of the system's
memory before every step, against the same step with its data ready in memory. The same steps are
taken again and again, in turns. Of each the least time counts, since other programs only add to
it; printed are their means and the ratio of these: of the time that passed, and of the processors'
time in all threads. The last column is the processors' time of reading a batch and making its
states, without any step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cards import LARGE, SD35
from model_cost import SDXL
from safetensors.torch import load_file, save_file
from torch import Tensor

from inversion_dpo.maths.inversion import follow, invert
from inversion_dpo.maths.records import Extent, Grid, Levels
from inversion_dpo.run.config import load_config
from inversion_dpo.training import step as training
from inversion_dpo.training.recipe import prepare, set_up
from inversion_dpo.training.session import Session
from inversion_dpo.training.states import stored_positions
from inversion_dpo.trajectories.storing import endpoint_size, form_of, kept_steps, packed

FLUX = {"in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768}  # packed 2x2
HALF = (16, 16)  # bits of predictions
Shape = tuple[int, int, int]


def shapes(side: int) -> dict[str, tuple[Shape, int]]:
    """Latent and bytes of a condition in bfloat16 of each network, for images of so many pixels."""
    small, sd3 = side // 8, SD35 | LARGE
    pooled = SDXL["projection_class_embeddings_input_dim"] - 6 * SDXL["addition_time_embed_dim"]
    return {
        "SDXL": ((4, small, small), 2 * (77 * SDXL["cross_attention_dim"] + pooled)),
        "Stable Diffusion 3.5": (
            (sd3["in_channels"], small, small),
            2 * ((77 + 256) * sd3["joint_attention_dim"] + sd3["pooled_projection_dim"]),
        ),
        "FLUX.1": (
            (FLUX["in_channels"] // 4, small, small),
            2 * (512 * FLUX["joint_attention_dim"] + FLUX["pooled_projection_dim"]),
        ),
    }


def first_form(latent: int, text: int, states: int) -> int:
    """Bytes of a pair in layout 6: x_0, states and predictions of two images in float32."""
    return 2 * 4 * latent * (1 + 2 * states) + text


def written(shape: Shape, steps: int, keep: int | None, folder: Path) -> int:
    """Store a pair, and weigh it without its condition; its states must come back."""
    sigma = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    grid = Grid(1000 * sigma, Levels(1 - sigma, sigma))
    form = form_of(Extent(last=steps), (keep, 1, steps) if keep else None, 1.0, 1.0)
    x_0 = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x + t[0] / 1000).bfloat16().float()

    path = invert(x_0, grid, predict, "flow_prediction")
    chosen = kept_steps([0], form) if keep else None
    path_file = folder / "shard.safetensors"
    save_file({"clean": x_0, **packed(path, form, None, chosen, sides=2)}, path_file)
    stored = load_file(path_file)
    start, x, top = torch.zeros(2).long(), stored["clean"], steps
    moves = list(stored["predictions"][:-1])
    if chosen is not None:
        start, x, top = chosen[:, -2].repeat(2), stored["anchors"][-1], int(chosen[0, -1])
        moves = [stored["predictions"][-2]]
    again, _ = follow(x, moves, start, grid, "flow_prediction", refined=False)
    if not torch.equal(again, path.states[top]):
        raise SystemExit("a state has other bits than the inversion gave")
    return path_file.stat().st_size


def sizes(side: int, steps: int) -> Iterator[str]:
    """Write the table of bytes, in megabytes of 10^6."""
    yield f"{side} px, N = {steps}; MB a pair, and TB for a million pairs\n"
    yield (
        "| network | states | before | now | of before | written | a million | "
        "if 10 pairs share a prompt |"
    )
    yield "|---" * 8 + "|"
    with tempfile.TemporaryDirectory() as folder:
        for name, (shape, text) in shapes(side).items():
            latent = shape[0] * shape[1] * shape[2]
            for keep in (None, 4):
                form = form_of(Extent(last=steps), (keep, 1, steps) if keep else None, 1.0, 1.0)
                old, new = first_form(latent, text, keep or steps), form.size(latent, HALF) + text
                there = written(shape, steps, keep, Path(folder)) + text
                yield (
                    f"| {name} | {f'`keep={keep}`' if keep else 'all'} | {old / 1e6:.2f} | "
                    f"{new / 1e6:.2f} | {new / old:.3f} | {there / 1e6:.2f} | {new / 1e6:.2f} | "
                    f"{(new - 0.9 * text) / 1e6:.2f} |"
                )
    yield "\nWith objective.path=line or known: x_0 and one noise of each image in 16 bits\n"
    yield "| network | MB a pair | TB for a million | if 10 pairs share a prompt |"
    yield "|---" * 4 + "|"
    for name, (shape, text) in shapes(side).items():
        whole = (endpoint_size(shape[0] * shape[1] * shape[2]) + text) / 1e6
        yield f"| {name} | {whole:.2f} | {whole:.2f} | {whole - 0.9 * text / 1e6:.2f} |"
    yield "\nMB a pair with all states, where predictions are not numbers of 16 bits alone:\n"
    yield "| network | refined once | stored under guidance | all under guidance or float32 |"
    yield "|---" * 4 + "|"
    for name, (shape, text) in shapes(side).items():
        latent = shape[0] * shape[1] * shape[2]
        cells = [
            form_of(Extent(last=steps, iterations=k), None, 1.0, g).size(latent, bits) + text
            for k, g, bits in ((1, 1.0, HALF), (0, 5.0, (32, 16)), (0, 1.0, (32, 32)))
        ]
        yield f"| {name} | {' | '.join(f'{cell / 1e6:.2f}' for cell in cells)} |"


class InMemory:
    """Batches of known steps, ready in memory; everything else is the cache's."""

    def __init__(self, session: Session, numbers: range) -> None:
        self.cache, self.batches = session.cache, dict[tuple[int, ...], Any]()
        begun = time.process_time()
        for number in numbers:
            batch, generators = training.part_of_step(session, number, 0)
            pairs = [pair for pair, _ in batch]
            states = self.cache.states(
                pairs, stored_positions(session, generators) or [], session.plan.target
            )
            self.batches[tuple(pairs)] = self.cache.condition(pairs), states
        self.of_batch = (time.process_time() - begun) / len(numbers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def read_ahead(self, *_: Any) -> None:
        """Do nothing."""

    def condition(self, pairs: list[int]) -> dict[str, Tensor]:
        """Hand out what is there."""
        return dict(self.batches[tuple(pairs)][0])

    def states(self, pairs: list[int], *_: Any) -> Any:
        """Hand out what is there."""
        return self.batches[tuple(pairs)][1]


def forget(folder: Path) -> None:
    """Have the system drop the files from its memory."""
    for path in folder.glob("shard-*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def times(pairs: int, preset: str, blocks: int, length: int, root: Path) -> str:
    """Write one row: seconds of a step with data on the disk and in memory."""
    numbers = range(length + 2)
    settings = ["data.limit=200", f"training.batch_size={pairs}", f"training.steps={len(numbers)}"]
    config = load_config(preset, settings)
    session = set_up(config, prepare(config, root))
    disk, memory = session.cache, InMemory(session, numbers)
    found: dict[str, list[list[tuple[float, float]]]] = {"disk": [], "memory": []}

    def block(cache: Any) -> list[tuple[float, float]]:
        session.cache, taken = cache, []
        for number in numbers[:-1]:
            forget(disk.folder)
            begun, used = time.perf_counter(), time.process_time()
            training.step(session, number, 1e-9)
            taken.append((time.perf_counter() - begun, time.process_time() - used))
        return taken[1:]  # what came before has read nothing ahead for the first

    block(disk)
    for k in range(blocks):
        ways = [("disk", disk), ("memory", memory)]
        for name, cache in ways if k % 2 else ways[::-1]:
            found[name].append(block(cache))
    cells = []
    for clock in (0, 1):
        least = {
            n: statistics.mean(min(t[clock] for t in same) for same in zip(*blocks_of, strict=True))
            for n, blocks_of in found.items()
        }
        cells += [f"{1e3 * seconds:.1f}" for seconds in least.values()]
        cells.append(f"{least['disk'] / least['memory']:.3f}")
    return f"| {pairs} | {' | '.join(cells)} | {1e3 * memory.of_batch:.1f} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--times", action="store_true", help="measure steps, not bytes")
    parser.add_argument("--preset", default="taste")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--length", type=int, default=8, help="steps of a block")
    args = parser.parse_args()
    if not args.times:
        return print("\n".join(sizes(args.resolution, args.steps)))
    print(
        "| pairs | a step from the disk, ms | from memory, ms | ratio | processor time, disk, ms | "
        "processor time, memory, ms | ratio | reading alone, ms |\n" + "|---" * 8 + "|"
    )
    with tempfile.TemporaryDirectory() as root:
        for pairs in (1, 8, 32):
            print(times(pairs, args.preset, args.blocks, args.length, Path(root)), flush=True)


if __name__ == "__main__":
    main()
