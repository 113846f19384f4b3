"""Samples and their scores on disk: one Parquet file for each model, prompt set and setting."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from inversion_dpo.data.images import decode_image, png
from inversion_dpo.evaluation.prompt_sets import read_prompt_set
from inversion_dpo.evaluation.scorers.registry import Graphs, Scores, load_scorers
from inversion_dpo.evaluation.scorers.scene_graph import SCENE_GRAPH
from inversion_dpo.evaluation.sides import graphs_for, sampler_of
from inversion_dpo.models.sampler import Prompt
from inversion_dpo.run.config import Config, resolve
from inversion_dpo.run.disk import atomic_table, atomic_tables, read_table, sha256_of
from inversion_dpo.run.faults import memory_advice
from inversion_dpo.run.processes import current_team

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
        pictured = [graphs.get(p, p) for p in prompts for _ in range(repeats)]
        seeds = [e.seed + k + REPEAT * j for k in range(len(prompts)) for j in range(repeats)]
        team = current_team()
        with memory_advice("sampling"):
            parts = sample_parts(config, adapter, path.with_suffix(""), pictured, seeds, desc)
        team.wait()
        if team.main:
            join_parts(parts, path)
        team.wait()
    return path


def sample_parts(
    config: Config,
    adapter: Path | None,
    folder: Path,
    prompts: Sequence[Prompt],
    seeds: list[int],
    desc: str,
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
        asked = [p if isinstance(p, str) else p.caption for p in prompts[batch]]
        if read_table(part) is None:
            sampler, noise = sampler or sampler_of(config, adapter), seeds[batch]
            images = sampler.draw(prompts[batch], noise)
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
    return [np.array(image) for image in pictures(path)], read_scores(path)


def read_scores(path: Path) -> Scores:
    """Only the scores of :func:`write_samples`' file."""
    names = [n for n in pq.read_schema(path).names if n.startswith("score.")]
    table = pq.read_table(path, columns=names)
    return {n[6:]: table[n].to_numpy() for n in names}


def read_images(path: Path, rows: list[int]) -> Images:
    """The images of these rows, which ascend."""
    return [np.array(image) for image in pictures(path, frozenset(rows).__contains__)]


def pictures(path: Path, wanted: Callable[[int], bool] = lambda row: True) -> Iterator[Image.Image]:
    """The wanted rows' images of a file of samples, a few encoded ones in memory at a time."""
    row = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=64, columns=["image"]):
        for encoded in batch["image"]:
            if wanted(row):
                yield decode_image(encoded.as_py(), f"{path} row {row}")
            row += 1
