"""Serve until told to stop; then finish what was begun."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from treadle.core.cards import Card
from treadle.core.errors import TreadleError
from treadle.serving.app import App
from treadle.serving.config import Serve

CARD = Card(
    id="deploy.server",
    paper="No paper: the protocol is OpenAI's.",
    summary="Models and adapters behind the OpenAI protocol: chat, completions, embeddings, tools.",
    recipe="treadle serve smollm2-135m-instruct",
    oracle="tests/serving/test_serving_openai.py::test_chat",
)


class DrainingServer(uvicorn.Server):
    """On the first signal it refuses new requests and finishes the others; then it stops."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self.app = app
        self.draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        asyncio.get_running_loop().call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """Begin to drain; asked again, stop at once."""
        if self.draining is None:
            self.draining = asyncio.create_task(self._drain())
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        await self.app.drain(self.app.service.config.drain_seconds)
        self.should_exit = True


def listen(config: Serve) -> socket.socket:
    """The socket that clients will find.

    Raises:
        TreadleError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise TreadleError(
            f"cannot listen at {config.host}, port {config.port}: {error.strerror}; "
            "choose another with --host and --port"
        ) from None


def web_server(app: App) -> DrainingServer:
    """A server that is not yet running."""
    settings = uvicorn.Config(
        app.gate,
        lifespan="on",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )
    return DrainingServer(settings, app)


async def serve(app: App, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until SIGTERM or Ctrl-C, and then until those under way are answered."""
    server = web_server(app)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    if server.started:
        ready()
    await serving
