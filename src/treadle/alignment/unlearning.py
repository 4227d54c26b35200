"""Texts to forget beside texts to keep, in pairs, with what the model said of them before."""

from __future__ import annotations

import torch
from pydantic import Field

from treadle.alignment.reference import InitialModel, Reference, reference_of
from treadle.alignment.trees import Tree, TreeStream, answer_tree, assemble_trees, extended
from treadle.core.errors import TreadleError
from treadle.data.batch import Piece
from treadle.data.records import Chat
from treadle.data.source import Env, Source
from treadle.data.supervised import Conversations
from treadle.objectives.unlearn import UnlearnBatch


class Unlearning(Source):
    """Pairs of conversations; the shorter set is gone through more often."""

    forget: Conversations
    """Their last answers are to become unlikely."""
    retain: Conversations
    """Their last answers stay: like those to forget, but not of them."""
    per_step: int = Field(8, ge=1)
    """Pairs in an optimiser step, over all ranks."""
    tokens: int = Field(4096, ge=8)
    """Most tokens in a micro-batch."""
    longest: int = Field(512, ge=2)
    """Prompt and answer are cut to this many tokens, or to the model's context."""
    reference: Reference = InitialModel()

    def open(self, env: Env) -> UnlearningStream:
        """The stream from its beginning.

        Raises:
            TreadleError: one of the two never ends or is empty, or no pair can be learned from.
        """
        for name, supply in (("forget", self.forget), ("retain", self.retain)):
            if not supply.count():
                raise TreadleError(
                    f"Unlearning: `{name}` must be a known number of conversations, at least one, "
                    f"but {type(supply).__name__} is endless or empty"
                )
        return UnlearningStream(self, env)


class UnlearningStream(TreeStream):
    """Trees of a prompt and answer to forget, and a prompt and answer to keep."""

    def __init__(self, config: Unlearning, env: Env) -> None:
        self.config = config
        count = max(config.forget.count() or 0, config.retain.count() or 0)
        per_step, tokens = config.per_step, config.tokens
        super().__init__(env, count=count, per_step=per_step, tokens=tokens, what="pair")
        self.reference = reference_of(self, config.reference)

    def tree(self, index: int) -> Tree:
        config = self.config
        gone, kept = (
            self._answered(supply.conversation(index % (supply.count() or 1)))
            for supply in (config.forget, config.retain)
        )
        moved = [Piece(p.tokens, p.learn, p.parent + 2 if p.parent >= 0 else -1) for p in kept]
        return [*gone, *moved]

    def _answered(self, chat: Chat) -> Tree:
        *prompt, last = chat.messages
        if last.role != "assistant":
            raise TreadleError("its last message is not the assistant's")
        return answer_tree(self.env, tuple(prompt), ((last,),), self.config.longest)

    def batch(self, trees: list[Tree], places: list[int]) -> UnlearnBatch:
        rows = torch.tensor(places)
        reference = None if self.reference is None else self.reference[rows].flatten()
        return extended(UnlearnBatch, assemble_trees(trees), reference=reference)
