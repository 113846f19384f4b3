"""How close to the card's limit? ``python benchmarks/gpu.py [OUTPUT] [--seconds 540]``, for a GPU.

Times, on SDXL's UNet and on a transformer of FLUX.1's width with fewer layers, at 1024 pixels and
with random weights: the bare forward and backward, our step on cached trajectories, Diffusion-DPO's
step (these three in turn, in one process), inversion beside bare forwards, and sampling; for a LoRA
and for all weights, at several batches. Each setting that trades is tried alone, and each default
that is meant to be faster is taken back alone. All of it is the product's own code, from the
pipeline's folder to the optimizer. Every row has pairs (or images) per second, the share of the
measured matmul rate, the peak memory, the seconds of the first call (compiling, choosing kernels),
the time that a step waits for its data, and how often it waits for the device.

Rows go to OUTPUT/gpu.jsonl as they are measured, the most telling first; OUTPUT/gpu.md is the table
with what to do next, OUTPUT/gpu.json what `benchmarks/job_cost.py` reads. When the seconds are
over, it stops; the next call measures the rows that are missing. With --miniature, and where there
is no GPU, the tiny pipelines of the same classes take their place: that says nothing of the models,
but shows that every row can be measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from workshop import CLIP_WIDTH, write_tiny

from inversion_dpo.maths.records import NoisyStates
from inversion_dpo.models.sampler import Sampler
from inversion_dpo.run.config import Config, load_config
from inversion_dpo.training import step as training
from inversion_dpo.training.plan import make_plan
from inversion_dpo.training.recipe import prepare, set_up
from inversion_dpo.training.run_files import peak_memory
from inversion_dpo.training.session import Session
from inversion_dpo.training.step import part_of_step

# FLUX.1-dev has 19 and 38 layers; https://huggingface.co/black-forest-labs/FLUX.1-dev
FLUX: dict[str, Any] = {"num_layers": 4, "num_single_layers": 8, "attention_head_dim": 128}
FLUX |= {"num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
PAIRS, STEPS = 16, 4  # of the cache that every row reads
BATCHES = (4, 1, 8, 16)  # pairs of a step
STEP_WORKS = ("bare", "step", "diffusion_dpo")
VARIANTS = {  # the settings that trade, one by one
    "plain": [],
    "compile": ["training.compile=default"],
    "adapter": ["training.mixed_precision=no", "policy.adapter_dtype=model"],  # LoRA only
    "checkpointing": ["training.gradient_checkpointing=true"],
    "graphs": ["training.compile=reduce-overhead"],  # GPU only
}
AIMS = {"step": 0.5, "invert": 0.55}  # shares of the matmul rate


def contiguous(session: Session) -> None:
    """Take channels-last back."""
    session.policy.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def widened(session: Session) -> None:
    """Have peft widen the inputs of a LoRA to float32 again."""
    for module in session.policy.network.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = True


def unfused(session: Session) -> None:
    """Take AdamW's steps tensor by tensor, or in lists of them."""
    for group in session.optimizer.param_groups:
        group["fused"] = False


TAKEN_BACK = {"contiguous": contiguous, "widened": widened, "unfused": unfused}  # the defaults


@dataclass(frozen=True)
class Row:
    """What is measured: ``work`` on so many pairs (inversion and sampling: images) at once."""

    model: str
    work: str
    kind: str = "lora"
    batch: int = 4
    variant: str = "plain"


ROW = tuple(Row.__dataclass_fields__)


def rows(gpu: bool = True) -> Iterator[Row]:
    """Every row, the most telling first: time may end before the last.

    Those of one model, kind and variant follow each other: a model is loaded once for them.
    """

    def steps(model: str, kind: str, variant: str, batches: Sequence[int] = (4,)) -> Iterator[Row]:
        works = STEP_WORKS if variant == "plain" else ("step",)
        yield from (Row(model, work, kind, b, variant) for b in batches for work in works)

    yield from steps("sdxl", "lora", "plain", BATCHES)
    yield Row("sdxl", "invert", batch=8)
    yield from steps("sdxl", "full", "plain")
    yield from steps("sdxl", "lora", "compile", (4, 8))
    yield Row("sdxl", "invert", batch=32)
    yield from steps("flux", "lora", "plain")
    yield Row("flux", "invert", batch=8)
    yield from steps("sdxl", "lora", "adapter")
    yield Row("sdxl", "invert", batch=8, variant="compile")
    for variant in ("checkpointing", *TAKEN_BACK, *["graphs"] * gpu):
        yield from steps("sdxl", "lora", variant)
    yield from steps("sdxl", "full", "compile")
    yield Row("sdxl", "sample", batch=8)
    yield from steps("flux", "full", "plain")
    for variant in ("compile", "adapter", "checkpointing", "widened"):
        yield from steps("flux", "lora", variant, (4, 1))
    yield Row("flux", "invert", batch=2)
    yield Row("flux", "sample", batch=8)


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
        self.alive: tuple[Row, Session] | None = None  # what the row before was measured with

    def config(self, row: Row, *more: str) -> Config:
        """Give a user's own settings for such a model."""
        path = write_pipeline(row.model, self.folder / row.model, self.miniature, self.device)
        gpu = self.device.type == "cuda"
        half = (gpu and row.kind == "lora") or row.variant == "adapter"
        frozen = "bfloat16" if half else "float32"
        settings = [
            f"model.path={path}",
            f"model.dtype={frozen}",
            f"model.resolution={self.side}",
            f"data.pairs={self.pairs}",
            "data.holdout=0.1",
            f"inversion.steps={STEPS}",
            f"policy.kind={row.kind}",
            f"training.batch_size={max(BATCHES)}",
            f"training.mixed_precision={'bf16' if gpu else 'no'}",
            "evaluation.scorer=null",
            *VARIANTS.get(row.variant, []),
            *(["policy.rank=64", "policy.alpha=64"] if row.kind == "lora" else []),
            *more,
        ]
        return load_config(None, settings)

    def session(self, row: Row) -> Session:
        """Set up a training of the row, or go on with that of the row before."""
        same = replace(row, work="step", batch=0)
        if self.alive is None or self.alive[0] != same:
            self.alive = None  # before the next takes its memory
            self.free()
            config = self.config(row)
            session = set_up(config, prepare(config, self.folder / "caches"))
            TAKEN_BACK.get(row.variant, lambda _: None)(session)
            self.alive = same, session
        return self.alive[1]

    def plan_of(self, row: Row, session: Session) -> Session:
        """Take the row's batch, and for Diffusion-DPO its loss and its path of fresh noise."""
        plan, model, cache = session.plan, session.model, session.cache
        if row.work == "diffusion_dpo":
            config = self.config(row, "objective.name=diffusion_dpo")
            at = lambda size: (model.schedule_at(size), cache.grid_at(size))  # noqa: E731
            plan = make_plan(config, at, cache.sizes[0])
        return replace(session, plan=replace(plan, batch_size=row.batch))

    def free(self) -> None:
        """Give back memory that nothing holds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def measure(self, row: Row) -> list[dict[str, Any]]:
        """Time the row, and those that are timed in turn with it; what does not fit says so."""
        if row.work not in STEP_WORKS:
            self.alive = None
        self.free()
        turns = STEP_WORKS if row.variant == "plain" and row.work in STEP_WORKS else (row.work,)
        how = {"invert": self.invert, "sample": self.sample}.get(row.work)
        try:
            found = [how(row)] if how else self.train([replace(row, work=w) for w in turns])
        except torch.cuda.OutOfMemoryError:
            self.alive = None
            found = [{"fits": False} for _ in turns]
        peak = {"peak_mb": round(peak_memory(self.device))}
        rows = [asdict(replace(row, work=w)) for w in turns]
        return [r | {"fits": True} | peak | f for r, f in zip(rows, found, strict=True)]

    def train(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Take steps of training, or bare forwards and backwards, in turn."""
        first = rows[0]
        bare_flops, forward = first.batch * self.bare(first), self.forward(first)
        sessions = [self.plan_of(row, self.session(row)) for row in rows]
        numbers = iter(range(10**9))

        def work_of(row: Row, session: Session) -> Callable[[], object]:
            if row.work == "bare":
                return bare_step(session, row.batch)
            return lambda: training.step(session, next(numbers), 1e-6)

        works = [work_of(row, session) for row, session in zip(rows, sessions, strict=True)]
        begun = [timed(work, self.device) for work in works]
        seconds = [*repeated(works, self.device)]
        found = []
        for k, (row, session) in enumerate(zip(rows, sessions, strict=True)):
            reference = 2 * row.batch * forward if row.work == "diffusion_dpo" else 0.0
            own = self.result(row.batch, [s[k] for s in seconds], bare_flops + reference)
            own["first_s"] = round(begun[k], 2)
            if row.work == "step":
                own["waits"] = waits(works[k], self.device)
                batch = [pair for pair, _ in part_of_step(session, 0, 0)[0]]
                read = partial(tensors, session, batch)
                reading = [timed(read, self.device) for _ in "123"]
                own["data_ms"] = round(1e3 * statistics.median(reading), 2)
            found.append(own)
        return found

    def invert(self, row: Row) -> dict[str, Any]:
        """Run the whole of ``invert`` on fresh pairs, autoencoder and writing included.

        ``of_bare`` is its time over that of as many bare forwards of the same batch.
        """
        flops = self.forward(row)
        session = self.session(row)
        states, condition = tensors(session, (session.train_pairs * row.batch)[: row.batch // 2])

        @torch.no_grad()
        def forward() -> None:
            with session.accelerator.autocast():
                session.model.predict(session.network, states.x_t, states.timesteps, condition)

        first = timed(forward, self.device)
        bare = statistics.median(timed(forward, self.device) for _ in range(3))
        self.alive = session = states = condition = None  # type: ignore[assignment]
        self.free()
        config = self.config(row, f"inversion.batch_size={row.batch}")
        cache = self.folder / "fresh"
        shutil.rmtree(cache, ignore_errors=True)
        seconds = timed(lambda: prepare(config, cache), self.device)
        cached = timed(lambda: prepare(config, cache), self.device)  # loads and finds all done
        shutil.rmtree(cache)
        took, forwards = seconds - cached, (STEPS + 1) * 2 * PAIRS / row.batch
        found = self.result(2 * PAIRS, [took], flops * 2 * PAIRS * (STEPS + 1))
        return found | {"first_s": round(first, 2), "of_bare": round(took / bare / forwards, 3)}

    def sample(self, row: Row) -> dict[str, Any]:
        """Images through the pipeline itself."""
        more = [f"evaluation.batch_size={row.batch}", f"evaluation.sample_steps={STEPS}"]
        config = self.config(row, *more, "evaluation.guidance_scale=1.0")
        path = config.model.path
        pipeline = DiffusionPipeline.from_pretrained(path, torch_dtype=torch.bfloat16)
        pipeline.set_progress_bar_config(disable=True)
        sampler, names = Sampler(pipeline.to(self.device), config), ["a red square"] * row.batch
        with torch.autocast("cpu", torch.bfloat16) if self.device.type == "cpu" else nullcontext():
            work = partial(sampler.draw, names, range(row.batch))
            work()
            seconds = [s for (s,) in repeated([work], self.device)]
        return self.result(row.batch, seconds, self.forward(row) * row.batch * STEPS)

    def bare(self, row: Row) -> float:
        """Operations of one pair's bare forward and backward."""
        plain = replace(row, work="step", variant="plain")
        return self.counted(
            f"{row.model} {row.kind}", lambda: bare_step(self.session(plain), 1, moves=False)
        )

    def forward(self, row: Row) -> float:
        """Operations of one image's forward pass."""

        def work() -> Callable[[], object]:
            session = self.session(replace(row, work="step", variant="plain"))
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


def repeated(
    works: Sequence[Callable[[], object]], device: torch.device
) -> Iterator[tuple[float, ...]]:
    """Seconds of at least three calls of each, in turn, up to five seconds for each."""
    start = time.perf_counter()
    for number in range(30):
        yield tuple(timed(work, device) for work in works)
        if number >= 2 and time.perf_counter() - start > 5 * len(works):
            return


def waits(work: Callable[[], object], device: torch.device) -> int | None:
    """Count how often a call waits for the GPU, as torch warns of it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in found)


def tensors(session: Session, batch: list[int]) -> tuple[NoisyStates, dict[str, torch.Tensor]]:
    """States and conditions of pairs, read from the cache and brought to the device."""
    device = session.accelerator.device
    states = session.cache.states(batch, [STEPS // 2] * len(batch), "x0").to(device)
    return states, {k: v.to(device) for k, v in session.cache.condition(batch).items()}


def bare_step(session: Session, pairs: int, *, moves: bool = True) -> Callable[[], None]:
    """Policy forward and backward on tensors in memory, and the optimizer's step if it moves."""
    states, condition = tensors(session, (session.train_pairs * pairs)[:pairs])
    parameters = list(session.policy.trainable().values())

    def step() -> None:
        session.optimizer.zero_grad()
        with session.accelerator.autocast():
            prediction = session.model.predict(
                session.network, states.x_t, states.timesteps, condition
            )
        (prediction.float() - states.target).square().mean().backward()
        if moves:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            session.optimizer.step()

    return step


def table(found: list[dict[str, Any]], device: str) -> str:
    """Format the rows as Markdown."""
    head = "| model | work | trained | batch | setting | s | per second | of the matmul rate |"
    head += " peak, MB | first, s | data, ms | waits | of bare forwards |"
    lines = [f"{device}\n", head, "|---" * 13 + "|"]
    for r in found:
        cells = [r[k] for k in ("model", "work", "kind", "batch", "variant")]
        if r["fits"]:
            share = "" if r["share"] is None else f"{r['share']:.0%}"
            cells += [r["seconds"], r["per_second"], share, r["peak_mb"]]
            more = (r.get(k) for k in ("first_s", "data_ms", "waits", "of_bare"))
            cells += ["" if value is None else value for value in more]
        else:
            cells += ["does not fit", *[""] * 7]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def advice(found: list[dict[str, Any]]) -> list[str]:
    """Say what the rows show beside the aims, and what to try next."""
    told, at = [], {Row(*(r[k] for k in ROW)): r for r in found if r["fits"]}
    for row, r in at.items():
        if row.work == "step" and row.variant == "plain":
            for other, aim in (("bare", 1.03), ("diffusion_dpo", 0.78)):
                if beside := at.get(replace(row, work=other)):
                    ratio = r["seconds"] / beside["seconds"]
                    verdict = "met" if ratio <= aim else f"missed; {r['data_ms']} ms are data"
                    told.append(f"{name_of(row)} / {other}: {ratio:.3f}, aim {aim} {verdict}")
        plain = at.get(replace(row, variant="plain"))
        if row.variant != "plain" and plain:
            gain = plain["per_second"] and r["per_second"] / plain["per_second"]
            told.append(f"{name_of(row)}: x {gain:.2f} of plain, {r['peak_mb']} MB at most")
    for work, aim in AIMS.items():
        for model in dict.fromkeys(row.model for row in at):
            shares = {k: r["share"] for k, r in at.items() if (k.work, k.model) == (work, model)}
            if shares:
                best = max(shares, key=lambda k: shares[k])
                next_step = "" if shares[best] >= aim else "; profile this row next"
                told.append(f"best {name_of(best)}: {shares[best]:.0%}, aim {aim:.0%}{next_step}")
    return told


def name_of(row: Row) -> str:
    """Name a row in a line."""
    return f"{row.model} {row.work} {row.kind} x{row.batch} {row.variant}"


def write(folder: Path, found: list[dict[str, Any]], device: str, rate: float) -> str:
    """Write the table, and the figures that ``job_cost.py`` reads; returns the table."""
    text = table(found, device) + "\n" + "".join(f"- {line}\n" for line in advice(found))
    (folder / "gpu.md").write_text(text)
    about = {"device": device, "date": time.strftime("%Y-%m-%d"), "matmul_flops": rate}
    (folder / "gpu.json").write_text(json.dumps(about | {"rows": found}, indent=1))
    return text


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
    for row in dict.fromkeys(rows(gpu=bench.device.type == "cuda")):
        if row in [Row(*(r[k] for k in ROW)) for r in found]:
            continue
        if time.monotonic() - began > args.seconds:
            print("the time is over: the same command measures the rest")
            break
        for one in bench.measure(row):
            found.append(one)
            with journal.open("a") as file:
                file.write(json.dumps(one) + "\n")
            print(json.dumps(one), flush=True)
        write(args.output, found, name, bench.rate)  # a run that is killed leaves it
    print(write(args.output, found, name, bench.rate))


if __name__ == "__main__":
    main()
