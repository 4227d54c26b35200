"""Models in native kernels come and go as those in torch do, and leave nothing behind."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable

import pytest

pytest.importorskip("fastapi")
from serving.tiny_server import WAIT, running
from tiny_generation import byte_tokenizer, tiny_model

from treadle.core.errors import TreadleError
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.native_runner import NativeRunner
from treadle.inference.runner import Runner
from treadle.kernels.compiler import find_compiler
from treadle.models.llama import tiny_llama
from treadle.serving.config import Serve
from treadle.serving.pool import Base

NATIVE, TORCH = "native", "torch"


def native_engine() -> Engine:
    try:
        find_compiler()
    except TreadleError as error:
        pytest.skip(str(error))
    decoder = tiny_llama(257, dim=64, layers=2, kv_heads=2, hidden=96, context=256)
    runner = NativeRunner.of_model(decoder.build().eval(), pages=32)
    return Engine.of_runner(runner, byte_tokenizer(), EngineConfig(slots=4))


def torch_engine() -> Engine:
    return Engine(tiny_model(), byte_tokenizer(), EngineConfig(slots=4))


ENGINES: dict[str, Callable[[], Engine]] = {NATIVE: native_engine, TORCH: torch_engine}


class Opened:
    """Offers of one kind of engine, and what has become of their runners."""

    def __init__(self, kind: str) -> None:
        self.make = ENGINES[kind]
        self.runners: list[weakref.ref[Runner]] = []

    def offer(self, name: str) -> Base:
        def make() -> Engine:
            engine = self.make()
            self.runners.append(weakref.ref(engine.runner))
            return engine

        return Base(name, make)

    def in_memory(self) -> int:
        gc.collect()
        return sum(runner() is not None for runner in self.runners)


def eventually(check: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not check():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


@pytest.mark.parametrize("kind", ENGINES)
def test_what_is_idle_leaves_memory(kind: str) -> None:
    opened = Opened(kind)
    with running([opened.offer("a")], Serve(port=0, idle_seconds=0.4)) as server:
        asked = {"model": "a", "prompt": "x", "max_tokens": 3, "temperature": 0}
        said = server.client.completions.create(**asked).choices[0].text
        eventually(lambda: opened.in_memory() == 0)
        assert server.client.completions.create(**asked).choices[0].text is not None
        assert len(opened.runners) == 2
        assert (kind == NATIVE) or server.client.completions.create(**asked).choices[0].text == said


@pytest.mark.parametrize("kind", ENGINES)
def test_weights_count_towards_the_memory_that_is_allowed(kind: str) -> None:
    runner = ENGINES[kind]().runner
    size = sum(runner.weights().values())
    if isinstance(runner, NativeRunner):
        assert size == runner.nbytes
        matrices = 257 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
        assert size >= matrices * 34 / 32, "Q8_0 has 34 bytes for 32 weights"
    else:
        assert size == sum(p.nbytes for p in tiny_model().parameters())
    opened = Opened(kind)
    offers = [opened.offer(name) for name in "abc"]
    with running(offers, Serve(port=0, memory_bytes=int(2.5 * size))) as server:
        pool = server.app.service.pool
        for name in "abac":
            server.client.completions.create(model=name, prompt="x", max_tokens=1)
        assert set(pool.workers()) == {"a", "c"}, "the least recently used makes room"
        assert len(opened.runners) == 3
        shown = server.app.service.metrics.text().decode()
        assert f'{{model="a"}} {float(size)}' in shown
        pool.unload_idle()
        eventually(lambda: opened.in_memory() == 2 or bool(pool.unload_idle()))
    eventually(lambda: opened.in_memory() == 0)
