"""What pairs cost before any network runs: ``python benchmarks/reader_cost.py [--most 100000]``.

Simulated rows: two 32x32 JPEG images, a caption and a label, in one Parquet file. Each size is read
in a process of its own, so that its peak memory is its own: once as training reads it (every image
decoded, hashed and checked). Beside it, what a training of so many pairs does with their numbers:
the order of an epoch, and one step's batch once the order is known.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def write(path: Path, rows: int, group: int = 1000) -> None:
    """Rows in groups, so that the file is written in little memory; the groups' images recur."""
    rng = np.random.default_rng(0)
    images = [_jpeg(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(2 * group)]
    writer = None
    for start in range(0, rows, group):
        count = min(group, rows - start)
        table = pa.table(
            {
                "jpg_0": images[: 2 * count : 2],
                "jpg_1": images[1 : 2 * count : 2],
                "label_0": [1.0] * count,
                "caption": [f"picture {start + k}" for k in range(count)],
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32)).save(buffer, "JPEG")
    return buffer.getvalue()


def measure(path: Path) -> dict[str, float]:
    """Seconds, and MB of memory above what the imports take."""
    from inversion_dpo.data.source import open_pairs
    from inversion_dpo.run.fields import DataConfig
    from inversion_dpo.training.session import epoch_order, pairs_of_step

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    begun = time.perf_counter()
    count = sum(1 for _ in open_pairs(DataConfig(pairs=str(path))))
    read = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before
    numbers, begun = list(range(count)), time.perf_counter()
    epoch_order(count, 0, 0)
    order, begun = time.perf_counter() - begun, time.perf_counter()
    for step in range(100):
        pairs_of_step(numbers, 32, 0, step % max(1, count // 32))
    step_us = (time.perf_counter() - begun) * 1e4
    return {"rows": count, "read_s": read, "mb": peak, "order_ms": order * 1e3, "step_us": step_us}


def main() -> None:
    """Print one row of a table per size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--least", type=int, default=1000, help="smallest number of rows")
    parser.add_argument("--most", type=int, default=100_000, help="largest number of rows")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.file:
        print(json.dumps(measure(arguments.file)))
        return
    print(
        "| rows | file, MB | reading, s | per row, ms | memory, MB | order of an epoch, ms | "
        "batch of a step, µs |\n|---|---|---|---|---|---|---|"
    )
    rows = arguments.least
    while rows <= arguments.most:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pairs.parquet"
            write(path, rows)
            command = [sys.executable, __file__, "--file", str(path)]
            m = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            print(
                f"| {rows:,} | {path.stat().st_size / 1e6:.1f} | {m['read_s']:.2f} | "
                f"{m['read_s'] / rows * 1e3:.3f} | {m['mb']:.0f} | {m['order_ms']:.1f} | "
                f"{m['step_us']:.1f} |",
                flush=True,
            )
        rows *= 10


if __name__ == "__main__":
    main()
