"""Routes of comparing: samples of any prompt and seed, and the film strip of an inversion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from inversion_dpo.labels.store import Asked, LabelStore
from inversion_dpo.web.app import Tab
from inversion_dpo.web.follow import policies
from inversion_dpo.web.incoming import body, one_of, text, whole
from inversion_dpo.web.studio import Studio

REFERENCE = "reference"
MOST_SAMPLES = 16  # in one request
MOST_STEPS = 200
LONGEST = 2000  # characters of a prompt
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


def prompts_of(value: object) -> list[str]:
    """1 to 16 prompts; HTTPException 400 if they are none."""
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_SAMPLES:
        raise HTTPException(400, f"prompts must be 1 to {MOST_SAMPLES} texts")
    return [text(prompt, "prompt", LONGEST) for prompt in value]


def guidance_of(value: object) -> float:
    """A guidance scale from 0 to 30; HTTPException 400 if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 30:
        raise HTTPException(400, "guidance must be a number from 0 to 30")
    return float(value)


def compare_tab(studio: Studio, store: LabelStore, run: Path | None) -> Tab:
    """The page on which pictures are made."""
    e = studio.config.evaluation

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
        sent, there = await body(request), folders(run)
        model = one_of(sent.get("model"), "model", tuple(there))
        prompts = prompts_of(sent.get("prompts"))
        seed = whole(sent.get("seed"), "seed", 0, 2**31)
        steps = whole(sent.get("steps", e.sample_steps), "steps", 1, MOST_STEPS)
        guidance = guidance_of(sent.get("guidance", e.guidance_scale))
        seeds = [seed + k for k in range(len(prompts))]
        images = await made(lambda: studio.samples(there[model], prompts, seeds, steps, guidance))
        return JSONResponse({"images": images, "seeds": seeds})

    async def strip(request: Request) -> JSONResponse:
        sent = await body(request)
        name = text(sent.get("image"), "image", 64)
        caption = text(sent.get("caption"), "caption", LONGEST)
        data = store.image(name) or studio.pictures.get(name)
        if data is None:
            raise HTTPException(404, "no such image")
        return JSONResponse(await made(lambda: film(studio, data, caption)))

    def pair(request: Request) -> JSONResponse:
        number = request.query_params.get("number", "")
        usable = number.isascii() and number.isdigit() and len(number) < 12
        found = store.shown(int(number), 1) if usable else []
        if not found:
            raise HTTPException(404, "no such pair")
        return JSONResponse(_seen(found[0]))

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


def _seen(pair: Asked) -> dict[str, Any]:
    return {"caption": pair.caption, "images": [pair.left, pair.right]}
