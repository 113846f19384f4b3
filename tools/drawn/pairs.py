"""Make the preference pairs of drawn pictures: ``python -m tools.drawn.pairs --output FOLDER``.

- ``originals``: one hand over the other, both pictures by people. No model has a part in it.
- ``samples``: the same hand over the other among the model's own samples, by the labellers.
- ``legible``: the sample that the labellers read best over the one that they read worst.

The names are those of the groups ``pairs`` and ``both``, which no evaluation asks for. The judges
have no part in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import yaml

from inversion_dpo.data.images import png
from inversion_dpo.making_pairs.build import build
from inversion_dpo.run.config import load_config
from inversion_dpo.run.disk import atomic_table, atomic_text
from tools.drawn.fetch import HANDS, fetch, load
from tools.drawn.groups import number_of, of_group
from tools.drawn.pretrain import PROMPTS
from tools.drawn.scorers import folder, use

LABELLER, JUDGE = "tools.drawn.scorers:labeller", "tools.drawn.scorers:judge"
BUILT = {"samples": ("twemoji", 0.5), "legible": ("legible", 0.2)}  # score, least difference
PREFERENCE = {"originals": "twemoji", "samples": "twemoji", "legible": "legible"}
SETTINGS = {
    "inversion": {"steps": 10, "spacing": "even", "t_start": 0.1},
    "objective": {"beta": 1000, "t_min": 0.1, "t_max": 0.9},
    "policy": {
        "rank": 16,
        "alpha": 64,  # four times the usual: the rates that tuning tries are otherwise too small
        "target_modules": [
            *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
            *("ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
        ],
    },
    "training": {
        "learning_rate": 3e-4,
        "lr_scheduler": "linear",
        "steps": 120,
        "batch_size": 8,
    },
}


def write_config(model: Path, pairs: Path, name: str) -> Path:
    """Write the configuration of a set of pairs into ``pairs``, and return its path."""
    given = SETTINGS | {
        "model": {"path": str(model / "pipeline"), "resolution": 64},
        "data": {"pairs": str(pairs / f"{name}.parquet")},
        "evaluation": {
            "prompts": str(model / "prompts-evaluation.txt"),
            "limit": None,
            "seeds": 2,
            "scorer": JUDGE,
            "preference": PREFERENCE[name],
            "sample_steps": 10,
            "guidance_scale": 1.0,
        },
    }
    pairs.mkdir(parents=True, exist_ok=True)
    atomic_text(yaml.safe_dump(given, sort_keys=False), pairs / f"{name}.yaml")
    return pairs / f"{name}.yaml"


def write_originals(pictures: Path, file: Path, winner: str) -> int:
    """Write pairs of originals, the hand ``winner`` preferred; returns their number."""
    images, emoji = load(pictures)
    better, rows = HANDS.index(winner), []
    for e in of_group(emoji, *PROMPTS["prompts-pairs.txt"]):
        first = number_of(e.code, "order") % 2  # the hand of the first picture
        rows.append(
            {
                "jpg_0": png(images[e.row, first].numpy()),
                "jpg_1": png(images[e.row, 1 - first].numpy()),
                "label_0": float(first == better),
                "caption": e.name,
            }
        )
    atomic_table(pa.Table.from_pylist(rows), file)
    return len(rows)


def write_built(model: Path, output: Path, name: str, samples: int) -> int:
    """Sample the model, let the labellers label; returns the number of pairs."""
    by, least = BUILT[name]
    settings = [
        f"evaluation.scorer={LABELLER}",
        f"evaluation.preference={by}",
        f"build.prompts={model / 'prompts-pairs.txt'}",
        f"build.samples={samples}",
        f"build.by=[{by}]",
        "build.mining=best_worst",
        f"build.least={least}",
        "build.limit=1000",
    ]
    work = output / f"{name}-build"
    count = sum(build(load_config(str(output / f"{name}.yaml"), settings), work).values())
    (work / "pairs.parquet").replace(output / f"{name}.parquet")
    return count


def ready(model: Path, output: Path, name: str, samples: int = 6) -> Path:
    """Make a set of pairs unless it is there; returns its configuration."""
    use(model)
    config, file = write_config(model, output, name), output / f"{name}.parquet"
    if not file.exists():
        if name in BUILT:
            count = write_built(model, output, name, samples)
        else:
            count = write_originals(fetch(output), file, PREFERENCE[name])
        print(f"{count} pairs in {file}")
    return config


def main() -> None:
    """Write the sets that are not there yet, each with its configuration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="archives, pairs, settings")
    parser.add_argument("--model", type=Path, default=folder(), help="of tools.drawn.pretrain")
    parser.add_argument("--samples", type=int, default=6, help="of each name")
    parser.add_argument("--sets", nargs="+", choices=list(PREFERENCE), default=list(PREFERENCE))
    args = parser.parse_args()
    for name in args.sets:
        ready(args.model.absolute(), args.output.absolute(), name, args.samples)


if __name__ == "__main__":
    main()
