"""Keep samples and their scores: one Parquet file per model, prompt set and setting."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from inversion_dpo.data.buckets import square
from inversion_dpo.data.images import decode_image, one_colour, one_colour_text, png
from inversion_dpo.evaluation.prompt_sets import read_prompt_set
from inversion_dpo.evaluation.scorers.own import Graphs, Scores
from inversion_dpo.evaluation.scorers.registry import (
    PER_PROMPT,
    TOGETHER,
    ScorerGroup,
    load_scorers,
)
from inversion_dpo.evaluation.scorers.scene_graph import SCENE_GRAPH
from inversion_dpo.evaluation.sides import graphs_for, opened, sampler_of, sizes_for, sources_for
from inversion_dpo.models.lora import ABOUT
from inversion_dpo.models.parts import HUB
from inversion_dpo.models.sampler import Prompt
from inversion_dpo.run.config import Config, resolve
from inversion_dpo.run.disk import (
    atomic_folder,
    atomic_table,
    atomic_tables,
    content_of,
    digest_of,
    read_table,
)
from inversion_dpo.run.faults import memory_advice
from inversion_dpo.run.processes import current_team
from inversion_dpo.run.words import harmless

logger = logging.getLogger(__name__)
Images = list[NDArray[np.uint8]]
PICTURES = 64  # images of each model that are also files
REPEAT = 1_000_000  # between the seeds of a prompt's images


def model_digest(config: Config, adapter: Path | None) -> str:
    """Hash the model to sample: its settings, and every file of weights or configuration.

    A repository of the hub counts by its commit, as far as that can be known here.
    """
    named = model_places(config, adapter)
    return f"{config.model}{commits_of(config, named)}" + digest_of(
        Path(name).expanduser() for name in named
    )


def model_places(config: Config, adapter: Path | None) -> list[str]:
    """List what a model is made of: files, folders and hub ids, and peft's settings of a file."""
    m = config.model
    parts = [m.path, m.config, m.network, m.vae, m.lora, m.scene_graph]
    named = [resolve(name) for name in (*parts, str(adapter) if adapter else None) if name]
    files = [Path(lora).expanduser() for lora in (m.lora, adapter) if lora]
    beside = [file.with_name(ABOUT) for file in files if file.is_file()]
    return named + [str(file) for file in beside if file.is_file()]


def commits_of(config: Config, named: Iterable[str]) -> list[str]:
    """Find the commits of those that are repositories of the hub."""
    m = config.model
    return [commit_of(n, m.revision if n == m.path else None) for n in named if HUB.fullmatch(n)]


@cache
def commit_of(name: str, revision: str | None) -> str:
    """Find the commit of a repository of the hub, or in its cache offline; "" for no repository."""
    if Path(name).exists():
        return ""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json"])).name
    except (OSError, ValueError, HfHubHTTPError):  # kept samples need no model
        return ""


def scoring_digest(config: Config) -> str:
    """Hash what the scores depend on: settings, local weights, own functions, scene graphs."""
    e, score = config.evaluation, scorers_of(config)
    places = [place for member in (score.members if score else ()) for place in member.places()]
    text = f"{e.scorer} {e.checkpoints}"
    if any(name in str(e.scorer) for name in (SCENE_GRAPH, *PER_PROMPT)):
        text += f" {e.parser} {e.prompts}"
        places += [Path(resolve(e.prompts)), Path(e.parser.vocabulary or "").expanduser()]
    return text + digest_of(p for p in places if p != Path())


def _on_disk(path: Path) -> bool:
    """Tell every process the same: whether intact samples are on disk. All must call this."""
    team = current_team()
    exists = team.main and path.exists()
    intact = exists and read_table(path) is not None
    if exists and not intact:
        logger.warning("%s is damaged: sampling it again", path)
        path.unlink()
    return any(team.collect([intact]))


def sampled_file(
    config: Config,
    adapter: Path | None,
    memo: Path,
    prompts: list[str],
    desc: str,
    repeats: int = 1,
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
    key = f"{model_digest(config, adapter)} {scoring_digest(config)} {prompts} {e.seed} {repeats} "
    key += f"{e.sample_steps} {e.guidance_scale}"
    graphs = graphs_for(config, adapter, prompts)
    key += "".join(g.to_json() for g in graphs.values())
    sizes = sizes_for(config, prompts)
    if set(sizes) - {square(config.model.resolution)}:
        key += f"{sizes}"
    key += "".join(content_of(file) for file in sources_for(config, prompts) if file)
    name = f"-{hashlib.sha256(key.encode()).hexdigest()[:16]}.parquet"
    path = memo / f"{desc}{name}"
    if not path.exists():  # the same samples may be there for another purpose
        path = min(memo.glob(f"*{name}"), default=path)
    if not _on_disk(path):
        pictured = [graphs.get(p, p) for p in prompts for _ in range(repeats)]
        seeds = [e.seed + k + REPEAT * j for k in range(len(prompts)) for j in range(repeats)]
        team = current_team()
        with memory_advice("sampling"):
            parts = sample_parts(config, adapter, path.with_suffix(""), pictured, seeds, desc)
        team.wait()
        if team.main:
            atomic_tables(map(pq.read_table, parts), pq.read_schema(parts[0]), path)
            shutil.rmtree(parts[0].parent)
        team.wait()
    elif current_team().main:  # a kill may have come before its parts were removed
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    return path


def scorers_of(config: Config, store: Path | None = None) -> ScorerGroup | None:
    """Return the configured scorers, None without any; ``store`` keeps their scores."""
    e = config.evaluation
    whole = partial(read_prompt_set, e.prompts, e.limit)
    alone = [name for name in e.scorers if name not in TOGETHER]
    if not alone:
        return None
    places = {name: place for name, place in e.checkpoints.items() if name not in TOGETHER}
    return load_scorers(alone, places, e.batch_size, store, e.parser, whole)


def sample_parts(
    config: Config,
    adapter: Path | None,
    folder: Path,
    prompts: Sequence[Prompt],
    seeds: list[int],
    desc: str,
) -> list[Path]:
    """Sample and score batch by batch into files of ``folder``; list all processes' files.

    Processes take the batches in turn. Intact files are kept.
    """
    e, team, sampler = config.evaluation, current_team(), None
    score = scorers_of(config, folder.parent / "scores.sqlite")
    starts = range(0, len(prompts), e.batch_size)
    parts = [folder / f"{start:08d}-{e.batch_size}.parquet" for start in starts]
    blank: list[str] = []
    bar = tqdm(total=len(prompts), desc=desc, unit="image", mininterval=1.0, disable=not team.main)
    for start, part in list(zip(starts, parts, strict=True))[team.rank :: team.size]:
        batch = slice(start, start + e.batch_size)
        texts = [p if isinstance(p, str) else p.caption for p in prompts[batch]]
        if read_table(part) is None:
            if sampler is None:
                sampler = sampler_of(config, adapter)
                sampler.warn_of_cut(prompts)
            noise = seeds[batch]
            sizes = sizes_for(config, texts)
            sources = [opened(file) for file in sources_for(config, texts)]
            images = sampler.draw(prompts[batch], noise, sizes=sizes, sources=sources)
            blank += [
                f"{text[:60]!r}, seed {seed}"
                for text, seed, image in zip(texts, noise, images, strict=True)
                if one_colour(image)
            ]
            results = score.judge(images, texts) if score else ({}, None)
            write_samples(part, texts, noise, images, *results)
        bar.update(len(texts) * team.size)
    bar.close()
    if score:
        score.conclude()
    if blank:
        logger.warning("%s: %s", desc, one_colour_text(blank, len(prompts)))
    return parts


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
    columns: dict[str, Any] = {"prompt": prompts, "seed": seeds, "image": list(map(png, images))}
    if graphs is not None:
        columns["graph"] = pa.array([g and g.to_json() for g in graphs], pa.string())
    atomic_table(pa.table(columns | {f"score.{k}": v for k, v in scores.items()}), path)


def write_pictures(folder: Path, files: Sequence[Path], config: Config) -> None:
    """Write the first images of reference and policy side by side: 000-reference.png and so on.

    ``prompts.txt`` has the prompts in the same order. An edit has its source beside it.

    Args:
        folder: where they go; it is replaced.
        files: samples of reference and policy.
        config: the run's settings.
    """

    def fill(made: Path) -> None:
        made.mkdir()
        for word, file in zip(("reference", "policy"), files, strict=True):
            rows = next(pq.ParquetFile(file).iter_batches(PICTURES, columns=["prompt", "image"]))
            for number, image in enumerate(rows["image"]):
                (made / f"{number:03d}-{word}.png").write_bytes(image.as_py())
        texts = [prompt.as_py() for prompt in rows["prompt"]]
        for number, edited in enumerate(sources_for(config, texts)):
            if source := opened(edited):
                source.save(made / f"{number:03d}-source.png")
        lines = [f"{k:03d} {harmless(' '.join(text.split()))}\n" for k, text in enumerate(texts)]
        (made / "prompts.txt").write_text("".join(lines), encoding="utf-8")

    atomic_folder(folder, fill)


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
