"""How close to the card's limit? ``python benchmarks/gpu.py [OUTPUT] [--seconds 540]``, for a GPU.

Times, on SDXL's UNet and on a transformer of FLUX.1's width with fewer layers, at 1024 pixels and
with random weights: the bare forward and backward, our step on cached trajectories, Diffusion-DPO's
step, inversion and sampling; for a LoRA and for all weights, at several batches, with each setting
that trades memory for time. All of it is the product's own code, from the pipeline's folder to the
optimizer. Every row has pairs (or images) per second, the share of the measured matmul rate, the
peak memory, and the time that a step waits for its data.

Rows go to OUTPUT/gpu.jsonl as they are measured, and OUTPUT/gpu.md is the table. When the seconds
are over, it stops; the next call measures the rows that are missing. With --miniature, and where
there is no GPU, the tiny pipelines of the same classes take their place: that says nothing of the
models, but shows that every row can be measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from model_cost import SDXL, matmul_rate, timed
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from workshop import CLIP_WIDTH, write_tiny

from inversion_dpo.maths.records import NoisyStates
from inversion_dpo.models.sampler import Sampler
from inversion_dpo.run.config import Config, load_config
from inversion_dpo.training import step as training
from inversion_dpo.training.recipe import prepare, set_up
from inversion_dpo.training.run_files import peak_memory
from inversion_dpo.training.session import Session

# FLUX.1-dev has 19 and 38 layers; https://huggingface.co/black-forest-labs/FLUX.1-dev
FLUX = {"num_layers": 4, "num_single_layers": 8, "attention_head_dim": 128}
FLUX |= {"num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
PAIRS, STEPS = 16, 4  # of the cache that every row reads
VARIANTS = {
    "plain": [],
    "checkpointing": ["training.gradient_checkpointing=true"],
    "compile": ["training.compile=true"],
}


@dataclass(frozen=True)
class Row:
    """What is measured: ``work`` on so many pairs (inversion and sampling: images) at once."""

    model: str
    work: str
    kind: str = "lora"
    batch: int = 4
    variant: str = "plain"


def rows() -> Iterator[Row]:
    """Every row, the most telling first: time may end before the last."""
    for model in ("sdxl", "flux"):
        yield Row(model, "invert", batch=8)
        for kind in ("lora", "full"):
            for work in ("bare", "step", "diffusion_dpo"):
                yield Row(model, work, kind)
    for model in ("sdxl", "flux"):
        for variant in VARIANTS:
            for batch in (1, 4, 8, 16):
                yield Row(model, "step", "lora", batch, variant)
                yield Row(model, "step", "full", batch, variant)
        for batch in (2, 16, 32):
            yield Row(model, "invert", batch=batch)
        yield Row(model, "sample", batch=8)


def write_pipeline(model: str, folder: Path, miniature: bool, device: torch.device) -> Path:
    """Write the tiny pipeline of the class; on a GPU network and autoencoder have real size."""
    if folder.exists():
        return folder
    tiny = write_tiny(model, folder.with_name(f"{model}.part"))
    if not miniature:
        pipeline = DiffusionPipeline.from_pretrained(tiny)
        with torch.device(device):
            torch.manual_seed(0)
            if model == "sdxl":
                widths = {
                    "cross_attention_dim": 2 * CLIP_WIDTH,  # that of the tiny text encoders
                    "projection_class_embeddings_input_dim": 6 * 256 + CLIP_WIDTH,
                }
                pipeline.register_modules(unet=UNet2DConditionModel(**SDXL | widths))
            else:
                config = dict(pipeline.transformer.config) | FLUX
                pipeline.register_modules(transformer=FluxTransformer2DModel(**config))
            config = dict(pipeline.vae.config) | {"block_out_channels": (128, 256, 512, 512)}
            config |= {"layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024}
            pipeline.register_modules(vae=AutoencoderKL.from_config(config))
        shutil.rmtree(tiny)
        pipeline.to(dtype=torch.bfloat16).save_pretrained(tiny)
    return tiny.rename(folder)


def write_pairs(path: Path, side: int) -> Path:
    """Random pictures, which cost as much as any."""
    draw = np.random.default_rng(0)

    def picture() -> bytes:
        data, small = BytesIO(), draw.integers(0, 256, (side // 16, side // 16, 3), np.uint8)
        Image.fromarray(small).resize((side, side)).save(data, "PNG")
        return data.getvalue()

    table = {
        "jpg_0": [picture() for _ in range(PAIRS)],
        "jpg_1": [picture() for _ in range(PAIRS)],
        "label_0": [1] * PAIRS,
        "caption": [f"a red square {k}" for k in range(PAIRS)],
    }
    pq.write_table(pa.table(table), path)
    return path


class Bench:
    """The rows' pipelines, pairs and caches, in one folder."""

    def __init__(self, folder: Path, miniature: bool) -> None:
        self.folder, self.miniature = folder, miniature
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.side = 64 if miniature else 1024
        folder.mkdir(parents=True, exist_ok=True)
        self.pairs = folder / "pairs.parquet"
        if not self.pairs.exists():
            write_pairs(self.pairs, self.side)
        half = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.rate = matmul_rate(self.device, half)
        self.flops: dict[str, float] = {}

    def config(self, row: Row, *more: str) -> Config:
        """Give a user's own settings for such a model."""
        path = write_pipeline(row.model, self.folder / row.model, self.miniature, self.device)
        gpu = self.device.type == "cuda"
        frozen = "bfloat16" if gpu and row.kind == "lora" else "float32"
        settings = [
            f"model.path={path}",
            f"model.dtype={frozen}",
            f"model.resolution={self.side}",
            f"data.pairs={self.pairs}",
            "data.holdout=0.1",
            f"inversion.steps={STEPS}",
            f"policy.kind={row.kind}",
            f"training.batch_size={row.batch}",
            f"training.mixed_precision={'bf16' if gpu else 'no'}",
            "evaluation.scorer=null",
            *VARIANTS[row.variant],
            *(["policy.rank=64", "policy.alpha=64"] if row.kind == "lora" else []),
            *more,
        ]
        return load_config(None, settings)

    def session(self, row: Row) -> Session:
        """Set up a training of the row, ready for its first step."""
        name = row.work if row.work == "diffusion_dpo" else "inversion_dpo"
        config = self.config(row, f"objective.name={name}")
        return set_up(config, prepare(config, self.folder / "caches"))

    def measure(self, row: Row) -> dict[str, Any]:
        """Time the row; what does not fit into memory says so."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        how = {"invert": self.invert, "sample": self.sample}.get(row.work, self.train)
        try:
            found = how(row)
        except torch.cuda.OutOfMemoryError:
            return asdict(row) | {"fits": False}
        peak = round(peak_memory(self.device))
        return asdict(row) | {"fits": True, **found, "peak_mb": peak}

    def train(self, row: Row) -> dict[str, Any]:
        """Take a step of training, or its bare forward and backward."""
        flops = row.batch * self.bare(row)
        if row.work == "diffusion_dpo":  # it evaluates the reference, too
            flops += 2 * row.batch * self.forward(row)
        session, numbers = self.session(row), iter(range(10**9))

        def step() -> None:
            training.step(session, next(numbers), 1e-6)

        work = bare_step(session, row.batch) if row.work == "bare" else step
        first = timed(work, self.device)
        seconds = [*repeated(work, self.device)]
        found = self.result(row.batch, seconds, flops) | {"first_s": round(first, 2)}
        if row.work == "step":
            batch = [pair for pair, _ in session.batch_of(0)]
            waiting = [timed(lambda: tensors(session, batch), self.device) for _ in range(3)]
            found["data_ms"] = round(1e3 * statistics.median(waiting), 2)
        return found

    def invert(self, row: Row) -> dict[str, Any]:
        """Run the whole of ``invert`` on fresh pairs, autoencoder and writing included."""
        config = self.config(row, f"inversion.batch_size={row.batch}")
        cache = self.folder / "fresh"
        shutil.rmtree(cache, ignore_errors=True)
        seconds = timed(lambda: prepare(config, cache), self.device)
        cached = timed(lambda: prepare(config, cache), self.device)  # loads and finds all done
        forward = self.forward(row)
        shutil.rmtree(cache)
        return self.result(2 * PAIRS, [seconds - cached], forward * 2 * PAIRS * (STEPS + 1))

    def sample(self, row: Row) -> dict[str, Any]:
        """Images through the pipeline itself."""
        more = [f"evaluation.batch_size={row.batch}", f"evaluation.sample_steps={STEPS}"]
        config = self.config(row, *more, "evaluation.guidance_scale=1.0")
        path = config.model.path
        pipeline = DiffusionPipeline.from_pretrained(path, torch_dtype=torch.bfloat16)
        pipeline.set_progress_bar_config(disable=True)
        sampler, names = Sampler(pipeline.to(self.device), config), ["a red square"] * row.batch
        with torch.autocast("cpu", torch.bfloat16) if self.device.type == "cpu" else nullcontext():
            work = lambda: sampler.draw(names, range(row.batch))  # noqa: E731
            work()
            seconds = [*repeated(work, self.device)]
        return self.result(row.batch, seconds, self.forward(row) * row.batch * STEPS)

    def bare(self, row: Row) -> float:
        """Operations of one pair's bare forward and backward."""
        session = partial(self.session, replace(row, work="step", batch=1, variant="plain"))
        return self.counted(f"{row.model} {row.kind}", lambda: bare_step(session(), 1))

    def forward(self, row: Row) -> float:
        """Operations of one image's forward pass."""

        def work() -> Callable[[], object]:
            session = self.session(replace(row, work="step", batch=1, variant="plain"))
            states, condition = tensors(session, session.train_pairs[:1])
            predict = partial(session.model.predict, session.network)
            return torch.no_grad()(lambda: predict(states.x_t, states.timesteps, condition))

        return self.counted(f"{row.model} forward", work) / 2  # of winner and loser

    def counted(self, name: str, work: Callable[[], Callable[[], object]]) -> float:
        """Operations of what ``work`` makes, counted once."""
        if name not in self.flops:
            once = work()
            with FlopCounterMode(display=False) as counter:
                once()
            self.flops[name] = counter.get_total_flops()
        return self.flops[name]

    def result(self, items: int, seconds: list[float], flops: float) -> dict[str, Any]:
        """Median, rate and share of the matmul rate."""
        median = statistics.median(seconds)
        share = round(flops / median / self.rate, 4) if flops else None
        return {
            "seconds": round(median, 4),
            "n": len(seconds),
            "per_second": round(items / median, 3),
            "share": share,
        }


def repeated(work: Callable[[], object], device: torch.device) -> Iterator[float]:
    """Seconds of at least three calls, up to five seconds in all."""
    start = time.perf_counter()
    for number in range(30):
        yield timed(work, device)
        if number >= 2 and time.perf_counter() - start > 5:
            return


def tensors(session: Session, batch: list[int]) -> tuple[NoisyStates, dict[str, torch.Tensor]]:
    """States and conditions of pairs, read from the cache and brought to the device."""
    device = session.accelerator.device
    states = session.cache.states(batch, [STEPS // 2] * len(batch), "x0").to(device)
    return states, {k: v.to(device) for k, v in session.cache.condition(batch).items()}


def bare_step(session: Session, pairs: int) -> Callable[[], None]:
    """Policy forward and backward on tensors in memory, and the optimizer's step."""
    states, condition = tensors(session, (session.train_pairs * pairs)[:pairs])

    def step() -> None:
        session.optimizer.zero_grad()
        with session.accelerator.autocast():
            prediction = session.model.predict(
                session.network, states.x_t, states.timesteps, condition
            )
        (prediction.float() - states.target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(session.policy.trainable().values(), 1.0)
        session.optimizer.step()

    return step


def table(found: list[dict[str, Any]], device: str) -> str:
    """Format the rows as Markdown."""
    head = "| model | work | trained | batch | setting | s | per second | of the matmul rate |"
    lines = [f"{device}\n", head + " peak, MB | first, s | data, ms |", "|---" * 11 + "|"]
    for r in found:
        cells = [r[k] for k in ("model", "work", "kind", "batch", "variant")]
        if r["fits"]:
            share = "" if r["share"] is None else f"{r['share']:.0%}"
            cells += [r["seconds"], r["per_second"], share, r["peak_mb"]]
            cells += [r.get("first_s", ""), r.get("data_ms", "")]
        else:
            cells += ["does not fit", *[""] * 5]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--miniature", action="store_true")
    args = parser.parse_args()
    began, miniature = time.monotonic(), args.miniature or not torch.cuda.is_available()
    bench = Bench(args.output, miniature)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    name += f", {bench.rate / 1e12:.1f} TFLOP/s measured" + (", miniature" if miniature else "")
    journal = args.output / "gpu.jsonl"
    found = [json.loads(x) for x in journal.read_text().splitlines()] if journal.exists() else []
    known = [Row(*(r[k] for k in Row.__dataclass_fields__)) for r in found]
    for row in [r for r in dict.fromkeys(rows()) if r not in known]:
        if time.monotonic() - began > args.seconds:
            print("the time is over: the same command measures the rest")
            break
        found.append(bench.measure(row))
        with journal.open("a") as file:
            file.write(json.dumps(found[-1]) + "\n")
        print(json.dumps(found[-1]), flush=True)
    (args.output / "gpu.md").write_text(table(found, name))
    print(table(found, name))


if __name__ == "__main__":
    main()
