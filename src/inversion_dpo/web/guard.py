"""What keeps other web sites, and other machines, out of a page that runs on one's own."""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from inversion_dpo.labels.questions import WebError

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hosts_for(host: str, allow_remote: bool) -> list[str]:
    """List the names by which the server may be addressed; "*" beyond this machine.

    A name that resolves to this machine but is not ours is how DNS rebinding reaches a page.
    """
    if is_loopback(host):
        return [*LOOPBACK, host]
    if not allow_remote:
        raise WebError(
            f"--host {host} would let other machines in, and the page asks for no password: use "
            "127.0.0.1 and an SSH tunnel, or say --allow-remote in a network you trust"
        )
    return ["*"]


async def guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Refuse writes that another site sends; add the headers that confine the page."""
    refusal = refused(request.method, request.headers)
    response = PlainTextResponse(refusal, 403) if refusal else await call_next(request)
    response.headers.update(_HEADERS)
    return response


def refused(method: str, headers: Headers) -> str | None:
    """Say why a request is refused; None if it is not.

    A browser says with every POST where it comes from (Origin). Another site must ask before it
    sends JSON, and nobody answers.
    """
    if method in ("GET", "HEAD"):
        return None
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return "this page takes labels from itself alone"
    if headers.get("content-type", "").split(";")[0].strip() != "application/json":
        return "send application/json"
    return None
