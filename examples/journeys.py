"""Three journeys from an empty folder, by the README's commands; each step prints its seconds.

    python examples/journeys.py spreadsheet --folder runs/spreadsheet
    python examples/journeys.py labels --folder runs/labels
    python examples/journeys.py methods --folder runs/methods

spreadsheet: own pairs in a table become a LoRA that plain diffusers loads. labels: samples are
labelled left or right, as the keys 1 and 2 of the page do, a policy is trained, and compared blind.
methods: three methods on one's own model and scorer. The embedded model stands for one's own;
--config names another, and further words are settings. docs/tutorial/journeys.md has the timings.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from inversion_dpo.cli.main import main as inversion_dpo
from inversion_dpo.data.source import open_pairs
from inversion_dpo.labels.questions import questions
from inversion_dpo.labels.store import LabelStore
from inversion_dpo.run.config import load_config, resolve

SHORT = ("data.limit=64", "training.steps=30", "evaluation.limit=32")
SCORER = """def warm(images, prompts):
    return [float(image[..., 0].mean() - image[..., 2].mean()) for image in images]
"""


def run(*words: str) -> None:
    """Run a command, say it and its seconds; a failed one ends the journey."""
    begun = time.time()
    try:
        inversion_dpo(list(words))
    except SystemExit as end:
        if end.code:
            raise
    print(f"[{time.time() - begun:5.1f} s] inversion-dpo {' '.join(words)}", flush=True)


def warmth(image: bytes) -> float:
    """Measure red less blue, the mean over an image's pixels."""
    red, _, blue = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), float).mean((0, 1))
    return float(red - blue)


def label(pairs: str, labels: str) -> Counter[str]:
    """Choose the warmer of two images of every pair, blind, and count the keys."""
    store, keys = LabelStore(Path(labels)), Counter[str]()
    store.add(questions(load_config(None, [f"data.pairs={pairs}"]).data, 1000, Counter()))
    while ahead := store.ahead("me", 1):
        asked = ahead[0]
        left, right = (warmth(store.image(name) or b"") for name in (asked.left, asked.right))
        keys["left" if left > right else "right"] += 1
        store.label(f"key {keys.total()}", "me", asked.pair, "left" if left > right else "right")
    store.close()
    return keys


def spreadsheet(config: str, settings: Sequence[str]) -> None:
    """Go from a table of own images to an adapter in plain diffusers."""
    from diffusers import DiffusionPipeline

    data = load_config(config, list(settings)).data
    Path("images").mkdir()
    with open("my_pairs.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "winner", "loser"])
        for pair in open_pairs(data, 64):
            names = [f"images/{pair.row}-{word}.png" for word in ("good", "bad")]
            for name, picture in zip(names, pair.images, strict=True):
                picture.save(name)
            table.writerow([pair.caption, *names])
    run("pairs", "check", "my_pairs.csv")
    words = ("-c", config, "-o", "mine", *settings, "data.pairs=my_pairs.csv")
    run("train", *words, "--dry-run")
    run("train", *words)
    run("evaluate", "mine")
    run("report", "mine")
    model = load_config("mine/config.yaml", []).model.path
    pipeline: Any = DiffusionPipeline.from_pretrained(resolve(model))
    side = load_config("mine/config.yaml", []).model.resolution
    how = {"num_inference_steps": 4, "height": side, "width": side, "output_type": "np"}
    before = pipeline("a small red star", generator=seeded(), **how).images
    pipeline.load_lora_weights("mine/adapter")
    after = pipeline("a small red star", generator=seeded(), **how).images
    change = float(np.abs(after - before).mean())
    print(f"plain diffusers loads mine/adapter: a pixel changes by {change:.4f} of 1")
    assert change > 0, "the adapter changes nothing"


def seeded() -> Any:
    """Make the noise of seed 0."""
    import torch

    return torch.Generator().manual_seed(0)


def labels(config: str, settings: Sequence[str]) -> None:
    """Go from no labels to a policy, and compare it blind with the reference."""
    sampled = [s for s in settings if s.startswith(("model.", "evaluation."))]
    how = ("-c", config, "--prompts", "scenes", *sampled)
    run("pairs", "sample", *how, "--count", "30", "-o", "pairs.parquet")
    print("keys pressed:", dict(label("pairs.parquet", "pairs.labels.sqlite")))
    run("pairs", "export", "pairs.labels.sqlite", "-o", "labelled.parquet")
    run("train", "-c", config, "-o", "mine", *settings, "data.pairs=labelled.parquet")
    texts = pq.read_table("pairs.parquet")["caption"].to_pylist()[:8]
    run("sample", *texts, "-c", config, *sampled, "-o", "reference")
    run("sample", *texts, "--run", "mine", "-o", "policy")
    with open("blind.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "image_0", "image_1", "label_0"])
        for k, text in enumerate(texts):
            table.writerow([text, f"reference/{k:06d}.png", f"policy/{k:06d}.png", 1])
    print("blind comparison, keys pressed:", dict(label("blind.csv", "blind.labels.sqlite")))
    chosen = [
        next(iter(v.values())) for v in LabelStore(Path("blind.labels.sqlite")).votes().values()
    ]
    print(f"the policy is preferred in {chosen.count('second')} of {len(chosen)} comparisons")


def methods(config: str, settings: Sequence[str]) -> None:
    """Compare three methods on one's own model and scorer."""
    Path("my_scorer.py").write_text(SCORER)
    own = ("evaluation.scorer=my_scorer:warm", "evaluation.preference=auto")
    which = ("--methods", "x0,diffusion_dpo,sft", "--seeds", "1", "--curve-prompts", "0")
    run("compare", "-c", config, *which, "-o", "compared", *settings, *own)


JOURNEYS = {"spreadsheet": spreadsheet, "labels": labels, "methods": methods}


def main(words: Sequence[str] | None = None) -> None:
    """Go on one journey in an empty folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("journey", choices=JOURNEYS)
    parser.add_argument("--folder", type=Path, required=True, help="new or empty")
    parser.add_argument("--config", default="taste", help="preset or YAML file: the model")
    parser.add_argument("settings", nargs="*", default=list(SHORT), help="KEY=VALUE")
    asked = parser.parse_intermixed_args(words)
    config = os.path.abspath(asked.config) if Path(asked.config).is_file() else asked.config
    asked.folder.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    with chdir(asked.folder):
        JOURNEYS[asked.journey](config, asked.settings)
    print(f"{asked.journey}: {time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
