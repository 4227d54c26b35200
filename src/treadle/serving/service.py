"""What all endpoints share: models, limits, figures, trials; and one request on its way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from uuid import uuid4

from treadle.inference.engine import Engine
from treadle.inference.request import Finish, Request
from treadle.serving.config import Serve
from treadle.serving.errors import ApiError, unknown_model
from treadle.serving.metrics import Metrics
from treadle.serving.pool import Pool
from treadle.serving.route import Routes
from treadle.serving.ticket import Piece, Ticket
from treadle.serving.trial import Trials

Prepare = Callable[[Engine], Request]


@dataclass
class Session:
    """A request in an engine, and what is known of it so far."""

    id: str
    model: str
    """As the client named it."""
    engine: Engine
    ticket: Ticket
    created: int = field(default_factory=lambda: int(time.time()))
    tokens: int = 0
    """Generated, over all completions."""
    cached: int = 0
    """Of the prompt, found in the prefix cache."""
    first_token: float | None = None
    """Seconds that the client waited for it."""
    finishes: list[Finish] = field(default_factory=list)
    text: str = ""
    """Of the first completion."""

    @property
    def usage(self) -> dict[str, int]:
        read = len(self.ticket.request.prompt)
        return usage(read, self.tokens)

    def take(self) -> list[Piece]:
        """What has come since the last call, counted."""
        pieces = self.ticket.take()
        if pieces and self.first_token is None:
            self.first_token = self.seconds
        for piece in pieces:
            self.tokens += len(piece.tokens)
            self.cached = piece.cached
            if piece.index == 0:
                self.text += piece.text
            if piece.finish == "cancelled":
                raise ApiError(400, "the answer's format is too complex to be followed to its end")
            if piece.finish is not None:
                self.finishes.append(piece.finish)
        return pieces

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.ticket.began


async def pieces(*sessions: Session) -> AsyncIterator[tuple[int, Piece]]:
    """What comes of sessions that share their news, each with the number of its session.

    Raises:
        TimeoutError: they took too long.
        TreadleError: an engine refused a request.
        ApiError: an engine failed, or the server stops.
    """
    news = sessions[0].ticket.news
    deadline = min(session.ticket.deadline for session in sessions)
    while any(session.ticket.unfinished for session in sessions):
        await asyncio.wait_for(news.wait(), deadline - time.monotonic())
        news.clear()
        for number, session in enumerate(sessions):
            for piece in session.take():
                yield number, piece


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


@dataclass
class Service:
    config: Serve
    pool: Pool
    metrics: Metrics
    trials: Trials
    routes: Routes
    shadows: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        """All that a request may ask for."""
        return [*self.pool.names, *self.trials.names, *self.routes.names]

    @asynccontextmanager
    async def session(
        self,
        kind: str,
        model: str,
        prepare: Prepare,
        *,
        user: str | None = None,
        news: asyncio.Event | None = None,
    ) -> AsyncIterator[Session]:
        """Run a request from its preparation (in a thread) to its end.

        Args:
            kind: begins the answer's id.
            model: a model, an adapter, a trial or a route.
            user: whom a trial shows the same arm each time.
            news: shared by sessions that are read together.

        Raises:
            ApiError: no such model, it cannot be loaded, or it is overloaded.
        """
        if model not in self.names:
            raise unknown_model(model, self.names)
        id = f"{kind}-{uuid4().hex}"
        trial = self.trials.find(model)
        name = trial.arm(user or id) if trial else model
        if model in self.routes.names:
            model = name = await self._routed(model, prepare)
        async with self._run(id, model, name, prepare, news) as session:
            if trial and trial.shadow and len(self.shadows) < trial.shadows:
                other = trial.b if name == trial.a else trial.a
                task = asyncio.create_task(self._shadow(id, trial.name, other, prepare))
                self.shadows.add(task)
                task.add_done_callback(self.shadows.discard)
            try:
                yield session
            finally:
                if trial:
                    self.trials.served(trial.name, name, user, session, shadow=False)

    async def _routed(self, route: str, prepare: Prepare) -> str:
        """The adapter that a request is for."""
        async with self.pool.use(self.routes.base) as worker:
            request = await asyncio.to_thread(prepare, worker.engine)
            return await self.routes.choose(route, worker, request.prompt)

    @asynccontextmanager
    async def _run(
        self, id: str, model: str, name: str, prepare: Prepare, news: asyncio.Event | None
    ) -> AsyncIterator[Session]:
        async with self.pool.use(name) as worker:
            request = await asyncio.to_thread(prepare, worker.engine)
            request = replace(request, adapter=self.pool.adapter(name))
            seconds = self.config.limits.seconds
            with worker.open(request, seconds=seconds, news=news or asyncio.Event()) as ticket:
                yield Session(id, model, worker.engine, ticket)

    async def _shadow(self, id: str, trial: str, name: str, prepare: Prepare) -> None:
        """The same request for a model whose answer nobody sees."""
        async with self._run(id, name, name, prepare, None) as session:
            async for _ in pieces(session):
                pass
            self.trials.served(trial, name, None, session, shadow=True)

    async def close(self) -> None:
        for task in self.shadows:
            task.cancel()
        await asyncio.gather(*self.shadows, return_exceptions=True)
        self.pool.close()
        await self.pool.join()
        self.trials.close()
