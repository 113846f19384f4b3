"""Routes of asking people: what to ask next, labels, undo, agreement, export, images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from inversion_dpo.labels.store import LabelStore
from inversion_dpo.labels.votes import agreement, outcome
from inversion_dpo.web.incoming import Key, Labeller, Sent, body, labeller_of, made

Lookup = Callable[[str], bytes | None]  # image by its SHA-256
_TYPES = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png", b"RI": "image/webp"}

_UNKNOWN = "application/octet-stream"


@dataclass(frozen=True)
class Asking:
    """What a page asks people.

    page: its path. question: stands above the pictures. next: commands for afterwards. ready: fills
    the store before a labeller is asked, and gives it with the number of pairs that there will be.
    verdict: what all labels come to, called whenever one is stored. kind: of the labels, of KINDS.
    """

    page: str
    question: str
    next: str
    ready: Callable[[str], tuple[LabelStore, int]]
    verdict: Callable[[], dict[str, Any] | None] = lambda: None
    kind: str = "pairs"


class Undo(Sent):
    """Withdraw the labeller's latest label. request: an id that makes a repeat harmless."""

    labeller: Labeller
    request: Key


class Label(Undo):
    """One label on a pair, or on a single image."""

    pair: Key
    choice: Literal["left", "right", "tie", "bad", "up", "down", "unsure", "1", "2", "3", "4", "5"]


def image_route(lookups: Sequence[Lookup]) -> Route:
    """Serve images, which never change under their address, from the first lookup that has it."""

    def image(request: Request) -> Response:
        found = (lookup(request.path_params["sha256"]) for lookup in lookups)
        data = next((data for data in found if data is not None), None)
        if data is None:
            raise HTTPException(404, "no such image")
        kind = "image/avif" if data[4:8] == b"ftyp" else _TYPES.get(data[:2], _UNKNOWN)
        forever = {"cache-control": "max-age=31536000, immutable"}
        return Response(data, media_type=kind, headers=forever)

    return Route("/image/{sha256}", image)


def state(asking: Asking, labeller: str) -> dict[str, Any]:
    """Describe what the page shows: the next pair, the one after (to be loaded), progress."""
    store, total = asking.ready(labeller)
    ahead = [asdict(asked) for asked in store.ahead(labeller)]
    return {
        "labeller": labeller,
        "done": store.done(labeller),
        "covered": store.covered(),
        "total": total,
        "pair": ahead[0] if ahead else None,
        "after": ahead[1] if len(ahead) > 1 else None,
    }


def team(asking: Asking, labeller: str) -> dict[str, Any]:
    """Count who labelled how many pairs, how far they agree, and what the labels come to."""
    store, total = asking.ready(labeller)
    votes = store.votes()
    done = Counter(name for by in votes.values() for name in by)
    return {
        "labellers": [{"labeller": name, "done": n} for name, n in sorted(done.items())],
        "total": total,
        **asdict(agreement(votes, store.kind)),
        "split": sum(outcome(by.values()) == "split" for by in votes.values()),
        "verdict": asking.verdict(),
    }


def label_routes(asking: Asking) -> list[Route]:
    """Build the routes of a page; what waits for the disk runs in a thread."""

    def record(sent: Undo) -> dict[str, Any]:
        store, _ = asking.ready(sent.labeller)
        if isinstance(sent, Label):
            store.label(sent.request, sent.labeller, sent.pair, sent.choice)
        else:
            store.undo(sent.request, sent.labeller)
        asking.verdict()
        return state(asking, sent.labeller)

    async def ahead(request: Request) -> JSONResponse:
        return JSONResponse(await made(partial(state, asking, labeller_of(request))))

    async def everyone(request: Request) -> JSONResponse:
        return JSONResponse(await made(partial(team, asking, labeller_of(request))))

    async def label(request: Request) -> JSONResponse:
        return JSONResponse(await made(partial(record, await body(request, Label))))

    async def undo(request: Request) -> JSONResponse:
        return JSONResponse(await made(partial(record, await body(request, Undo))))

    api = f"/api/{asking.page}"
    return [
        Route(f"{api}/next", ahead),
        Route(f"{api}/choose", label, methods=["POST"]),
        Route(f"{api}/undo", undo, methods=["POST"]),
        Route(f"{api}/team", everyone),
    ]
