"""Several models behind one port: loaded when first asked for, unloaded when idle or in the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from treadle.core.errors import TreadleError, did_you_mean
from treadle.inference.adapters import CannotShareError
from treadle.inference.attach import attach, beside, detach
from treadle.inference.engine import Engine
from treadle.inference.torch_runner import TorchRunner
from treadle.serving.config import Serve
from treadle.serving.errors import ApiError, unavailable, unknown_model
from treadle.serving.metrics import Metrics
from treadle.serving.worker import Worker

OpenEngine = Callable[[], Engine]


@dataclass(frozen=True)
class Base:
    """A model with weights of its own."""

    name: str
    open: OpenEngine


@dataclass(frozen=True)
class Adapted:
    """An adapter's folder on the weights of a base."""

    name: str
    base: str
    folder: str


Offer = Base | Adapted


@dataclass(eq=False)
class _Entry:
    offer: Offer
    worker: Worker | None = None
    loading: asyncio.Task[Worker] | None = None
    users: int = 0
    used: float = 0.0
    shares: bool = False
    """An adapter whose worker is that of its base."""

    @property
    def idle(self) -> bool:
        return self.worker is not None and self.users == 0


class Pool:
    """Engines by the name that clients ask for."""

    def __init__(self, offers: Sequence[Offer], config: Serve, metrics: Metrics) -> None:
        self.config, self.metrics = config, metrics
        self._ending: list[Worker] = []
        """Unloaded ones whose threads may still be at work."""
        self._entries: dict[str, _Entry] = {}
        for offer in offers:
            if offer.name in self._entries:
                raise TreadleError(f"two models are called `{offer.name}`; name one NAME=MODEL")
            self._entries[offer.name] = _Entry(offer)
        for offer in offers:
            if isinstance(offer, Adapted) and offer.base not in self._entries:
                hint = did_you_mean(offer.base, self._entries)
                raise TreadleError(f"adapter `{offer.name}`: no model `{offer.base}`{hint}")

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def offer(self, name: str) -> Offer:
        """
        Raises:
            ApiError: there is no such model.
        """
        return self._entry(name).offer

    def workers(self) -> dict[str, Worker]:
        """The models that are loaded now."""
        return {n: e.worker for n, e in self._entries.items() if e.worker is not None}

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Worker]:
        """A model's worker, loaded if need be, kept until the context is left.

        Raises:
            ApiError: there is no such model, or it cannot be loaded.
        """
        entry = self._entry(name)
        entry.users += 1
        try:
            async with AsyncExitStack() as held:
                if isinstance(entry.offer, Adapted):
                    await held.enter_async_context(self.use(entry.offer.base))
                yield await self._worker(entry)
        finally:
            entry.users -= 1
            entry.used = time.monotonic()

    def adapter(self, name: str) -> str | None:
        """What a request to the worker of `use(name)` is to name as its adapter."""
        entry = self._entry(name)
        return name if entry.shares else None

    def unload_idle(self) -> None:
        """Unload what nobody has used for `idle_seconds`, and let go of what was unloaded."""
        self._ending = [worker for worker in self._ending if worker.alive]
        now = time.monotonic()
        for entry in self._entries.values():
            if entry.idle and now - entry.used >= self.config.idle_seconds:
                self._unload(entry)

    def close(self) -> None:
        """Unload everything; requests under way are told."""
        for entry in self._entries.values():
            self._unload(entry)

    async def join(self) -> None:
        """Wait for the threads of what was unloaded.

        One that computes while the interpreter ends would abort the process.
        """
        for worker in self._ending:
            await asyncio.to_thread(worker.join)
        self._ending = []

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise unknown_model(name, self.names)
        return self._entries[name]

    async def _worker(self, entry: _Entry) -> Worker:
        if entry.worker is not None and entry.worker.failed:
            self._unload(entry)
        if entry.worker is None:
            if entry.loading is None:
                entry.loading = asyncio.create_task(self._load(entry))
            # one client that goes away does not stop the loading that others wait for
            return await asyncio.shield(entry.loading)
        return entry.worker

    async def _load(self, entry: _Entry) -> Worker:
        try:
            name = entry.offer.name
            before = self._loaded_bytes()
            entry.worker = await self._share(entry) or Worker(
                await self._open(entry.offer),
                name=name,
                capacity=self.config.limits.requests,
                metrics=self.metrics,
            )
            entry.used = time.monotonic()
            self._make_room(entry)
            self.metrics.loaded.labels(name).set(self._loaded_bytes() - before)
            return entry.worker
        except TreadleError as error:
            raise unavailable(f"`{entry.offer.name}` cannot be loaded: {error}", "load") from error
        finally:
            entry.loading = None

    async def _share(self, entry: _Entry) -> Worker | None:
        """The base's worker, with an adapter attached; None where it needs an engine of its own."""
        offer = entry.offer
        if not isinstance(offer, Adapted):
            return None
        async with self.use(offer.base) as base:
            try:
                await base.call(partial(attach, name=offer.name, folder=offer.folder))
            except CannotShareError:
                return None
            entry.shares = True
            return base

    async def _open(self, offer: Offer) -> Engine:
        if isinstance(offer, Base):
            return await asyncio.to_thread(offer.open)
        async with self.use(offer.base) as base:
            return await base.call(partial(beside, folder=offer.folder))

    def _make_room(self, kept: _Entry) -> None:
        """Unload idle models, the least recently used first, until the rest fits."""
        limit = self.config.memory_bytes
        if limit is None:
            return
        others = sorted((e for e in self._entries.values() if e is not kept), key=lambda e: e.used)
        for entry in others:
            if self._loaded_bytes() <= limit:
                return
            if entry.idle:
                self._unload(entry)
        if self._loaded_bytes() > limit:
            self._unload(kept)
            raise unavailable(
                f"`{kept.offer.name}` does not fit beside the models that are in use; try again",
                "memory",
            )

    def _loaded_bytes(self) -> int:
        return _bytes([w.engine for w in self.workers().values()])

    def _unload(self, entry: _Entry) -> None:
        worker, entry.worker = entry.worker, None
        if worker is None:
            return
        self.metrics.loaded.labels(entry.offer.name).set(0)
        if entry.shares:
            entry.shares = False
            worker.tell(partial(detach, name=entry.offer.name))
            return
        for other in self._entries.values():
            if other.shares and other.worker is worker:
                self._unload(other)
        worker.close()
        self._ending = [w for w in (*self._ending, worker) if w.alive]


def runner_of(engine: Engine, lack: str = "gives text only") -> TorchRunner:
    """The runner behind an engine, with its model.

    Args:
        lack: what the other runners do not give, for the message.

    Raises:
        ApiError: the engine runs it in a form of its own.
    """
    if isinstance(engine.runner, TorchRunner):
        return engine.runner
    message = (
        f"this model runs in a form that {lack} ({type(engine.runner).__name__}): start the "
        "server with `--device cpu` (or `cuda`), and without `--tensor-parallel`"
    )
    raise ApiError(400, message, code="text_only")


def _bytes(engines: Sequence[Engine]) -> int:
    """Memory of the weights and adapters, shared ones once."""
    weights: dict[int, int] = {}
    for engine in engines:
        weights |= engine.runner.weights()
    shelves = {id(e): e.runner.adapters.nbytes for e in engines if e.runner.adapters is not None}
    return sum(weights.values()) + sum(shelves.values())
