"""`POST /v1/responses`: text and tools, streaming events, conversations that go on."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as Http
from starlette.responses import Response

from treadle.serving.chat import ChatRun
from treadle.serving.items import Event, Items
from treadle.serving.memory import Conversations
from treadle.serving.parse import Part, Reasoning
from treadle.serving.protocol import CalledFunction, CallOfTool, ChatMessage
from treadle.serving.responses_body import ResponsesBody, add_call
from treadle.serving.service import Service, Session, pieces
from treadle.serving.stream import EITHER, Answer, answered
from treadle.serving.stream import event as sent


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    memory = Conversations(service.config.limits.remembered)

    @router.post("/v1/responses", responses=EITHER)
    async def responses(body: ResponsesBody, http: Http) -> Response:
        answer = ResponseAnswer(service, body, memory)
        stall = service.config.limits.stall_seconds
        return await answered(http, answer, stream=body.stream, stall=stall)

    return router


class ResponseAnswer(Answer):
    def __init__(self, service: Service, body: ResponsesBody, memory: Conversations) -> None:
        self.body, self.memory = body, memory
        before = body.previous_response_id
        self.earlier = memory.find(before) if before else []
        self.run = ChatRun(service, body.chat(self.earlier), "resp")

    async def whole(self) -> dict[str, Any]:
        told = [event async for event in self._told()]
        response: dict[str, Any] = told[-1]["response"]
        return response

    async def events(self) -> AsyncGenerator[bytes, None]:
        number = 0
        async for told in self._told():
            yield sent({**told, "sequence_number": number}, told["type"])
            number += 1

    async def _told(self) -> AsyncGenerator[Event, None]:
        """What happens; the last event holds the whole response."""
        items = Items()
        thought = 0
        async with self.run.session() as session:
            (choice,) = self.run.choices(1)
            begun = self._response(session, "in_progress", items)
            yield {"type": "response.created", "response": begun}
            yield {"type": "response.in_progress", "response": begun}
            async for _, piece in pieces(session):
                parts: list[Part] = choice.parts(piece)
                if any(isinstance(part, Reasoning) for part in parts):
                    thought += len(piece.tokens)
                for part in parts:
                    for told in items.add(part):
                        yield told
            status = "incomplete" if choice.finish == "length" else "completed"
            for told in items.end(status):
                yield told
            if self.body.store is not False:
                said = [*self.earlier, *self.body.turns(), *_turn(items)]
                self.memory.keep(session.id, said)
            response = self._response(session, status, items)
            response["usage"] = _usage(session, thought)
        yield {"type": f"response.{status}", "response": response}

    def _response(self, session: Session, status: str, items: Items) -> dict[str, Any]:
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        body = self.body.model_dump(exclude={"input", "stream"}, by_alias=True)
        return {
            **{key: value for key, value in body.items() if value is not None},
            "id": session.id,
            "object": "response",
            "created_at": session.created,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "model": session.model,
            "output": list(items.done),
            "parallel_tool_calls": True,
            "tool_choice": body["tool_choice"] or "auto",
            "tools": body["tools"] or [],
            "usage": None,
        }


def _turn(items: Items) -> list[ChatMessage]:
    """What the model said, as a template wants to see it again: without the reasoning."""
    turns: list[ChatMessage] = []
    for item in items.done:
        if item["type"] == "message":
            turns.append(ChatMessage(role="assistant", content=item["content"][0]["text"]))
        elif item["type"] == "function_call":
            function = CalledFunction(name=item["name"], arguments=item["arguments"])
            add_call(turns, CallOfTool(id=item["call_id"], function=function))
    return turns


def _usage(session: Session, thought: int) -> dict[str, Any]:
    used = session.usage
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": session.cached},
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": used["total_tokens"],
    }
