"""An engine in a thread of its own; asynchronous callers get its tokens as they come.

The engine never waits for a reader. What a reader has not fetched is kept as one piece per
completion, which cannot outgrow the model's context, so a slow reader costs a bounded amount of
memory and nobody else's time. Leaving a ticket's context frees its place in the engine, whether
the answer is whole or the client has gone.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from treadle.core.errors import TreadleError
from treadle.inference.engine import Engine
from treadle.inference.request import Request
from treadle.inference.sequence import Active
from treadle.serving.errors import log, overloaded, unavailable
from treadle.serving.metrics import Metrics
from treadle.serving.ticket import Piece, Ticket

T = TypeVar("T")


@dataclass
class _Job:
    """A ticket as the engine's thread sees it."""

    ticket: Ticket
    sent: dict[int, int] = field(default_factory=dict)
    """Completion -> tokens that its reader was given."""
    last: dict[int, float] = field(default_factory=dict)
    """Completion -> when its last token came."""
    ended: set[int] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        return len(self.ended) == self.ticket.request.n


class Worker:
    """Runs an engine until it is closed.

    Args:
        name: labels its metrics.
        capacity: tickets that may be open at once.
    """

    def __init__(self, engine: Engine, *, name: str, capacity: int, metrics: Metrics) -> None:
        self.engine, self.name, self.capacity, self.metrics = engine, name, capacity, metrics
        self.tickets: set[Ticket] = set()
        self.failed = self.closed = False
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[int, _Job] = {}
        self._numbers: dict[Ticket, int] = {}
        self._thread = threading.Thread(target=self._live, name=f"engine {name}", daemon=True)
        self._thread.start()

    @contextmanager
    def open(self, request: Request, *, seconds: float, news: asyncio.Event) -> Iterator[Ticket]:
        """Hand a request to the engine; leaving the context ends it.

        Raises:
            ApiError: the engine has as many requests as it may, or has failed.
        """
        if self.failed:
            raise unavailable(f"the model `{self.name}` has failed and is being reloaded", "failed")
        if self.closed:
            raise unavailable(f"the model `{self.name}` is being unloaded", "unloaded")
        if len(self.tickets) >= self.capacity:
            raise overloaded(
                f"the model `{self.name}` has {self.capacity} requests in hand; try again"
            )
        ticket = Ticket(request, seconds, news)
        self.tickets.add(ticket)
        self._count()
        self._commands.put(partial(self._begin, ticket))
        try:
            yield ticket
        finally:
            self.tickets.discard(ticket)
            self._count()
            self._commands.put(partial(self._end, ticket))

    async def call(self, function: Callable[[Engine], T]) -> T:
        """What `function` gives, run in the engine's thread between two steps."""
        loop, answer = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def settle(value: T | None, error: Exception | None) -> None:
            if answer.cancelled():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(value)

        def command() -> None:
            try:
                result: tuple[T | None, Exception | None] = (function(self.engine), None)
            except Exception as error:
                result = (None, error)
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(settle, *result)

        self._commands.put(command)
        value: T = await answer
        return value

    def tell(self, function: Callable[[Engine], None]) -> None:
        """Run `function` in the engine's thread between two steps; what it raises is logged."""

        def command() -> None:
            try:
                function(self.engine)
            except TreadleError as error:
                log.warning("`%s`: %s", self.name, error)

        self._commands.put(command)

    def close(self) -> None:
        """End the thread; open tickets fail."""
        self.closed = True
        self._commands.put(None)

    @property
    def alive(self) -> bool:
        """Whether its thread still runs."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait until a closed worker's thread has ended."""
        self._thread.join()

    def _count(self) -> None:
        self.metrics.open.labels(self.name).set(len(self.tickets))

    def _live(self) -> None:
        self._run()
        self.engine.runner.close()

    def _run(self) -> None:
        while True:
            try:
                while not self._jobs or not self._commands.empty():
                    command = self._commands.get()
                    if command is None:
                        self._fail(unavailable("the model is being unloaded", "unloaded"))
                        return
                    command()
                self._step()
            except Exception as error:
                log.error("the engine of `%s` failed", self.name, exc_info=error)
                self.failed = True
                self._fail(unavailable(f"the engine of `{self.name}` failed", "engine_failed"))

    def _begin(self, ticket: Ticket) -> None:
        if self.failed:
            self._tell(ticket, partial(ticket.fail, unavailable("the engine failed", "failed")))
            return
        try:
            number = self.engine.submit(ticket.request)
        except TreadleError as error:
            self._tell(ticket, partial(ticket.fail, error))
            return
        self._jobs[number], self._numbers[ticket] = _Job(ticket), number
        self.metrics.prompt_tokens.labels(self.name).inc(len(ticket.request.prompt))
        self.metrics.waiting.labels(self.name).inc()

    def _end(self, ticket: Ticket) -> None:
        number = self._numbers.pop(ticket, None)
        job = None if number is None else self._jobs.pop(number, None)
        if number is None or job is None:
            return
        self.engine.cancel(number)
        self._forget(job)
        self._settle()

    def _settle(self) -> None:
        if not self._jobs:
            self.engine.step()  # lets go of what has ended
        blocks = self.engine.scheduler.blocks
        self.metrics.pages.labels(self.name).set(blocks.pages - blocks.available)

    def _forget(self, job: _Job) -> None:
        """Count a job that does not finish."""
        if not job.last:
            self.metrics.waiting.labels(self.name).dec()
        left = job.ticket.request.n - len(job.ended)
        self.metrics.finished.labels(self.name, "cancelled").inc(left)

    def _step(self) -> None:
        fresh: dict[Ticket, list[Piece]] = {}
        touched, now = self.engine.step(), time.monotonic()
        for sequence in touched:
            job = self._jobs.get(sequence.job)
            if job is None:
                continue
            self._time(job, sequence.index, now)
            piece = self._advance(job, sequence)
            if piece is not None:
                fresh.setdefault(job.ticket, []).append(piece)
            if job.whole:
                del self._jobs[sequence.job]
        for ticket, pieces in fresh.items():
            self._tell(ticket, partial(ticket.put, pieces))
        self._settle()

    def _time(self, job: _Job, index: int, now: float) -> None:
        if index in job.last:
            self.metrics.between_tokens.labels(self.name).observe(now - job.last[index])
        elif not job.last:
            self.metrics.first_token.labels(self.name).observe(now - job.ticket.began)
            self.metrics.waiting.labels(self.name).dec()
        job.last[index] = now

    def _advance(self, job: _Job, sequence: Active) -> Piece | None:
        """What a sequence has that its reader does not; nothing while its text is unsure."""
        index, finish = sequence.index, sequence.finish
        text = sequence.text.take(final=finish is not None)
        if not text and finish is None:
            return None
        prompt = () if index in job.sent else tuple(sequence.readings)
        sent = job.sent.get(index, 0)
        job.sent[index] = len(sequence.tokens)
        tokens, logprobs = sequence.tokens[sent:], sequence.logprobs[sent:]
        tops: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
        if sequence.request.sampling.top_logprobs:
            tops = sequence.top[sent:]
        piece = Piece(index, text, tokens, logprobs, tops, finish, sequence.cached, prompt)
        self.metrics.generated_tokens.labels(self.name).inc(len(piece.tokens))
        if finish is not None:
            job.ended.add(index)
            self.metrics.finished.labels(self.name, finish).inc()
        return piece

    def _tell(self, ticket: Ticket, news: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop has closed, nobody listens
            ticket.loop.call_soon_threadsafe(news)

    def _fail(self, error: Exception) -> None:
        jobs, self._jobs = self._jobs, {}
        self._numbers.clear()
        for job in jobs.values():
            self._forget(job)
            self._tell(job.ticket, partial(job.ticket.fail, error))
