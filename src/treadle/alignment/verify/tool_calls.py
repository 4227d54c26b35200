"""Tool calls: the right functions with the right arguments, and no others.

The problem's answer is a JSON list of calls, `[{"name": "f", "arguments": {"x": 1}}]`; an empty
list asks for no call. A completion writes each call as JSON in `<tool_call>` tags (Hermes, Qwen,
SmolLM). The order does not count.
"""

from __future__ import annotations

import json
import re
from typing import Any

from treadle.core.errors import TreadleError
from treadle.data.records import Problem

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def marks(problem: Problem, completion: str) -> float:
    """1 where all calls are as asked, else half the share of names that are right.

    Raises:
        TreadleError: the problem's answer is no list of calls.
    """
    wanted = _wanted(problem.answer)
    try:
        given = tool_calls(completion)
    except ValueError:
        return 0.0
    if sorted(map(_canonical, given)) == sorted(map(_canonical, wanted)):
        return 1.0
    if not wanted or not given:
        return 0.0
    names = [call["name"] for call in wanted]
    right = 0
    for call in given:
        if call["name"] in names:
            names.remove(call["name"])
            right += 1
    return 0.5 * right / max(len(wanted), len(given))


def tool_calls(completion: str) -> list[dict[str, Any]]:
    """The calls in a completion. Raises ValueError where one is malformed."""
    try:
        return [_call(json.loads(text)) for text in _TAGGED.findall(completion)]
    except RecursionError:
        raise ValueError("too many brackets in brackets") from None


def _call(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("a call is an object with `name` and `arguments`")
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError("`arguments` is no object")
    return {"name": value["name"], "arguments": arguments}


def _wanted(answer: str) -> list[dict[str, Any]]:
    try:
        return [_call(call) for call in json.loads(answer)]
    except (ValueError, TypeError) as error:
        raise TreadleError(
            f"a problem's answer is no list of tool calls ({error}); write "
            '[{"name": "f", "arguments": {}}]'
        ) from None


def _canonical(call: dict[str, Any]) -> str:
    return json.dumps(call, sort_keys=True)
