"""Policy against reference on held-out prompts, from the same noise."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from inversion_dpo.cache import atomic_text, sha256_of
from inversion_dpo.config import Config, ConfigError, resolve
from inversion_dpo.data.pairs import decode_image
from inversion_dpo.evaluation.metrics import compare
from inversion_dpo.evaluation.report import ReportData, write_report
from inversion_dpo.models.loading import load_pipeline
from inversion_dpo.runs import read_config, read_seconds, stage
from inversion_dpo.sampling import sample
from inversion_dpo.session import source_of
from inversion_dpo.training import read_rows

Images = list[NDArray[np.uint8]]
Scores = dict[str, NDArray[np.float64]]
Scorer = Callable[[Sequence[NDArray[np.uint8]], Sequence[str]], Scores]


def read_prompts(path: str, limit: int | None) -> list[str]:
    """Prompts of a text file, one a line; ConfigError if it is missing or empty."""
    file = Path(resolve(path))
    if not file.is_file():
        raise ConfigError(f"evaluation.prompts: no file {file}; give a text file, a prompt a line")
    prompts = [p.strip() for p in file.read_text(encoding="utf-8").splitlines() if p.strip()]
    if not prompts:
        raise ConfigError(f"evaluation.prompts: {file} holds no prompts; write one a line")
    return prompts[:limit]


def load_scorer(name: str) -> Scorer:
    """Import ``module:function``; ConfigError names what is missing."""
    module, _, function = name.partition(":")
    try:
        scorer: Scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"evaluation.scorer={name!r}: {error}; write module:function") from error
    return scorer


def load_policy_pipeline(config: Config, adapter: Path | None) -> Any:
    """The pipeline as users load it: the base, plus a LoRA, or a full pipeline folder."""
    m = config.model
    full = adapter is not None and (adapter / "model_index.json").exists()
    path = str(adapter) if full else resolve(m.path)
    import torch

    extras = (None, None, m.t5) if full else (m.vae, m.lora, m.t5)
    pipeline = load_pipeline(path, m.revision, m.variant, getattr(torch, m.dtype), *extras)
    if adapter is not None and not full:
        if not (adapter / "pytorch_lora_weights.safetensors").exists():
            raise ConfigError(f"{adapter} holds neither a LoRA nor a pipeline: train first")
        pipeline.load_lora_weights(adapter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return pipeline.to(device)


def model_digest(config: Config, adapter: Path | None) -> str:
    """A short hash of what would be sampled: the model's name and every weight file."""
    digest = hashlib.sha256(f"{config.model}".encode())
    base = Path(resolve(config.model.path))
    folders = [f for f in (base, adapter) if f is not None and f.is_dir()]
    for file in sorted(p for f in folders for p in f.rglob("*.safetensors")):
        digest.update(sha256_of(file).encode())
    return digest.hexdigest()[:16]


def sampled(
    config: Config, adapter: Path | None, memo: Path, prompts: list[str], desc: str
) -> tuple[Images, Scores]:
    """Images and scores of one model on the prompts; kept as Parquet and reused."""
    e = config.evaluation
    asked = f"{model_digest(config, adapter)} {prompts} {e.seed} {e.sample_steps} "
    asked += f"{e.guidance_scale} {e.scorer}"
    path = memo / f"{desc}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.parquet"
    if path.exists():
        return read_samples(path)
    pipeline = load_policy_pipeline(config, adapter)
    seeds = [e.seed + k for k in range(len(prompts))]
    images = sample(
        pipeline, prompts, seeds, e.sample_steps, e.guidance_scale, e.batch_size, desc,
        config.model.resolution, config.model.prompt_chunks,
    )  # fmt: skip
    scores = load_scorer(e.scorer)(images, prompts) if e.scorer else {}
    write_samples(path, prompts, seeds, images, scores)
    return images, scores


def write_samples(
    path: Path, prompts: list[str], seeds: list[int], images: Images, scores: Scores
) -> None:
    """The per-prompt table: prompt, seed, PNG bytes and every score."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"prompt": prompts, "seed": seeds, "image": [png_bytes(i) for i in images]}
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.table(columns | {f"score.{k}": v for k, v in scores.items()}), partial)
    os.replace(partial, path)


def read_samples(path: Path) -> tuple[Images, Scores]:
    """Inverse of :func:`write_samples`."""
    table = pq.read_table(path)
    images = [
        np.array(decode_image(b, f"{path} row {k}"))
        for k, b in enumerate(table["image"].to_pylist())
    ]
    names = [n for n in table.column_names if n.startswith("score.")]
    return images, {n[6:]: table[n].to_numpy() for n in names}


def png_bytes(image: NDArray[np.uint8]) -> bytes:
    """Encode uint8 [H, W, 3] losslessly."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def evaluate(
    folder: Path, config: Config | None = None, memo: Path | None = None
) -> dict[str, Any]:
    """Sample reference and policy of a finished run, score both, write ``metrics.json``.

    ``memo`` keeps samples so that the same reference is sampled once for many runs.
    """
    config = config or read_config(folder)
    prompts = read_prompts(config.evaluation.prompts, config.evaluation.limit)
    memo = memo or folder / "samples"
    with stage(folder, "sample reference"):
        _, reference = sampled(config, None, memo, prompts, "reference")
    with stage(folder, "sample policy"):
        _, policy = sampled(config, folder / "adapter", memo, prompts, "policy")
    metrics: dict[str, Any] = {"n_prompts": len(prompts)}
    if reference:
        if config.evaluation.preference not in reference:
            raise ConfigError(
                f"evaluation.preference={config.evaluation.preference!r} is not a score of "
                f"{config.evaluation.scorer}; it gives {', '.join(reference)}"
            )
        metrics |= compare(reference, policy, config.evaluation.preference)
    rows = read_rows(folder / "metrics.jsonl")
    last = {k: v for k, v in rows[-1].items() if k != "step"} if rows else {}
    metrics |= {"pairs": last.pop("pairs", 0), "steps": config.training.steps, "training": last}
    metrics |= {"seconds": read_seconds(folder)}
    atomic_text(json.dumps(metrics, indent=1), folder / "metrics.json")
    return metrics


def pick(prompts: list[str], count: int, seed: int = 0) -> list[int]:
    """Which prompts to show: a seeded draw, not the best."""
    rng = np.random.default_rng(seed)
    return sorted(rng.choice(len(prompts), min(count, len(prompts)), replace=False).tolist())


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    names = ("inversion-dpo", "torch", "diffusers", "transformers", "peft", "accelerate")
    found = {n: version(n) for n in names}
    return found | {"python": platform.python_version(), "machine": platform.machine()}


def report(folder: Path, memo: Path | None = None, shown: int = 16) -> Path:
    """Write ``report.html`` of an evaluated run, with PNG copies of its figures."""
    if not (folder / "metrics.json").exists():
        raise ConfigError(f"{folder} has no metrics.json: run `inversion-dpo evaluate {folder}`")
    config, metrics = read_config(folder), json.loads((folder / "metrics.json").read_text())
    e = config.evaluation
    prompts = read_prompts(e.prompts, e.limit)
    memo = memo or folder / "samples"
    reference, r = sampled(config, None, memo, prompts, "reference")
    policy, p = sampled(config, folder / "adapter", memo, prompts, "policy")
    show = pick(prompts, shown)
    scores = [
        {"reference": float(r[e.preference][k]), "policy": float(p[e.preference][k])}
        for k in show if r
    ]  # fmt: skip
    examples = list(source_of(config, 6))
    data = ReportData(
        title="Inversion-DPO: policy against reference",
        metrics=metrics,
        preference=e.preference,
        captions=[prompts[k] for k in show],
        reference_images=[reference[k] for k in show],
        policy_images=[policy[k] for k in show],
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
