"""Run the application with uvicorn, on loopback unless told otherwise."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from inversion_dpo.labels.questions import WebError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. WebError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise WebError(f"cannot listen on {host}:{port} ({error}); give another --port") from error
    # inherited by connections; without it each answer waits 40 ms for the browser's delayed ACK
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def address(listening: socket.socket) -> str:
    """``http://HOST:PORT`` of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: Starlette, listening: socket.socket, say: Callable[[str], None]) -> None:
    """Serve until interrupted; ``say`` is told the address once connections are taken."""
    say(address(listening))
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5
    )
    uvicorn.Server(config).run(sockets=[listening])
