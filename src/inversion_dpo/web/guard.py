"""What keeps other web sites, and other machines, out of a page that runs on one's own."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hosts_for(host: str, allow_remote: bool) -> list[str]:
    """The names by which the server may be addressed; "*" beyond this machine.

    A name that resolves to this machine but is not ours is how DNS rebinding reaches a page.

    Raises:
        WebError: ``host`` can be reached from other machines and that was not asked for.
    """
    if is_loopback(host):
        return [*LOOPBACK, host]
    if not allow_remote:
        raise WebError(
            f"--host {host} would let other machines in, and the page asks for no password: use "
            "127.0.0.1 and an SSH tunnel, or say --allow-remote in a network you trust"
        )
    return ["*"]


class Guard:
    """Refuse writes that another site sends; add the headers that confine the page.

    A browser says with every POST where it comes from (Origin); what is sent as JSON cannot be
    sent from another site without asking first, and nobody answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_confined(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = refused(scope["method"], Headers(scope=scope))
        app = PlainTextResponse(refusal, 403) if refusal else self.app
        await app(scope, receive, send_confined)


def refused(method: str, headers: Headers) -> str | None:
    """Why a request is refused; None if it is not."""
    if method in ("GET", "HEAD"):
        return None
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        return "this page takes labels from itself alone"
    if headers.get("content-type", "").split(";")[0].strip() != "application/json":
        return "send application/json"
    return None
