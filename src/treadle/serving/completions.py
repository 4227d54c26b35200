"""`POST /v1/completions`: text in, more text out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as Http
from starlette.responses import Response

from treadle.inference.engine import Engine
from treadle.inference.request import Request
from treadle.serving.errors import ApiError
from treadle.serving.logprobs import TextLogprobs
from treadle.serving.protocol import CompletionBody
from treadle.serving.sampling import request_of
from treadle.serving.service import Service, Session, pieces, usage
from treadle.serving.stream import DONE, EITHER, Answer, answered, event
from treadle.serving.texts import several

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


class TextAnswer(Answer):
    """An answer, whole or in pieces; choice i belongs to prompt i // n."""

    def __init__(self, service: Service, body: CompletionBody) -> None:
        self.service, self.body = service, body
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise ApiError(400, "`best_of` other than `n` is not supported", param="best_of")
        self.prompts = several(body.prompt, service.config.limits.inputs, "prompt")
        self.n = body.n or 1

    def _prepare(self, prompt: str | list[int], engine: Engine) -> Request:
        if isinstance(prompt, str):
            prompt = engine.tokenizer.encode(prompt, add_special=True)
        limit = MAX_TOKENS if self.body.max_tokens is None else self.body.max_tokens
        limits = self.service.config.limits
        top = self.body.logprobs
        return request_of(self.body, prompt, engine, limits, max_tokens=limit, top_logprobs=top)

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

    def _echo(self, number: int, session: Session) -> str:
        if not self.body.echo:
            return ""
        prompt = self.prompts[number]
        return prompt if isinstance(prompt, str) else session.engine.tokenizer.decode(prompt)

    async def whole(self) -> dict[str, Any]:
        async with AsyncExitStack() as stack:
            sessions = await self._sessions(stack)
            texts = [self._echo(i // self.n, sessions[i // self.n]) for i in range(self._choices)]
            logprobs = [TextLogprobs(self.body.logprobs, len(text)) for text in texts]
            finishes: list[str | None] = [None] * self._choices
            async for number, piece in pieces(*sessions):
                index = number * self.n + piece.index
                texts[index] += piece.text
                finishes[index] = piece.finish
                logprobs[index].add(sessions[0].engine.tokenizer, piece)
            return {
                **self._head(sessions[0]),
                "choices": [
                    {
                        "index": i,
                        "text": texts[i],
                        "logprobs": logprobs[i].content(),
                        "finish_reason": finishes[i],
                    }
                    for i in range(self._choices)
                ],
                "usage": _usage(sessions),
            }

    async def events(self) -> AsyncGenerator[bytes, None]:
        async with AsyncExitStack() as stack:
            sessions = await self._sessions(stack)
            head = self._head(sessions[0])
            tail = {"usage": None} if self.body.with_usage else {}
            texts = [self._echo(i // self.n, sessions[i // self.n]) for i in range(self._choices)]
            logprobs = [TextLogprobs(self.body.logprobs, len(text)) for text in texts]
            async for number, piece in pieces(*sessions):
                index = number * self.n + piece.index
                logprobs[index].add(sessions[0].engine.tokenizer, piece)
                choice = {
                    "index": index,
                    "text": texts[index] + piece.text,
                    "logprobs": logprobs[index].content(),
                    "finish_reason": piece.finish,
                }
                texts[index] = ""
                logprobs[index] = logprobs[index].rest()
                yield event({**head, "choices": [choice], **tail})
            if self.body.with_usage:
                yield event({**head, "choices": [], "usage": _usage(sessions)})
        yield DONE

    @property
    def _choices(self) -> int:
        return len(self.prompts) * self.n

    def _head(self, session: Session) -> dict[str, Any]:
        return {
            "id": session.id,
            "object": "text_completion",
            "created": session.created,
            "model": session.model,
        }


def _usage(sessions: list[Session]) -> dict[str, int]:
    read = sum(len(s.ticket.request.prompt) for s in sessions)
    return usage(read, sum(s.tokens for s in sessions))
