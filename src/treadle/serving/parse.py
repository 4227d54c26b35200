"""What a model writes, told apart as it comes: reasoning, content, calls of tools.

Reasoning stands in `<think>...</think>` at the start; a call in `<tool_call>JSON</tool_call>`, one
object `{"name": ..., "arguments": {...}}` or a list of them, or as the whole answer for models
that mark it with nothing (Llama 3). What looks like a call and is none is content: nothing that
the model wrote is lost. Once a known function's arguments begin, they come in pieces, as they are
written; whether they are whole and valid is for the caller to see.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""A call up to its arguments, in the order in which models write it."""
Mode = Literal["start", "content", "reasoning", "call", "arguments", "close"]


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Call:
    """A call begins."""

    name: str
    arguments: str = ""
    """A JSON object, or its beginning."""


@dataclass(frozen=True)
class Arguments:
    """More of the last call's."""

    text: str


Part = Content | Reasoning | Call | Arguments


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
        self._braces = _Braces()
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
                case "arguments":
                    parts += self._arguments(final)
                case "close":
                    parts += self._close(final)
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
        head = HEAD.match(self._held)
        if head and head[1] in self.tools:
            self.mode, self._held, self._braces = "arguments", self._held[head.end() :], _Braces()
            return [Call(head[1])]
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

    def _arguments(self, final: bool) -> list[Part]:
        text, found, _ = ("", "", "") if self.bare else self._held.partition(CALLED)
        if not found:
            keep = 0 if final or self.bare else _overlap(self._held, CALLED)
            text = self._held[: len(self._held) - keep]
        size = self._braces.feed(text)
        if self._braces.closed or found:
            self.mode = "close"
        self._held = self._held[size:]
        return [Arguments(text[:size])]

    def _close(self, final: bool) -> list[Part]:
        """What stands behind the arguments is part of the call up to its end."""
        inside, found, after = self._held.partition("}" if self.bare else CALLED)
        if not found and not final:
            return []
        self.mode, self._held, self._between = "content", after, True
        return [] if found else [Content(inside.strip().removeprefix("}"))]

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


class _Braces:
    """How far a JSON object goes, while its text comes."""

    def __init__(self) -> None:
        self.depth, self.quoted, self.escaped, self.closed = 0, False, False, False

    def feed(self, text: str) -> int:
        """Characters that belong to the object."""
        for place, char in enumerate(text, 1):
            if self.escaped:
                self.escaped = False
            elif self.quoted:
                self.quoted, self.escaped = char != '"', char == "\\"
            elif char in "{[":
                self.depth += 1
            elif char in "}]":
                self.depth -= 1
                if not self.depth:
                    self.closed = True
                    return place
            else:
                self.quoted = char == '"'
        return len(text)


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of the text that is a beginning of `tag`."""
    sizes = range(min(len(tag) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(tag[:size])), 0)
