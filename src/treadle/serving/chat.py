"""`POST /v1/chat/completions`."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
from starlette.requests import Request as Http
from starlette.responses import Response

from treadle.inference.constrained import JsonSchema
from treadle.inference.engine import Engine
from treadle.inference.request import Request
from treadle.serving.logprobs import chat_logprobs
from treadle.serving.parse import Arguments, Call, Content, OutputParser, Part, Reasoning
from treadle.serving.prompt import ChatPrompt, call_schema, chat_prompt
from treadle.serving.protocol import ChatBody
from treadle.serving.sampling import request_of
from treadle.serving.service import Service, Session, pieces
from treadle.serving.sources import Passage, told
from treadle.serving.stream import DONE, EITHER, Answer, answered, event
from treadle.serving.ticket import Piece


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", responses=EITHER)
    async def chat_completions(body: ChatBody, http: Http) -> Response:
        answer = ChatAnswer(ChatRun(service, body, "chatcmpl"))
        stall = service.config.limits.stall_seconds
        return await answered(http, answer, stream=body.stream, stall=stall)

    return router


class Choice:
    """One completion, as it is told apart into the fields of a message."""

    def __init__(self, parser: OutputParser) -> None:
        self.parser = parser
        self.calls = 0
        self.content = ""
        self.finish: str | None = None

    def parts(self, piece: Piece) -> list[Part]:
        parts = self.parser.feed(piece.text, final=piece.finish is not None)
        self.calls += sum(isinstance(part, Call) for part in parts)
        self.content += "".join(part.text for part in parts if isinstance(part, Content))
        if piece.finish is not None:
            self.finish = "tool_calls" if self.calls and piece.finish == "stop" else piece.finish
        return parts

    def numbered(self, piece: Piece) -> Iterator[tuple[Part, int]]:
        """The piece's parts, each with the number of the call that it may belong to."""
        number = self.calls - 1
        for part in self.parts(piece):
            number += isinstance(part, Call)
            yield part, number


class ChatRun:
    """A conversation that a model continues, whichever endpoint it came by.

    Args:
        kind: begins the answer's id.
    """

    def __init__(self, service: Service, body: ChatBody, kind: str) -> None:
        self.service, self.body, self.kind = service, body, kind
        self.prompt = ChatPrompt("")

    def session(self) -> AbstractAsyncContextManager[Session]:
        """To be entered once; then `choices` tells the model's text apart."""
        body = self.body
        return self.service.session(self.kind, body.model, self._prepare, user=body.user)

    def choices(self, count: int) -> list[Choice]:
        return [Choice(self.prompt.parser()) for _ in range(count)]

    def _prepare(self, engine: Engine) -> Request:
        body = self.body
        self.prompt = chat_prompt(engine.tokenizer, body, engine.runner.context)
        forced = self.prompt.forced
        return request_of(
            body,
            engine.tokenizer.encode(self.prompt.text),
            engine,
            self.service.config.limits,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            top_logprobs=body.top_logprobs if body.logprobs else None,
            language=JsonSchema(text=json.dumps(call_schema(forced))) if forced else None,
        )


class ChatAnswer(Answer):
    def __init__(self, run: ChatRun) -> None:
        self.run, self.body = run, run.body

    async def whole(self) -> dict[str, Any]:
        async with self.run.session() as session:
            n, sources = session.ticket.request.n, self.run.prompt.sources
            choices = self.run.choices(n)
            parts: list[list[Part]] = [[] for _ in range(n)]
            logprobs: list[list[dict[str, Any]]] = [[] for _ in range(n)]
            async for _, piece in pieces(session):
                parts[piece.index] += choices[piece.index].parts(piece)
                if self.body.logprobs:
                    logprobs[piece.index] += chat_logprobs(session.engine.tokenizer, piece)
            return {
                "id": session.id,
                "object": "chat.completion",
                "created": session.created,
                "model": session.model,
                "choices": [
                    {
                        "index": index,
                        "message": _message(parts[index], sources),
                        "logprobs": {"content": logprobs[index]} if self.body.logprobs else None,
                        "finish_reason": choice.finish,
                    }
                    for index, choice in enumerate(choices)
                ],
                "usage": session.usage,
            }

    async def events(self) -> AsyncGenerator[bytes, None]:
        async with self.run.session() as session:
            choices, sources = self.run.choices(session.ticket.request.n), self.run.prompt.sources
            head = {
                "id": session.id,
                "object": "chat.completion.chunk",
                "created": session.created,
                "model": session.model,
            }
            tail = {"usage": None} if self.body.with_usage else {}
            greeted: set[int] = set()
            async for _, piece in pieces(session):
                choice = choices[piece.index]
                deltas = [_delta(part, number) for part, number in choice.numbered(piece)]
                greeting = int(piece.index not in greeted)
                if greeting:
                    greeted.add(piece.index)
                    deltas = [{"role": "assistant", "content": ""}, *deltas]
                if self.body.logprobs and piece.tokens and not deltas[greeting:]:
                    deltas.append({})  # tokens whose text is held back are told all the same
                for number, delta in enumerate(deltas, 1):
                    one: dict[str, Any] = {"index": piece.index, "delta": delta}
                    one |= {"logprobs": None, "finish_reason": None}
                    if self.body.logprobs and number == len(deltas):
                        content = chat_logprobs(session.engine.tokenizer, piece)
                        one["logprobs"] = {"content": content}
                    yield event({**head, "choices": [one], **tail})
                if choice.finish is not None:
                    last = told(choice.content, sources) if sources else {}
                    one = {"index": piece.index, "delta": last, "logprobs": None}
                    one["finish_reason"] = choice.finish
                    yield event({**head, "choices": [one], **tail})
            if self.body.with_usage:
                yield event({**head, "choices": [], "usage": session.usage})
        yield DONE


def _message(parts: list[Part], sources: Sequence[Passage]) -> dict[str, Any]:
    content = "".join(p.text for p in parts if isinstance(p, Content))
    reasoning = "".join(p.text for p in parts if isinstance(p, Reasoning))
    calls = tool_calls(parts)
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message |= {"content": content.strip() or None, "tool_calls": calls}
    if sources:
        message |= told(message["content"] or "", sources)
    return message


def tool_calls(parts: Iterable[Part]) -> list[dict[str, Any]]:
    """The calls among the parts, each with all of its arguments."""
    calls: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, Call):
            calls.append(_call(part))
        elif isinstance(part, Arguments):
            calls[-1]["function"]["arguments"] += part.text
    return calls


def _delta(part: Part, number: int) -> dict[str, Any]:
    match part:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case Arguments(text):
            return {"tool_calls": [{"index": number, "function": {"arguments": text}}]}
        case Call():
            return {"tool_calls": [{"index": number, **_call(part)}]}


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": function}
