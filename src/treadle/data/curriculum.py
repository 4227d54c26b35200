"""Curriculum: conversations from easy to hard, and how soon the hard ones come.

    step t learns from the easiest g(t) n of n conversations, drawn at random

    Linear        g = min(1, g0 + (1 - g0) t / T)
    Root          g = min(1, sqrt(g0^2 + (1 - g0^2) t / T))           Platanios et al. 2019
    Staircase     g = min(1, g0 grow^floor(t / every))                Hacohen and Weinshall 2019

Bengio et al. 2009. How hard a conversation is, is a value of its own: the length of the answer, or
the model's own loss before it learned anything (`ModelLoss`).
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from treadle.core.cards import Card
from treadle.core.config import Config, digest
from treadle.core.errors import ConfigError
from treadle.core.files import write_json
from treadle.data.batch import assemble, within_budget
from treadle.data.records import Chat
from treadle.data.source import Env, Source, Stream
from treadle.data.supervised import Conversations, Supervised, piece_of
from treadle.kernels.linear_cross_entropy import HeadRule, token_logprobs
from treadle.nn.linear import bias_of
from treadle.nn.modes import evaluating

CARD = Card(
    id="ft.curriculum",
    paper="Bengio et al. 2009; Platanios et al. 2019, arXiv:1903.09848; Hacohen and Weinshall "
    "2019, arXiv:1904.03626",
    summary="Learns easy examples first; how hard one is and how fast to go on are free to choose.",
    recipe="treadle run curriculum",
    oracle="tests/data/test_data_curriculum.py::test_draws_are_from_the_easiest",
)


class Pacing(Config):
    """A shape: which share of the data, from its easy end, is open."""

    start: float = Field(0.2, gt=0.0, le=1.0)
    """g0."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """g of a step, counted from 0, in (0, 1]."""


class LinearPace(Pacing):
    """Grows by the same number of examples at each step."""

    steps: int = Field(ge=1)
    """T."""

    def __call__(self, step: int) -> float:
        return min(1.0, self.start + (1 - self.start) * step / self.steps)


class RootPace(Pacing):
    """Slows down, so that new examples keep being seen equally often."""

    steps: int = Field(ge=1)
    """T."""

    def __call__(self, step: int) -> float:
        return min(1.0, math.sqrt(self.start**2 + (1 - self.start**2) * step / self.steps))


class StaircasePace(Pacing):
    """Grows by a factor at regular intervals."""

    every: int = Field(ge=1)
    grow: float = Field(1.9, gt=1.0)

    def __call__(self, step: int) -> float:
        most = math.ceil(-math.log(self.start) / math.log(self.grow))  # later powers overflow
        return float(min(1.0, self.start * self.grow ** min(step // self.every, most)))


class Difficulty(Config):
    """A shape: how hard conversations are."""

    @abstractmethod
    def __call__(self, source: Supervised, count: int, env: Env) -> list[float]:
        """A number for each of the first `count` conversations; larger is harder."""


class AnswerLength(Difficulty):
    """Characters that the assistant says."""

    def __call__(self, source: Supervised, count: int, env: Env) -> list[float]:
        chats = map(source.conversations.conversation, range(count))
        return [
            float(sum(len(m.content) for m in chat.messages if m.role == "assistant"))
            for chat in chats
        ]


class ModelLoss(Difficulty):
    """Mean loss of the learned tokens under the model as the run finds it, without dropout."""

    @torch.no_grad()
    def __call__(self, source: Supervised, count: int, env: Env) -> list[float]:
        with evaluating(env.model):
            return self._losses(source, count, env)

    def _losses(self, source: Supervised, count: int, env: Env) -> list[float]:
        chats = map(source.conversations.conversation, range(count))
        pieces = [piece_of(chat, source, env.tokenizer) for chat in chats]
        learned = [i for i, piece in enumerate(pieces) if any(piece.learn)]
        losses = [math.inf] * count  # what has nothing to learn comes last
        model = env.model
        rule = HeadRule(softcap=model.config.softcap)
        for run in within_budget([len(pieces[i].tokens) for i in learned], source.tokens):
            places = [learned[i] for i in run]
            batch = assemble([pieces[i] for i in places]).to(env.device)
            with env.autocast():
                hidden = model(batch.tokens, batch.context())[batch.sources]
                logp = token_logprobs(
                    hidden,
                    model.head_weight(),
                    batch.targets,
                    bias=bias_of(model.head),
                    rule=rule,
                )
            means = -batch.per_sequence(logp) / batch.per_sequence(batch.weights)
            for place, mean in zip(places, means.tolist(), strict=True):
                losses[place] = mean
        return losses


class Paced(Conversations):
    """Conversations in a given order, of which more and more are open."""

    conversations: Conversations
    order: tuple[int, ...] = Field(min_length=1)
    """Numbers of the conversations, the easiest first."""
    pacing: Pacing
    per_step: int = Field(32, ge=1)
    seed: int = 0

    def conversation(self, index: int) -> Chat:
        open_ = math.ceil(self.pacing(index // self.per_step) * len(self.order))
        drawn = int(np.random.default_rng([self.seed, index]).integers(open_))
        return self.conversations.conversation(self.order[drawn])

    def count(self) -> int | None:
        return None


class Curriculum(Source):
    """A supervised source from easy to hard."""

    source: Supervised
    pacing: Pacing
    difficulty: Difficulty = AnswerLength()

    def open(self, env: Env) -> Stream:
        """The stream from its beginning.

        Raises:
            ConfigError: the conversations never end, so no order puts the hard ones last.
        """
        count = self.source.conversations.count()
        if count is None:
            raise ConfigError(
                f"Curriculum: {type(self.source.conversations).__name__} never ends; take "
                "conversations of which there is a known number"
            )
        paced = Paced(
            conversations=self.source.conversations,
            order=self._order(count, env),
            pacing=self.pacing,
            per_step=self.source.per_step,
            seed=env.seed,
        )
        return self.source.replace(conversations=paced).open(env)

    def _order(self, count: int, env: Env) -> tuple[int, ...]:
        """Kept beside the run: a resumed model would find other things hard."""
        path: Path = env.scratch / f"curriculum-{digest(self)}.json"
        if not path.exists():
            hard = self.difficulty(self.source, count, env)
            write_json(path, sorted(range(count), key=lambda i: (hard[i], i)))
        return tuple(json.loads(path.read_text(encoding="utf-8")))
