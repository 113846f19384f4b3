"""Compare policy and reference on held-out prompts, from the same noise."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from inversion_dpo.data.buckets import named, square
from inversion_dpo.data.source import open_pairs
from inversion_dpo.evaluation.breakdown import scoring, structure
from inversion_dpo.evaluation.changes import changes
from inversion_dpo.evaluation.defaults import (
    check_scores,
    evaluation_prompts,
    evaluation_sizes,
    has_sources,
    settled,
)
from inversion_dpo.evaluation.diversity import diversity, measure_of
from inversion_dpo.evaluation.judges import agreement, order_of_pairs
from inversion_dpo.evaluation.metrics import (
    AGREEMENT,
    OTHER_GUIDANCE,
    PAIRS_AGREE,
    compare,
    mean_of_groups,
    wins,
)
from inversion_dpo.evaluation.pairwise import in_pairs, judge_of
from inversion_dpo.evaluation.people import PEOPLE_JUDGE, judged_by
from inversion_dpo.evaluation.prompt_sets import PromptSet, read_prompt_set, read_prompts
from inversion_dpo.evaluation.readiness import check_sampling
from inversion_dpo.evaluation.repairs import repairs
from inversion_dpo.evaluation.samples import (
    REPEAT,
    read_scores,
    sampled_file,
    scorers_of,
    write_pictures,
)
from inversion_dpo.evaluation.scorers.asked import GENEVAL
from inversion_dpo.evaluation.scorers.asking import backend_for
from inversion_dpo.evaluation.scorers.own import Scores, check_same
from inversion_dpo.evaluation.scorers.registry import PER_PROMPT, SERVED
from inversion_dpo.evaluation.scorers.unified_reward import PAIR
from inversion_dpo.evaluation.scorers.vqa import VQA
from inversion_dpo.evaluation.sides import side, sizes_for
from inversion_dpo.run.config import Config, ConfigError, to_yaml
from inversion_dpo.run.disk import atomic_json, atomic_table, atomic_text, digest_of
from inversion_dpo.run.folder import going_on, read_config, read_rows, read_seconds, stage
from inversion_dpo.run.judged import WEIGHTS
from inversion_dpo.run.processes import current_team
from inversion_dpo.training.notices import trained_guidance

logger = logging.getLogger(__name__)
Models = tuple[str | None, str | None]  # reference and policy, as sides.side takes them
EVALUATED = "evaluated.yaml"  # the settings behind metrics.json
SAMPLES = "samples"  # the folder of samples, and in metrics.json the names of its two files
ANSWER = 16  # tokens of a server's answer on trial
AGREEING = 64  # pairs that the preference is measured on


def evaluate(
    folder: Path, config: Config | None = None, models: Models | None = None
) -> dict[str, Any]:
    """Compare reference and policy; write ``metrics.json`` and ``per_prompt.parquet``.

    If the policy is a run whose training had another guidance scale, both scales are compared. The
    comparison at the scale of training stands under ``at_training_guidance``. Every process must
    call this.

    Args:
        folder: a finished run, or a folder for the evaluation of any two models.
        config: settings, if they differ from the folder's own.
        models: reference and policy as :func:`sides.side` takes them; by default the
            configuration's model and the run's policy.

    Returns:
        What ``metrics.json`` holds.
    """
    config = settled(config or read_config(folder), folder)
    check(config, folder, models or (None, str(folder)))
    metrics = measure(folder, config, folder / "samples", models)
    if "win_rate" in metrics and models is None:
        metrics[PAIRS_AGREE] = pairs_agree(config, folder / "samples")
        write_metrics(folder, metrics)
    if models is None and (people := judged_by(folder, config)):
        metrics[PEOPLE_JUDGE] = people
        write_metrics(folder, metrics)
    e, run = config.evaluation, Path((models or (None, folder))[1] or "")
    trained = e.guidance_scale
    if "win_rate" in metrics and (run / "config.yaml").is_file():
        trained = trained_guidance(read_config(run))
    if trained != e.guidance_scale:
        there = replace(config, evaluation=replace(e, guidance_scale=trained))
        r, p = map(read_scores, both_sides(folder, there, folder / "samples", models))
        other = {"guidance_scale": trained, "instead_of": e.guidance_scale}
        other |= judged(read_prompt_set(e.prompts, e.limit), r, p, config)
        metrics |= {OTHER_GUIDANCE: other, "seconds": read_seconds(folder)}
        metrics |= scoring(folder / "samples", config)
        write_metrics(folder, metrics)
    return metrics


def check(config: Config, folder: Path, models: Sequence[str | None] = (None,)) -> None:
    """Refuse, before the first image is sampled, what would stop an evaluation later.

    It reads the prompts, tries the scorers without loading the known ones, and looks for the
    models, and for a folder and a disk that take the samples. Before the first evaluation it asks
    each server of a vision-language model one small question.

    Args:
        config: settings of the evaluation.
        folder: where samples will be kept.
        models: as :func:`sides.side` takes them.

    Raises:
        ConfigError, ScorerError, DiskError: the first fault and what to do.
    """
    e = config.evaluation
    prompts = evaluation_prompts(config)
    if again := len(prompts) - len({*prompts}):
        logger.warning(
            "evaluation.prompts: %d of %d prompts repeat an earlier one. The intervals count each "
            "as a prompt of its own and are too narrow: leave them out, and raise evaluation.seeds",
            again,
            len(prompts),
        )
    sources, sizes = has_sources(config, prompts), evaluation_sizes(config, prompts)
    check_scores(config, prompts)
    if judge := judge_of(config):
        judge.check()
    measure_of(config)
    if not (folder / "samples").exists():
        reach_servers(config)
    usual = config.model.resolution
    for model in models:
        drawn = side(config, model).config
        if model and (text := going_on(Path(model))):
            logger.warning(text)
        if square(drawn.model.resolution) != square(usual):
            raise ConfigError(
                f"{model} draws {drawn.model.resolution} pixels, and here model.resolution is "
                f"{usual}: images of two sizes have no noise in common. Give "
                f"{model}/adapter, which is then sampled at {usual}, or judge in a new folder with "
                f"--config {model}/config.yaml"
            )
        images = 2 * len(prompts) * e.seeds
        check_sampling(drawn, folder / "samples", images, "evaluation.limit", sources, sizes)


def reach_servers(config: Config) -> None:
    """Ask about a grey image; ScorerError from a server that would fail once images are sampled."""
    e, grey = config.evaluation, np.full((64, 64, 3), 127, np.uint8)
    for name in {*SERVED, PAIR} & {*e.scorers}:
        short = replace(e.parser, max_tokens=ANSWER)
        backend = backend_for(name, e.checkpoints.get(name), short)
        if not hasattr(backend, "url"):
            continue  # a model on this machine
        question = "Is this image grey? Please answer Yes or No."
        if name == VQA:  # which needs the tokens' probabilities
            backend.starts([grey], question, "Yes")
        else:
            backend.say([grey], question)


def measure(folder: Path, config: Config, memo: Path, models: Models | None) -> dict[str, Any]:
    """Compare two models at ``evaluation.guidance_scale``; write what :func:`evaluate` writes.

    memo: folder that keeps samples, so that many runs share the samples of one reference.
    """
    e = config.evaluation
    prompt_set = read_prompt_set(e.prompts, e.limit)
    files = both_sides(folder, config, memo, models)
    reference, policy = map(read_scores, files)
    metrics: dict[str, Any] = {"n_prompts": len(prompt_set.prompts), "seeds": e.seeds}
    sizes = Counter(map(named, sizes_for(config, prompt_set.prompts)))
    metrics |= {"sizes": dict(sizes)} if len(sizes) > 1 else {}
    if reference:
        metrics |= judged(prompt_set, reference, policy, config) | repairs(reference, policy)
        if current_team().main:
            write_table(folder / "per_prompt.parquet", prompt_set, config, reference, policy)
    metrics |= structure(prompt_set, files, config) | scoring(memo, config) | changes(*files)
    metrics |= in_pairs(files, config, memo) | diversity(files, config)
    metrics |= training_facts(Path(models[1] or os.devnull) if models else folder, config)
    metrics |= {"seconds": read_seconds(folder), "models": list(models) if models else None}
    metrics[SAMPLES] = [file.name for file in files]
    judged_policy = Path((models or (None, folder))[1] or os.devnull)
    own = judged_policy / "adapter"
    metrics[WEIGHTS] = digest_of([own if own.is_dir() else judged_policy])
    write_metrics(folder, metrics)
    if current_team().main:
        write_pictures(folder / "images", files, config)
        atomic_text(to_yaml(config), folder / EVALUATED)
    return metrics


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write ``metrics.json`` in the first process."""
    if current_team().main:
        atomic_json(metrics, folder / "metrics.json")


def both_sides(folder: Path, config: Config, memo: Path, models: Models | None) -> list[Path]:
    """Sample and score both sides, each in a timed stage; return their files, reference first.

    The policy comes first: a LoRA that does not fit is refused before the reference is sampled.
    Samples at a second guidance scale add to the time of the same stage.
    """
    e, files = config.evaluation, []
    prompts = read_prompts(e.prompts, e.limit)
    sides = [side(config, name) for name in models or (None, str(folder))]
    for word, model in zip(("policy", "reference"), reversed(sides), strict=True):
        with stage(folder, f"sample {word}"):
            files.append(sampled_file(model.config, model.adapter, memo, prompts, word, e.seeds))
    return files[::-1]


def judged(
    prompt_set: PromptSet, reference: Scores, policy: Scores, config: Config
) -> dict[str, Any]:
    """Compare over all prompts, and per category under ``categories``."""
    e = config.evaluation
    shape = (len(prompt_set.prompts), e.seeds)

    r, p = ({k: v.reshape(shape) for k, v in s.items()} for s in (reference, policy))

    def over(rows: Any) -> dict[str, Any]:
        before, after = ({k: v[rows] for k, v in s.items()} for s in (r, p))
        return compare(before, after, e.preference)

    by_category = {name: over(rows) for name, rows in prompt_set.by_category.items()}
    check_same(str(e.scorer), p, r)
    whole = compare(r, p, e.preference) | {AGREEMENT: agreement(r, p, e.preference)}
    if GENEVAL in r and by_category:  # the paper's score: tasks count alike
        g, tasks = (r[GENEVAL], p[GENEVAL]), list(prompt_set.by_category.values())
        whole[f"{GENEVAL}_overall"] = mean_of_groups(*g, tasks) | wins(*g)
    return whole | ({"categories": by_category} if by_category else {})


def write_table(
    path: Path, prompt_set: PromptSet, config: Config, reference: Scores, policy: Scores
) -> None:
    """Write one row per image: prompt, category, seed, every score of both sides, and who won."""
    e = config.evaluation
    places = [(k, j) for k in range(len(prompt_set.prompts)) for j in range(e.seeds)]
    ours, theirs = policy[e.preference], reference[e.preference]
    columns: dict[str, Any] = {
        "prompt": [prompt_set.prompts[k] for k, _ in places],
        "category": [prompt_set.categories[k] for k, _ in places],
        "seed": [e.seed + k + REPEAT * j for k, j in places],
        "win": (ours > theirs) + 0.5 * (ours == theirs),
    }
    columns |= {f"reference.{name}": v for name, v in reference.items()}
    columns |= {f"policy.{name}": v for name, v in policy.items()}
    atomic_table(pa.table(columns), path)


def pairs_agree(config: Config, memo: Path) -> dict[str, Any]:
    """Measure the share of some pairs whose winner has the higher score, see ``order_of_pairs``.

    It is empty where a model that is paid for would score them, where the preference needs more
    than a caption, or where pairs or captions cannot be read.
    """
    e = config.evaluation
    score = scorers_of(config, memo / "scores.sqlite")
    if score is None or any(n in str(e.scorer) for n in SERVED) or not current_team().main:
        return {}
    score.members = tuple(m for m in score.members if m.spec not in PER_PROMPT)
    if e.preference in PER_PROMPT:  # which a caption is not enough for
        return {}
    try:
        pairs = list(open_pairs(config.data, AGREEING))
        images = [np.asarray(image) for pair in pairs for image in pair.images]
        captions = [pair.caption for pair in pairs for _ in range(2)]
        return order_of_pairs(score(images, captions), e.preference)
    except ValueError as error:
        logger.warning("%s was not measured on the pairs: %s", e.preference, error)
        return {}


def training_facts(folder: Path, config: Config) -> dict[str, Any]:
    """Read the last row of the training log of the policy's run; without one it is empty."""
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        return {"pairs": 0, "steps": config.training.steps, "training": {}}
    last = {k: v for k, v in rows[-1].items() if k != "step"}
    return {"pairs": last.pop("pairs", 0), "steps": config.training.steps, "training": last}
