"""The outermost layer: who may enter, with how much, and what is counted."""

from __future__ import annotations

import asyncio
import hmac
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from treadle.serving.config import Serve
from treadle.serving.errors import ApiError, unavailable
from treadle.serving.metrics import Metrics

OPEN = ("/", "/health", "/metrics")
"""Without a key; so is what lies below /page/."""
DISCARDED = 64 * 2**20
"""Bytes of a body that is too long which are read away, so that the client hears why."""


class Gate:
    """ASGI middleware: drains, checks keys, reads bodies up to a limit, counts answers."""

    def __init__(self, app: ASGIApp, config: Serve, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.paths: frozenset[str] = frozenset()
        """Those that the figures name; others are counted as one."""
        self.keys = [key.encode() for key in config.keys]
        self.draining = False
        self.inside = 0
        self.empty = asyncio.Event()
        self.empty.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 499
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.inside += 1
        self.empty.clear()
        try:
            await self._admit(scope, receive, counted)
        finally:
            self.inside -= 1
            if not self.inside:
                self.empty.set()
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.duration.labels(path).observe(time.monotonic() - began)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        free = scope["path"] in OPEN or scope["path"].startswith("/page/")
        try:
            if self.draining and not free:
                raise unavailable("the server is stopping; ask another", "draining")
            if self.keys and not free:
                self._check_key(scope)
            body = await self._body(receive)
        except ApiError as error:
            response = error.response()
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        if body is None:
            return
        unread = [body]

        async def replay() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        await self.app(scope, replay, send)

    def _check_key(self, scope: Scope) -> None:
        given = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        good = [hmac.compare_digest(key.strip(), known) for known in self.keys]
        if scheme.lower() != b"bearer" or not any(good):
            message = "a valid API key is needed: `Authorization: Bearer KEY`"
            raise ApiError(401, message, kind="authentication_error", code="invalid_api_key")

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None where the client went away.

        Raises:
            ApiError: it is too long, or does not come.
        """
        limit, parts, size, more = self.config.limits.body_bytes, list[bytes](), 0, True
        while more and size <= DISCARDED:
            try:
                async with asyncio.timeout(self.config.limits.stall_seconds):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "the rest of the body did not come", code="timeout") from None
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size <= limit:
                parts.append(message.get("body", b""))
            else:
                parts.clear()
        if size > limit:
            raise ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")
        return b"".join(parts)
