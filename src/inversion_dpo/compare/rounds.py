"""Train in rounds: sample the policy, label its samples, make it the reference, train again.

The first round is the ordinary run on the configured pairs. Each later round is a run in its own
folder. Its model is the merged policy of the round before. Its pairs are that policy's samples,
chosen by ``evaluation.preference`` and inverted under the model that made them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from inversion_dpo.compare.runs import Start, folder_of, run
from inversion_dpo.compare.summary import over_seeds, step_evaluations
from inversion_dpo.evaluation.defaults import evaluation_prompts
from inversion_dpo.evaluation.metrics import metric_rows
from inversion_dpo.evaluation.prompt_sets import read_prompt_set, read_prompts
from inversion_dpo.evaluation.sides import load_policy_pipeline
from inversion_dpo.labels.asking import LEAST, pairs_by_people
from inversion_dpo.making_pairs.build import build
from inversion_dpo.models.lora import merge_lora
from inversion_dpo.models.parts import save_pipeline
from inversion_dpo.run.disk import atomic_folder, atomic_text
from inversion_dpo.run.fields import Config, ConfigError, DataConfig
from inversion_dpo.run.folder import claim, occupied, stage

Result = dict[str, Any]
SEED = 1000  # of prompts and samples: this, plus 100 for each training seed, plus the round


@dataclass(frozen=True)
class Rounds:
    """The number of rounds, and the samples of the later ones.

    prompts: a number of the embedded world's training prompts, others in every round; or a prompt
    set, sampled from other noise in every round. samples: per prompt; the best is paired with
    the worst, the second best with the second worst, and so on. people: number of prompts, with two
    samples each, that people label instead of the scorer; 0 if the scorer labels.
    """

    count: int = 1
    prompts: str = "1000"
    samples: int = 4
    people: int = 0


def check_rounds(rounds: Rounds, config: Config) -> None:
    """Refuse rounds that have no labels, or that train on the prompts of the evaluation."""
    e = config.evaluation
    if rounds.count == 1:
        if rounds.people:
            raise ConfigError("--people label the samples of later rounds: give --rounds 2 or more")
        return
    if 0 < rounds.people < LEAST:
        raise ConfigError(f"--people {rounds.people}: give at least {LEAST} prompts to label")
    if not e.scorer and not rounds.people:
        raise ConfigError("--rounds needs evaluation.scorer, which labels the samples, or --people")
    if rounds.prompts.isdecimal():
        if e.scorer != "scenes" or not int(rounds.prompts):
            raise ConfigError(
                f"--round-prompts {rounds.prompts}: a number counts training prompts of the "
                "embedded world, for evaluation.scorer=scenes; else give a file, one prompt a line"
            )
        return
    held = set(evaluation_prompts(config))
    asked = read_prompts(rounds.prompts, None, option="--round-prompts")
    if shared := [p for p in asked if p in held]:
        raise ConfigError(
            f"--round-prompts {rounds.prompts}: {len(shared)} of its prompts are in "
            f"evaluation.prompts ({shared[0]!r}): train on other prompts than the evaluation's"
        )


def chain(
    root: Path, variant: str, config: Config, curve: int, rounds: Rounds
) -> dict[str, Result]:
    """Run one seed's rounds in turn, without the finished ones; return name -> result.

    Gains are over the first round's reference. ``spent`` holds the evaluations and seconds of a
    later round's samples and inversion.

    Args:
        root: the folder of all runs.
        variant: its name.
        config: of the first round.
        curve: number of prompts scored at every snapshot; 0 for no curve.
        rounds: how many, and how labels come.
    """
    before = config
    first = last = f"{variant}-{config.training.seed}"
    results = {variant: run(root, first, config, curve)}
    for number in range(2, rounds.count + 1):
        name = f"{first}-round{number}"
        settings = next_round(before, folder_of(root, last), folder_of(root, name))
        drawn = drawn_with(config, number)
        start = Start(config, partial(make_samples, before, settings, rounds, drawn))
        results[f"{variant} round {number}"] = run(root, name, settings, curve, start)
        before, last = settings, name
    return results


def later_rounds(config: Config, output: Path, rounds: Rounds) -> Iterator[tuple[Config, Path]]:
    """Yield settings and folder of each round after the run in ``output``, with its pairs made.

    The caller trains a round before it asks for the next.

    Args:
        config: of the first round.
        output: its folder.
        rounds: how many, and how labels come.
    """
    before, last = config, output
    for number in range(2, rounds.count + 1):
        folder = output / f"round-{number}"
        settings = next_round(before, last, folder)
        with occupied(folder):
            claim(folder, settings)
            with stage(folder, "pairs"):
                make_samples(before, settings, rounds, drawn_with(config, number), folder)
        yield settings, folder
        before, last = settings, folder


def drawn_with(config: Config, number: int) -> int:
    """Return the seed of a round's prompts and samples."""
    return SEED + 100 * config.training.seed + number


def next_round(before: Config, last: Path, folder: Path) -> Config:
    """Derive the settings of the round in ``folder`` from the finished run in ``last``."""
    merged, pairs = last.resolve() / "merged", folder.resolve() / "pairs" / "pairs.parquet"
    d, m = before.data, before.model
    return replace(
        before,
        model=replace(m, path=str(merged), revision=None, variant=None, vae=None, lora=None),
        data=DataConfig(
            pairs=str(pairs),
            fit=d.fit,
            flip=d.flip,
            holdout=d.holdout,
            prompt_dropout=d.prompt_dropout,
            label_noise=d.label_noise,
        ),
    )


def make_samples(before: Config, config: Config, rounds: Rounds, seed: int, folder: Path) -> float:
    """Merge the last policy, sample it and write ``FOLDER/pairs``, unless that is done.

    ``build.*`` and ``rounds`` say how to sample and which pairs to keep, as for ``pairs build``.
    When people label, ``evaluation.*`` does, as for ``pairs sample``.

    Args:
        before: settings of the round before.
        config: settings of this round.
        rounds: prompts and samples.
        seed: of prompts and samples.
        folder: of this round.

    Returns:
        The network evaluations of the samples; guidance takes two a step.
    """
    merged, pairs = Path(config.model.path), Path(config.data.pairs)
    merge(before, merged.parent / "adapter", merged)
    source, e, samples = rounds.prompts, config.evaluation, rounds.samples
    scales = config.build.guidance_scales or [e.guidance_scale]
    if source.isdecimal():
        captions = read_prompts(str(rounds.people or source), None, seed)
        source = str(folder / "prompts.txt")
        atomic_text("\n".join(captions) + "\n", Path(source))
    asked = read_prompt_set(source, rounds.people or None)
    if rounds.people:
        samples, scales = 2, [e.guidance_scale]
    if rounds.people and not pairs.exists():
        pairs_by_people(pairs, config, asked, seed)
    elif not pairs.exists():
        how = replace(
            config.build,
            prompts=source,
            samples=samples,
            seed=seed,
            by=[e.preference],
            mining="margin",
            once=True,
            splits={},
        )
        build(replace(config, build=how), pairs.parent)
    taken = [1 if scales[k % len(scales)] == 1.0 else 2 for k in range(samples)]
    return float(e.sample_steps * sum(taken) * len(asked.prompts))


def merge(config: Config, adapter: Path, folder: Path) -> None:
    """Write the pipeline with the adapter merged into its weights, whole or not at all."""
    if folder.exists():
        return
    whole = replace(config.model, quantize=None, offload=False)  # which take no LoRA
    pipeline = load_policy_pipeline(replace(config, model=whole), adapter)
    if not (adapter / "model_index.json").exists():
        merge_lora(pipeline)
    atomic_folder(folder, lambda made: save_pipeline(pipeline, made))


def spent_before(
    rounds: Mapping[str, Sequence[Result]], inversion: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Map each round to evaluations and seconds before its first step, means over seeds.

    ``rounds``: one variant's, in their order, a result per seed. ``inversion``: the first round's.
    """
    costs: dict[str, dict[str, float]] = {}
    evaluations, seconds = inversion["evaluations"], inversion["seconds"]
    for name, runs in rounds.items():
        own = [r["spent"] for r in runs if "spent" in r]
        evaluations += sum(s["evaluations"] for s in own) / len(runs)
        seconds += sum(s["seconds"] for s in own) / len(runs)
        costs[name] = {"evaluations": evaluations, "seconds": seconds}
        steps = runs[0]["metrics"]["steps"]
        evaluations += steps * step_evaluations(runs[0]["history"])
        seconds += steps * sum(r["step_seconds"] for r in runs) / len(runs)
    return costs


def round_scores(rounds: Sequence[Sequence[Result]]) -> list[dict[str, Any]]:
    """Average single-sample scores over seeds: the reference as round 0, then each round."""
    names = metric_rows(rounds[0][0]["metrics"])
    first = {n: over_seeds([r["metrics"][n]["reference"] for r in rounds[0]]) for n in names}
    rows: list[dict[str, Any]] = [{"round": 0, **first}]
    for number, runs in enumerate(rounds, start=1):
        scores = {n: over_seeds([r["metrics"][n]["policy"] for r in runs]) for n in names}
        rows.append({"round": number, **scores})
    return rows
