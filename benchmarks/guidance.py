"""Does training under guidance help where one samples under it? ``python benchmarks/guidance.py``.

Trains Inversion-DPO (target ``x0``) and Diffusion-DPO on the shipped ``composition`` pairs, each
as it is and with ``objective.guidance_scale=2``: the same pairs, steps, rate and beta. All four are
sampled under guidance 2, the reference too. Prints gains over the reference on the 500 test prompts
with 95% t intervals over seeds. Resumable: a finished run is not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inversion_dpo.compare.methods import METHODS
from inversion_dpo.compare.runs import run
from inversion_dpo.compare.summary import over_seeds, step_evaluations
from inversion_dpo.run.config import Config, load_config

SAMPLED = 2
COMMON = (
    "training.batch_size=16",
    "training.steps=360",
    "training.learning_rate=3e-4",
    "training.lr_scheduler=linear",
    "objective.beta=1000",
    f"evaluation.guidance_scale={SAMPLED}",
)
OWN = {  # as in budgets.py
    "x0": ("inversion.fixed_point_iterations=1", "objective.t_min=0.4"),
    "diffusion_dpo": ("inversion.steps=1", "inversion.t_start=0"),
}
TRAINED = (1, SAMPLED)
SHOWN = ("composition", "sg_iou", "exact")


def settings(method: str, trained: int, seed: int) -> Config:
    """Return the configuration of one run."""
    own = (*OWN[method], f"objective.guidance_scale={trained}", f"training.seed={seed}")
    return load_config("composition", [*COMMON, *METHODS[method].settings, *own])


def table(root: Path, seeds: Sequence[int]) -> str:
    """Train what is not yet trained; Markdown, a row for each method and guidance."""
    found: dict[tuple[str, int], list[Any]] = {}
    for seed in seeds:
        for method in OWN:
            for trained in TRAINED:
                name = f"{method}-{trained}-{seed}"
                result = run(root, name, settings(method, trained, seed), 0)
                found.setdefault((method, trained), []).append(result)
    names = ["method", "trained under", *(f"{n} gain" for n in SHOWN), "drift", "evaluations/step"]
    rows = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    for (method, trained), results in found.items():
        gains = [over_seeds([r["metrics"][n]["gain"] for r in results]) for n in SHOWN]
        drift = over_seeds([r["history"][-1]["heldout_drift"] for r in results])["mean"]
        cells = [f"{g['mean']:+.3f} [{g['low']:+.3f}, {g['high']:+.3f}]" for g in gains]
        cost = step_evaluations(results[0]["history"])
        rows.append(f"| {method} | {trained} | {' | '.join(cells)} | {drift:.4f} | {cost:.0f} |")
    first = found["x0", 1][0]["metrics"]
    reference = ", ".join(f"{n} {first[n]['reference']:.3f}" for n in SHOWN)
    return "\n".join([*rows, "", f"The reference under guidance {SAMPLED}: {reference}"])


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/guidance"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    print(table(args.output, args.seeds))


if __name__ == "__main__":
    main()
