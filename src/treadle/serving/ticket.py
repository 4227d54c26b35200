"""A request in an engine's hands: what the event loop gave, and what came of it so far."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from treadle.inference.request import Finish, Reading, Request


@dataclass
class Piece:
    """What is new of one completion."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish: Finish | None = None
    cached: int = 0
    """Tokens of the prompt that had not to be computed."""
    prompt: tuple[Reading, ...] = ()
    """Of the prompt's tokens but the first, in a completion's first piece, if it was asked for."""

    def extend(self, more: Piece) -> None:
        self.text += more.text
        self.tokens += more.tokens
        self.logprobs += more.logprobs
        self.tops += more.tops
        self.finish = more.finish


class Ticket:
    """A request in an engine's hands, as the event loop sees it.

    Args:
        news: set when there is something to take; several tickets may share one.
    """

    def __init__(self, request: Request, seconds: float, news: asyncio.Event) -> None:
        self.request, self.news = request, news
        self.loop = asyncio.get_running_loop()
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        self.unfinished = request.n
        self._unread: dict[int, Piece] = {}
        self._failure: Exception | None = None

    def take(self) -> list[Piece]:
        """What has come since the last call.

        Raises:
            TreadleError: the engine refused the request.
            ApiError: the engine failed, or the server stops.
        """
        if self._failure is not None:
            raise self._failure
        pieces, self._unread = list(self._unread.values()), {}
        self.unfinished -= sum(piece.finish is not None for piece in pieces)
        return pieces

    def put(self, pieces: list[Piece]) -> None:
        """Called in the event loop."""
        for piece in pieces:
            if piece.index in self._unread:
                self._unread[piece.index].extend(piece)
            else:
                self._unread[piece.index] = piece
        self.news.set()

    def fail(self, error: Exception) -> None:
        """Called in the event loop."""
        self._failure = error
        self.news.set()
