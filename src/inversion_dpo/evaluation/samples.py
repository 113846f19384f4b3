"""Keep samples and their scores: one Parquet file per model, prompt set and setting."""

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
    """Hash the model to sample: its name and every weight file."""
    digest = hashlib.sha256(f"{config.model}".encode())
    base = Path(resolve(config.model.path))
    encoder = Path(config.model.scene_graph).expanduser() if config.model.scene_graph else None
    places = [p for p in (base, encoder, adapter) if p is not None and p.exists()]
    for file in (
        f for p in places for f in ([p] if p.is_file() else sorted(p.rglob("*.safetensors")))
    ):
        digest.update(sha256_of(file).encode())
    return digest.hexdigest()[:16]


def _on_disk(path: Path) -> bool:
    """Tell every process the same: whether intact samples are on disk. All must call this."""
    team = current_team()
    exists = team.main and path.exists()
    intact = exists and read_table(path) is not None
    if exists and not intact:
        logger.warning("%s is damaged: sampling it again", path)
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
    """Return one model's images and scores on the prompts, see :func:`sampled_file`."""
    return read_samples(sampled_file(config, adapter, memo, prompts, desc, repeats))


def sampled_file(
    config: Config, adapter: Path | None, memo: Path, prompts: list[str], desc: str, repeats: int
) -> Path:
    """Return the Parquet file of one model's images and scores, made if it is not there.

    Every batch is kept as soon as it is sampled and scored, so a killed run loses one batch.

    Args:
        config: its ``evaluation`` and ``model`` say how to sample and score.
        adapter: what is put on the model; None: the model as it is.
        memo: folder of these files.
        prompts: the texts.
        desc: ``reference`` or ``policy``, for the file's name and the progress bar.
        repeats: images per prompt; those of one prompt follow each other.
    """
    e = config.evaluation
    key = f"{model_digest(config, adapter)} {prompts} {e.seed} {e.sample_steps} {repeats} "
    key += f"{e.guidance_scale} {e.scorer} {e.checkpoints} {config.model.resolution}"
    graphs = graphs_for(config, adapter, prompts)
    key += "".join(g.to_json() for g in graphs.values())
    key += f" {e.parser} {e.prompts}" if SCENE_GRAPH in str(e.scorer) else ""
    path = memo / f"{desc}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.parquet"
    if not _on_disk(path):
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
    """Sample and score batch by batch into files of ``folder``; processes take the batches in turn.

    Intact files are kept. The result lists all files, whichever process writes them.
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
        texts = [p if isinstance(p, str) else p.caption for p in prompts[batch]]
        if read_table(part) is None:
            sampler, noise = sampler or sampler_of(config, adapter), seeds[batch]
            images = sampler.draw(prompts[batch], noise)
            results = score.judge(images, texts) if score else ({}, None)
            write_samples(part, texts, noise, images, *results)
        bar.update(len(texts) * team.size)
    bar.close()
    if score:
        score.conclude()
    return parts


def join_parts(parts: list[Path], path: Path) -> None:
    """Join all parts into one file, in their order, and remove them."""
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
    """Write the table of images: prompt, seed, PNG bytes, every score, and any graphs."""
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
    """Read the images and scores of :func:`write_samples`."""
    return [np.array(image) for image in pictures(path)], read_scores(path)


def read_scores(path: Path) -> Scores:
    """Read only the scores of :func:`write_samples`."""
    names = [n for n in pq.read_schema(path).names if n.startswith("score.")]
    table = pq.read_table(path, columns=names)
    return {n[6:]: table[n].to_numpy() for n in names}


def read_images(path: Path, rows: list[int]) -> Images:
    """Read the images of these rows, which ascend."""
    return [np.array(image) for image in pictures(path, frozenset(rows).__contains__)]


def pictures(path: Path, chosen: Callable[[int], bool] = lambda row: True) -> Iterator[Image.Image]:
    """Yield the chosen rows' images, with few encoded ones in memory at a time."""
    row = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=64, columns=["image"]):
        for encoded in batch["image"]:
            if chosen(row):
                yield decode_image(encoded.as_py(), f"{path} row {row}")
            row += 1
