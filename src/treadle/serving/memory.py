"""Conversations that clients go on with by the id of their last response."""

from __future__ import annotations

from collections import OrderedDict

from treadle.serving.errors import ApiError
from treadle.serving.protocol import ChatMessage


class Conversations:
    """Kept in memory only, the least recently used dropped first.

    Args:
        characters: of all conversations together; one that is longer by itself is not kept.
    """

    def __init__(self, characters: int) -> None:
        self.characters, self.size = characters, 0
        self._kept: OrderedDict[str, list[ChatMessage]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, id: str, messages: list[ChatMessage]) -> None:
        self._kept[id] = messages
        self.size += _size(messages)
        while self.size > self.characters:
            _, dropped = self._kept.popitem(last=False)
            self.size -= _size(dropped)

    def find(self, id: str) -> list[ChatMessage]:
        """What was said up to a response and in it.

        Raises:
            ApiError: there is no such response any more.
        """
        if id not in self._kept:
            raise ApiError(
                404,
                f"no response `{id[:100]}` is remembered: it was never given, not stored, or so "
                "much has been said since; send the conversation as `input`",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        self._kept.move_to_end(id)
        return self._kept[id]


def _size(messages: list[ChatMessage]) -> int:
    """Characters, and something for each message."""
    size = 0
    for message in messages:
        calls = message.tool_calls or ()
        size += 100 + len(message.text)
        size += sum(100 + len(call.function.name + call.function.arguments) for call in calls)
    return size
