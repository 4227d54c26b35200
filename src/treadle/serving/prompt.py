"""From a chat request to the tokens that the model is to continue, and how to read its answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from treadle.serving.errors import ApiError
from treadle.serving.parse import CALL, THINK, Mode, OutputParser
from treadle.serving.protocol import CallOfTool, ChatBody, ChatMessage, NamedTool, Tool
from treadle.serving.sources import Passage, chosen, passages
from treadle.serving.sources import shown as told_of
from treadle.tokenizers.tokenizer import Tokenizer

TOOLS = """\
You can call these functions. Each line is one, as JSON:
{tools}
To call one, answer with its name and arguments, and nothing else:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""
"""What a model whose template knows no tools is told of them."""
SHOWN = 1500
"""Tokens of documents that a model sees at most: more make small ones slower, not better."""


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation."""

    text: str
    tools: tuple[str, ...] = ()
    """Functions that may be called."""
    mode: Mode = "start"
    bare: bool = False
    forced: Sequence[Tool] = field(default=())
    """One of these is called."""
    sources: Sequence[Passage] = field(default=())
    """Passages of the request's documents that the model sees."""

    def parser(self) -> OutputParser:
        return OutputParser(tools=self.tools, mode=self.mode, bare=self.bare)


def chat_prompt(tokenizer: Tokenizer, body: ChatBody, context: int) -> ChatPrompt:
    """The text for the model.

    Args:
        context: of the model, in tokens; documents get at most half of it.

    Raises:
        TreadleError: the tokenizer has no chat template, or it refuses the messages.
        ApiError: `tool_choice` names a function that is not in `tools`.
    """
    tools = body.tools or []
    forced = _forced(body, tools)
    if body.tool_choice == "none":
        tools = []
    source = tokenizer.chat.source
    messages = [_plain(m, source) for m in body.messages]
    shown = [tool.model_dump(exclude_none=True) for tool in tools]
    if tools and "tools" not in source:
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in shown)
        messages = _with_system(messages, TOOLS.format(tools=lines))
    seen, variables = _sources(tokenizer, body, context), dict(body.chat_template_kwargs or {})
    if seen and "documents" in source:
        variables["documents"] = [{"title": p.title, "text": p.text} for p in seen]
    elif seen:
        messages = _with_system(messages, told_of(seen))
    text = tokenizer.render(
        messages,
        tools=shown if "tools" in source else None,
        add_generation_prompt=True,
        variables=variables,
    )
    names = tuple(tool.function.name for tool in tools)
    marked = CALL in source or "tools" not in source
    if forced:
        # a model that marks its calls is put behind the mark, so that it writes what it knows
        opened = f"{CALL}\n" if marked else ""
        return ChatPrompt(text + opened, names, "call", not marked, forced, seen)
    thinking = text.rstrip().endswith(THINK)
    mode: Mode = "reasoning" if thinking else "start"
    return ChatPrompt(text, names, mode, not marked, sources=seen)


def _sources(tokenizer: Tokenizer, body: ChatBody, context: int) -> list[Passage]:
    given = passages([(document.title, document.text) for document in body.documents or ()])
    asked = next((m.text for m in reversed(body.messages) if m.role == "user"), "")
    return chosen(given, asked, lambda text: len(tokenizer.encode(text)), min(context // 2, SHOWN))


def _forced(body: ChatBody, tools: Sequence[Tool]) -> list[Tool]:
    choice = body.tool_choice
    if choice is None or choice in ("none", "auto"):
        return []
    if isinstance(choice, NamedTool):
        found = [t for t in tools if t.function.name == choice.function.name]
        if not found:
            message = f"`tool_choice` names `{choice.function.name}`, which is not in `tools`"
            raise ApiError(400, message, param="tool_choice")
        return found
    if not tools:
        raise ApiError(
            400, "`tool_choice` requires a call, but no `tools` are given", param="tools"
        )
    return list(tools)


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """JSON Schema of a call of one of the functions."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _plain(message: ChatMessage, source: str) -> dict[str, Any]:
    """A message as templates know it; what this one does not show is spelled out as text."""
    plain: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.role == "developer" and "developer" not in source:
        plain["role"] = "system"
    if message.name:
        plain["name"] = message.name
    if message.tool_calls:
        if "tool_calls" in source:
            plain["tool_calls"] = [_call(call) for call in message.tool_calls]
        else:
            called = [json.dumps(_call(call)["function"]) for call in message.tool_calls]
            spelled = "".join(f"\n<tool_call>\n{text}\n</tool_call>" for text in called)
            plain["content"] = (message.text + spelled).lstrip("\n")
    if message.role == "tool":
        if "tool_calls" in source or "tool_response" in source:
            plain["tool_call_id"] = message.tool_call_id or ""
        else:
            plain["role"] = "user"
            plain["content"] = f"<tool_response>\n{message.text}\n</tool_response>"
    return plain


def _call(call: CallOfTool) -> dict[str, Any]:
    """Templates show the arguments as JSON, so they want them parsed."""
    try:
        arguments: Any = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    first, *rest = messages
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
