"""Chat templates: Jinja in a sandbox, with the functions that Hugging Face templates use.

Templates come with model weights, so they are foreign programs. The sandbox keeps them from the
interpreter; a budget of loop steps, seconds and characters keeps them from running away.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, final

from jinja2 import TemplateSyntaxError
from jinja2.environment import Template

from treadle.core.errors import TreadleError
from treadle.tokenizers.sandbox import (
    BUDGET,
    CLOSE,
    OPEN,
    Budget,
    Limits,
    RunawayError,
    Sandbox,
    strftime_at,
)

Message = Mapping[str, Any]
"""A chat message as JSON: `role`, `content`, and what the template knows besides."""

CHATML = """\
{% if tools %}
{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}
{%- if message['tool_calls'] %}
{%- for call in message['tool_calls'] %}
{{ '<tool_call>' + call['function'] | tojson + '</tool_call>' }}
{%- endfor %}
{%- endif %}
{{ '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """\
{{ bos_token }}
{%- for message in messages %}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Rendered:
    """Text and the character spans that the template marks with `{% generation %}`."""

    text: str
    spans: tuple[tuple[int, int], ...]


@final
class ChatTemplate:
    """One template and the special tokens that it may name (`bos_token`, `eos_token`, ...)."""

    def __init__(
        self, source: str, *, special: Mapping[str, str] | None = None, limits: Limits | None = None
    ) -> None:
        self.source = source
        self.special = dict(special or {})
        self.limits = limits or Limits()

    @property
    def marks_generation(self) -> bool:
        """Whether the template says itself what the assistant wrote."""
        return bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The text that the model sees.

        Args:
            variables: further names for the template, such as `enable_thinking`.
            now: the time that `strftime_now` tells.

        Raises:
            TreadleError: the template is not valid or refuses these messages; names its line.
        """
        return self.render_marked(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
            now=now,
        ).text

    def render_marked(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> Rendered:
        """Like `render`, with the spans of generation tags."""
        moment = now or datetime.now()
        names = {
            **self.special,
            **_plain(dict(variables or {}), "variables"),
            "messages": _plain(list(messages), "messages"),
            "tools": _plain(list(tools), "tools") if tools else None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": strftime_at(moment),
            BUDGET: Budget(self.limits),
        }
        template = self._compiled
        parts: list[str] = []
        size = 0
        try:
            for part in template.generate(names):
                size += len(part)
                if size > self.limits.characters:
                    raise RunawayError(f"writes more than {self.limits.characters} characters")
                parts.append(part)
        except Exception as error:  # a foreign program may fail in any way
            raise TreadleError(f"chat template{_line(error)}: {error}") from None
        return _unmark("".join(parts))

    @cached_property
    def _compiled(self) -> Template:
        try:
            return Sandbox().from_string(self.source)
        except TemplateSyntaxError as error:
            raise TreadleError(f"chat template, line {error.lineno}: {error.message}") from None


def _plain(value: Any, name: str) -> Any:
    """Only JSON values enter a template: no object with methods that a sandbox does not know."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise TreadleError(f"chat template: `{name}` must be JSON values: {error}") from None


def _unmark(text: str) -> Rendered:
    spans: list[tuple[int, int]] = []
    clean: list[str] = []
    length = start = 0
    for part in re.split(f"({OPEN}|{CLOSE})", text):
        if part == OPEN:
            start = length
        elif part == CLOSE:
            spans.append((start, length))
        else:
            clean.append(part)
            length += len(part)
    return Rendered("".join(clean), tuple(spans))


def _line(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    line = next((f.lineno for f in reversed(frames) if f.filename == "<template>"), None)
    return f", line {line}" if line else ""
