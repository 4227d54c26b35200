"""`POST /v1/completions`: text in, more text out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as Http
from starlette.responses import Response

from treadle.inference.best_of import mean_logprob
from treadle.inference.engine import Engine
from treadle.inference.request import Finish, Request
from treadle.serving.errors import ApiError
from treadle.serving.logprobs import Echoed, TextLogprobs, echoed
from treadle.serving.protocol import CompletionBody
from treadle.serving.sampling import check_count, request_of
from treadle.serving.service import Service, Session, pieces, usage
from treadle.serving.stream import DONE, EITHER, Answer, answered, event
from treadle.serving.texts import Text, several
from treadle.serving.ticket import Piece
from treadle.tokenizers.tokenizer import Tokenizer

MAX_TOKENS = 16
"""Where the request does not say, as the protocol has it."""


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", responses=EITHER)
    async def completions(body: CompletionBody, http: Http) -> Response:
        answer = TextAnswer(service, body)
        stall = service.config.limits.stall_seconds
        return await answered(http, answer, stream=body.stream, stall=stall)

    return router


@dataclass
class Drawn:
    """One continuation of one prompt, while it comes."""

    tokenizer: Tokenizer
    lists: TextLogprobs
    echoed: Echoed | None
    """The prompt, until it has been given back."""
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, piece: Piece) -> None:
        if self.echoed is not None:
            self.text = self.echoed.text
            self.lists.echo(self.tokenizer, self.echoed, (None, *piece.prompt))
            self.echoed = None
        self.lists.add(self.tokenizer, piece)
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.finish = piece.finish

    def choice(self, index: int) -> dict[str, Any]:
        """What has come since the last call."""
        text, self.text = self.text, ""
        lists = self.lists.take()
        return {"index": index, "text": text, "logprobs": lists, "finish_reason": self.finish}


class TextAnswer(Answer):
    """An answer, whole or in pieces; choice i belongs to prompt i // n."""

    def __init__(self, service: Service, body: CompletionBody) -> None:
        self.service, self.body = service, body
        self.n = body.n or 1
        self.draws = body.best_of or self.n
        """Continuations of each prompt, of which the likeliest n are told."""
        self.silent = body.max_tokens == 0
        """The prompt is read and given back; the token that the engine draws then is dropped."""
        _check(body, self.n, self.draws)
        self.prompts = several(body.prompt, service.config.limits.inputs, "prompt")

    def _prepare(self, prompt: Text, engine: Engine) -> Request:
        ids = prompt
        if isinstance(ids, str):
            ids = engine.tokenizer.encode(ids, add_special=True)
        limit = MAX_TOKENS if self.body.max_tokens is None else max(1, self.body.max_tokens)
        limits, top = self.service.config.limits, self.body.logprobs
        check_count(self.draws, engine, limits, "best_of" if self.body.best_of else "n")
        request = request_of(self.body, ids, engine, limits, max_tokens=limit, top_logprobs=top)
        return replace(request, n=self.draws, prompt_logprobs=top if self.body.echo else None)

    async def _sessions(self, stack: AsyncExitStack) -> list[Session]:
        model, user, news = self.body.model, self.body.user, asyncio.Event()
        return [
            await stack.enter_async_context(
                self.service.session(
                    "cmpl", model, partial(self._prepare, prompt), user=user, news=news
                )
            )
            for prompt in self.prompts
        ]

    def _drawn(self, number: int, session: Session) -> Drawn:
        tokenizer, prompt = session.engine.tokenizer, None
        if self.body.echo:
            prompt = echoed(tokenizer, self.prompts[number], list(session.ticket.request.prompt))
        return Drawn(tokenizer, TextLogprobs(self.body.logprobs), prompt)

    async def _pieces(self, sessions: list[Session]) -> AsyncGenerator[tuple[int, Piece], None]:
        """Each with its place among all that is drawn."""
        async for number, piece in pieces(*sessions):
            if self.silent:
                piece = Piece(piece.index, finish=piece.finish and "length", prompt=piece.prompt)
            yield number * self.draws + piece.index, piece

    async def whole(self) -> dict[str, Any]:
        async with AsyncExitStack() as stack:
            sessions = await self._sessions(stack)
            drawn = [self._drawn(i, s) for i, s in enumerate(sessions) for _ in range(self.draws)]
            async for place, piece in self._pieces(sessions):
                drawn[place].add(piece)
            told: list[Drawn] = []
            for start in range(0, len(drawn), self.draws):
                group = drawn[start : start + self.draws]
                if self.draws > self.n:
                    group.sort(key=lambda one: mean_logprob(one.logprobs), reverse=True)
                told += group[: self.n]
            choices = [one.choice(index) for index, one in enumerate(told)]
            return {**_head(sessions[0]), "choices": choices, "usage": self._usage(sessions)}

    async def events(self) -> AsyncGenerator[bytes, None]:
        async with AsyncExitStack() as stack:
            sessions = await self._sessions(stack)
            head = _head(sessions[0])
            tail = {"usage": None} if self.body.with_usage else {}
            drawn = [self._drawn(i, s) for i, s in enumerate(sessions) for _ in range(self.draws)]
            async for place, piece in self._pieces(sessions):
                drawn[place].add(piece)
                yield event({**head, "choices": [drawn[place].choice(place)], **tail})
            if self.body.with_usage:
                yield event({**head, "choices": [], "usage": self._usage(sessions)})
        yield DONE

    def _usage(self, sessions: list[Session]) -> dict[str, int]:
        """All that was drawn counts, told or not."""
        read = sum(len(s.ticket.request.prompt) for s in sessions)
        return usage(read, 0 if self.silent else sum(s.tokens for s in sessions))


def _check(body: CompletionBody, n: int, draws: int) -> None:
    """
    Raises:
        ApiError: fields that do not go together.
    """
    if draws < n:
        message = f"`best_of` is {draws}, but `n` is {n}: draw at least as many as are told"
        raise ApiError(400, message, param="best_of")
    if draws > n and body.stream:
        message = (
            "which answers are the best is known at their end: leave out `stream` or `best_of`"
        )
        raise ApiError(400, message, param="best_of")
    if body.max_tokens == 0 and not body.echo:
        message = "`max_tokens` is 0: ask for a token, or with `echo` for the prompt alone"
        raise ApiError(400, message, param="max_tokens")


def _head(session: Session) -> dict[str, Any]:
    return {
        "id": session.id,
        "object": "text_completion",
        "created": session.created,
        "model": session.model,
    }
