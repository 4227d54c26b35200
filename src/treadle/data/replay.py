"""Replay: among new conversations some of those that were learned before.

Ratcliff 1990; Rolnick et al. 2019, Experience Replay, arXiv:1811.11682. Only a few old examples are
kept, and each new epoch sees them again.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
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
        """New number `index`, or an old one in its place.

        Raises:
            ConfigError: an earlier task has fewer conversations than are to be kept.
        """
        random = np.random.default_rng([self.seed, index])
        if random.random() >= self.share:
            count = self.new.count()
            return self.new.conversation(index if count is None else index % count)
        old = self.old[int(random.integers(len(self.old)))]
        count = old.count()
        if count is not None and count < self.kept:
            raise ConfigError(
                f"Replayed: {self.kept} conversations of each earlier task are to be kept, but "
                f"one has only {count}; lower `kept`"
            )
        return old.conversation(int(random.integers(self.kept)))

    def count(self) -> int | None:
        return None
