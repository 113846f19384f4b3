"""What a browser sends, checked before anything is done with it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Annotated, TypeVar
from unicodedata import category

from pydantic import AfterValidator, BaseModel, StringConstraints, TypeAdapter
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request

MAX_BODY = 2**16  # bytes


Key = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=64)]
Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]


def _one_line(name: str) -> str:
    """Refuse a name that people could not tell from another one."""
    unseen = any(category(c)[0] == "C" or category(c) in ("Zl", "Zp") for c in name)
    if unseen or not 0 < len(name) <= 40:
        raise PydanticCustomError(
            "name", "a name has 1 to 40 characters, all visible; go back and give another one"
        )
    return name


Labeller = Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(_one_line)]


class Sent(BaseModel, strict=True):
    """The JSON object of a request; a wrong one raises ValidationError, answered by 400."""


T = TypeVar("T", bound=Sent)
R = TypeVar("R")


async def body(request: Request, kind: type[T]) -> T:
    """Read a request's JSON; HTTPException 413 if it is too large."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise HTTPException(413, f"more than {MAX_BODY} bytes")
    return kind.model_validate_json(data)


async def made(make: Callable[[], R]) -> R:
    """Return what a thread makes; 409 with the reason where data or a model cannot be used.

    503, on which the page tries again, where the file of the labels cannot be read or written.
    """
    try:
        return await run_in_threadpool(make)
    except sqlite3.Error as error:
        raise HTTPException(503, str(error)[:500]) from error
    except (ValueError, OSError, RuntimeError) as error:
        raise HTTPException(409, str(error)[:500]) from error


def labeller_of(request: Request) -> str:
    """Read the labeller's name in the address, ``me`` where there is none."""
    name = request.query_params.get("labeller", "me")
    return TypeAdapter[str](Labeller).validate_python(name)
