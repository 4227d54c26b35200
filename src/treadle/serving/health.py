"""`/health` and `/metrics`, for those who watch the server."""

from __future__ import annotations

import os

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from treadle.serving.errors import reply
from treadle.serving.gate import Gate
from treadle.serving.service import Service


def routes(service: Service, gate: Gate) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        state = "draining" if gate.draining else "ok"
        loaded = sorted(service.pool.workers())
        found = {"status": state, "loaded": loaded, "process": os.getpid()}
        return reply(found, 503 if gate.draining else 200)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
