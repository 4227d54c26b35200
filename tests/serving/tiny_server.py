"""A server in this process with tiny models behind it, for tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from socket import socket

from openai import OpenAI
from tiny_generation import byte_tokenizer, tiny_model
from torch import Tensor

from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.runner import Batch
from treadle.serving.app import App, build
from treadle.serving.config import Serve
from treadle.serving.pool import Base, Offer
from treadle.serving.route import Route
from treadle.serving.run import listen, web_server
from treadle.serving.trial import Trial
from treadle.tokenizers.template import CHATML

CONTEXT = 1024
WAIT = 60.0
"""Seconds that something may take which happens soon; nothing is timed by it."""


def tiny_engine(seed: int = 0, *, slots: int = 16, context: int = CONTEXT) -> Engine:
    tokenizer = byte_tokenizer().with_template(CHATML)
    return Engine(tiny_model(seed=seed, context=context), tokenizer, EngineConfig(slots=slots))


def long_engine() -> Engine:
    """One whose greedy text goes on to the token limit."""
    engine = tiny_engine(slots=8)
    object.__setattr__(engine.tokenizer, "stop_ids", frozenset())
    return engine


class Brake:
    """A model whose passes take a while until `release`, so that what is to last, lasts."""

    def __init__(self) -> None:
        self._free = threading.Event()
        self.release = self._free.set

    def engine(self) -> Engine:
        engine = long_engine()
        run = engine.runner.run

        def braked(batch: Batch) -> Tensor:
            self._free.wait(0.02)
            return run(batch)

        engine.runner.run = braked  # type: ignore[method-assign]
        return engine

    def offer(self, name: str = "tiny") -> Base:
        return Base(name, self.engine)


class Running:
    """A server that answers at `url`."""

    def __init__(self, app: App, listener: socket) -> None:
        self.app, self.listener = app, listener
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.stop: Callable[[], None] = lambda: None

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


@contextmanager
def running(
    offers: Sequence[Offer] | None = None,
    config: Serve | None = None,
    *,
    trials: Sequence[Trial] = (),
    trial_log: Path | None = None,
    routes: Sequence[Route] = (),
) -> Iterator[Running]:
    config = config or Serve(port=0, drain_seconds=5.0)
    offers = offers or [Base("tiny", tiny_engine)]
    app = build(offers, config, trials=trials, trial_log=trial_log, routes=routes)
    listener, server = listen(config), web_server(app)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(
        target=loop.run_until_complete, args=(server.serve(sockets=[listener]),)
    )
    it = Running(app, listener)
    stop = threading.Event()

    def stop_once() -> None:  # a second call would be a second Ctrl-C
        if not stop.is_set():
            stop.set()
            loop.call_soon_threadsafe(server.stop)

    it.stop = stop_once
    thread.start()
    try:
        yield it
    finally:
        it.stop()
        thread.join(timeout=30)
        assert not thread.is_alive(), "the server did not stop"
        engines = [t.name for t in threading.enumerate() if t.name.startswith("engine ")]
        assert not engines, "engines outlive the server"
        loop.close()
