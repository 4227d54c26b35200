"""The web chat page: static files, no build step, nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

from treadle.core.cards import Card
from treadle.serving.errors import ApiError

CARD = Card(
    id="deploy.ui",
    paper="No paper: engineering.",
    summary="A chat page: models, adapters, sampling, streaming, history, token probabilities, "
    "sources, attention.",
    recipe="treadle serve smollm2-135m-instruct",
    oracle="tests/serving/test_serving_page.py::test_a_conversation_in_a_browser",
)
KINDS = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "sources.js": "text/javascript; charset=utf-8",
    "attention.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def index() -> Response:
        return _file("index.html")

    @router.get("/page/{name}")
    async def page(name: str) -> Response:
        return _file(name)

    return router


def _file(name: str) -> Response:
    if name not in KINDS:
        raise ApiError(404, f"no page `{name[:100]}`")
    content = files("treadle.serving").joinpath("page", name).read_bytes()
    return Response(content, headers={**HEADERS, "content-type": KINDS[name]})
