"""Score the embedded pipeline and write its model card: ``python -m tools.embedded.card``.

Run it after :mod:`tools.embedded.pretrain`; it samples the test prompts with the preset's
guidance and steps and writes ``README.md`` into the pipeline's folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from inversion_dpo.evaluation.sides import sampler_of
from inversion_dpo.run.config import PACKAGE, load_config
from inversion_dpo.world.checker import NAMES, judge
from inversion_dpo.world.scene_prompts import prompts

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# The embedded pipeline of inversion-dpo

A {megabytes:.0f} MB text-to-image model of the synthetic world `scenes`: 64x64 images of one
to four flat shapes on a plain ground (6 shapes, 8 colours, 2 sizes). A caption reads
*"{example}"*.
The model is good and clearly imperfect, so that preference alignment has something to do.
It is of no use outside this world.

It is a plain diffusers folder (`AutoencoderKL`, `CLIPTextModel`, `UNet2DConditionModel`,
v-prediction) and loads without this project:

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipe(
    "{example}", num_inference_steps={steps}, guidance_scale={guidance[0]}
).images[0]
```

- **Data**: synthetic scenes drawn by `inversion_dpo.world.drawing`, `train` captions only.
- **Command**: `{command}`
- **Training**: {parts} Machine: {machine}.
- **Scores** on {count} held-out test prompts, {steps} DDIM steps, seeds {seed} and up, by the
  exact checker ({date}); mean ± 95% interval of the mean. The presets sample and build their pairs
  at guidance {guidance[0]}: there the policy that is trained is the sampler that is used.

{rows}

{by_objects}

`python -m tools.embedded.card` prints the scores again.
"""


def measure(folder: Path, count: int, steps: int, guidance: float, seed: int) -> dict[str, Any]:
    """Scores of the pipeline on ``count`` test prompts, per prompt."""
    captions = [g.caption for g in prompts("test", count)]
    seeds = [seed + k for k in range(count)]
    config = load_config(
        None,
        [f"model.path={folder}", f"evaluation.sample_steps={steps}", "evaluation.batch_size=64"],
    )
    sampler = sampler_of(config, None).under(guidance_scale=guidance)
    images = sampler.draw(captions, seeds, desc="score")
    scores = judge(images, captions)
    return {"captions": captions, "scores": {name: scores[name] for name in NAMES}}


def by_objects(captions: list[str], exact: np.ndarray) -> str:
    """Return the exact-match rate by number of objects, one sentence."""
    objects = np.array(
        [1 + sum(c.count(r) for r in (" of a ", " above a ", " below a ")) for c in captions]
    )
    parts = [
        f"{n}: {exact[objects == n].mean():.3f} ({(objects == n).sum()} prompts)"
        for n in sorted(set(objects.tolist()))
    ]
    return f"exact-match rate by number of objects: {', '.join(parts)}."


def table(found: dict[float, dict[str, Any]]) -> str:
    """Markdown: one row a score, one column a guidance, mean ± 95% interval of the mean."""
    names = next(iter(found.values()))["scores"]
    lines = [["score", *(f"guidance {g}" for g in found)], ["---"] * (1 + len(found))]
    for name in names:
        columns = [f["scores"][name] for f in found.values()]
        cells = [f"{v.mean():.3f} ± {1.96 * v.std(ddof=1) / len(v) ** 0.5:.3f}" for v in columns]
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure, print, and write the card where training's notes are given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = PACKAGE / "assets" / "pipeline"
    parser.add_argument("--pipeline", type=Path, default=default)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--write", help="write the card: JSON with command and parts")
    args = parser.parse_args()
    found = {g: measure(args.pipeline, args.count, args.steps, g, args.seed) for g in args.guidance}
    rows, first = table(found), found[args.guidance[0]]
    split = by_objects(first["captions"], first["scores"]["exact"])
    split = f"At guidance {args.guidance[0]}: {split}"
    print(f"{rows}\n{split}")
    if args.write:
        size = sum(f.stat().st_size for f in args.pipeline.rglob("*.safetensors")) / 1e6
        card = CARD.format(
            megabytes=size,
            example=first["captions"][1],
            steps=args.steps,
            guidance=args.guidance,
            count=args.count,
            seed=args.seed,
            rows=rows,
            by_objects=split,
            machine=f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU",
            date=datetime.date.today().isoformat(),
            **json.loads(args.write),
        )
        (args.pipeline / "README.md").write_text(card)


if __name__ == "__main__":
    main()
