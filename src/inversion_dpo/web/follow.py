"""Follow a run: what it does now, its measurements as they are written, samples so far."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from inversion_dpo.data.formats import HUB
from inversion_dpo.data.source import open_pairs
from inversion_dpo.run.config import Config
from inversion_dpo.run.folder import read_rows, steps_in
from inversion_dpo.trajectories.method import chosen_method
from inversion_dpo.web.app import Tab
from inversion_dpo.web.incoming import made
from inversion_dpo.web.pictures import spread
from inversion_dpo.web.studio import Studio

MOST_POINTS = 400  # of a curve: more are not seen
RECENT = 50  # steps by which the time left is reckoned
SHOWN = 6  # prompts in the table of samples


@dataclass(frozen=True)
class Phase:
    """What a run does: ``done`` of ``total`` steps, pairs or images.

    name: waiting, encoding, inverting, training, trained, sampling or evaluated. total: None if it
    is not known. rate: seconds for each, if known. file: the one that was written last.
    """

    name: str
    done: int
    total: int | None
    rate: float | None
    file: Path

    def facts(self) -> dict[str, Any]:
        """Give what the page shows: also seconds left, if known, and seconds without news."""
        left = self.rate * (self.total - self.done) if self.rate and self.total else None
        silent = time.time() - (_written(self.file) or time.time())
        return asdict(self) | {"file": None, "left": left, "silent": silent}


def curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Map each measured column to its points [step, value], to a part of them if they are many."""
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append([row["step"], value])
    return {n: [p[k] for k in spread(len(p), MOST_POINTS)] for n, p in found.items()}


def phase(run: Path, config: Config, rows: list[dict[str, Any]], pairs: int | None) -> Phase:
    """Find out from its files what a run does; ``pairs`` is how many it will encode, if known."""
    log, steps = run / "metrics.jsonl", config.training.steps
    if rows and "loss" in rows[-1]:
        recent = [r for r in rows if "loss" in r][-RECENT:]
        took = recent[-1]["seconds"] - recent[0]["seconds"]
        return Phase("training", recent[-1]["step"] + 1, steps, took / max(1, len(recent) - 1), log)
    if rows and (parts := sorted((run / "samples").glob("*/*.parquet"), key=_written)):
        images = sum(int(p.stem.partition("-")[2] or 0) for p in parts)
        return Phase("sampling", images, None, None, parts[-1])
    if rows:
        ended = "evaluated" if (run / "metrics.json").exists() else "trained"
        return Phase(ended, steps, steps, None, log)
    shards = sorted(config.inversion.folder(run).glob("*/shard-*.json"), key=_written)
    if not shards:
        return Phase("waiting", 0, None, None, run / "config.yaml")
    shards = [p for p in shards if p.parent == shards[-1].parent]  # the cache that grows
    each = max(1, config.inversion.batch_size // 2)
    done = min(each * len(shards), pairs or each * len(shards))
    rate = (_written(shards[-1]) - _written(shards[0])) / (each * max(1, len(shards) - 1))
    doing = "inverting" if chosen_method(config).inverts else "encoding"
    return Phase(doing, done, pairs, rate, shards[-1])


def _written(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def expected_pairs(config: Config) -> int | None:
    """Count the pairs of local data without reading an image; None if that cannot be known."""
    try:
        return None if config.data.pairs.startswith(HUB) else open_pairs(config.data).expected()
    except (ValueError, OSError):  # the run says itself what is wrong with its data
        return None


def policies(run: Path) -> dict[str, Path]:
    """Map names to folders of what the run has saved: snapshots in order, then the end."""
    found = [*steps_in(run / "snapshots").values(), run / "adapter"]
    return {path.name: path for path in found if path.is_dir()}


def follow_tab(run: Path, studio: Studio) -> Tab:
    """Build the page that asks again and again how the run does."""
    counted: list[int | None] = []

    def status() -> dict[str, Any]:
        rows = read_rows(run / "metrics.jsonl")
        if not rows and not counted:
            counted.append(expected_pairs(studio.config))
        return {
            **phase(run, studio.config, rows, *counted[:1] or [None]).facts(),
            "curves": curves(rows),
            "policies": list(policies(run)),
        }

    async def now(request: Request) -> JSONResponse:
        return JSONResponse(await made(status))

    async def prompts(request: Request) -> JSONResponse:
        return JSONResponse(await made(lambda: studio.prompts[:SHOWN]))

    routes = [Route("/api/run", now), Route("/api/prompts", prompts)]
    return Tab("follow", "Follow", lambda request: {}, routes, studio.pictures.get)
