"""Policy against reference on held-out prompts, from the same noise."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from inversion_dpo.data.images import decode_image, png
from inversion_dpo.evaluation.breakdown import structure
from inversion_dpo.evaluation.changes import changes
from inversion_dpo.evaluation.metrics import compare
from inversion_dpo.evaluation.prompt_sets import PromptSet, read_prompt_set
from inversion_dpo.evaluation.prompt_sets import read_prompts as read_prompts
from inversion_dpo.evaluation.report import ReportData, write_report
from inversion_dpo.evaluation.scorers.registry import SCENE_GRAPH, Graphs, Scores, load_scorers
from inversion_dpo.evaluation.sides import Side, graphs_for, sampler_of, side
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.run.config import Config, ConfigError, resolve
from inversion_dpo.run.disk import (
    atomic_table,
    atomic_tables,
    atomic_text,
    read_table,
    sha256_of,
)
from inversion_dpo.run.faults import memory_advice
from inversion_dpo.run.folder import read_config, read_seconds, stage
from inversion_dpo.run.processes import current_team
from inversion_dpo.training.recipe import source_of
from inversion_dpo.training.step import read_rows

logger = logging.getLogger(__name__)
Images = list[NDArray[np.uint8]]
REPEAT = 1_000_000  # between the seeds of a prompt's images


def model_digest(config: Config, adapter: Path | None) -> str:
    """A short hash of what would be sampled: the model's name and every weight file."""
    digest = hashlib.sha256(f"{config.model}".encode())
    base = Path(resolve(config.model.path))
    encoder = Path(config.model.scene_graph).expanduser() if config.model.scene_graph else None
    places = [p for p in (base, encoder, adapter) if p is not None and p.exists()]
    for file in (
        f for p in places for f in ([p] if p.is_file() else sorted(p.rglob("*.safetensors")))
    ):
        digest.update(sha256_of(file).encode())
    return digest.hexdigest()[:16]


def _known(path: Path) -> bool:
    """Whether samples are on disk, of which every process has the same answer; all must ask."""
    team = current_team()
    exists = team.main and path.exists()
    intact = exists and read_table(path) is not None
    if exists and not intact:
        logger.warning("%s is damaged: sampled again", path)
        path.unlink()
    return any(team.collect([intact]))


def sampled(
    config: Config,
    adapter: Path | None,
    memo: Path,
    prompts: list[str],
    desc: str,
    repeats: int = 1,
) -> tuple[Images, Scores]:
    """Images and scores of one model on the prompts: what :func:`sampled_file` holds."""
    return read_samples(sampled_file(config, adapter, memo, prompts, desc, repeats))


def sampled_file(
    config: Config, adapter: Path | None, memo: Path, prompts: list[str], desc: str, repeats: int
) -> Path:
    """The Parquet file of one model's images and scores on the prompts, made if it is not there.

    Of ``repeats`` images a prompt, those of one prompt follow each other. Every batch is kept as
    soon as it is sampled and scored, so a run that is killed loses one batch.
    """
    e = config.evaluation
    asked = f"{model_digest(config, adapter)} {prompts} {e.seed} {e.sample_steps} {repeats} "
    asked += f"{e.guidance_scale} {e.scorer} {e.checkpoints} {config.model.resolution}"
    graphs = graphs_for(config, adapter, prompts)
    asked += "".join(g.to_json() for g in graphs.values())
    asked += f" {e.parser} {e.prompts}" if SCENE_GRAPH in str(e.scorer) else ""
    path = memo / f"{desc}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.parquet"
    if not _known(path):
        pictured = [p for p in prompts for _ in range(repeats)]
        seeds = [e.seed + k + REPEAT * j for k in range(len(prompts)) for j in range(repeats)]
        team = current_team()
        with memory_advice("sampling"):
            parts = sample_parts(
                config, adapter, path.with_suffix(""), pictured, seeds, desc, graphs
            )
        team.wait()
        if team.main:
            join_parts(parts, path)
        team.wait()
    return path


def sample_parts(
    config: Config,
    adapter: Path | None,
    folder: Path,
    prompts: list[str],
    seeds: list[int],
    desc: str,
    graphs: Mapping[str, SceneGraph],
) -> list[Path]:
    """Sample and score batch by batch into files of ``folder``, the processes in turn.

    Intact files that are there are kept. Returns all files, whichever process makes them.
    """
    e, team, sampler = config.evaluation, current_team(), None
    score = None
    if e.scorer:
        kept, whole = folder.parent / "scores.sqlite", partial(read_prompt_set, e.prompts, e.limit)
        score = load_scorers(e.scorer, e.checkpoints, e.batch_size, kept, e.parser, whole)
    starts = range(0, len(prompts), e.batch_size)
    parts = [folder / f"{start:08d}-{e.batch_size}.parquet" for start in starts]
    bar = tqdm(total=len(prompts), desc=desc, unit="image", mininterval=1.0, disable=not team.main)
    for start, part in list(zip(starts, parts, strict=True))[team.rank :: team.size]:
        batch = slice(start, start + e.batch_size)
        asked, noise = prompts[batch], seeds[batch]
        if read_table(part) is None:
            sampler = sampler or sampler_of(config, adapter)
            images = sampler.draw([graphs.get(p, p) for p in asked], noise)
            judged = score.judge(images, asked) if score else ({}, None)
            write_samples(part, asked, noise, images, *judged)
        bar.update(len(asked) * team.size)
    bar.close()
    if score:
        score.conclude()
    return parts


def join_parts(parts: list[Path], path: Path) -> None:
    """One file of all parts, in their order; then the parts are removed."""
    atomic_tables(map(pq.read_table, parts), pq.read_schema(parts[0]), path)
    shutil.rmtree(parts[0].parent)


def write_samples(
    path: Path,
    prompts: list[str],
    seeds: list[int],
    images: Images,
    scores: Scores,
    graphs: Graphs | None = None,
) -> None:
    """The per-prompt table: prompt, seed, PNG bytes, every score and the graph found, if any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {
        "prompt": prompts,
        "seed": seeds,
        "image": [png(i) for i in images],
    }
    if graphs is not None:
        columns["graph"] = pa.array([g and g.to_json() for g in graphs], pa.string())
    atomic_table(pa.table(columns | {f"score.{k}": v for k, v in scores.items()}), path)


def read_samples(path: Path) -> tuple[Images, Scores]:
    """Inverse of :func:`write_samples`."""
    table = pq.read_table(path)
    images = [
        np.array(decode_image(b, f"{path} row {k}"))
        for k, b in enumerate(table["image"].to_pylist())
    ]
    names = [n for n in table.column_names if n.startswith("score.")]
    return images, {n[6:]: table[n].to_numpy() for n in names}


def read_scores(path: Path) -> Scores:
    """Only the scores of :func:`write_samples`' file."""
    names = [n for n in pq.read_schema(path).names if n.startswith("score.")]
    table = pq.read_table(path, columns=names)
    return {n[6:]: table[n].to_numpy() for n in names}


def read_images(path: Path, rows: list[int]) -> Images:
    """The images of these rows, which ascend; a few encoded ones are in memory at a time."""
    images, wanted, start = [], set(rows), 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=64, columns=["image"]):
        for k in range(batch.num_rows):
            if start + k in wanted:
                encoded = batch["image"][k].as_py()
                images.append(np.array(decode_image(encoded, f"{path} row {start + k}")))
        start += batch.num_rows
    return images


def evaluate(
    folder: Path,
    config: Config | None = None,
    memo: Path | None = None,
    models: tuple[str | None, str | None] | None = None,
) -> dict[str, Any]:
    """Sample reference and policy, score both, write ``metrics.json`` and ``per_prompt.parquet``.

    Args:
        folder: a finished run's, or one to hold the evaluation of any two models.
        config: its settings, if they differ from the folder's own.
        memo: keeps samples so that the same reference is sampled once for many runs.
        models: reference and policy as :func:`sides.side` takes them; by default the
            configuration's model and the run's policy. Of several processes all must call it.
    """
    config = config or read_config(folder)
    asked = read_prompt_set(config.evaluation.prompts, config.evaluation.limit)
    named = models or (None, str(folder))
    sides = [side(config, name) for name in named]
    files = [
        staged(folder, word, model, memo, asked)
        for word, model in zip(("reference", "policy"), sides, strict=True)
    ]
    reference, policy = (read_scores(file) for file in files)
    s = config.evaluation.seeds
    metrics: dict[str, Any] = {"n_prompts": len(asked.prompts), "seeds": s}
    metrics |= judged(asked, reference, policy, config) if reference else {}
    metrics |= structure(asked, files, config) | changes(*files)
    if reference:
        if current_team().main:
            write_table(folder / "per_prompt.parquet", asked, config, reference, policy)
    metrics |= training_facts(folder, config)
    metrics |= {"seconds": read_seconds(folder), "models": list(named) if models else None}
    if current_team().main:
        atomic_text(json.dumps(metrics, indent=1), folder / "metrics.json")
    return metrics


def staged(folder: Path, word: str, model: Side, memo: Path | None, asked: PromptSet) -> Path:
    """The file of one side's images and scores [n s], made in a timed stage of the folder."""
    repeats = model.config.evaluation.seeds
    with stage(folder, f"sample {word}"):
        return sampled_file(
            model.config, model.adapter, memo or folder / "samples", asked.prompts, word, repeats
        )


def judged(asked: PromptSet, reference: Scores, policy: Scores, config: Config) -> dict[str, Any]:
    """The comparison over all prompts, and under ``categories`` over each category's."""
    e = config.evaluation
    if e.preference not in reference:
        raise ConfigError(
            f"evaluation.preference={e.preference!r} is not a score of {e.scorer}; it gives "
            f"{', '.join(reference)}"
        )
    shape = (len(asked.prompts), e.seeds)
    r, p = ({k: v.reshape(shape) for k, v in side.items()} for side in (reference, policy))
    found = compare(r, p, e.preference)
    by_category = {
        name: compare(
            {k: v[rows] for k, v in r.items()}, {k: v[rows] for k, v in p.items()}, e.preference
        )
        for name, rows in asked.by_category.items()
    }
    return found | ({"categories": by_category} if by_category else {})


def write_table(
    path: Path, asked: PromptSet, config: Config, reference: Scores, policy: Scores
) -> None:
    """One row an image: prompt, category, seed, every score of both sides, and who won."""
    e = config.evaluation
    places = [(k, j) for k in range(len(asked.prompts)) for j in range(e.seeds)]
    ours, theirs = policy[e.preference], reference[e.preference]
    columns: dict[str, Any] = {
        "prompt": [asked.prompts[k] for k, _ in places],
        "category": [asked.categories[k] for k, _ in places],
        "seed": [e.seed + k + REPEAT * j for k, j in places],
        "win": (ours > theirs) + 0.5 * (ours == theirs),
    }
    columns |= {f"reference.{name}": v for name, v in reference.items()}
    columns |= {f"policy.{name}": v for name, v in policy.items()}
    atomic_table(pa.table(columns), path)


def training_facts(folder: Path, config: Config) -> dict[str, Any]:
    """What the run's own log says; of a folder without a training nothing."""
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        return {"pairs": 0, "steps": config.training.steps, "training": {}}
    last = {k: v for k, v in rows[-1].items() if k != "step"}
    return {"pairs": last.pop("pairs", 0), "steps": config.training.steps, "training": last}


def pick(prompts: list[str], count: int, seed: int = 0) -> list[int]:
    """Which prompts to show: a seeded draw, not the best."""
    rng = np.random.default_rng(seed)
    return sorted(rng.choice(len(prompts), min(count, len(prompts)), replace=False).tolist())


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    names = ("inversion-dpo", "torch", "diffusers", "transformers", "peft", "accelerate")
    found = {n: version(n) for n in names}
    return found | {"python": platform.python_version(), "machine": platform.machine()}


def title(models: list[str | None] | None) -> str:
    """Of a report: what is compared."""
    if not models:
        return "Inversion-DPO: policy against reference"
    return f"{models[1]} against {models[0] or 'the base model'}"


def setting(seeds: int) -> str:
    """Of a report's first sentence: what was compared how."""
    each = f", {seeds} images of each" if seeds > 1 else ""
    return f"held-out prompts{each}, with the same noise"


def report(folder: Path, memo: Path | None = None, shown: int = 16) -> Path:
    """Write ``report.html`` of an evaluated run, with PNG copies of its figures."""
    if not (folder / "metrics.json").exists():
        raise ConfigError(f"{folder} has no metrics.json: run `inversion-dpo evaluate {folder}`")
    config, metrics = read_config(folder), json.loads((folder / "metrics.json").read_text())
    e = config.evaluation
    asked = read_prompt_set(e.prompts, e.limit)
    names, prompts = metrics.get("models") or (None, str(folder)), asked.prompts
    files = [
        staged(folder, word, side(config, name), memo, asked)
        for word, name in zip(("reference", "policy"), names, strict=True)
    ]
    r, p = (read_scores(file) for file in files)
    show = pick(prompts, shown)
    first = [k * e.seeds for k in show]  # of each prompt the first image
    scores = [
        {"reference": float(r[e.preference][k]), "policy": float(p[e.preference][k])}
        for k in first
        if r
    ]
    reference, policy = (read_images(file, first) for file in files)
    examples = [] if metrics.get("models") else list(source_of(config, 6))
    data = ReportData(
        title=title(metrics.get("models")),
        setting=setting(e.seeds),
        metrics=metrics,
        preference=e.preference,
        captions=[prompts[k] for k in show],
        reference_images=reference,
        policy_images=policy,
        scores=scores,
        pairs=[
            (x.caption, np.array(decode_image(x.winner, "")), np.array(decode_image(x.loser, "")))
            for x in examples
        ],
        history=read_rows(folder / "metrics.jsonl"),
        config=(folder / "config.yaml").read_text(),
        versions=versions(),
        seconds=read_seconds(folder),
        seeds={"training": config.training.seed, "evaluation, first prompt": e.seed},
        preference_note=f"Of each pair the image with the higher {e.preference} is preferred.",
        selection=f"{len(show)} of {len(prompts)} prompts, drawn at random with seed 0.",
    )
    return write_report(folder, data)
