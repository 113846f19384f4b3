"""What healthy and sick runs look like: ``python benchmarks/health.py --out FOLDER``.

Trains the embedded model on its ``composition`` pairs, soundly and with one thing wrong at a time,
and prints what ``inversion-dpo advise`` says of each. Draws the curves beside one another. Run it
again to go on where it stopped. Takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from workshop import render

from inversion_dpo.api import evaluate
from inversion_dpo.data.images import decode_image, png
from inversion_dpo.evaluation.figures import BLUE, GREY, ORANGE, PAPER, bare
from inversion_dpo.evaluation.metrics import interval_text
from inversion_dpo.run.config import load_config
from inversion_dpo.run.folder import claim, read_rows
from inversion_dpo.training.advice import advise, text
from inversion_dpo.training.recipe import train
from inversion_dpo.world.captions import parse_caption
from inversion_dpo.world.drawing import CLEAR, RADIUS, Scene, dominant_relation, try_layout

PAIRS, STEPS = 600, 150
COMMON = [
    f"data.limit={PAIRS}",
    f"training.steps={STEPS}",
    "evaluation.limit=200",
    "training.batch_size=16",
    "training.eval_every=10",
    "inversion.fixed_point_iterations=0",
    "training.tracker=none",
]
RUNS = {
    "healthy": [],
    "beta too low": ["objective.beta=3"],
    "rate too high": ["training.learning_rate=0.01"],
    "coin labels": ["data.label_noise=0.5"],
    "ties": ["data.pairs={out}/ties.parquet"],
    "drawn winners": ["data.pairs={out}/drawn.parquet", "data.allow_giveaways=true"],
}
# Pairs of two equal images, several seeds: what is gained without a preference?
EQUAL = {
    f"{what}, seed {seed}": [f"data.pairs={{out}}/{file}.parquet", *more, f"training.seed={seed}"]
    for seed in range(3)
    for what, file, more in (
        ("two winners", "ties", []),
        ("two losers", "two-losers", []),
        ("two winners, fresh noise", "ties", ["objective.name=diffusion_dpo"]),
        ("real pairs", "real", []),
    )
}
CURVES = {
    "accuracy": ("accuracy", 0.5),
    "gradient factor": ("gradient_factor", 0.5),
    "winner's error over ref.": ("winner_error", 0.0),
    "drift": ("drift", None),
}
Rows = list[dict[str, Any]]


def ties(row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Make both images the winner, each with one level of noise of its own."""
    winner = np.asarray(decode_image(row[side(row)], "winner")).astype(int)
    both = [winner + rng.integers(-1, 2, winner.shape) for _ in range(2)]
    noisy = [png(np.clip(image, 0, 255).astype(np.uint8)) for image in both]
    return row | {"jpg_0": noisy[0], "jpg_1": noisy[1], "label_0": 1.0}


def two_losers(row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Make both images the loser, each with one level of noise of its own."""
    return ties(row | {"label_0": 1.0 - row["label_0"]}, rng)


def drawn(row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Make the winner a drawing of the caption, which the model did not make."""
    graph = parse_caption(row["caption"])
    asked = [r.relation for r in graph.relations]
    while True:
        places = try_layout(rng, [RADIUS[item.attributes[0]] for item in graph.items])
        if places is None:
            continue
        pairs = [(places[r.item1], places[r.item2]) for r in graph.relations]
        if [dominant_relation(a, b, CLEAR) for a, b in pairs] == asked:
            break
    picture = render(Scene(graph, places, float(rng.uniform())))
    loser = row["jpg_1" if side(row) == "jpg_0" else "jpg_0"]
    return row | {"jpg_0": png(picture), "jpg_1": loser, "label_0": 1.0}


def side(row: dict[str, Any]) -> str:
    """Name the winner's column."""
    return "jpg_0" if row["label_0"] > 0.5 else "jpg_1"


def write(out: Path, name: str, change: Callable[..., dict[str, Any]], source: Path) -> None:
    """Write pairs with one thing changed."""
    rng = np.random.default_rng(0)
    kept = ("jpg_0", "jpg_1", "label_0", "caption")
    rows = pq.read_table(source, columns=list(kept)).slice(0, PAIRS).to_pylist()
    pq.write_table(pa.Table.from_pylist([change(r, rng) for r in rows]), out / f"{name}.parquet")


def draw(histories: dict[str, Rows]) -> Figure:
    """Put the runs side by side: a column a run, a row a curve."""
    drawing = Figure((2.1 * len(histories), 7.2), dpi=160, facecolor=PAPER, layout="constrained")
    grid = drawing.subplots(len(CURVES), len(histories), squeeze=False, sharex=True)
    for column, (name, rows) in enumerate(histories.items()):
        for line, (title, (key, base)) in enumerate(CURVES.items()):
            axes = grid[line][column]
            bare(axes)
            for prefix, colour, look in (("", BLUE, ""), ("heldout_", ORANGE, "o")):
                points = [(r["step"], value(r, prefix + key)) for r in rows if prefix + key in r]
                xs, ys = zip(*points, strict=True) if points else ((), ())
                if not prefix:
                    ys = tuple(np.convolve(np.pad(ys, 5, "edge"), np.ones(11) / 11, "valid"))
                axes.plot(xs, ys, color=colour, linewidth=1.3, marker=look or None, markersize=2.5)
            if base is not None:
                axes.axhline(base, color=GREY, linewidth=0.7, linestyle=":")
            if line == 0:
                axes.set_title(name, fontsize=9)
                axes.set_ylim(0, 1.03)
            if column == 0:
                axes.set_ylabel(title, fontsize=8)
            axes.tick_params(labelsize=7)
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=8)
    return drawing


def value(row: dict[str, Any], key: str) -> float:
    """Read a measurement; errors are those of the policy less the reference's."""
    return float(row[key] - row.get(f"{key}_ref", 0.0) if key.endswith("_error") else row[key])


def main() -> None:
    """Train, advise, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/health"))
    parser.add_argument("--only", nargs="*", choices=[*RUNS, *EQUAL], default=list(RUNS))
    parser.add_argument("--equal", action="store_true", help="the runs on equal images instead")
    given = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    given.out.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).parents[1] / "src/inversion_dpo/assets/composition.parquet"
    made = {"ties": ties, "two-losers": two_losers, "drawn": drawn, "real": lambda row, rng: row}
    for name, change in made.items():
        write(given.out, name, change, source)
    histories = {}
    for name in EQUAL if given.equal else given.only:
        settings = [s.format(out=given.out) for s in (RUNS | EQUAL)[name]]
        config, folder = load_config("composition", [*COMMON, *settings]), given.out / name
        folder.mkdir(exist_ok=True)
        claim(folder, config)
        train(config, folder, given.out / "cache")
        found = evaluate(folder)["preference"]
        histories[name] = read_rows(folder / "metrics.jsonl")
        print(f"## {name}: {' '.join(settings) or 'the preset'}\n{text(advise(folder))}")
        print(f"gain {interval_text(found['gain'], found['gain_low'], found['gain_high'])}\n")
    draw(histories).savefig(given.out / "health.png")


if __name__ == "__main__":
    main()
