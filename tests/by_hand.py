"""A cache, a model and a session whose every number is known, without a pipeline."""

import json
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from inversion_dpo.maths.losses import LOSSES
from inversion_dpo.maths.methods import METHODS
from inversion_dpo.maths.records import Grid, Levels, LossSettings
from inversion_dpo.maths.schedule import Schedule, step
from inversion_dpo.models.base import plain_guidance, same_schedule
from inversion_dpo.run.disk import sha256_of
from inversion_dpo.run.processes import Team
from inversion_dpo.training.plan import Plan
from inversion_dpo.trajectories.cache import TrajectoryCache

PAIRS, PER_SHARD, STEPS = 5, 2, 3
# alpha = 1, 0.96, 0.8, 0.6
ALPHA = torch.tensor([1.0, 0.96, 0.8, 0.6], dtype=torch.float64)
GRID = Grid(torch.tensor([0, 10, 20, 30]), Levels(ALPHA, (1 - ALPHA**2).sqrt()))


def clean(pair, side):
    """The pair's number in hundreds, one ten more for the loser; two elements."""
    return torch.tensor([100.0 * pair + 10 * side, -1.0]) / 100


def state(pair, side, i, kind="v_prediction"):
    """The state at grid index i: a step along the prediction from the one below."""
    if i == 0:
        return clean(pair, side)
    here, known = state(pair, side, i - 1, kind), reference(pair, side, i - 1, kind)
    return step(here, known, GRID.levels[i - 1], GRID.levels[i], kind)


def reference(pair, side, i, kind="v_prediction"):
    """What the reference predicts there."""
    return state(pair, side, i, kind) / 2 + i


def write_cache(folder, *, steps=None, kind="v_prediction"):
    """Write and open a cache of five pairs in three shards.

    steps: of every pair the grid indices that are kept, one or two neighbours; all by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sums = {}
    for number, first in enumerate(range(0, PAIRS, PER_SHARD)):
        pairs = range(first, min(first + PER_SHARD, PAIRS))
        images = [(p, side) for p in pairs for side in (0, 1)]
        tensors = {
            "clean": torch.stack([clean(*image) for image in images]),
            "preference": torch.tensor([1 - p / 10 for p in pairs]),
            "condition.prompt": torch.tensor([[p + 1.0] for p in pairs]),
            "condition.graph_rows": torch.tensor([[p + 0.5] for p in pairs]),
            "framing.size": torch.tensor([[10.0 * p + side] for p, side in images]),
            "x_T_variance": torch.tensor([0.5 + p for p, _ in images]),
        }

        def both(value, pair, i):
            return torch.stack([value(pair, side, i, kind) for side in (0, 1)])

        known = {p: steps[p] if steps else range(STEPS + 1) for p in pairs}
        rows = [both(reference, p, i) for p in pairs for i in known[p]]
        tensors["predictions"] = torch.stack(rows)
        if steps:
            tensors["steps"] = torch.tensor([steps[p] for p in pairs])
            tensors["anchors"] = torch.stack([both(state, p, steps[p][0]) for p in pairs])
        path = folder / f"shard-{number:05d}.safetensors"
        save_file(tensors, path)
        sums[path.name] = sha256_of(path)
    empty = {"prompt": torch.tensor([[-7.0]]), "graph_rows": torch.tensor([[-9.0]])}
    save_file(empty, folder / "empty.safetensors")
    sums["empty.safetensors"] = sha256_of(folder / "empty.safetensors")
    manifest = {
        "key": {
            "model": "0123456789abcdef" * 4,
            "keep": [len(steps[0]), 1, 3] if steps else None,
            "guidance_scale": 1.0,
            "reference_guidance": 1.0,
            "extent": {"start": 0, "first": 1, "last": STEPS, "iterations": 0},
            "pairs_per_shard": PER_SHARD,
        },
        "pairs": PAIRS,
        "counts": {"rows": 7, "pairs": PAIRS, "ties": 2},
        "overlong": {"tokenizer": 0},
        "digests": [f"{p}" * 64 for p in range(PAIRS)],
        "errors": [0.1, 0.5, 0.2, 0.4, 0.3],
        "left_out": [],
        "places": [divmod(p, PER_SHARD) for p in range(PAIRS)],
        "texts": [divmod(p, PER_SHARD) for p in range(PAIRS)],
        "sizes": [(1, 2)] * -(-PAIRS // PER_SHARD),
        "shards": sums,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return TrajectoryCache(folder, lambda size: GRID, kind)


class Scaled(torch.nn.Module):
    """Predicts ``weight`` times what it is given."""

    def __init__(self, weight=0.5):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(float(weight)))

    def forward(self, x):
        return self.weight * x


class Model:
    """Predicts weight x + prompt + t / 10; counts its evaluations in ``calls``, one an image."""

    unreached, component, targets, reads, chunked = None, "unet", ("linear",), {}, True
    multiple, schedule_at = 2, same_schedule
    combine = staticmethod(plain_guidance)

    def __init__(self, network=None, kind="v_prediction", grid=GRID):
        self.schedule = Schedule(kind, grid.timesteps, grid.levels, lambda steps: grid)
        self.pipeline = SimpleNamespace(unet=network or Scaled())
        self.calls = 0

    def predict(self, network, x, t, condition):
        self.calls += len(x)
        return (
            network(x)
            + condition["prompt"].reshape(-1, *[1] * (x.ndim - 1))
            + (t.reshape(-1, *[1] * (x.ndim - 1)).to(x) / 10)
        )


class Accelerator:
    """One process on the CPU, no mixed precision."""

    device, num_processes, scaler, mixed_precision = torch.device("cpu"), 1, None, "no"

    def __init__(self):
        self.unsynced, self.logged, self.trackers = 0, [], []

    autocast = staticmethod(nullcontext)

    @contextmanager
    def no_sync(self, network):
        self.unsynced += 1
        yield

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, limit):
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def log(self, row, step):
        self.logged.append((step, row))


def make_plan(name="inversion_dpo", **changed):
    """A plan of a method, over all levels of the grid, with equal weights."""
    method = METHODS[name]
    values = {
        "loss": LOSSES[method.loss],
        "settings": LossSettings(2.0),
        "path": method.path,
        "target": method.target,
        "coupling": 0.0,
        "iterations": 0,
        "low": 1,
        "high": STEPS,
        "weights": lambda size: torch.ones(STEPS + 1),
        "states": 1,
        "safeguard": False,
        "safeguard_margin": 0.0,
        "gradient_factor": None,
        "soft_labels": False,
        "gap": None,
        "reference_every": None,
        "guidance_scale": 1.0,
        "batch_size": 4,
        "accumulation": 1,
        "seed": 0,
        "prompt_dropout": 0.0,
        "graph_dropout": 0.0,
        "caption_dropout": 0.0,
    }
    return Plan(**values | changed)


def make_session(cache, plan=None, weight=0.5, **more):
    """A session that trains the one weight of :class:`Scaled`; the reference has 0.25."""
    network, frozen = Scaled(weight), Scaled(0.25)

    @contextmanager
    def of_reference(given):
        assert given is network
        yield frozen

    policy = SimpleNamespace(
        trainable=lambda: {"weight": network.weight}, reference=of_reference, network=network
    )
    values = {
        "accelerator": Accelerator(),
        "model": Model(network),
        "policy": policy,
        "network": network,
        "optimizer": torch.optim.SGD([network.weight], lr=1.0),
        "cache": cache,
        "train_pairs": [0, 1, 2, 3],
        "heldout_pairs": [4],
        "plan": plan or make_plan(),
        "clip": 1e9,
        "max_skipped": 1,
        "skipped": 0,
        "coefficients": {},
        "moved": {},
        "team": Team(),
    }
    values |= more
    return SimpleNamespace(**{"buckets": [values["train_pairs"]]} | values)
