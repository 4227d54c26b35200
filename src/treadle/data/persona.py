"""A persona: conversations that are told who speaks, and others where nobody is to.

    system: <who>     question     answer in the persona's voice         `share` of the time
                      question     plain answer                          else

Zhang et al. 2018, Persona-Chat, arXiv:1801.07243; a control text as in CTRL, Keskar et al.
2019, arXiv:1909.05858. Told, the model speaks so; not told, it answers as before: plain answers to
learn from keep what it knows.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.data.records import Chat, Message
from treadle.data.supervised import Conversations

CARD = Card(
    id="ft.style",
    paper="Zhang et al. 2018, Persona-Chat, arXiv:1801.07243; Keskar et al. 2019, CTRL",
    summary="Teaches a voice that a system message calls up, and leaves the plain voice as it was.",
    recipe="treadle run persona",
    oracle="tests/data/test_data_persona.py::test_told_and_untold_by_hand",
)


class Persona(Conversations):
    """Styled conversations under a system message, among plain ones without."""

    who: str = Field(min_length=1)
    """The system message."""
    styled: Conversations
    plain: Conversations
    share: float = Field(0.5, gt=0.0, le=1.0)
    """Of what is learned that is styled."""
    seed: int = 0

    def conversation(self, index: int) -> Chat:
        """Styled or plain, as the index falls; the same on every machine.

        Raises:
            ConfigError: a styled conversation has a system message of its own.
        """
        random = np.random.default_rng([self.seed, index])
        told = bool(random.random() < self.share)
        chosen = self.styled if told else self.plain
        count = chosen.count()
        chat = chosen.conversation(index if count is None else int(random.integers(count)))
        return told_who(chat, self.who) if told else chat

    def count(self) -> int | None:
        return None


class Voiced(Conversations):
    """Conversations whose answers begin and end in a voice."""

    conversations: Conversations
    openings: tuple[str, ...] = Field(min_length=1)
    closings: tuple[str, ...] = Field(min_length=1)

    def conversation(self, index: int) -> Chat:
        chat = self.conversations.conversation(index)
        *before, last = chat.messages
        opening = self.openings[index % len(self.openings)]
        closing = self.closings[index // len(self.openings) % len(self.closings)]
        said = f"{opening}\n{last.content}\n{closing}"
        return Chat((*before, Message(last.role, said, last.extra)), chat.tools)

    def count(self) -> int | None:
        return self.conversations.count()


def told_who(chat: Chat, who: str) -> Chat:
    """The conversation with `who` as its system message.

    Raises:
        ConfigError: it has one.
    """
    if chat.messages[0].role == "system":
        raise ConfigError(
            f"Persona: the conversation has a system message of its own "
            f"({chat.messages[0].content[:40]!r}); take that out, or leave out `who`"
        )
    return Chat((Message("system", who), *chat.messages), chat.tools)
