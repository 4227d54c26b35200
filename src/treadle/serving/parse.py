"""What a model writes, told apart as it comes: reasoning, content, calls of tools.

Reasoning stands in `<think>...</think>` at the start; a call in `<tool_call>JSON</tool_call>`, one
object `{"name": ..., "arguments": {...}}` or a list of them, or as the whole answer for models
that mark it with nothing (Llama 3). What looks like a call and is none is content: nothing that
the model wrote is lost.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"
Mode = Literal["start", "content", "reasoning", "call"]


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str
    """A JSON object."""


Part = Content | Reasoning | Call


class OutputParser:
    """Parts of one completion.

    Args:
        tools: functions that may be called.
        mode: where the text begins, if the prompt's end has opened a tag already.
        bare: an answer that is a JSON object may be a call.
    """

    def __init__(
        self, *, tools: Collection[str] = (), mode: Mode = "start", bare: bool = False
    ) -> None:
        self.tools, self.mode, self.bare = tools, mode, bare
        self._held = ""
        self._between = False
        """Just after a tag, where line breaks belong to the tag."""

    def feed(self, text: str, *, final: bool) -> list[Part]:
        """Parts that the text completes; with `final`, all that is left."""
        self._held += text
        parts: list[Part] = []
        while True:
            if self._between and self._held:
                self._held = self._held.lstrip("\n")
                self._between = not self._held
            mode, held = self.mode, len(self._held)
            match mode:
                case "start":
                    self._start(final)
                case "content":
                    parts += self._upto(CALL if self.tools else None, "call", final)
                case "reasoning":
                    parts += self._upto(THOUGHT, "content", final)
                case "call":
                    parts += self._call(final)
            if self.mode == mode and len(self._held) == held:
                break
        return [p for p in parts if isinstance(p, Call) or p.text]

    def _start(self, final: bool) -> None:
        text = self._held.lstrip()
        if text.startswith(THINK):
            self.mode, self._held, self._between = "reasoning", text.removeprefix(THINK), True
        elif self.bare and self.tools and text.startswith("{"):
            self.mode = "call"
        elif final or not (THINK.startswith(text) or not text):
            self.mode = "content"

    def _upto(self, tag: str | None, then: Mode, final: bool) -> list[Part]:
        """The text before `tag`; what may begin the tag is held back."""
        kind = Reasoning if self.mode == "reasoning" else Content
        before, found, after = self._held.partition(tag) if tag else (self._held, "", "")
        if found:
            self.mode, self._held, self._between = then, after, then == "content"
        else:
            keep = 0 if final or not tag else _overlap(before, tag)
            before, self._held = before[: len(before) - keep], before[len(before) - keep :]
        return [kind(before)]

    def _call(self, final: bool) -> list[Part]:
        inside, found, after = self._held.partition(CALLED)
        if not found and not final:
            return []
        if not inside and not found:
            return []
        self.mode, self._held, self._between = "content", after, True
        calls = self._read(inside)
        if calls:
            return list(calls)
        return [Content(inside if self.bare else CALL + inside + found)]

    def _read(self, text: str) -> list[Call]:
        """Calls that the text holds; none where one of them is not sound."""
        try:
            value: Any = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = []
        for item in value if isinstance(value, list) else [value]:
            item = item.get("function", item) if isinstance(item, dict) else {}
            name = item.get("name") if isinstance(item, dict) else None
            arguments = item.get("arguments", item.get("parameters", {})) if name else None
            if name not in self.tools or not isinstance(arguments, dict):
                return []
            calls.append(Call(str(name), json.dumps(arguments, ensure_ascii=False)))
        return calls


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of the text that is a beginning of `tag`."""
    sizes = range(min(len(tag) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(tag[:size])), 0)
