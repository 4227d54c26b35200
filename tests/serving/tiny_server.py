"""A server in this process with tiny models behind it, for tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI
from tiny_generation import byte_tokenizer, tiny_model

from treadle.inference.engine import Engine, EngineConfig
from treadle.serving.app import App, build
from treadle.serving.config import Serve
from treadle.serving.pool import Base, Offer
from treadle.serving.run import listen, web_server
from treadle.serving.trial import Trial
from treadle.tokenizers.template import CHATML

CONTEXT = 1024


def tiny_engine(seed: int = 0, *, slots: int = 16, context: int = CONTEXT) -> Engine:
    tokenizer = byte_tokenizer().with_template(CHATML)
    return Engine(tiny_model(seed=seed, context=context), tokenizer, EngineConfig(slots=slots))


class Running:
    """A server that answers at `url`."""

    def __init__(self, app: App, url: str) -> None:
        self.app, self.url = app, url
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
) -> Iterator[Running]:
    config = config or Serve(port=0, drain_seconds=5.0)
    app = build(offers or [Base("tiny", tiny_engine)], config, trials=trials, trial_log=trial_log)
    listener, server = listen(config), web_server(app)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(
        target=loop.run_until_complete, args=(server.serve(sockets=[listener]),)
    )
    it = Running(app, f"http://127.0.0.1:{listener.getsockname()[1]}")
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
        loop.close()
