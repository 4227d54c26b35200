"""The row formats of the field, each to the one record schema.

| format | a row |
|---|---|
| TextFormat | `{text}` |
| AlpacaFormat | `{instruction, input, output}` (`response` for `output`; `system`, `history`) |
| MessagesFormat | `{messages: [{role, content}]}`, OpenAI's, with `tools` |
| ShareGPTFormat | `{conversations: [{from, value}]}`, with tool calls and `tools` |
| FlanFormat | `{inputs, targets}` |
| PreferenceFormat | `{prompt, chosen, rejected}`: texts or messages |
| TranscriptFormat | `{chosen, rejected}`: "\\n\\nHuman: ... \\n\\nAssistant: ..." (HH-RLHF) |
| ShareGPTPreferenceFormat | `{conversations, chosen: {from, value}, rejected}` |
| KTOFormat | `{prompt, completion, label}` |
| LabelledMessagesFormat | `{messages, label}` |
| ProblemFormat | `{question, answer}` and the name of a verifier |
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import FileFormatError
from treadle.data.fields import (
    conversation,
    flag,
    messages_of,
    optional_number,
    optional_text,
    said_by,
    tagged,
    text,
    tools_of,
    turns_or_text,
)
from treadle.data.records import (
    Chat,
    Labelled,
    Message,
    Messages,
    Preference,
    Problem,
    Record,
    Text,
)

CARD = Card(
    id="data.formats",
    paper="Taori et al. 2023 (Alpaca); Wei et al. 2022 (FLAN); Bai et al. 2022 (HH-RLHF)",
    summary="Reads the instruction, preference and problem formats of the field as one schema.",
    recipe="treadle run quickstart "
    "steps.1.source.conversations='{kind: ConversationFiles, path: chats.jsonl}'",
    oracle="tests/tokenizers/test_tokenizers_chat.py::test_marked_turns_match_transformers",
)

Row = Mapping[str, Any]


class Format(Config):
    """A shape: what a row of a data set means."""

    @abstractmethod
    def __call__(self, row: Row) -> Record:
        """The record. Raises FileFormatError with the key that is wrong."""


class TextFormat(Format):
    """A document."""

    key: str = "text"

    def __call__(self, row: Row) -> Text:
        return Text(text(row, self.key))


class AlpacaFormat(Format):
    """An instruction, perhaps with input, and its output."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    system: str = "system"
    history: str = "history"

    def __call__(self, row: Row) -> Chat:
        asked = text(row, self.instruction)
        more = optional_text(row, self.input)
        past = row.get(self.history) or []
        if not all(isinstance(p, list | tuple) and len(p) == 2 for p in past):
            raise FileFormatError(f"key `{self.history}`: expected pairs of question and answer")
        return Chat(
            (
                *said_by("system", optional_text(row, self.system)),
                *(m for q, a in past for m in (*said_by("user", q), *said_by("assistant", a))),
                Message("user", f"{asked}\n\n{more}" if more else asked),
                Message("assistant", text(row, self.output)),
            )
        )


class MessagesFormat(Format):
    """OpenAI's messages."""

    messages: str = "messages"
    tools: str = "tools"

    def __call__(self, row: Row) -> Chat:
        return Chat(messages_of(row, self.messages), tools_of(row, self.tools))


class ShareGPTFormat(Format):
    """Turns tagged human, gpt, system, function_call, observation."""

    conversations: str = "conversations"
    system: str = "system"
    tools: str = "tools"

    def __call__(self, row: Row) -> Chat:
        system = said_by("system", optional_text(row, self.system))
        return Chat((*system, *conversation(row, self.conversations)), tools_of(row, self.tools))


class FlanFormat(Format):
    """An input and a target."""

    inputs: str = "inputs"
    targets: str = "targets"

    def __call__(self, row: Row) -> Chat:
        asked, told = text(row, self.inputs), text(row, self.targets)
        return Chat((Message("user", asked), Message("assistant", told)))


class PreferenceFormat(Format):
    """A prompt and two answers; each a text or messages.

    Answers may repeat the prompt as messages, and then need no `prompt`.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str = "system"
    margin: str = "margin"
    """Key of how much better the chosen answer is, where rows have one."""
    confidence: str = "confidence"
    """Key of the probability that it is better, where rows have one."""

    def __call__(self, row: Row) -> Preference:
        chosen = turns_or_text(row, self.chosen, role="assistant")
        rejected = turns_or_text(row, self.rejected, role="assistant")
        margin = optional_number(row, self.margin)
        confidence = optional_number(row, self.confidence)
        if confidence is not None and not 0 <= confidence <= 1:
            raise FileFormatError(f"key `{self.confidence}`: {confidence} is no probability")
        if chosen[0].role != "assistant" or rejected[0].role != "assistant":
            parted = _parted(chosen, rejected, self.chosen)
            return replace(parted, margin=margin, confidence=confidence)
        system = said_by("system", optional_text(row, self.system))
        prompt = (*system, *turns_or_text(row, self.prompt, role="user"))
        return Preference(prompt, chosen, rejected, margin, confidence)


class TranscriptFormat(Format):
    """Two transcripts of Human and Assistant that share their beginning."""

    chosen: str = "chosen"
    rejected: str = "rejected"

    def __call__(self, row: Row) -> Preference:
        chosen, rejected = _transcript(row, self.chosen), _transcript(row, self.rejected)
        return _parted(chosen, rejected, self.chosen)


class ShareGPTPreferenceFormat(Format):
    """ShareGPT turns and two answers, each one turn."""

    conversations: str = "conversations"
    chosen: str = "chosen"
    rejected: str = "rejected"

    def __call__(self, row: Row) -> Preference:
        return Preference(
            conversation(row, self.conversations),
            (tagged(row.get(self.chosen), self.chosen),),
            (tagged(row.get(self.rejected), self.rejected),),
        )


class KTOFormat(Format):
    """A prompt, a completion, and whether it is good."""

    prompt: str = "prompt"
    completion: str = "completion"
    label: str = "label"

    def __call__(self, row: Row) -> Labelled:
        return Labelled(
            turns_or_text(row, self.prompt, role="user"),
            turns_or_text(row, self.completion, role="assistant"),
            flag(row, self.label),
        )


class LabelledMessagesFormat(Format):
    """Messages whose last, the assistant's, is good or bad."""

    messages: str = "messages"
    label: str = "label"

    def __call__(self, row: Row) -> Labelled:
        messages = messages_of(row, self.messages)
        if messages[-1].role != "assistant":
            raise FileFormatError(f"key `{self.messages}`: the last message is not the assistant's")
        return Labelled(messages[:-1], messages[-1:], flag(row, self.label))


class ProblemFormat(Format):
    """A question and an answer that can be checked."""

    prompt: str = "question"
    answer: str = "answer"
    verifier: str = "number"
    """Name of what checks answers."""
    answer_after: str = ""
    """The answer proper is what follows this mark (GSM8K: `####`)."""
    system: str = ""
    """A system message for every problem, such as how to write the answer."""

    def __call__(self, row: Row) -> Problem:
        answer = text(row, self.answer)
        if self.answer_after:
            _, mark, answer = answer.rpartition(self.answer_after)
            if not mark:
                raise FileFormatError(f"key `{self.answer}`: no `{self.answer_after}` in it")
        rest = {k: v for k, v in row.items() if k not in (self.prompt, self.answer)}
        prompt = (*said_by("system", self.system), *turns_or_text(row, self.prompt, role="user"))
        return Problem(prompt, answer.strip(), self.verifier, rest)


def _parted(chosen: Messages, rejected: Messages, key: str) -> Preference:
    """Two conversations to their common prompt and what follows it."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1].role == "assistant":
        shared -= 1
    after = (chosen[shared:], rejected[shared:])
    if not shared or not all(turns and turns[0].role == "assistant" for turns in after):
        raise FileFormatError(
            f"key `{key}`: the two conversations do not part at an answer of the assistant"
        )
    return Preference(chosen[:shared], *after)


def _transcript(row: Row, key: str) -> Messages:
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text(row, key))
    if parts[0].strip() or len(parts) < 3:
        raise FileFormatError(f"key `{key}`: expected a transcript that begins with `Human:`")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(roles[who], said.strip())
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    )
