"""Replay: among new conversations some of those that were learned before.

Ratcliff 1990; Rolnick et al. 2019, Experience Replay, arXiv:1811.11682. Only a few old examples are
kept, and each new epoch sees them again. The old ones come at regular intervals, in the place of
none of the new: of these every epoch sees all, in an order of its own.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.data.order import Order, Place
from treadle.data.records import Chat
from treadle.data.supervised import Conversations

CARD = Card(
    id="ft.continual.replay",
    paper="Ratcliff 1990; Rolnick et al. 2019, arXiv:1811.11682",
    summary="Keeps a few examples of earlier tasks and mixes them into the new one.",
    recipe="treadle run continual",
    oracle="tests/data/test_data_replay.py::test_share_and_buffer_are_as_asked",
)


class Replayed(Conversations):
    """New conversations, and now and then one out of a small memory of old ones."""

    new: Conversations
    old: tuple[Conversations, ...] = Field(min_length=1)
    """One for each earlier task."""
    kept: int = Field(64, ge=1)
    """Conversations of each earlier task that are remembered."""
    share: float = Field(0.25, gt=0.0, lt=1.0)
    """Of what is learned that is old."""
    seed: int = 0

    def conversation(self, index: int) -> Chat:
        """The next new one, or an old one between them.

        Raises:
            ConfigError: an earlier task has fewer conversations than are to be kept.
        """
        before, after = (math.floor(i * (1 - self.share)) for i in (index, index + 1))
        if after > before:
            return _shuffled(self.new, before, self.seed)
        random = np.random.default_rng([self.seed, index])
        old = self.old[int(random.integers(len(self.old)))]
        count = old.count()
        if count is not None and count < self.kept:
            raise ConfigError(
                f"Replayed: {self.kept} conversations of each earlier task are to be kept, but "
                f"one has only {count}; lower `kept`"
            )
        return _shuffled(old, int(random.integers(self.kept)), self.seed)

    def count(self) -> int | None:
        return None


def _shuffled(conversations: Conversations, number: int, seed: int) -> Chat:
    """What comes at a place, in an order that each epoch has anew."""
    count = conversations.count()
    if count is not None:
        number = Order(count, seed).index(Place(*divmod(number, count)))
    return conversations.conversation(number)
