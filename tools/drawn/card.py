"""Score the model of drawn pictures, write its card: ``python -m tools.drawn.card --run FOLDER``.

Samples the prompts of evaluation, lets the judges score them, and writes ``README.md`` and
``sheet.png`` into ``FOLDER/model``. FOLDER is what :mod:`tools.drawn.pretrain` made.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open

from inversion_dpo.evaluation.sides import sampler_of
from inversion_dpo.run.config import load_config
from inversion_dpo.run.disk import atomic_bytes, atomic_text
from tools.drawn.fetch import fetch, load
from tools.drawn.groups import of_group
from tools.drawn.judges import Judges
from tools.embedded.card import table

SHOWN = 14  # names of the sheet
EDGE = 4  # pixels of white around a picture of the sheet
STAGES = ("vae", "names", "denoiser")
CARD = """---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Drawn pictures, a small text-to-image model

It draws emoji at 64x64 pixels by the hand of Noto or of Twemoji, as chance has it. A caption is a
name as Unicode gives it (*{example}*), with or without its category. It is good and clearly
imperfect, so that preference alignment has something to do.

- **Pictures**: npm packages `emoji-datasource-google` and `emoji-datasource-twitter` 16.0.0.
  Noto Emoji is by Google, Apache License 2.0 (https://github.com/googlefonts/noto-emoji).
  Twemoji is by Twitter, Inc and other contributors, CC BY 4.0
  (https://creativecommons.org/licenses/by/4.0/, https://github.com/jdecked/twemoji). The model
  learned from both, changed them to 64x64 pixels on white, and is under CC BY 4.0 for that.
- **Left out**: people, hands, skin tones, flags, symbols, objects, places, and joined emoji.
- **Command**: `python -m tools.drawn.pretrain --output FOLDER`
- **Training**: {stages}.
  Autoencoder and denoiser start from the embedded pipeline's. The denoiser is stored in half
  precision.
- **Machine**: {machine}, shared with other work.
- **Judges**: on {pictures} originals that they had not learned from, {hand:.1%} of the hands. Of
  {names} names the right one came first for {named:.1%}, among the first five for {recognised:.1%},
  each from a picture by the other hand.
- **Scores** of {count} samples, {steps} steps, by these judges ({date}); mean and 95% interval:

{rows}

`python -m tools.drawn.card --run FOLDER` writes this card.
"""


def draw(
    model: Path, prompts: list[str], seeds: list[int], steps: int, guidance: float
) -> list[NDArray[np.uint8]]:
    """Sample the pipeline, one image a prompt."""
    settings = [
        f"model.path={model / 'pipeline'}",
        f"evaluation.sample_steps={steps}",
        "evaluation.batch_size=64",
    ]
    sampler = sampler_of(load_config(None, settings), None).under(guidance_scale=guidance)
    return list(sampler.draw(prompts, seeds, desc=f"guidance {guidance}"))


def sheet(rows: list[list[NDArray[np.uint8]]]) -> bytes:
    """Lay pictures out in rows on white."""
    padded = [
        [np.pad(p, ((EDGE, EDGE), (EDGE, EDGE), (0, 0)), constant_values=255) for p in row]
        for row in rows
    ]
    file = io.BytesIO()
    Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in padded])).save(file, "PNG")
    return file.getvalue()


def stages(run: Path) -> str:
    """Say how many steps and seconds each stage of training took."""
    parts = []
    for name in STAGES:
        with safe_open(run / f"{name}.safetensors", "pt") as file:
            about = file.metadata()
        parts.append(f"{name} {int(about['step']):,} steps in {float(about['seconds']):,.0f} s")
    return ", ".join(parts)


def main() -> None:
    """Sample, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="made by tools.drawn.pretrain")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--seeds", type=int, default=2, help="images of each prompt")
    args = parser.parse_args()
    model = args.run / "model"
    prompts = (model / "prompts-evaluation.txt").read_text().splitlines() * args.seeds
    numbers = [1000 + k for k in range(len(prompts))]
    judges, found = Judges(model / "judges"), {}
    for guidance in args.guidance:
        images = draw(model, prompts, numbers, args.steps, guidance)
        scores = judges.scores(images, prompts)
        found[guidance] = {"scores": scores}
    rows = table(found)
    print(rows)
    originals, emoji = load(fetch(args.run))
    both = of_group(emoji, "both")
    shown = both[:: len(both) // SHOWN][:SHOWN]
    names = [e.name for e in shown]
    atomic_bytes(
        sheet(
            [[originals[e.row, hand].numpy() for e in shown] for hand in range(2)]
            + [
                draw(model, names, [k * 100 + j for j in range(SHOWN)], args.steps, guidance)
                for k, guidance in enumerate([args.guidance[0]] * 2 + args.guidance[1:])
            ]
        ),
        model / "sheet.png",
    )
    text = CARD.format(
        example=prompts[0],
        stages=stages(args.run),
        machine=f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU",
        count=len(prompts),
        steps=args.steps,
        date=datetime.date.today().isoformat(),
        rows=rows,
        **json.loads((model / "accuracy.json").read_text())["judges"],
    )
    atomic_text(text, model / "README.md")


if __name__ == "__main__":
    main()
