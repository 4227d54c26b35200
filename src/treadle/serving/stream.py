"""Answers that outlive their request's first line: event streams, and clients that go away."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from treadle.serving.errors import ApiError, as_api_error, encode, log, reply

T = TypeVar("T")
Events = AsyncGenerator[bytes, None]
DONE = b"data: [DONE]\n\n"


EITHER: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}
"""What the OpenAPI page says of an answer that may be streamed."""


class Answer(ABC):
    """What a request is answered with, to be had once, in one of two ways."""

    @abstractmethod
    async def whole(self) -> Any:
        """All at once, as JSON."""

    @abstractmethod
    def events(self) -> Events:
        """As it comes."""


async def answered(http: Request, answer: Answer, *, stream: bool | None, stall: float) -> Response:
    """The response; a client that goes away ends the work on it."""
    if stream:
        return await streamed(http, answer.events(), stall=stall)
    return reply(await unless_gone(http, answer.whole()))


def event(content: Any, name: str = "") -> bytes:
    """One server-sent event."""
    first = f"event: {name}\n".encode() if name else b""
    return first + b"data: " + encode(content) + b"\n\n"


async def unless_gone(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(http.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone")  # nobody reads this
        return await task
    finally:
        await _end(task, gone)


async def streamed(http: Request, events: Events, *, stall: float) -> Response:
    """A stream of events; what goes wrong before the first is an ordinary error answer."""
    first = await unless_gone(http, _first(events))
    return EventStream(first, events, stall)


class EventStream(Response):
    """Sends events until they end, the client goes away, or reads nothing for `stall` seconds."""

    def __init__(self, first: bytes, events: Events, stall: float) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self.first, self.events, self.stall = first, events, stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _end(sending, gone)

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            await self._send_part(send, self.first)
            async for part in self.events:
                await self._send_part(send, part)
        except _StalledError:
            log.warning("a client read nothing for %.0f s; its stream is ended", self.stall)
            raise
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                return  # the client went away while it was sent to
            await self._send_part(send, event(as_api_error(error).content()))
        finally:
            await self.events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_part(self, send: Send, part: bytes) -> None:
        try:
            async with asyncio.timeout(self.stall):
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except TimeoutError:
            raise _StalledError from None


class _StalledError(Exception):
    """The client does not read."""


async def _first(events: Events) -> bytes:
    return await anext(events)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
