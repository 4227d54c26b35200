"""Conversations as plain text: what a tokenizer for them is trained on."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from treadle.data.documents import Documents
from treadle.data.records import Text, record_text
from treadle.data.supervised import Conversations


class ChatTexts(Documents):
    """The first conversations of a supply, and the ones after them held out."""

    conversations: Conversations
    amount: int = Field(1000, ge=1)
    kept: int = Field(32, ge=1)
    """Conversations that are held out."""

    def training(self) -> Iterator[Text]:
        return self._texts(range(self.amount))

    def held_out(self) -> Iterator[Text]:
        return self._texts(range(self.amount, self.amount + self.kept))

    def _texts(self, numbers: range) -> Iterator[Text]:
        return (Text(record_text(self.conversations.conversation(i))) for i in numbers)
