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

from inversion_dpo.labels.store import Conflict, LabelStore
from inversion_dpo.web.guard import guard
from inversion_dpo.web.incoming import labeller_of
from inversion_dpo.web.labelling import Lookup, image_route, label_routes

STATIC = Path(__file__).parent / "static"
TITLES = {"label": "Label", "compare": "Compare", "follow": "Follow"}
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
    """A page beside ``label``: what its template is told, its routes, its images by SHA-256."""

    page: str
    facts: Facts
    routes: list[Route]
    image: Lookup | None = None


def make_app(
    store: LabelStore, name: str, hosts: Sequence[str], more: Sequence[Tab] = ()
) -> Starlette:
    """The page over a store.

    Args:
        store: pairs and labels.
        name: of the data, for the heading.
        hosts: by which the server may be addressed, see :func:`guard.hosts_for`.
        more: further pages.
    """
    pages: list[tuple[str, Facts]] = [("label", lambda request: {"labeller": labeller_of(request)})]
    pages += [(tab.page, tab.facts) for tab in more]
    lookups = [store.image, *(tab.image for tab in more if tab.image)]
    tabs = [(page, TITLES[page]) for page, _ in pages]
    routes: list[BaseRoute] = [
        Route("/", lambda request: RedirectResponse("/label")),
        *(Route(f"/{page}", _page(page, facts, tabs, name)) for page, facts in pages),
        *label_routes(store),
        image_route(lookups),
        *(route for tab in more for route in tab.routes),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(BaseHTTPMiddleware, dispatch=guard),
        ],
        exception_handlers={Conflict: _conflict, ValidationError: _unusable},
    )


def _page(
    page: str, facts: Facts, tabs: list[tuple[str, str]], name: str
) -> Callable[[Request], Response]:
    template = _TEMPLATES.get_template(f"{page}.html.jinja")

    def render(request: Request) -> Response:
        return HTMLResponse(template.render(page=page, tabs=tabs, name=name, **facts(request)))

    return render


def _conflict(request: Request, error: Exception) -> Response:
    return PlainTextResponse(str(error), 409)


def _unusable(request: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError)
    first = error.errors()[0]
    return PlainTextResponse(": ".join([*map(str, first["loc"]), first["msg"]]), 400)
