"""Run the application with uvicorn, on loopback unless told otherwise."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from starlette.applications import Starlette

from inversion_dpo.labels.questions import WebError
from inversion_dpo.web.guard import is_loopback


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 takes a free one. WebError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise WebError(f"cannot listen on {host}:{port} ({error}); give another --port") from error
    # inherited by connections; without it each answer waits 40 ms for the browser's delayed ACK
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def address(listening: socket.socket) -> str:
    """Name a listening socket as ``http://HOST:PORT``."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def tunnel(port: int) -> str | None:
    """Word the command that reaches this port through SSH; None if nobody came here by SSH."""
    _, _, host, number, *_ = [*os.environ.get("SSH_CONNECTION", "").split(), "", "", "", ""]
    if not number:
        return None
    own = "" if number == "22" else f"-p {number} "
    return f"ssh -N -L {port}:127.0.0.1:{port} {own}{getpass.getuser()}@{host}"


def serve(app: Starlette, listening: socket.socket, say: Callable[[str], None]) -> None:
    """Serve until interrupted; ``say`` is told the address, and how to reach it through SSH."""
    host, port = listening.getsockname()[:2]
    say(f"open {address(listening)}/ (Ctrl-C ends it)")
    if is_loopback(host) and (command := tunnel(port)):
        say(f"from another machine, run there first, and leave it open:\n  {command}")
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
