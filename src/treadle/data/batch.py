"""Batches: flat tokens, how they fall into documents, and which tokens are to be predicted.

A prediction is a pair (source, target): the hidden state at flat index `source` predicts the
token `target`. For a document the source is the token before; for the first token of a completion
it is the last token of its prompt. Only these hidden states meet the head, so prompts and masked
turns cost no logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from treadle.nn.context import Packed
from treadle.nn.layout import Layout


@dataclass(frozen=True)
class Piece:
    """Tokens of one segment; `learn[i]` says whether token i is to be predicted."""

    tokens: Sequence[int]
    learn: Sequence[bool]
    parent: int = -1
    """Index of the piece that this one continues, in the same batch."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a model and an objective need for one forward and backward pass."""

    tokens: Int[Tensor, " N"]
    layout: Layout
    sources: Int[Tensor, " M"]
    """Flat index of the hidden state that makes each prediction."""
    targets: Int[Tensor, " M"]
    """Token that it should predict."""
    weights: Float[Tensor, " M"]
    """Weight of each prediction in the loss."""
    sequences: Int[Tensor, " M"]
    """Which sequence each prediction belongs to, in [0, sequence_count)."""
    sequence_count: int
    task: int = 0
    """Which task the batch is of, where a source mixes several."""

    def to(self, device: torch.device | str) -> Self:
        """The batch with all its tensors on `device`."""
        tensors = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)

    def context(self) -> Packed:
        return Packed.of(self.layout, self.tokens.device)

    def per_sequence(self, values: Float[Tensor, " M"]) -> Float[Tensor, " S"]:
        """Sum of a value over the predictions of each sequence."""
        return values.new_zeros(self.sequence_count).index_add(0, self.sequences, values)


def assemble(pieces: Sequence[Piece]) -> Batch:
    """Lay pieces one after another. A sequence is a piece with at least one prediction.

    The first token of a piece without parent has nothing before it and is never predicted.
    """
    layout = Layout(tuple(len(p.tokens) for p in pieces), tuple(p.parent for p in pieces))
    sources: list[int] = []
    targets: list[int] = []
    sequences: list[int] = []
    count = 0
    for index, piece in enumerate(pieces):
        assert len(piece.tokens) == len(piece.learn)
        start, found = layout.starts[index], len(targets)
        for i, (token, learn) in enumerate(zip(piece.tokens, piece.learn, strict=True)):
            if not learn or (i == 0 and piece.parent < 0):
                continue
            before = layout.span(piece.parent)[-1] if i == 0 else start + i - 1
            sources.append(before)
            targets.append(token)
            sequences.append(count)
        count += len(targets) > found
    return Batch(
        tokens=torch.tensor([t for p in pieces for t in p.tokens]),
        layout=layout,
        sources=torch.tensor(sources, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.ones(len(targets)),
        sequences=torch.tensor(sequences, dtype=torch.long),
        sequence_count=count,
    )


def within_budget(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in order, cut into runs whose sizes sum to at most `budget` (or are one alone)."""
    runs: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not runs or size > room:
            runs.append([])
            room = budget
        runs[-1].append(index)
        room -= size
    return runs
