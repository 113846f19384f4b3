"""Routes of comparing: samples of any prompt and seed, and the film strip of an inversion."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from inversion_dpo.web.app import Tab
from inversion_dpo.web.follow import policies
from inversion_dpo.web.incoming import Key, Prompt, Sent, body, made
from inversion_dpo.web.studio import How, Studio

REFERENCE = "reference"
STARTED = 4  # prompts that the page begins with


class Inversion(Sent):
    """A film strip that is asked for. image: its SHA-256."""

    image: Key
    caption: Prompt


def compare_tab(studio: Studio) -> Tab:
    """Build the page on which pictures are made."""
    e = studio.config.evaluation

    def folders() -> dict[str, Path | None]:
        return {REFERENCE: None, **(policies(studio.run) if studio.run else {})}

    class Samples(Sent):
        model: str
        prompts: list[Prompt] = Field(min_length=1, max_length=16)
        seed: int = Field(ge=0, le=2**31)
        steps: int = Field(e.sample_steps, ge=1, le=200)
        guidance: float = Field(e.guidance_scale, ge=0, le=30)
        side: int | None = Field(None, ge=16, le=4096, multiple_of=8)

    def facts(request: Request) -> dict[str, Any]:
        return {
            "models": list(folders()),
            "path": studio.config.model.path,
            "data": studio.run is None,
            "prompts": studio.prompts[:STARTED],
            "steps": e.sample_steps,
            "guidance": e.guidance_scale,
            "batch": e.batch_size,
        }

    async def samples(request: Request) -> JSONResponse:
        sent, models = await body(request, Samples), folders()
        if sent.model not in models:
            raise HTTPException(400, f"model must be one of {', '.join(models)}")
        seeds = [sent.seed + k for k in range(len(sent.prompts))]
        how = How(sent.steps, sent.guidance, sent.side)
        drawn = await made(partial(studio.draw, models[sent.model], sent.prompts, seeds, how))
        images, sources = map(studio.pictures.add, drawn), map(studio.source, sent.prompts)
        return JSONResponse({"images": [*images], "seeds": seeds, "sources": [*sources]})

    async def strip(request: Request) -> JSONResponse:
        sent = await body(request, Inversion)
        data = studio.pictures.get(sent.image)
        if data is None:
            raise HTTPException(404, "this image is kept no longer: sample it, or show it, again")
        return JSONResponse(await made(partial(studio.inversion, data, sent.caption)))

    async def pair(request: Request) -> JSONResponse:
        number = request.query_params.get("number", "")
        usable = number.isascii() and number.isdigit() and len(number) < 12
        found = await made(partial(studio.pair, int(number))) if usable else None
        if not found:
            raise HTTPException(404, "no such pair")
        return JSONResponse({"caption": found[0], "images": found[1]})

    routes = [
        Route("/api/samples", samples, methods=["POST"]),
        Route("/api/strip", strip, methods=["POST"]),
        Route("/api/pair", pair),
    ]
    return Tab("compare", "Compare", facts, routes, image=studio.pictures.get)
