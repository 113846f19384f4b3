"""Follow a run: its measurements as they are written, and samples of the policy so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from inversion_dpo.run.config import Config
from inversion_dpo.training.run_files import read_rows
from inversion_dpo.web.app import Tab
from inversion_dpo.web.studio import spread

MOST_POINTS = 400  # of a curve: more are not seen
PANELS = (
    ("loss", ("loss",)),
    ("implicit accuracy", ("accuracy", "heldout_accuracy")),
    ("margin", ("margin", "heldout_margin")),
    ("error on winners", ("winner_error", "winner_error_ref")),
    ("error on losers", ("loser_error", "loser_error_ref")),
    ("drift from the reference", ("drift", "heldout_drift")),
    ("gradient norm", ("grad_norm",)),
)


def thinned(points: list[list[float]], most: int = MOST_POINTS) -> list[list[float]]:
    """At most ``most`` of the points, evenly spread, the first and the last among them."""
    return [points[k] for k in spread(len(points), most)]


def curves(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The panels that there are measurements for: {title, lines: [{name, points: [[step, y]]}]}."""
    found = []
    for title, names in PANELS:
        points = {n: [[r["step"], r[n]] for r in rows if n in r] for n in names}
        lines = [{"name": n, "points": thinned(p)} for n, p in points.items() if p]
        if lines:
            found.append({"title": title, "lines": lines})
    return found


def status(run: Path, config: Config) -> dict[str, Any]:
    """Where the training is: steps done and asked for, seconds, whether it is finished."""
    rows = read_rows(run / "metrics.jsonl")
    steps = [r for r in rows if "loss" in r]
    return {
        "step": steps[-1]["step"] + 1 if steps else 0,
        "steps": config.training.steps,
        "seconds": rows[-1]["seconds"] if rows else 0,
        "finished": bool(rows) and "loss" not in rows[-1],
        "panels": curves(rows),
        "policies": [name for name, _ in policies(run)],
    }


def policies(run: Path) -> list[tuple[str, Path]]:
    """(name, folder) of what the run has saved to sample from: snapshots in order, then the end."""
    found = [(p.name, p) for p in sorted((run / "snapshots").glob("step-*")) if p.is_dir()]
    if (run / "adapter").is_dir():
        found.append(("adapter", run / "adapter"))
    return found


def follow_tab(run: Path, config: Config) -> Tab:
    """The page that asks again and again how the run does."""

    def now(request: Request) -> JSONResponse:
        return JSONResponse(status(run, config))

    return Tab("follow", lambda request: {}, [Route("/api/run", now)])
