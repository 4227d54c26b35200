"""The output items of a response, and the events that tell how they grow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

from treadle.serving.parse import Arguments, Call, Content, Part, Reasoning

Event = dict[str, Any]


class Items:
    """Messages, reasoning and calls, in the order in which a model writes them."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._blank = ""
        """White space that may stand before a message, or between calls."""

    def add(self, part: Part) -> Iterator[Event]:
        """Events that a part gives rise to."""
        match part:
            case Content(text) | Reasoning(text):
                kind = "message" if isinstance(part, Content) else "reasoning"
                if not self._is(kind):
                    text = self._blank + text
                    if text.isspace():
                        self._blank = text
                        return
                    yield from self._begin(kind)
                yield from self._grow(text)
            case Call():
                yield from self._begin("function_call", part.name)
                yield from self._grow(part.arguments)
            case Arguments(text):
                yield from self._grow(text)

    def end(self, status: str) -> Iterator[Event]:
        """The last item's end; an answer without any text is an empty message."""
        if self._open is None and not self.done:
            text = self._blank
            yield from self._begin("message")
            yield from self._grow(text)
        yield from self._close(status)

    def _is(self, kind: str) -> bool:
        return self._open is not None and self._open["type"] == kind

    def _begin(self, kind: str, name: str = "") -> Iterator[Event]:
        yield from self._close("completed")
        self._blank = ""
        number = uuid4().hex
        match kind:
            case "message":
                self._open = {"id": f"msg_{number}", "role": "assistant", "content": []}
            case "reasoning":
                self._open = {"id": f"rs_{number}", "summary": [], "content": []}
            case _:
                call = {"call_id": f"call_{number[:24]}", "name": name, "arguments": ""}
                self._open = {"id": f"fc_{number}", **call}
        self._open |= {"type": kind, "status": "in_progress"}
        yield {**self._at("output_item.added"), "item": _copy(self._open)}
        if kind != "function_call":
            self._open["content"] = [_part(kind)]
            yield {**self._in("content_part.added"), "part": _part(kind)}

    def _grow(self, text: str) -> Iterator[Event]:
        if not text:
            return
        assert self._open is not None
        match self._open["type"]:
            case "message":
                self._open["content"][0]["text"] += text
                yield {**self._in("output_text.delta"), "delta": text, "logprobs": []}
            case "reasoning":
                self._open["content"][0]["text"] += text
                yield {**self._in("reasoning_text.delta"), "delta": text}
            case _:
                self._open["arguments"] += text
                yield {**self._within("function_call_arguments.delta"), "delta": text}

    def _close(self, status: str) -> Iterator[Event]:
        item = self._open
        if item is None:
            return
        if item["type"] == "function_call":
            said = {"name": item["name"], "arguments": item["arguments"]}
            yield {**self._within("function_call_arguments.done"), **said}
        else:
            (part,) = item["content"]
            if item["type"] == "message":
                yield {**self._in("output_text.done"), "text": part["text"], "logprobs": []}
            else:
                yield {**self._in("reasoning_text.done"), "text": part["text"]}
            yield {**self._in("content_part.done"), "part": dict(part)}
        item["status"] = status
        yield {**self._at("output_item.done"), "item": _copy(item)}
        self.done.append(item)
        self._open = None

    def _at(self, name: str) -> Event:
        return {"type": f"response.{name}", "output_index": len(self.done)}

    def _within(self, name: str) -> Event:
        assert self._open is not None
        return {**self._at(name), "item_id": self._open["id"]}

    def _in(self, name: str) -> Event:
        return {**self._within(name), "content_index": 0}


def _part(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """As it is now; it grows on."""
    content = {"content": [dict(part) for part in item["content"]]} if "content" in item else {}
    return {**item, **content}
