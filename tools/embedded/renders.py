"""Exact pictures of scenes as data: what a scene-graph encoder is trained on.

``python -m tools.embedded.renders FILE --rows 10000`` writes pairs whose two images show one
scene graph in two layouts, for ``objective.name=denoising``. Neither is better: no preference
method should be trained on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from inversion_dpo.making_pairs.candidates import encode_image
from inversion_dpo.run.disk import atomic_table
from inversion_dpo.world.drawing import Scene, sample_scene
from inversion_dpo.world.scene_prompts import split_of
from tools.embedded.painting import lay_out, render

SHARES = (0.1, 0.3, 0.3, 0.3)  # of scenes with one, two, three and four objects


def two_layouts(rng: np.random.Generator, shares: Sequence[float]) -> tuple[Scene, Scene]:
    """Draw a scene of a training caption, and another that the same caption describes."""
    while True:
        first = sample_scene(rng, int(rng.choice(len(shares), p=shares)) + 1)
        if split_of(first.graph.caption) == "train":
            break
    positions = lay_out(rng, first.graph)
    return first, replace(first, positions=positions, warmth=float(rng.uniform()))


def rows(count: int, seed: int, shares: Sequence[float] = SHARES) -> Iterator[dict[str, Any]]:
    """``count`` rows in Pick-a-Pic's columns, with ``scene_graph``; the label says nothing."""
    rng = np.random.default_rng([seed, 17])
    for _ in range(count):
        scenes = two_layouts(rng, shares)
        first, second = (encode_image(render(scene)) for scene in scenes)
        graph = scenes[0].graph
        yield {
            "jpg_0": first,
            "jpg_1": second,
            "label_0": 1.0,
            "caption": graph.caption,
            "scene_graph": graph.to_json(),
        }


def main() -> None:
    """``python -m tools.embedded.renders FILE [--rows 10000] [--seed 0]``."""
    parser = argparse.ArgumentParser(description="Write exact renders with their scene graphs.")
    parser.add_argument("file", type=Path, metavar="FILE.parquet")
    parser.add_argument("--rows", type=int, default=10_000, help="of two images each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.rows < 1:
        parser.error(f"--rows must be at least 1, got {arguments.rows}")
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows(arguments.rows, arguments.seed)))
    atomic_table(table, arguments.file)
    print(f"{arguments.rows} rows of two renders in {arguments.file}")


if __name__ == "__main__":
    main()
