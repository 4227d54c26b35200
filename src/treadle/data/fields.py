"""Reading the fields of a row, with the key named where one is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from treadle.core.errors import FileFormatError, did_you_mean
from treadle.data.records import Message, Messages

Row = Mapping[str, Any]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
"""ShareGPT's tags; `function_call` is an assistant turn of its own kind."""


def text(row: Row, key: str) -> str:
    value = _present(row, key)
    if not isinstance(value, str):
        raise FileFormatError(f"key `{key}`: expected text, found {type(value).__name__}")
    return value


def optional_text(row: Row, key: str) -> str:
    """The text, or nothing where the key is absent or null."""
    return text(row, key) if row.get(key) is not None else ""


def flag(row: Row, key: str) -> bool:
    value = _present(row, key)
    if not isinstance(value, bool) and value not in (0, 1):
        raise FileFormatError(f"key `{key}`: expected true or false, found {value!r}")
    return bool(value)


def optional_number(row: Row, key: str) -> float | None:
    """The number, or None where the key is absent or null."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FileFormatError(f"key `{key}`: expected a finite number, found {value!r}")
    return float(value)


def said_by(role: str, content: str) -> Messages:
    """One message, or none if there is nothing to say."""
    return (Message(role, content),) if content else ()


def turns_or_text(row: Row, key: str, *, role: str) -> Messages:
    """Messages, or a text that `role` says."""
    value = _present(row, key)
    if isinstance(value, str):
        return (Message(role, value),)
    return messages_of(row, key)


def messages_of(row: Row, key: str) -> Messages:
    """A list of OpenAI messages; parts of text are joined, nulls dropped."""
    value = _present(row, key)
    if not isinstance(value, list | tuple) or not value:
        raise FileFormatError(f"key `{key}`: expected a list of messages, found {_kind(value)}")
    return tuple(_message(m, f"{key}[{i}]") for i, m in enumerate(value))


def _message(value: Any, key: str) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise FileFormatError(f"key `{key}`: expected a message with `role` and `content`")
    message = {k: v for k, v in value.items() if v is not None}
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list | tuple):
        if not all(isinstance(part, Mapping) and "text" in part for part in content):
            raise FileFormatError(f"key `{key}`: content has parts that are not text")
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(content, str):
        raise FileFormatError(f"key `{key}`: `content` should be text, found {_kind(content)}")
    extra = {k: v for k, v in message.items() if k not in ("role", "content")}
    return Message(message["role"], content, extra)


def conversation(row: Row, key: str) -> Messages:
    """A list of ShareGPT turns."""
    value = _present(row, key)
    if not isinstance(value, list | tuple) or not value:
        raise FileFormatError(f"key `{key}`: expected a list of turns, found {_kind(value)}")
    return tuple(tagged(turn, f"{key}[{i}]") for i, turn in enumerate(value))


def tagged(turn: Any, key: str) -> Message:
    """One ShareGPT turn."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise FileFormatError(f"key `{key}`: expected a turn with `from` and `value`")
    tag, said = str(turn.get("from")), turn["value"]
    if tag == "function_call":
        return Message("assistant", "", {"tool_calls": _calls(said, key)})
    if tag not in ROLES:
        raise FileFormatError(f"key `{key}`: unknown tag `{tag}`{did_you_mean(tag, ROLES)}")
    return Message(ROLES[tag], said)


def _calls(said: str, key: str) -> list[dict[str, Any]]:
    calls = _json(said, key)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise FileFormatError(f"key `{key}`: a function call needs `name` and `arguments`")
    return [{"type": "function", "function": call} for call in calls]


def tools_of(row: Row, key: str) -> tuple[Mapping[str, Any], ...]:
    """Tool descriptions, a list or its JSON text; none where the key is absent or empty."""
    value = row.get(key) or []
    tools = _json(value, key) if isinstance(value, str) else value
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        raise FileFormatError(f"key `{key}`: expected a list of tools, found {_kind(tools)}")
    return tuple(t if "function" in t else {"type": "function", "function": t} for t in tools)


def _json(value: str, key: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise FileFormatError(f"key `{key}`: not valid JSON: {error}") from None


def _present(row: Row, key: str) -> Any:
    if row.get(key) is None:
        state = "null" if key in row else "missing"
        hint = did_you_mean(key, (str(k) for k in row)) if state == "missing" else ""
        raise FileFormatError(f"key `{key}` is {state}{hint}")
    return row[key]


def _kind(value: Any) -> str:
    return "an empty list" if value in ([], ()) else type(value).__name__
