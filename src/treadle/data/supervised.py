"""Supervised fine-tuning: conversations of which the assistant's tokens are learned.

Conversations of unequal length lie one after another in flat micro-batches; nothing is padded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import Field

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.batch import Piece, assemble, within_budget
from treadle.data.records import Chat
from treadle.data.source import Env, Source, Stream, Work
from treadle.tokenizers.chat import EveryTurn, Turns, encode_chat
from treadle.tokenizers.tokenizer import Tokenizer

CARD = Card(
    id="ft.full",
    paper="Wei et al. 2022, FLAN, arXiv:2109.01652; Ouyang et al. 2022, arXiv:2203.02155",
    summary="Supervised instruction tuning, packed, with the loss on assistant turns only.",
    recipe="treadle run quickstart",
    oracle="tests/data/test_data_supervised.py::test_loss_matches_trl",
)


class Conversations(Config):
    """A shape: a reproducible supply of conversations."""

    @abstractmethod
    def conversation(self, index: int) -> Chat:
        """Conversation number `index`, from 0."""

    @abstractmethod
    def count(self) -> int | None:
        """How many there are; None where they never end."""


class Supervised(Source):
    """Conversations in a shuffled order that a seed fixes."""

    conversations: Conversations
    per_step: int = Field(32, ge=1)
    """Conversations in an optimiser step, over all ranks."""
    tokens: int = Field(2048, ge=8)
    """Most tokens in a micro-batch."""
    longest: int = Field(1024, ge=2)
    """Conversations are cut to this many tokens."""
    turns: Turns = EveryTurn()
    """Which turns of the assistant are learned."""

    def open(self, env: Env) -> SupervisedStream:
        return SupervisedStream(self, env)


class SupervisedStream(Stream):
    """Its state is how many conversations have been taken."""

    def __init__(self, config: Supervised, env: Env) -> None:
        self.config, self.env = config, env
        self.taken = 0
        self.empty = 0
        self.order = lru_cache(maxsize=2)(self._permutation)

    def __next__(self) -> Work:
        numbers = range(self.taken, self.taken + self.config.per_step)
        self.taken += self.config.per_step
        mine = [self._piece(n) for n in list(numbers)[self.env.rank :: self.env.world]]
        pieces = [p for p in mine if any(p.learn)]
        self.empty += len(mine) - len(pieces)
        if not pieces:
            raise TreadleError(
                f"none of {len(mine)} conversations has an assistant token within its first "
                f"{self.config.longest} tokens: raise `longest`, or shorten the prompts"
            )
        runs = within_budget([len(p.tokens) for p in pieces], self.config.tokens)
        batches = tuple(assemble([pieces[i] for i in run]) for run in runs)
        return Work(batches, {"conversations_without_answer": float(self.empty)})

    def _piece(self, number: int) -> Piece:
        count = self.config.conversations.count()
        if count is not None:
            epoch, place = divmod(number, count)
            number = int(self.order(epoch)[place])
        chat = self.config.conversations.conversation(number)
        return piece_of(chat, self.config, self.env.tokenizer)

    def _permutation(self, epoch: int) -> np.ndarray:
        count = self.config.conversations.count()
        assert count is not None
        return np.random.default_rng([self.env.seed, epoch]).permutation(count)

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken, "empty": self.empty}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.taken, self.empty = int(state["taken"]), int(state["empty"])


def piece_of(chat: Chat, config: Supervised, tokenizer: Tokenizer) -> Piece:
    """A conversation in tokens, cut to the longest that the source takes."""
    encoded = encode_chat(
        tokenizer,
        [m.plain() for m in chat.messages],
        tools=chat.tools or None,
        turns=config.turns,
    )
    return Piece(encoded.ids[: config.longest], encoded.mask[: config.longest])
