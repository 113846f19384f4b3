"""Time and memory of inversion and training against what they grow with.

``python benchmarks/cost_curves.py`` measures, with one thing varied at a time, the number of pairs,
the number of inversion steps N and the number of processes on the embedded model, and the
resolution on a tiny random pipeline of Stable Diffusion's classes. Each point is measured in
processes of its own, of one thread, inversion and training apart, so that peak memory is theirs
(above what imports and model take; of two processes the first one's). Points go to
--results as they come, and those that are there are not measured again. Prints tables, and draws
--picture. What the data cost to read is in reader_cost.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["inversion_dpo.training.step"])
WARM, STEPS = 3, 12  # steps before those that are timed; all steps

EMBEDDED = ("inversion.t_start=0", "training.batch_size=16")
TINY = (
    "data.limit=16",
    "inversion.steps=5",
    "inversion.batch_size=8",
    "policy.rank=4",
    "training.batch_size=4",
)
Point = tuple[str, int]  # what is varied, and its value
POINTS: list[Point] = [
    *(("resolution", n) for n in (64, 128, 256, 384)),
    *(("N", n) for n in (5, 10, 20, 40, 80)),
    *(("pairs", n) for n in (50, 100, 200, 400)),
    ("processes", 1),
    ("processes", 2),
]


def settings(kind: str, value: int, model: str) -> list[str]:
    """Return the overrides of a point."""
    if kind == "resolution":
        return [f"model.path={model}", f"model.resolution={value}", *TINY]
    pairs, steps = (value if kind == "pairs" else 50), (value if kind == "N" else 20)
    return [*EMBEDDED, f"data.limit={pairs}", f"inversion.steps={steps}"]


def memory() -> float:
    """MB: the most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def invert(preset: str | None, overrides: list[str], cache: Path) -> dict[str, float]:
    """Seconds and memory of inverting all pairs, and the bytes that they leave."""
    from inversion_dpo.run.config import load_config
    from inversion_dpo.training.recipe import prepare

    before, begun = memory(), time.perf_counter()
    prepare(load_config(preset, overrides), cache)
    seconds = time.perf_counter() - begun
    size = sum(p.stat().st_size for p in cache.rglob("*.safetensors"))
    return {"invert_s": seconds, "invert_mb": memory() - before, "cache_mb": size / 1e6}


def train(preset: str | None, overrides: list[str], cache: Path) -> dict[str, float]:
    """Median milliseconds of a step, and memory, of a training on what was inverted."""
    from inversion_dpo.run.config import load_config
    from inversion_dpo.training.recipe import prepare, set_up
    from inversion_dpo.training.step import step

    config, times = load_config(preset, overrides), list[float]()
    session = set_up(config, prepare(config, cache))
    before = memory()
    for number in range(STEPS):
        begun = time.perf_counter()
        step(session, number, 1e-5)
        times.append(time.perf_counter() - begun)
    return {"step_ms": statistics.median(times[WARM:]) * 1e3, "train_mb": memory() - before}


def processes(point: Point) -> int:
    """How many a point has."""
    return point[1] if point[0] == "processes" else 1


def child(
    work: Any, arguments: tuple[Any, ...], rank: int, point: Point, port: int, out: Any
) -> None:
    """One process of a point; the first one sends what it measured."""
    import torch

    torch.set_num_threads(1)
    size = processes(point)
    if size > 1:  # what a launcher sets
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
    found = work(*arguments)
    if rank == 0:
        out.send(found)


def in_processes(work: Any, arguments: tuple[Any, ...], point: Point) -> dict[str, float]:
    """Run a measurement in as many new processes as the point has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here, there = CONTEXT.Pipe(False)
    members = [
        CONTEXT.Process(target=child, args=(work, arguments, rank, point, port, there))
        for rank in range(processes(point))
    ]
    for member in members:
        member.start()
    there.close()
    try:
        found: dict[str, float] = here.recv()
    except EOFError:  # nobody is left who could send
        raise SystemExit(f"{point}: failed") from None
    for member in members:
        member.join(60)
    if any(member.exitcode for member in members):
        raise SystemExit(f"{point}: failed")
    return found


def measure(point: Point, model: str) -> dict[str, Any]:
    """Invert, then train, each in processes of its own."""
    kind, value = point
    preset = None if kind == "resolution" else "taste"
    with tempfile.TemporaryDirectory() as folder:
        arguments = (preset, settings(kind, value, model), Path(folder))
        found = in_processes(invert, arguments, point) | in_processes(train, arguments, point)
    return {"point": list(point), **{k: round(v, 2) for k, v in found.items()}}


def table(rows: list[dict[str, Any]], kind: str) -> str:
    """Format the points of one curve as Markdown."""
    head = f"| {kind} | inversion, s | its memory, MB | cache, MB | a step, ms | its memory, MB |"
    lines = [head, "|---|---|---|---|---|---|"]
    for row in rows:
        if row["point"][0] == kind:
            cells = (row[k] for k in ("invert_s", "invert_mb", "cache_mb", "step_ms", "train_mb"))
            lines.append(f"| {row['point'][1]} | " + " | ".join(f"{c:.4g}" for c in cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of inversion and of a step, and memory of both, against pairs, N and resolution."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    for column, kind in zip(axes.T, ("pairs", "N", "resolution"), strict=True):
        found = [r for r in rows if r["point"][0] == kind]
        x = [r["point"][1] for r in found]
        for key, label in (("invert_s", "inversion, s"), ("step_ms", "a step, ms")):
            column[0].plot(x, [r[key] for r in found], "o-", label=label)
        for key, label in (("invert_mb", "inversion"), ("train_mb", "training")):
            column[1].plot(x, [r[key] for r in found], "o-", label=f"memory of {label}, MB")
        for axis in column:
            axis.set(xscale="log", xlabel=kind)
            axis.set_xticks(x, map(str, x))
            axis.xaxis.minorticks_off()
            axis.legend(fontsize=8)
        column[0].set_yscale("log")
        column[1].set_ylim(bottom=0)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure what is missing, then print and draw all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("cost_curves.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("cost-curves.png"))
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no point after so long")
    arguments = parser.parse_args()
    file, begun = arguments.results, time.monotonic()
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model")
        words = [sys.executable, "-m", "tools.tiny", "sd15", model]
        subprocess.run(words, cwd=Path(__file__).parents[1], check=True, capture_output=True)
        for point in POINTS:
            done = [*point] in [r["point"] for r in rows]
            if done or time.monotonic() - begun > arguments.seconds:
                continue
            rows.append(measure(point, model))
            with file.open("a") as log:
                log.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], file=sys.stderr, flush=True)
    if len(rows) == len(POINTS):
        for kind in dict.fromkeys(point[0] for point in POINTS):
            print(table(rows, kind), end="\n\n")
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
