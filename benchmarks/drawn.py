"""What changes with pairs of other hands? ``python benchmarks/drawn.py OUTPUT --set NAME``.

Trains every method on pairs of drawn pictures: ``originals`` (people drew both pictures),
``samples`` (the same preference among the model's own) or ``legible``. Each method is tuned by the
same number of trials on every second prompt, of all pairs and without guidance if that comparison
was run first, and measured on the others by judges that did not label. ``--vary`` runs the
ablations of inversion instead: where the states begin, which pairs are left out, how exact the
inversion is, and on the model's own samples the noise that they were sampled from (``known``).
Prints OUTPUT/NAME-guidance-G/results.md, and draws pictures.png beside it: a row for the reference
and one for each method, all from the same noise. Resumable: a finished run is not repeated.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw
from workshop import drawn_pairs, drawn_scorers

from inversion_dpo.compare.beforehand import Plan, claim_folder
from inversion_dpo.compare.experiment import compare

METHODS = ("x0", "transition", "reference", "diffusion_dpo", "kto", "sft")
ABLATIONS = (
    "inversion.t_start=0,0.2,0.4",
    "inversion.max_error=0.12,0.15,0.3",
    "inversion.fixed_point_iterations=3",
)
KNOWN = "objective.path=known"  # only the model's own samples come with their noise
COLUMNS = 12  # of the sheet


def sheet(root: Path, methods: Sequence[str]) -> Image.Image:
    """Draw the reference's pictures above each method's of seed 0; prompts equally spaced."""
    rows = [("reference", methods[0], "reference")] + [(m, m, "policy") for m in methods]
    images = {name: sorted((root / f"runs/{m}-0/images").glob(f"*-{w}.png")) for name, m, w in rows}
    side, left = Image.open(images["reference"][0]).width, 90
    page = Image.new("RGB", (left + COLUMNS * (side + 4), len(rows) * (side + 4)), "white")
    draw = ImageDraw.Draw(page)
    for row, (name, files) in enumerate(images.items()):
        draw.text((4, row * (side + 4) + side // 2 - 6), name, "black")
        for k in range(COLUMNS):
            picture = Image.open(files[k * len(files) // COLUMNS])
            page.paste(picture, (left + k * (side + 4), row * (side + 4)))
    return page


def main() -> None:
    """Make the pairs if need be, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/drawn"))
    parser.add_argument("--set", choices=list(drawn_pairs.PREFERENCE), default="originals")
    parser.add_argument("--guidance", type=float, default=1.0, help="of sampling")
    parser.add_argument("--pairs", type=int, help="only so many, with the trials of all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--vary", action="store_true", help="ablations of x0 instead")
    parser.add_argument("--untuned", action="store_true", help="no trials: one rate and beta")
    parser.add_argument("--model", type=Path, default=drawn_scorers.folder())
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    config = drawn_pairs.ready(args.model.absolute(), args.output.absolute(), args.set)
    name = f"{args.set}-guidance-{args.guidance:g}"
    extra: tuple[str, ...] = (f"evaluation.guidance_scale={args.guidance}",)
    if args.pairs:
        name, extra = f"{name}-{args.pairs}", (*extra, f"data.limit={args.pairs}")
    plan = Plan(str(config), tuple(args.methods), args.seeds, extra, curve=0)
    if args.vary:
        name, extra = f"{name}-ablations", (*extra, "inversion.reconstruct=true")
        varied = ABLATIONS + (KNOWN,) * (args.set != "originals")
        plan = replace(plan, methods=("x0",), extra=extra, vary=varied)
    else:
        plan = replace(plan, tune=not args.untuned)
    root, tuned = args.output / name, args.output / f"{args.set}-guidance-1" / "tuned.json"
    if plan.tune and tuned.exists() and not (root / "tuned.json").exists():
        claim_folder(root, plan)
        shutil.copy(tuned, root)  # the trials were those of all pairs, without guidance
    page = compare(root, plan)
    if not args.vary:
        sheet(root, args.methods).save(root / "pictures.png", optimize=True)
    print((page.parent / "results.md").read_text())


if __name__ == "__main__":
    main()
