"""The application: endpoints around one service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI

from treadle import __version__
from treadle.core.meter import Meter
from treadle.serving import (
    attention,
    chat,
    completions,
    embeddings,
    errors,
    health,
    listing,
    responses,
    site,
    votes,
)
from treadle.serving.config import Serve
from treadle.serving.gate import Gate
from treadle.serving.metrics import Metrics
from treadle.serving.pool import Offer, Pool
from treadle.serving.route import Route, Routes
from treadle.serving.service import Service
from treadle.serving.trial import Trial, Trials

ENERGY_SECONDS = 5.0
"""Between two looks at the machine's counters, which start again from zero now and then."""


@dataclass(frozen=True)
class App:
    """What a web server runs (`gate`), and what is behind it."""

    gate: Gate
    service: Service
    http: FastAPI

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait for those under way; after `seconds` end them."""
        self.gate.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self.gate.empty.wait()
        except TimeoutError:
            self.service.pool.close()


def build(
    offers: Sequence[Offer],
    config: Serve,
    *,
    trials: Sequence[Trial] = (),
    routes: Sequence[Route] = (),
    trial_log: Path | None = None,
) -> App:
    """
    Raises:
        TreadleError: two things have one name, or a trial or a route names what is not served.
    """
    metrics = Metrics()
    pool = Pool(offers, config, metrics)
    known = Routes(routes, offers)
    service = Service(config, pool, metrics, Trials(trials, pool.names, trial_log), known)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        watching = asyncio.create_task(_unload_idle(service))
        with Meter(interval=ENERGY_SECONDS) as meter:
            metrics.watch(meter)
            yield
        watching.cancel()
        await service.close()

    http = FastAPI(
        title="treadle",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        responses={kind: {"model": errors.ErrorAnswer} for kind in ("4XX", "5XX")},
    )
    errors.install(http)
    for family in (chat, completions, responses, embeddings, attention, listing, votes):
        http.include_router(family.routes(service))
    http.include_router(site.routes())
    gate = Gate(http, config, metrics)
    http.include_router(health.routes(service, gate))
    gate.paths = frozenset(http.openapi()["paths"]) | {"/"}
    return App(gate, service, http)


async def _unload_idle(service: Service) -> None:
    while True:
        await asyncio.sleep(min(service.config.idle_seconds / 4, 30.0))
        service.pool.unload_idle()
