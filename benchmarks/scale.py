"""What do more pairs in every round bring? ``python benchmarks/scale.py [OUTPUT]``, for a GPU.

Rounds on the embedded model, as ``inversion-dpo compare --rounds`` runs them, with everything on
the device and the exact checker on every core: that model is so small that files and launches
would take most of the time. A round samples the policy on new training prompts (in bfloat16 on a
GPU; in the first round half of the samples of each under guidance 2), pairs the best with the
worst, inverts the pairs under that policy (``x0``) or draws fresh noise (``diffusion_dpo``,
``kto``), trains an adapter and merges it. Prints what one sample scores on the held-out prompts
after every round, mean of eight noises a prompt, with 95% t intervals over seeds; the best of four
of the reference by as many draws; and the difference with a 95% t interval over prompts. What every
round has reached stands in OUTPUT/seed-N/result.json: a finished seed is not repeated, fewer rounds
are only read, and a seed that was stopped begins again. Processes may share OUTPUT, each with seeds
of its own.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: there is a checker on every core

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inversion_dpo.compare.page import cell
from inversion_dpo.compare.summary import over_seeds
from inversion_dpo.data.images import decode_image
from inversion_dpo.evaluation.prompt_sets import read_prompts
from inversion_dpo.evaluation.samples import REPEAT
from inversion_dpo.graphs.graph import SceneGraph
from inversion_dpo.making_pairs.candidates import encode_image
from inversion_dpo.making_pairs.mining import disjoint, margin
from inversion_dpo.maths.inversion import invert, reconstruct
from inversion_dpo.maths.losses import as_pair_errors, dpo, kto, squared_error
from inversion_dpo.maths.records import Extent, LossSettings
from inversion_dpo.maths.schedule import add_noise, error_scale, prediction_of
from inversion_dpo.maths.targets import target_prediction
from inversion_dpo.models.base import DiffusionModel, network_of
from inversion_dpo.models.loading import adapt, load_pipeline
from inversion_dpo.models.lora import merge_lora
from inversion_dpo.run.config import load_config
from inversion_dpo.run.disk import atomic_text
from inversion_dpo.run.fields import PolicyConfig, TrainingConfig
from inversion_dpo.training.policy import LoraPolicy
from inversion_dpo.training.recipe import rate_at
from inversion_dpo.training.session import pairs_of_step
from inversion_dpo.trajectories.fill import predictions
from inversion_dpo.world.captions import parse_caption
from inversion_dpo.world.checker import NAMES, judge
from inversion_dpo.world.scene_prompts import scenes

CONFIG = load_config("composition", [])
VALIDATION = "asset:prompts-validation.txt"
CHUNK = 1024  # images in one pass of the network
NOISES = 8  # for each held-out prompt
Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Settings:
    """Of every round; ``hard``: share of prompts with three and four objects."""

    method: str = "x0"
    rounds: int = 3
    prompts: int = 10_000
    samples: int = 8
    hard: float = 0.5
    guidance: float = 2.0  # of every second sample of a prompt in the first round
    later_guidance: float = 1.0  # the same in the other rounds
    least: float = 0.2  # difference in composition of winner and loser
    iterations: int = 1  # of the inversion's fixed point
    t_min: float = 0.1
    steps: int = 600
    batch: int = 128
    rate: float = 3e-4  # falls to 0
    beta: float = 1000.0
    rank: int = 16


# ---------------------------------------------------------------- samples and their scores


def look(images: NDArray[np.uint8], graphs: list[SceneGraph], stored: bool) -> tuple[Any, Scores]:
    """Score the images; as a JPEG gives them back if they are to be ``stored``."""
    if stored:
        images = np.stack([np.asarray(decode_image(encode_image(i, 95), "sample")) for i in images])
    found = judge(list(images), [graph.caption for graph in graphs], graphs)
    return images, {name: found[name] for name in NAMES}


@dataclass(frozen=True)
class World:
    """The model on its device, its twin that draws, and the checkers."""

    model: DiffusionModel
    sampler: DiffusionModel
    device: torch.device
    checkers: ProcessPoolExecutor

    def hidden(self, captions: Sequence[str]) -> Tensor:
        """Text embeddings [P, 32, 128]."""
        parts = [list(captions[k : k + CHUNK]) for k in range(0, len(captions), CHUNK)]
        return torch.cat([self.model.condition(p)["encoder_hidden_states"] for p in parts])

    def draw(
        self, graphs: Sequence[SceneGraph], noise: Tensor, guidance: float, stored: bool
    ) -> tuple[NDArray[np.uint8], Scores]:
        """Draw an image [64, 64, 3] of each graph's caption from its noise, and its scores."""
        model = self.sampler
        grid = model.schedule.grid(CONFIG.evaluation.sample_steps, "sampler")
        hidden, waiting = self.hidden([g.caption for g in graphs]), []
        for k in range(0, len(graphs), CHUNK):
            part = slice(k, k + CHUNK)
            condition = {"encoder_hidden_states": hidden[part]}
            predict, _ = predictions(model, condition, guidance, guidance)
            x_0 = reconstruct(noise[part].to(self.device), grid, predict, model.schedule.kind)
            pixels = (model.decode(x_0) + 1) * 127.5
            images = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            for j in range(0, len(images), 64):
                some = images[j : j + 64], list(graphs[part][j : j + 64])
                waiting.append(self.checkers.submit(look, *some, stored))
        found = [w.result() for w in waiting]
        scores = {n: np.concatenate([s[n] for _, s in found]) for n in found[0][1]}
        return np.concatenate([i for i, _ in found]), scores


def make_world(workers: int) -> World:
    """Start the checkers first: they must not inherit a GPU."""
    checkers = ProcessPoolExecutor(workers, get_context("fork"))
    list(checkers.map(abs, range(workers)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    m = CONFIG.model
    faster = replace(m, dtype="bfloat16" if device.type == "cuda" else "float32")
    pipelines = [load_pipeline(m, device), load_pipeline(faster, device)]
    for part in (pipelines[1].unet, pipelines[1].vae):
        part.to(memory_format=torch.channels_last)
    model, sampler = (adapt(p, CONFIG.model.resolution) for p in pipelines)
    return World(model, sampler, device, checkers)


def normal(count: int, seed: int) -> Tensor:
    """Noise [count, 8, 8, 8], the same on every machine."""
    return torch.randn(count, 8, 8, 8, generator=torch.Generator().manual_seed(seed))


def held_out(world: World, prompts: str, samples: int = 1) -> Scores:
    """Scores [P, NOISES] of the best of some samples on held-out prompts.

    From the noise that ``inversion-dpo evaluate`` uses, further samples' from that of ``compare``.
    """
    e = CONFIG.evaluation
    graphs = [parse_caption(p) for p in read_prompts(prompts, e.limit)]
    drawn = []
    for j in range(samples):
        seeds = [
            e.seed + k + REPEAT * n + 100_000 * j for k in range(len(graphs)) for n in range(NOISES)
        ]
        noise = torch.cat([normal(1, seed) for seed in seeds])
        each = [graph for graph in graphs for _ in range(NOISES)]
        drawn.append(world.draw(each, noise, e.guidance_scale, stored=False)[1])
    best = np.argmax([d[e.preference] for d in drawn], axis=0)
    return {
        name: np.choose(best, [d[name] for d in drawn]).reshape(-1, NOISES) for name in drawn[0]
    }


def reference(world: World, file: Path) -> dict[str, Any]:
    """One sample and the best of four of the untrained model; measured once for all seeds."""
    if not file.exists():
        measured = {
            prompts: {str(n): summary(held_out(world, prompts, n)) for n in (1, 4)}
            for prompts in (VALIDATION, CONFIG.evaluation.prompts)
        }
        atomic_text(json.dumps(measured), file)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def summary(scores: Scores) -> dict[str, Any]:
    """Means, and composition by noise and by prompt."""
    c = scores["composition"]
    return {name: float(v.mean()) for name, v in scores.items()} | {
        "by noise": c.mean(0).tolist(),
        "by prompt": c.mean(1).tolist(),
    }


def asked(count: int, hard: float, seed: int) -> list[SceneGraph]:
    """Distinct training prompts of two objects and more, a share ``hard`` of three and four."""
    wanted = {True: round(count * hard), False: count - round(count * hard)}
    found: dict[str, SceneGraph] = {}
    for scene in scenes("train", seed):
        graph, kind = scene.graph, len(scene.graph.items) > 2
        if len(graph.items) > 1 and wanted[kind] and graph.caption not in found:
            wanted[kind] -= 1
            found[graph.caption] = graph
        if not any(wanted.values()):
            break
    return list(found.values())


@dataclass(frozen=True)
class Pairs:
    """Latents [2, P, *], winners first; embeddings of the prompts, and each pair's prompt [P]."""

    x_0: Tensor
    hidden: Tensor
    prompt: Tensor


def make_pairs(
    world: World, s: Settings, seed: int, guidance: float
) -> tuple[Pairs, dict[str, Any]]:
    """Sample, score, mine and encode; with the mean composition of both halves of the samples."""
    graphs = asked(s.prompts, s.hard, seed)
    guidances = 1.0, guidance
    images, values = [], []
    for k in range(s.samples):
        noise = normal(len(graphs), seed * 100 + k)
        drawn, scores = world.draw(graphs, noise, guidances[k % 2], stored=True)
        images.append(drawn)
        values.append(scores["composition"])
    rows = []
    for prompt in range(len(graphs)):
        group = [{"composition": float(v[prompt])} for v in values]
        mined = disjoint(margin(group, ["composition"], s.least))
        rows += [(prompt, m.winner, m.loser) for m in mined]
    chosen = np.stack([images[row[side]][row[0]] for side in (1, 2) for row in rows])
    pixels = torch.from_numpy(chosen).permute(0, 3, 1, 2)
    device = world.device
    x_0 = torch.cat([world.model.encode(p.to(device) / 127.5 - 1) for p in pixels.split(CHUNK)])
    pairs = Pairs(
        x_0.unflatten(0, (2, -1)),
        world.hidden([g.caption for g in graphs]),
        torch.tensor([row[0] for row in rows], device=device),
    )
    told = {"sampled": [float(np.mean(values[k::2])) for k in range(2)], "pairs": len(rows)}
    return pairs, told


# ---------------------------------------------------------------- one round of training


@dataclass(frozen=True)
class Points:
    """Where training looks. ``at``: (levels [B], pairs [B]) -> x_t, timesteps, target, what an
    error of it counts for, and the reference's error, [2B, ...] each, winners first.
    """  # noqa: D205

    at: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    low: int
    high: int


@torch.no_grad()
def trajectory_points(world: World, s: Settings, pairs: Pairs, seed: int) -> Points:
    """Return the states of all pairs' inversions, target ``x0``."""
    schedule, n, device = world.model.schedule, CONFIG.inversion.steps, world.device
    grid, kind = schedule.grid(n), schedule.kind
    low, high = round(s.t_min * n), round(CONFIG.objective.t_max * n)
    start, levels = round(CONFIG.inversion.t_start * n), grid.levels.to(device)
    scale, timesteps = error_scale(levels, kind).float(), grid.timesteps.to(device)
    count = pairs.x_0.shape[1]
    states = pairs.x_0.new_empty(high + 1 - low, *pairs.x_0.shape)
    target, error = torch.empty_like(states), states.new_empty(high + 1 - low, 2, count)
    noise = normal(count, seed).to(device)
    for k in range(0, count, CHUNK):
        part = slice(k, k + CHUNK)
        hidden = {"encoder_hidden_states": pairs.hidden[pairs.prompt[part]]}
        predict, _ = predictions(world.model, hidden, 1.0, 1.0)
        for side in range(2):
            x_0 = pairs.x_0[side, part]
            extent = Extent(start, low, high, s.iterations)
            path = invert(x_0, grid, predict, kind, noise=noise[part], extent=extent)
            for j in range(low, high + 1):
                x_t, i = path.states[j], torch.full((len(x_0),), j, device=device)
                wanted = target_prediction("x0", i, (x_0, x_0, x_t), x_t, levels, kind)
                here = j - low, side, part
                states[here], target[here] = x_t, wanted
                error[here] = scale[j] * squared_error(wanted, path.reference[j])

    def at(level: Tensor, pair: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x_t, wanted, e_ref = (
            x[level - low, :, pair].transpose(0, 1).flatten(0, 1) for x in (states, target, error)
        )
        both = level.repeat(2)
        return x_t, timesteps[both], wanted, scale[both], e_ref

    return Points(at, low, high)


def noise_points(world: World, s: Settings, pairs: Pairs) -> Points:
    """Fresh noise, one for both images of a pair: Diffusion-DPO and Diffusion-KTO."""
    schedule, device = world.model.schedule, world.device
    levels, timesteps = schedule.levels.to(device), schedule.timesteps.to(device)
    low, high = (
        round(t * (len(schedule.timesteps) - 1)) for t in (s.t_min, CONFIG.objective.t_max)
    )
    scale = error_scale(levels, schedule.kind).float()
    reference = copy.deepcopy(network_of(world.model))

    @torch.no_grad()
    def at(level: Tensor, pair: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x_0, both = pairs.x_0[:, pair].flatten(0, 1), level.repeat(2)
        eps = torch.randn_like(x_0[: len(pair)]).repeat(2, 1, 1, 1)
        x_t = add_noise(x_0, eps, levels[both])
        wanted = prediction_of(x_0, eps, levels[both], schedule.kind)
        condition = {"encoder_hidden_states": pairs.hidden[pairs.prompt[pair]].repeat(2, 1, 1)}
        found = world.model.predict(reference, x_t, timesteps[both], condition)
        e_ref = scale[both] * squared_error(wanted, found)
        return x_t, timesteps[both], wanted, scale[both], e_ref

    return Points(at, low, high)


def train(
    world: World, s: Settings, pairs: Pairs, policy: LoraPolicy, points: Points, seed: int
) -> None:
    """All steps."""
    torch.manual_seed(seed)
    device, trainable = world.device, policy.trainable()
    pair = torch.zeros(s.batch, dtype=torch.long, device=device)
    level, rate = torch.full_like(pair, points.low), torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        trainable.values(), rate, weight_decay=0.0, fused=True, capturable=device.type == "cuda"
    )

    loss = kto if s.method == "kto" else dpo

    def step() -> None:
        x_t, t, target, scale, e_ref = points.at(level, pair)
        condition = {"encoder_hidden_states": pairs.hidden[pairs.prompt[pair]].repeat(2, 1, 1)}
        found = world.model.predict(policy.network, x_t, t, condition)
        error = scale * squared_error(target, found)
        errors = as_pair_errors(error, e_ref, baseline=(e_ref - error).detach().mean())
        optimizer.zero_grad()
        loss(errors, LossSettings(s.beta)).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), CONFIG.training.max_grad_norm)
        optimizer.step()

    run = captured(step, optimizer) if device.type == "cuda" else step
    plan = TrainingConfig(steps=s.steps, learning_rate=s.rate, lr_scheduler="linear")
    drawn = torch.randint(
        points.low,
        points.high + 1,
        (s.steps, s.batch),
        generator=torch.Generator().manual_seed(seed),
    )
    everyone = list(range(pairs.x_0.shape[1]))
    for k in range(s.steps):
        pair.copy_(torch.tensor([p for p, _ in pairs_of_step(everyone, s.batch, seed, k)]))
        level.copy_(drawn[k])
        rate.fill_(rate_at(k, plan))
        run()


def captured(step: Callable[[], None], optimizer: Any) -> Callable[[], None]:
    """Capture the step as one CUDA graph, warmed up at rate 0, which the optimizer forgets."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    return graph.replay


# ---------------------------------------------------------------- rounds and seeds


def run_seed(world: World, s: Settings, seed: int, folder: Path) -> list[dict[str, Any]]:
    """All rounds of a seed, and what each has reached; rounds that are there are only read."""
    file = folder / "result.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if (known.get("settings", {}) | {"rounds": s.rounds}) not in ({"rounds": s.rounds}, asdict(s)):
        raise SystemExit(f"{folder} holds other settings: choose another OUTPUT")
    rows: list[dict[str, Any]] = known.get("rows", [])
    if len(rows) >= s.rounds:
        return rows[: s.rounds]
    rows, network = [], network_of(world.model)
    untrained = copy.deepcopy(network.state_dict())
    for number in range(1, s.rounds + 1):
        drawn, clock = 1000 + 100 * seed + number, [time.time()]
        pairs, told = make_pairs(world, s, drawn, s.guidance if number == 1 else s.later_guidance)
        clock.append(time.time())
        points = (
            trajectory_points(world, s, pairs, drawn)
            if s.method == "x0"
            else noise_points(world, s, pairs)
        )
        clock.append(time.time())
        targets = CONFIG.policy.target_modules and list(CONFIG.policy.target_modules)
        how = PolicyConfig(rank=s.rank, alpha=s.rank, target_modules=targets)
        policy = LoraPolicy(world.model, how, seed)
        train(world, s, pairs, policy, points, drawn)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        clock.append(time.time())
        policy.save(folder / f"round-{number}")
        merge_lora(world.model.pipeline)
        network_of(world.sampler).load_state_dict(network.state_dict())
        scores = {p: summary(held_out(world, p)) for p in (VALIDATION, CONFIG.evaluation.prompts)}
        seconds = dict(
            zip(("samples", "inversion", "training"), np.diff(clock).round(1).tolist(), strict=True)
        )
        rows.append({"round": number, **told, "seconds": seconds, **scores})
        shown = {p: round(v["composition"], 3) for p, v in scores.items()}
        print(f"seed {seed} round {number}: {told} {shown} {seconds}", flush=True)
        atomic_text(json.dumps({"settings": asdict(s), "rows": rows}, indent=1), file)
    for model in (world.model, world.sampler):
        network_of(model).load_state_dict(untrained)
    return rows


def over(values: Sequence[float]) -> str:
    """Mean and 95% t interval of several."""
    return cell(over_seeds(values), sign="")


def table(seeds: Sequence[Sequence[dict[str, Any]]], base: dict[str, Any], prompts: str) -> str:
    """Markdown: a row for each round, over seeds, the reference's, and the last difference."""
    shown = ("composition", "sg_iou", "exact", "warmth")
    lines = [f"| | pairs | {' | '.join(shown)} |", "|" + " --- |" * (2 + len(shown))]
    for rounds in zip(*seeds, strict=True):
        cells = [over([r[prompts][name] for r in rounds]) for name in shown]
        pairs = np.mean([r["pairs"] for r in rounds])
        lines.append(f"| round {rounds[0]['round']} | {pairs:,.0f} | {' | '.join(cells)} |")
    for n, found in base[prompts].items():
        cells = [over(found["by noise"]), *(f"{found[name]:.3f}" for name in shown[1:])]
        lines.append(f"| reference, best of {n} | | {' | '.join(cells)} |")
    last = np.mean([s[-1][prompts]["by prompt"] for s in seeds], axis=0)
    more = over((last - base[prompts]["4"]["by prompt"]).tolist())
    return "\n".join([f"{prompts}\n", *lines, f"\nOver the best of four, over prompts: {more}\n"])


def main() -> None:
    """Run the seeds, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/scale"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="checkers")
    for field in fields(Settings):
        name, choices = field.name.replace("_", "-"), None
        choices = ("x0", "diffusion_dpo", "kto") if name == "method" else None
        parser.add_argument(
            f"--{name}", type=type(field.default), default=field.default, choices=choices, help=" "
        )
    args = parser.parse_args()
    s = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)})
    world = make_world(args.workers)
    found = [run_seed(world, s, seed, args.output / f"seed-{seed}") for seed in args.seeds]
    base = reference(world, args.output / "reference.json")
    for prompts in (VALIDATION, CONFIG.evaluation.prompts):
        print(table(found, base, prompts))


if __name__ == "__main__":
    main()
