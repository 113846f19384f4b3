"""Every method on the same pairs, steps, batch and prompts: ``python benchmarks/methods.py``.

``--tune`` gives each method the same number of trials (learning rate x beta) on the validation
prompts and writes ``benchmarks/tuned.json``; without it, each method runs with its tuned values
for several training seeds on the test prompts, and ``results.json`` and a table are written.
Finished runs are never repeated. The same inversion cache and reference samples serve all.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from inversion_dpo.config import load_config
from inversion_dpo.evaluation.evaluate import evaluate
from inversion_dpo.evaluation.metrics import interval_text
from inversion_dpo.runs import claim, stage
from inversion_dpo.training import train

HERE = Path(__file__).parent
METHODS = {
    "x0": ["objective.name=inversion_dpo", "objective.target=x0"],
    "transition": ["objective.name=inversion_dpo", "objective.target=transition"],
    "reference": ["objective.name=inversion_dpo", "objective.target=reference"],
    "diffusion_dpo": ["objective.name=diffusion_dpo"],
    "sft": ["objective.name=sft"],
}
CONTROLS = {  # of x0, with its settings: what do the labels teach?
    "shuffled": [*METHODS["x0"], "data.label_noise=0.5"],
    "reversed": [*METHODS["x0"], "data.label_noise=1.0"],
}
LEARNING_RATES = (1e-4, 3e-4)
BETAS = (1000.0, 5000.0)
SFT_RATES = (1e-5, 3e-5, 1e-4, 3e-4)  # no beta: its trials are spent on the learning rate alone
METRICS = ("sg_iou", "entity_iou", "relation_iou", "exact", "shape_quality")


def trials(method: str) -> list[list[str]]:
    """Four settings of learning rate and beta for any method."""
    if method == "sft":
        return [[f"training.learning_rate={r}"] for r in SFT_RATES]
    return [
        [f"training.learning_rate={r}", f"objective.beta={b}"]
        for r in LEARNING_RATES
        for b in BETAS
    ]


def run(root: Path, name: str, pairs: str, overrides: list[str]) -> dict[str, Any]:
    """One training and its evaluation, unless it is finished already."""
    folder = root / pairs / name
    if not (folder / "metrics.json").exists():
        print(f"== {pairs} {name} {' '.join(overrides)}", flush=True)
        config = load_config(pairs, overrides)
        claim(folder, config)
        with stage(folder, "train"):
            train(config, folder, cache_root=root / "cache")
        evaluate(folder, config, memo=root / "samples")
        shutil.rmtree(folder / "checkpoints")
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics


def utility(metrics: dict[str, Any], pairs: str) -> float:
    """What tuning maximises, on validation prompts.

    taste: the effect (gain of warmth), less ten times any fall of entity IoU beyond 0.01.
    composition: the gain in scene-graph IoU, less any fall of another metric.
    """
    if pairs == "taste":
        fall = min(0.0, metrics["entity_iou"]["gain"] + 0.01)
        return float(metrics["preference"]["gain"] + 10 * fall)
    falls = sum(min(0.0, metrics[m]["gain"]) for m in METRICS)
    return float(metrics["sg_iou"]["gain"] + falls)


def tune(root: Path, pairs: str, methods: list[str]) -> dict[str, list[str]]:
    """The best of each method's trials on the validation prompts."""
    best = {}
    for method in methods:
        scored = []
        for k, settings in enumerate(trials(method)):
            on = ["evaluation.prompts=asset:prompts-validation.txt", "evaluation.limit=200"]
            overrides = [*METHODS[method], *settings, *on, "training.seed=100"]
            metrics = run(root, f"tune-{method}-{k}", pairs, overrides)
            scored.append((utility(metrics, pairs), settings))
            print(f"{pairs} {method} {settings}: {scored[-1][0]:+.4f}", flush=True)
        best[method] = max(scored)[1]
    return best


def summary(values: list[float]) -> dict[str, float]:
    """Mean over seeds with a 95% t interval."""
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else 0.0
    return {"mean": mean, "low": mean - half, "high": mean + half}


def results(root: Path, pairs: str, methods: list[str], seeds: int) -> Iterator[dict[str, Any]]:
    """One row a method, over training seeds, on the test prompts."""
    tuned = json.loads((HERE / "tuned.json").read_text())[pairs]
    for method in methods:
        settings = tuned["x0" if method in CONTROLS else method]
        overrides = [*(METHODS | CONTROLS)[method], *settings]
        found = [
            run(root, f"{method}-{s}", pairs, [*overrides, f"training.seed={s}"])
            for s in range(seeds)
        ]
        row: dict[str, Any] = {"pairs": pairs, "method": method, "settings": settings}
        row |= {"seeds": seeds, "n_prompts": found[0]["n_prompts"]}
        row["win_rate"] = summary([m["win_rate"] for m in found])
        row["effect"] = summary([m["preference"]["gain"] for m in found])
        row |= {k: summary([m[k]["gain"] for m in found]) for k in METRICS}
        row["drift"] = summary([m["training"]["heldout_drift"] for m in found])
        row["heldout_accuracy"] = summary([m["training"]["heldout_accuracy"] for m in found])
        row["train_seconds"] = float(np.median([m["training"]["seconds"] for m in found]))
        row["per_seed"] = [{k: m[k] for k in ("win_rate", "preference", *METRICS)} for m in found]
        yield row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean over seeds and 95% t interval."""

    def cell(x: dict[str, float], digits: int = 3) -> str:
        return f"{x['mean']:.{digits}f} [{x['low']:.{digits}f}, {x['high']:.{digits}f}]"

    head = ("method", "settings", "win rate", "effect", "sg IoU gain", "entity IoU gain",
            "exact gain", "drift", "median training s")  # fmt: skip
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for r in rows:
        settings = ", ".join(s.split(".", 1)[1] for s in r["settings"])
        cells = [cell(r[k]) for k in ("win_rate", "effect", "sg_iou", "entity_iou", "exact")]
        cells += [cell(r["drift"], 4), f"{r['train_seconds']:.0f}"]
        lines.append(" | ".join([r["method"], settings, *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def by_seed(row: dict[str, Any]) -> str:
    """Markdown: one line a training seed, gains with paired bootstrap intervals over prompts."""
    names = ("preference", *METRICS)
    lines = [["seed", "win rate", *names], ["---"] * (2 + len(names))]
    for seed, found in enumerate(row["per_seed"]):
        gains = (found[n] for n in names)
        cells = [interval_text(g["gain"], g["gain_low"], g["gain_high"]) for g in gains]
        lines.append([str(seed), f"{found['win_rate']:.3f}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Tune, or run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--pairs", nargs="+", default=["taste", "composition"])
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS, *CONTROLS])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.tune:
        file = HERE / "tuned.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        for pairs in args.pairs:
            known[pairs] = known.get(pairs, {}) | tune(args.output, pairs, args.methods)
            file.write_text(json.dumps(known, indent=1) + "\n")
        return
    for pairs in args.pairs:
        rows = list(results(args.output, pairs, args.methods, args.seeds))
        (args.output / f"results-{pairs}.json").write_text(json.dumps(rows, indent=1))
        print(f"\n### {pairs}\n\n{table(rows)}\n")
        print("\n\n".join(f"{r['method']}, seed by seed\n\n{by_seed(r)}" for r in rows))


if __name__ == "__main__":
    main()
