"""Conversations to tokens, and which of them the assistant wrote.

A template may say so itself (`{% generation %}`). For the others, each assistant turn is found by
rendering the conversation up to it, once with the generation prompt and once with the turn: what
the second has more is the turn. That is right only where both are beginnings of the whole text,
which is checked.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.tokenizers.template import CHATML, LLAMA3, Message
from treadle.tokenizers.tokenizer import Encoded, Tokenizer

Span = tuple[int, int]


@dataclass(frozen=True)
class ChatTokens:
    """A conversation as tokens."""

    ids: list[int]
    mask: list[bool]
    """True where the assistant wrote the token, its end-of-turn token included."""


class Turns(Config):
    """A shape: which assistant turns are learned."""

    @abstractmethod
    def __call__(self, turns: Sequence[int]) -> tuple[int, ...]:
        """Of the indices of assistant messages, those that count."""


class EveryTurn(Turns):
    """All that the assistant says."""

    def __call__(self, turns: Sequence[int]) -> tuple[int, ...]:
        return tuple(turns)


class LastTurn(Turns):
    """Only the last assistant turn: for templates that rewrite earlier ones (Qwen 3)."""

    def __call__(self, turns: Sequence[int]) -> tuple[int, ...]:
        return tuple(turns[-1:])


def encode_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Tokens of a conversation that the model is to continue."""
    _check_shown(tokenizer, messages, tools)
    text = tokenizer.render(messages, tools=tools, add_generation_prompt=True, variables=variables)
    return tokenizer.encode(text)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    turns: Turns | None = None,
    variables: Mapping[str, Any] | None = None,
) -> ChatTokens:
    """Tokens of a conversation, with the assistant's marked.

    Raises:
        TreadleError: the template refuses the messages, or does not show where turns begin.
    """
    turns = turns or EveryTurn()
    _check_shown(tokenizer, messages, tools)
    if tokenizer.chat.marks_generation:
        rendered = tokenizer.chat.render_marked(messages, tools=tools, variables=variables)
        text = rendered.text
        spans = [rendered.spans[i] for i in turns(range(len(rendered.spans)))]
    else:
        text, spans = _found_turns(tokenizer, messages, tools, turns, variables)
    encoded = tokenizer.encode_spans(text)
    return ChatTokens(encoded.ids, _inside(encoded, spans))


def default_template(tokenizer: Tokenizer) -> str:
    """ChatML or Llama 3's template, whichever the vocabulary has the tokens for.

    Raises:
        TreadleError: neither.
    """
    if _knows(tokenizer, "<|im_start|>", "<|im_end|>"):
        return CHATML
    if _knows(tokenizer, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
        return LLAMA3
    raise TreadleError(
        "the vocabulary has no turn tokens (<|im_start|>, <|im_end|>): train the tokenizer with "
        "them in `special_tokens`, or give a chat template of your own"
    )


def _check_shown(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> None:
    """A template that knows nothing of tools would leave them out without a word."""
    source = tokenizer.chat.source
    called = any(m.get("tool_calls") for m in messages)
    for name, used in (("tools", bool(tools)), ("tool_calls", called)):
        if used and name not in source:
            raise TreadleError(
                f"the conversation has `{name}`, which the chat template does not show; use one "
                "that does, such as template.CHATML (tokenizer.with_template(CHATML))"
            )


def _knows(tokenizer: Tokenizer, *tokens: str) -> bool:
    return all(tokenizer.token_id(token) is not None for token in tokens)


def _found_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    turns: Turns,
    variables: Mapping[str, Any] | None,
) -> tuple[str, list[Span]]:
    now = datetime.now()

    def render(count: int, prompt: bool) -> str:
        return tokenizer.chat.render(
            messages[:count],
            tools=tools,
            add_generation_prompt=prompt,
            variables=variables,
            now=now,
        )

    text = render(len(messages), False)
    spans = []
    for index in turns([i for i, m in enumerate(messages) if m["role"] == "assistant"]):
        before, after = render(index, True), render(index + 1, False)
        for part, what in ((before, "with the generation prompt"), (after, "with its reply")):
            if not text.startswith(part):
                raise TreadleError(
                    f"chat template: the text up to message {index} {what} is not a beginning of "
                    f"the whole text{_difference(part, text)}, so the assistant's turns cannot be "
                    "told. Put {% generation %}...{% endgeneration %} around them in the "
                    "template, or learn only the last turn: turns=LastTurn()"
                )
        spans.append((len(before), _end_of_turn(tokenizer, text, len(before), len(after))))
    return text, spans


def _difference(part: str, text: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), len(text))
    return f" (`{part[at : at + 20]}` against `{text[at : at + 20]}`)"


def _end_of_turn(tokenizer: Tokenizer, text: str, start: int, end: int) -> int:
    """The end of the token that ends the turn; what a template puts after it nobody generates."""
    stops = (tokenizer.spelling(i) for i in tokenizer.stop_ids)
    found = (text.rfind(stop, start, end) + len(stop) for stop in stops if stop in text[start:end])
    return max(found, default=end)


def _inside(encoded: Encoded, spans: Sequence[Span]) -> list[bool]:
    """Which tokens share a character with a span."""
    first = np.asarray(encoded.starts, dtype=np.int64)
    last = np.asarray(encoded.ends, dtype=np.int64)
    mask = np.zeros(len(first), dtype=bool)
    for start, end in spans:
        mask |= (first < end) & (last > start)
    return [bool(inside) for inside in mask]
