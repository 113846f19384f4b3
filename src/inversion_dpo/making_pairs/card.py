"""A built dataset's card, README.md as Hugging Face reads it, and its pictures."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from inversion_dpo.evaluation.figures import BLUE, INK, ORANGE, PAPER, bare
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.graphs.scene_key import SceneKey
from inversion_dpo.making_pairs.candidates import graph_of
from inversion_dpo.run.config import Config
from inversion_dpo.run.disk import atomic_figure, atomic_text

TEMPLATE = Path(__file__).with_name("dataset_card.md.jinja")
SHOWN = 40  # pairs on the sheet
SIDES = ("winner", "loser")
Rows = Sequence[Mapping[str, Any]]


def write_card(folder: Path, config: Config, splits: Mapping[str, Rows]) -> None:
    """README.md, distributions.png and pairs.png into the dataset's folder."""
    rows = [row for part in splits.values() for row in part]
    graphs = {
        split: [graph_of(row["caption"], row["scene_graph"]) for row in part]
        for split, part in splits.items()
    }
    draw_distributions(folder / "distributions.png", graphs, rows, config.build.by)
    draw_sheet(folder / "pairs.png", rows, config.build.by, config.build.seed)
    atomic_text(card(config, splits, graphs), folder / "README.md")


def card(
    config: Config, splits: Mapping[str, Rows], graphs: Mapping[str, Sequence[SceneGraph]]
) -> str:
    """Write the card with the hub's metadata; it names no path of this machine."""
    from huggingface_hub import DatasetCard, DatasetCardData

    b, total = config.build, sum(map(len, splits.values()))
    files = [{"split": split, "path": f"{split}/*.parquet"} for split in splits]
    about = DatasetCardData(
        license=b.licence,
        language=["en"],
        pretty_name=b.name,
        annotations_creators=["machine-generated"],
        size_categories=[size_category(total)],
        task_categories=["text-to-image"],
        tags=["preference-pairs", "scene-graphs", "compositional-generation", "dpo"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    every = [g for part in graphs.values() for g in part]
    complex_ones = sum(len(g.items) > 2 and len(g.relations) > 2 for g in every)
    sources = Counter(source for part in splits.values() for row in part for source in _by(row))
    return str(
        DatasetCard.from_template(
            about,
            template_str=TEMPLATE.read_text(encoding="utf-8"),
            build=b,
            evaluation=config.evaluation,
            total=total,
            table=split_table(graphs),
            complex=100 * complex_ones / len(every),
            sources=sorted(sources.items()),
        )
    )


def split_table(graphs: Mapping[str, Sequence[SceneGraph]]) -> list[list[object]]:
    """Of each split: name, pairs, different scenes, and pairs by number of objects."""
    counts = {split: Counter(len(g.items) for g in part) for split, part in graphs.items()}
    sizes = sorted({n for count in counts.values() for n in count})
    names = [f"{n} object{'s' * (n != 1)}" for n in sizes]
    head: list[object] = ["split", "pairs", "scenes", *names]
    return [head] + [
        [split, len(part), len({SceneKey(g) for g in part}), *(counts[split][n] for n in sizes)]
        for split, part in graphs.items()
    ]


def size_category(count: int) -> str:
    """Give the hub's words for a number of rows."""
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")
    return names[min(max(len(str(count)) - 3, 0), len(names) - 1)]


def decisive(row: Mapping[str, Any], by: Sequence[str]) -> tuple[float, float]:
    """Take the mean of the scores that decided, of winner and loser."""
    both = [json.loads(row[f"scores_{k}"]) for k in _order(row)]
    winner, loser = (float(np.mean([s[name] for name in by or s])) for s in both)
    return winner, loser


def draw_distributions(
    path: Path, graphs: Mapping[str, Sequence[SceneGraph]], rows: Rows, by: Sequence[str]
) -> None:
    """Objects, relations, scores of winners and losers, and who made them."""
    page = Figure((9, 5.6), dpi=110, facecolor=PAPER, layout="constrained")
    panels: list[Axes] = list(page.subplots(2, 2).flatten())
    for axes in panels:
        bare(axes)
    flat = [g for part in graphs.values() for g in part]
    _bars(panels[0], Counter(str(len(g.items)) for g in flat), "pairs by objects asked for")
    _bars(panels[1], Counter(str(len(g.relations)) for g in flat), "pairs by relations asked for")
    values = np.array([decisive(row, by) for row in rows])
    for k, (name, colour) in enumerate((("winners", BLUE), ("losers", ORANGE))):
        panels[2].hist(values[:, k], bins=24, alpha=0.6, color=colour, label=name)
    panels[2].legend(frameon=False, fontsize=8, labelcolor=INK)
    panels[2].set_title(f"mean of {', '.join(by) or 'all scores'}", fontsize=9, color=INK)
    sources = Counter(
        f"{side}\n{source}" for row in rows for side, source in zip(SIDES, _by(row), strict=True)
    )
    _bars(panels[3], sources, "images by source")
    atomic_figure(page, path)


def draw_sheet(path: Path, rows: Rows, by: Sequence[str], seed: int) -> None:
    """Pairs drawn at random, winner left, with the scores that decided."""
    pick = np.random.default_rng(seed).permutation(len(rows))[:SHOWN]
    page = Figure((13, 17), dpi=100, facecolor=PAPER)
    for place, k in enumerate(pick):
        row, (line, column) = rows[k], divmod(place, 5)
        axes = page.add_axes((0.005 + column / 5, 1 - (line + 0.97) / 8, 0.19, 0.09))
        axes.axis("off")
        axes.imshow(side_by_side([row[f"jpg_{n}"] for n in _order(row)]), interpolation="nearest")
        words = row["caption"].replace(" which", "\nwhich")
        winner, loser = decisive(row, by)
        axes.set_title(
            f"{words}\n{winner:.2f} > {loser:.2f}", fontsize=6.5, color=INK, parse_math=False
        )
    atomic_figure(page, path)


def side_by_side(jpgs: Sequence[bytes]) -> np.ndarray[Any, Any]:
    """Two images with a white line between them; the second as large as the first."""
    first, second = (Image.open(io.BytesIO(jpg)).convert("RGB") for jpg in jpgs)
    second = second.resize(first.size) if second.size != first.size else second
    gap = np.full((first.height, max(2, first.width // 16), 3), 255, np.uint8)
    return np.concatenate([np.asarray(first), gap, np.asarray(second)], axis=1)


def _bars(axes: Axes, counts: Mapping[str, int], title: str) -> None:
    names = sorted(counts)
    axes.set_axisbelow(True)
    axes.bar(names, [counts[name] for name in names], color=BLUE, width=0.6)
    axes.set_title(title, fontsize=9, color=INK)
    axes.tick_params(axis="x", labelsize=6 if any("\n" in n for n in names) else 8)


def _order(row: Mapping[str, Any]) -> tuple[int, int]:
    """Give the columns of winner and loser."""
    return (0, 1) if row["label_0"] == 1.0 else (1, 0)


def _by(row: Mapping[str, Any]) -> list[str]:
    """Who made winner and loser."""
    return [row[f"source_{k}"] for k in _order(row)]
