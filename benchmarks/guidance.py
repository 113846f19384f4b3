"""Does training under guidance help where one samples under it? ``python benchmarks/guidance.py``.

Trains Inversion-DPO (target ``x0``) and Diffusion-DPO on the shipped ``composition`` pairs, each
as it is and with ``objective.guidance_scale=2``: the same pairs, steps, rate and beta. All four are
sampled under guidance 2, the reference too. Prints gains over the reference on the 500 test prompts
with 95% t intervals over seeds. Resumable: a finished run is not repeated.

``--pairs FILE`` trains KTO on those pairs instead, under guidance 2, and samples the policies and
the reference under guidance 2 and 3. docs/results/guidance.md says how its pairs were made.
``--large`` gives it four times the training and four times the rank: some two hours a seed.
Each seed is printed with 95% bootstrap intervals over prompts, the table with those over seeds.

``--learned RUN ...`` prints how the accuracies of finished runs went, and trains nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from inversion_dpo.compare.methods import METHODS
from inversion_dpo.compare.page import cell
from inversion_dpo.compare.runs import folder_of, run
from inversion_dpo.compare.summary import over_seeds, step_evaluations
from inversion_dpo.evaluation.evaluate import both_sides
from inversion_dpo.evaluation.metrics import gain_row, gain_text
from inversion_dpo.evaluation.samples import read_scores
from inversion_dpo.run.config import Config, load_config
from inversion_dpo.run.folder import read_rows

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
KTO = (  # for more pairs than the shipped ones
    "objective.name=kto",
    "objective.beta=100",
    f"objective.guidance_scale={SAMPLED}",
    "training.batch_size=32",
    "training.steps=600",
    "training.learning_rate=3e-4",
    "training.lr_scheduler=linear",
    f"evaluation.guidance_scale={SAMPLED}",
)
LARGE = ("training.batch_size=64", "training.steps=1200", "policy.rank=64")
SCALES = (SAMPLED, 3)


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


def kto(pairs: Path, root: Path, seeds: Sequence[int], *, large: bool = False) -> str:
    """Train KTO on own pairs; Markdown, a row for each guidance of the samples."""
    more, kind = (LARGE, "large-") if large else ((), "")
    names = (*SHOWN, "warmth")
    rows = [f"| sampled under | {' | '.join(f'{n} gain' for n in names)} | reference |"]
    rows += ["|---" * (len(names) + 2) + "|"]
    found: dict[int, list[dict[str, float]]] = {scale: [] for scale in SCALES}
    reference: dict[int, float] = {}
    for seed in seeds:
        own = f"data.pairs={pairs}", f"training.seed={seed}"
        config = load_config("composition", [*KTO, *more, *own])
        run(root, f"kto-{kind}{seed}", config, 0)
        for scale in SCALES:
            there = replace(config.evaluation, guidance_scale=float(scale))
            sides = folder_of(root, f"kto-{kind}{seed}"), replace(config, evaluation=there)
            before, after = map(read_scores, both_sides(*sides, root / "samples", None))
            found[scale].append({n: float((after[n] - before[n]).mean()) for n in names})
            reference[scale] = float(before["composition"].mean())
            told = (f"{n} {gain_text(gain_row(n, before[n], after[n]), 3)}" for n in names)
            scores = f"{reference[scale]:.3f} to {after['composition'].mean():.3f}"
            print(f"seed {seed}, under {scale}: {', '.join(told)}; {scores}", flush=True)
    for scale, gains in found.items():
        cells = [cell(over_seeds([g[n] for g in gains])) for n in names]
        rows.append(f"| {scale} | {' | '.join(cells)} | {reference[scale]:.3f} |")
    return "\n".join(rows)


def learned(runs: Sequence[Path]) -> str:
    """Average the accuracies of runs over 200 steps each; Markdown, a row for each part."""
    kinds = ("accuracy", "heldout_accuracy")
    logs = [read_rows(run / "metrics.jsonl") for run in runs]
    rows = [f"| steps | {' | '.join(f'{k}, {run}' for run in runs for k in kinds)} |"]
    rows += ["|---" * (1 + len(kinds) * len(runs)) + "|"]
    for first in range(0, max(log[-1]["step"] for log in logs), 200):
        part = [[r for r in log if first < r["step"] <= first + 200] for log in logs]
        means = [fmean(r[k] for r in here if k in r) for here in part for k in kinds]
        rows.append(f"| {first}-{first + 200} | {' | '.join(f'{m:.3f}' for m in means)} |")
    return "\n".join(rows)


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/guidance"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED")
    parser.add_argument("--pairs", type=Path, help="train KTO on these, see above")
    parser.add_argument("--large", action="store_true", help="with --pairs: see above")
    parser.add_argument("--learned", type=Path, nargs="+", metavar="RUN", help="see above")
    args = parser.parse_args()
    if args.learned:
        print(learned(args.learned))
        return
    if args.large and not args.pairs:
        parser.error("--large is for --pairs")
    args.output.mkdir(parents=True, exist_ok=True)
    same = args.output, args.seeds
    print(kto(args.pairs, *same, large=args.large) if args.pairs else table(*same))


if __name__ == "__main__":
    main()
