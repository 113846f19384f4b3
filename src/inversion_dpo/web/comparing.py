"""Routes of comparing: samples of any prompt and seed, and the film strip of an inversion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from inversion_dpo.labels.store import LabelStore
from inversion_dpo.web.app import Tab
from inversion_dpo.web.follow import policies
from inversion_dpo.web.incoming import Key, Prompt, Sent, body
from inversion_dpo.web.studio import Studio

REFERENCE = "reference"
T = TypeVar("T")


def folders(run: Path | None) -> dict[str, Path | None]:
    """Name -> folder of everything that can be sampled; None is the reference."""
    return {REFERENCE: None, **dict(policies(run) if run else [])}


async def made(make: Callable[[], T]) -> T:
    """What a thread makes; 409 with the reason where a model cannot be loaded or run."""
    try:
        return await run_in_threadpool(make)
    except (ValueError, OSError, RuntimeError) as error:
        raise HTTPException(409, str(error)[:500]) from error


class Inversion(Sent):
    """A film strip that is asked for. image: its SHA-256."""

    image: Key
    caption: Prompt


def compare_tab(studio: Studio, store: LabelStore, run: Path | None) -> Tab:
    """The page on which pictures are made."""
    e = studio.config.evaluation

    class Samples(Sent):
        model: str
        prompts: list[Prompt] = Field(min_length=1, max_length=16)
        seed: int = Field(ge=0, le=2**31)
        steps: int = Field(e.sample_steps, ge=1, le=200)
        guidance: float = Field(e.guidance_scale, ge=0, le=30)

    def facts(request: Request) -> dict[str, Any]:
        first = store.shown(0, 1)
        return {
            "models": list(folders(run)),
            "prompt": first[0].caption if first else "",
            "steps": e.sample_steps,
            "guidance": e.guidance_scale,
            "total": store.total(),
        }

    async def samples(request: Request) -> JSONResponse:
        sent, there = await body(request, Samples), folders(run)
        if sent.model not in there:
            raise HTTPException(400, f"model must be one of {', '.join(there)}")
        seeds = [sent.seed + k for k in range(len(sent.prompts))]
        images = await made(
            lambda: studio.samples(
                there[sent.model], sent.prompts, seeds, sent.steps, sent.guidance
            )
        )
        return JSONResponse({"images": images, "seeds": seeds})

    async def strip(request: Request) -> JSONResponse:
        sent = await body(request, Inversion)
        data = store.image(sent.image) or studio.pictures.get(sent.image)
        if data is None:
            raise HTTPException(404, "no such image")
        return JSONResponse(await made(lambda: film(studio, data, sent.caption)))

    def pair(request: Request) -> JSONResponse:
        number = request.query_params.get("number", "")
        usable = number.isascii() and number.isdigit() and len(number) < 12
        found = store.shown(int(number), 1) if usable else []
        if not found:
            raise HTTPException(404, "no such pair")
        images = [found[0].left, found[0].right]
        return JSONResponse({"caption": found[0].caption, "images": images})

    routes = [
        Route("/api/samples", samples, methods=["POST"]),
        Route("/api/strip", strip, methods=["POST"]),
        Route("/api/pair", pair),
    ]
    return Tab("compare", facts, routes, studio.pictures.get)


def film(studio: Studio, data: bytes, caption: str) -> dict[str, Any]:
    """A film strip with its images by name."""
    strip, keep = studio.inversion(data, caption), studio.pictures.add
    return {
        "original": keep(strip.original),
        "frames": [
            {"image": keep(frame), "timestep": round(t, 1)}
            for frame, t in zip(strip.frames, strip.timesteps, strict=True)
        ],
        "reconstruction": keep(strip.reconstruction),
        "psnr": round(strip.psnr, 1),
        "error": round(strip.error, 4),
        "variance": round(strip.variance, 2),
    }
