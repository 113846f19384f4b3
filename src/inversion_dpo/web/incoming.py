"""What a browser sends, checked before anything is done with it."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, StringConstraints, TypeAdapter
from starlette.exceptions import HTTPException
from starlette.requests import Request

MAX_BODY = 2**16  # bytes


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("must be one line of printable characters")
    return name


Key = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=64)]
Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
Labeller = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=40),
    AfterValidator(_printable),
]


class Sent(BaseModel, strict=True):
    """The JSON object of a request; a wrong one raises ValidationError, answered by 400."""


T = TypeVar("T", bound=Sent)


async def body(request: Request, kind: type[T]) -> T:
    """Read a request's JSON; HTTPException 413 if it is too large."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise HTTPException(413, f"more than {MAX_BODY} bytes")
    return kind.model_validate_json(data)


def labeller_of(request: Request) -> str:
    """Read the labeller's name in the address, ``me`` where there is none."""
    name = request.query_params.get("labeller", "me")
    return TypeAdapter[str](Labeller).validate_python(name)
