"""Padded against bucketed training on pairs of mixed shapes, on the embedded model, as Markdown.

    python benchmarks/shapes.py runs/shapes --seeds 3

The pairs are those of ``taste``, which prefer a warm ground. A third of them stays square; of the
others 8 pixels are cut from two sides and the ground is continued on the other two, to 80 x 48 and
48 x 80. ``padded`` trains all of them at 64x64 with grey bars, ``bucketed`` at their own shapes.
Both are sampled at the pairs' shapes, from the noise of the reference, on validation prompts.
Warmth is that of the median pixel. Grey is the share of pixels within 16 levels of the bars'.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from inversion_dpo.compare.summary import over_seeds
from inversion_dpo.data.images import png
from inversion_dpo.data.source import open_pairs
from inversion_dpo.data.transforms import GREY
from inversion_dpo.evaluation.prompt_sets import read_prompts
from inversion_dpo.evaluation.samples import pictures, sampled_file
from inversion_dpo.run.config import Config, load_config
from inversion_dpo.training.recipe import train
from inversion_dpo.world.drawing import COOL_GROUND, WARM_GROUND

Pixels = NDArray[np.uint8]
CUT = 8  # pixels from two sides, and added to the other two
SIZES = ("64x64", "48x80", "80x48")
ARMS = {
    "padded": ["model.resolution=64x64", "data.fit=pad"],
    "bucketed": ["model.resolution=64"],
}


def reshaped(image: Pixels, kind: int) -> Pixels:
    """Return a 64 x 64 picture as it is (0), as a portrait (1) or as a landscape (2)."""
    if kind == 0:
        return image
    if kind == 1:
        return reshaped(image.swapaxes(0, 1), 2).swapaxes(0, 1)
    return np.pad(image[CUT:-CUT], ((0, 0), (CUT, CUT), (0, 0)), mode="edge")


def write_pairs(path: Path, count: int) -> None:
    """Write the first pairs of ``taste``, of three shapes in turn."""
    config = load_config("taste", [f"data.limit={count}"])
    rows = []
    for k, pair in enumerate(open_pairs(config.data)):
        better, worse = (png(reshaped(np.asarray(image), k % 3)) for image in pair.images)
        rows.append({"jpg_0": better, "jpg_1": worse, "label_0": 1.0, "caption": pair.caption})
    pq.write_table(pa.Table.from_pylist(rows), path)


def warmth(image: Pixels) -> float:
    """Measure where the median pixel lies between the cool ground (0) and the warm one (1)."""
    cool, warm = (np.asarray(colour, float) for colour in (COOL_GROUND, WARM_GROUND))
    axis = warm - cool
    return float((np.median(image.reshape(-1, 3), 0) - cool) @ axis / (axis @ axis))


def grey(image: Pixels) -> float:
    """Measure the share of pixels that are nearly the grey of the bars."""
    return float((np.abs(image.astype(int) - GREY).max(-1) <= 16).mean())


def measured(config: Config, adapter: Path | None, memo: Path) -> dict[str, NDArray[np.float64]]:
    """Sample a model at the three shapes; return warmth and share of grey, [prompts]."""
    prompts = read_prompts(config.evaluation.prompts, config.evaluation.limit)
    bare = replace(config, evaluation=replace(config.evaluation, scorer=None))
    file = sampled_file(bare, adapter, memo, prompts, "policy" if adapter else "reference")
    images = [np.asarray(image) for image in pictures(file)]
    return {"warmth": np.array([*map(warmth, images)]), "grey": np.array([*map(grey, images)])}


def table(gains: dict[str, list[list[float]]], kind: str) -> list[str]:
    """List the rows of a measure: policy minus reference, by shape and over all, over seeds."""
    apart = np.asarray(gains["bucketed"]) - np.asarray(gains["padded"])
    arms = {**gains, "bucketed less padded": apart.tolist()}
    return [
        f"| {arm}, {kind} | {' | '.join(map(interval, zip(*seeds, strict=True)))} |"
        for arm, seeds in arms.items()
    ]


def interval(values: Sequence[float]) -> str:
    """Write the mean over seeds with its 95% t interval."""
    row = over_seeds(values)
    return f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def main() -> None:
    """Train both arms with every seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=240)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    pairs, asked = args.folder / "pairs.parquet", args.folder / "prompts.jsonl"
    write_pairs(pairs, args.pairs)
    texts = read_prompts("asset:prompts-validation.txt", args.prompts)
    lines = [json.dumps({"prompt": t, "size": SIZES[k % 3]}) for k, t in enumerate(texts)]
    asked.write_text("\n".join(lines) + "\n")
    gains: dict[str, dict[str, list[list[float]]]] = {"warmth": {}, "grey": {}}
    for seed in range(args.seeds):
        for arm, words in ARMS.items():
            given = [f"data.pairs={pairs}", f"training.steps={args.steps}", *words]
            given += [f"training.seed={seed}", "training.batch_size=16", "training.warmup=5"]
            given += [f"training.learning_rate={args.rate}"]
            given += [f"evaluation.prompts={asked}", f"evaluation.limit={args.prompts}"]
            config, run = load_config("taste", given), args.folder / f"{arm}-{seed}"
            train(config, run, args.folder / "cache")
            same = replace(config, model=load_config("taste", ARMS["bucketed"]).model)
            before = measured(same, None, args.folder / "samples")
            after = measured(same, run / "adapter", args.folder / "samples")
            for kind, of_arms in gains.items():
                change = after[kind] - before[kind]
                row = [*(float(change[k::3].mean()) for k in range(3)), float(change.mean())]
                of_arms.setdefault(arm, []).append(row)
    print("| training, measure | square | portrait | landscape | all |\n|---|---|---|---|---|")
    print("\n".join(row for kind, of_arms in gains.items() for row in table(of_arms, kind)))


if __name__ == "__main__":
    main()
