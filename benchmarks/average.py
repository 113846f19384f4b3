"""One model of several runs: ``python benchmarks/average.py OUTPUT RUN RUN ...``.

Writes the mean of the policies' weights, adapters merged, as a pipeline folder in float32, which
``inversion-dpo evaluate --policy`` takes. The runs train one network, each perhaps from a base of
its own, as the rounds of different seeds do. It costs all their trainings, and one to sample.
Wortsman et al., Model soups, 2022, https://arxiv.org/abs/2203.05482.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from inversion_dpo.compare.rounds import merged_pipeline, write_pipeline
from inversion_dpo.models.base import network_of
from inversion_dpo.models.loading import adapt
from inversion_dpo.runs import read_config


def average(runs: Sequence[Path]) -> Any:
    """The first run's pipeline, with the mean of all policies' weights in its network."""
    found = [policy(run) for run in runs]
    weights = [network.state_dict() for _, network in found]
    shapes = [{name: w.shape for name, w in one.items()} for one in weights]
    for run, one in zip(runs, shapes, strict=True):
        if one != shapes[0]:
            raise SystemExit(f"{run} trains another network than {runs[0]}: nothing to average")
    pipeline, network = found[0]
    mean = {name: torch.stack([w[name] for w in weights]).mean(0) for name in weights[0]}
    network.load_state_dict(mean)
    return pipeline


def policy(run: Path) -> tuple[Any, Any]:
    """A run's policy as a pipeline, and its network, in float32."""
    config = read_config(run)
    config = replace(config, model=replace(config.model, dtype="float32"))
    pipeline = merged_pipeline(config, run / "adapter")
    return pipeline, network_of(adapt(pipeline, config.model.resolution))


def main() -> None:
    """Average and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a folder that is not there")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="finished runs")
    args = parser.parse_args()
    if args.output.exists():
        raise SystemExit(f"{args.output} exists: choose another OUTPUT")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_pipeline(average(args.runs), args.output)


if __name__ == "__main__":
    main()
