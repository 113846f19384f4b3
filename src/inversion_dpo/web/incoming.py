"""What a browser sends, checked before anything is done with it."""

from __future__ import annotations

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

MAX_BODY = 2**16  # bytes
MAX_NAME = 40  # characters of a labeller's name
DEFAULT_LABELLER = "me"


async def body(request: Request) -> dict[str, Any]:
    """The JSON object that was sent; HTTPException 400 if it is none, 413 if it is too large."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise HTTPException(413, f"more than {MAX_BODY} bytes")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "not JSON") from error
    if not isinstance(value, dict):
        raise HTTPException(400, "not a JSON object")
    return value


def text(value: object, name: str, longest: int) -> str:
    """A text of 1 to ``longest`` characters; HTTPException 400 if it is none."""
    if not isinstance(value, str) or not 0 < len(value.strip()) or len(value) > longest:
        raise HTTPException(400, f"{name} must be a text of 1 to {longest} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise HTTPException(400, f"{name} is not valid text") from error
    return value.strip()


def labeller_of(value: object) -> str:
    """A labeller's name: one line of printable characters; HTTPException 400 if it is none."""
    name = text(value, "labeller", MAX_NAME)
    if not name.isprintable():
        raise HTTPException(400, "labeller must be printable")
    return name


def one_of(value: object, name: str, allowed: tuple[str, ...]) -> str:
    """One of the allowed words; HTTPException 400 if it is none."""
    if not isinstance(value, str) or value not in allowed:
        raise HTTPException(400, f"{name} must be one of {', '.join(allowed)}")
    return value


def whole(value: object, name: str, low: int, high: int) -> int:
    """A whole number within limits; HTTPException 400 if it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise HTTPException(400, f"{name} must be a whole number from {low} to {high}")
    return value
