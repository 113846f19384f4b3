"""Routes of labelling: what to ask next, labels, undo, agreement, export, images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from inversion_dpo.labels.export import export, summary
from inversion_dpo.labels.questions import WebError
from inversion_dpo.labels.store import LabelStore
from inversion_dpo.labels.votes import agreement
from inversion_dpo.web.incoming import Key, Labeller, Sent, body, labeller_of

Lookup = Callable[[str], bytes | None]  # image by its SHA-256
_TYPES = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png", b"RI": "image/webp"}


class Undo(Sent):
    """Withdraw the labeller's latest label. request: an id that makes a repeat harmless."""

    labeller: Labeller
    request: Key


class Label(Undo):
    """One label on a pair."""

    pair: Key
    choice: Literal["left", "right", "tie", "bad"]


def image_route(lookups: Sequence[Lookup]) -> Route:
    """Images that never change under their address: what the first lookup that has it gives."""

    def image(request: Request) -> Response:
        found = (lookup(request.path_params["sha256"]) for lookup in lookups)
        data = next((data for data in found if data is not None), None)
        if data is None:
            raise HTTPException(404, "no such image")
        kind = _TYPES.get(data[:2], "application/octet-stream")
        forever = {"cache-control": "max-age=31536000, immutable"}
        return Response(data, media_type=kind, headers=forever)

    return Route("/image/{sha256}", image)


def state(store: LabelStore, labeller: str) -> dict[str, Any]:
    """What the page shows a labeller: the next pair, the one after (to be loaded), progress."""
    ahead = [asdict(asked) for asked in store.ahead(labeller)]
    return {
        "labeller": labeller,
        "done": store.done(labeller),
        "total": store.total(),
        "pair": ahead[0] if ahead else None,
        "after": ahead[1] if len(ahead) > 1 else None,
    }


def team(store: LabelStore) -> dict[str, Any]:
    """Who labelled how many pairs, and how far they agree."""
    votes = store.votes()
    names = sorted({name for by in votes.values() for name in by})
    done = [{"labeller": n, "done": sum(n in by for by in votes.values())} for n in names]
    return {"labellers": done, "total": store.total(), **asdict(agreement(votes))}


def exported(store: LabelStore) -> Response:
    """The labels as a Parquet file; 409 if there is none to give."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labelled.parquet"
        try:
            counts = export(store, path)
        except WebError as error:
            raise HTTPException(409, "nothing to export yet; label some pairs") from error
        headers = {
            "content-disposition": 'attachment; filename="labelled.parquet"',
            "x-summary": summary(counts),
        }
        return Response(
            path.read_bytes(), media_type="application/vnd.apache.parquet", headers=headers
        )


def label_routes(store: LabelStore) -> list[Route]:
    """The routes; what waits for the disk runs in a thread."""

    def ahead(request: Request) -> JSONResponse:
        return JSONResponse(state(store, labeller_of(request)))

    async def label(request: Request) -> JSONResponse:
        sent = await body(request, Label)
        await run_in_threadpool(store.label, sent.request, sent.labeller, sent.pair, sent.choice)
        return JSONResponse(await run_in_threadpool(state, store, sent.labeller))

    async def undo(request: Request) -> JSONResponse:
        sent = await body(request, Undo)
        await run_in_threadpool(store.undo, sent.request, sent.labeller)
        return JSONResponse(await run_in_threadpool(state, store, sent.labeller))

    return [
        Route("/api/next", ahead),
        Route("/api/label", label, methods=["POST"]),
        Route("/api/undo", undo, methods=["POST"]),
        Route("/api/team", lambda request: JSONResponse(team(store))),
        Route("/api/export", lambda request: exported(store)),
    ]
