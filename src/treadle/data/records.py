"""The one record schema: what every reader, filter, source and evaluation speaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else the chat template may want: `tool_calls`, `name`, `reasoning_content`."""

    def plain(self) -> dict[str, Any]:
        """As chat templates and the OpenAI protocol have it."""
        return {"role": self.role, "content": self.content, **self.extra}


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation to learn from."""

    messages: Messages
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, the first better."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None
    """How much better, where the raters said so."""
    confidence: float | None = None
    """Probability that the first is better, where it is known."""


@dataclass(frozen=True)
class Labelled:
    """An answer that someone called good or bad (KTO)."""

    prompt: Messages
    completion: Messages
    good: bool


@dataclass(frozen=True)
class Problem:
    """A prompt whose answers a verifier can score."""

    prompt: Messages
    answer: str
    verifier: str
    """Name of what scores answers, such as a reasoning-gym family."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Classified:
    """A text, or a pair of texts, and its label by name or number."""

    first: str
    second: str | None
    label: str | int


@dataclass(frozen=True)
class Tagged:
    """Words, and a label for each."""

    words: tuple[str, ...]
    tags: tuple[str | int, ...]


@dataclass(frozen=True)
class Rated:
    """A text, or a pair of texts, and a number."""

    first: str
    second: str | None
    value: float


@dataclass(frozen=True)
class Matched:
    """A text, one that belongs to it, and some that do not though they look it."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()


Record = Text | Chat | Preference | Labelled | Problem | Classified | Tagged | Rated | Matched


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def record_text(record: Record) -> str:
    """All that is said in a record, for hashing and for finding duplicates."""
    match record:
        case Text(text):
            return text
        case Chat(messages):
            return _said(messages)
        case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
            return _said((*prompt, *chosen, *rejected))
        case Labelled(prompt, completion):
            return _said((*prompt, *completion))
        case Problem(prompt, answer):
            return f"{_said(prompt)}\n{answer}"
        case Classified(first, second) | Rated(first, second):
            return first if second is None else f"{first}\n{second}"
        case Tagged(words):
            return " ".join(words)
        case Matched(query, positive):
            return f"{query}\n{positive}"


def _said(messages: Messages) -> str:
    return "\n".join(message.content for message in messages)
