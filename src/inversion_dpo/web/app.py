"""The application: pages, static files, and the routes behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from inversion_dpo.web.guard import guard
from inversion_dpo.web.incoming import labeller_of
from inversion_dpo.web.labelling import Asking, Lookup, image_route, label_routes

STATIC = Path(__file__).parent / "static"
_TEMPLATES = Environment(
    loader=PackageLoader("inversion_dpo.web"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
Facts = Callable[[Request], dict[str, Any]]


@dataclass(frozen=True)
class Tab:
    """A page: its path, title and template, what that is told, routes, images by SHA-256."""

    page: str
    title: str
    facts: Facts
    routes: list[Route]
    image: Lookup
    template: str = ""


def label_tab(asking: Asking, title: str, image: Lookup) -> Tab:
    """Build a page that asks people; its template and script are those of ``label``."""

    def facts(request: Request) -> dict[str, Any]:
        named = "labeller" in request.query_params
        return {"asking": asking, "labeller": labeller_of(request) if named else ""}

    return Tab(asking.page, title, facts, label_routes(asking), image, "label")


def make_app(tabs: Sequence[Tab], name: str, hosts: Sequence[str]) -> Starlette:
    """Build the application.

    Args:
        tabs: the pages; the first one is what the bare address leads to.
        name: of the data, for the heading.
        hosts: by which the server may be addressed, see :func:`guard.hosts_for`.
    """
    routes: list[BaseRoute] = [
        Route("/", lambda request: RedirectResponse(f"/{tabs[0].page}")),
        *(Route(f"/{tab.page}", _page(tab, tabs, name)) for tab in tabs),
        *(route for tab in tabs for route in tab.routes),
        image_route([tab.image for tab in tabs]),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(BaseHTTPMiddleware, dispatch=guard),
        ],
        exception_handlers={ValidationError: _unusable},
    )


def _page(tab: Tab, tabs: Sequence[Tab], name: str) -> Callable[[Request], Response]:
    script = tab.template or tab.page
    template = _TEMPLATES.get_template(f"{script}.html.jinja")

    def render(request: Request) -> Response:
        facts = {"tab": tab, "tabs": tabs, "name": name, "script": script, **tab.facts(request)}
        return HTMLResponse(template.render(facts))

    return render


def _unusable(request: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError)
    first = error.errors()[0]
    return PlainTextResponse(": ".join([*map(str, first["loc"]), first["msg"]]), 400)
