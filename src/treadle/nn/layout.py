"""Layout: how a flat run of tokens falls into documents.

Models work on flat tokens `[N]`, never on padded rectangles. A layout cuts them into segments;
each segment may continue a *parent* segment, so the documents form a forest:

    packed documents     lengths (5, 3, 7), no parents
    a batch of rows      lengths (T, T, T), no parents
    a GRPO group         one prompt, and its completions as children: the prompt is computed once
    a preference pair    one prompt with two children
    a token tree         speculative decoding

A token sees the tokens before it in its own segment and everything in its ancestors, and its
position counts from the root of its document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Segments in the order in which their tokens lie; a parent comes before its children."""

    lengths: tuple[int, ...]
    parents: tuple[int, ...] = ()
    """For each segment the index of the one it continues, or -1. Empty: all are roots."""

    def __post_init__(self) -> None:
        assert all(n > 0 for n in self.lengths), f"empty segment in {self.lengths}"
        if self.parents:
            assert len(self.parents) == len(self.lengths)
            assert all(-1 <= p < i for i, p in enumerate(self.parents)), self.parents

    @staticmethod
    def rows(batch: int, length: int) -> Layout:
        """`batch` documents of equal length."""
        return Layout((length,) * batch)

    @staticmethod
    def groups(groups: Sequence[tuple[int, Sequence[int]]]) -> Layout:
        """For each group the length of its prompt and of each completion."""
        lengths: list[int] = []
        parents: list[int] = []
        for prompt, completions in groups:
            root = len(lengths)
            lengths += [prompt, *completions]
            parents += [-1, *(root for _ in completions)]
        return Layout(tuple(lengths), tuple(parents))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each segment begins in the flat tokens."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    def parent(self, segment: int) -> int:
        return self.parents[segment] if self.parents else -1

    def lineage(self, segment: int) -> tuple[int, ...]:
        """The segment's ancestors from the root down, and itself."""
        chain = [segment]
        while (above := self.parent(chain[-1])) >= 0:
            chain.append(above)
        return tuple(reversed(chain))

    def depth(self, segment: int) -> int:
        """Position of the segment's first token in its document."""
        return sum(self.lengths[s] for s in self.lineage(segment)[:-1])

    @cached_property
    def positions(self) -> Int[Tensor, " N"]:
        """Position of every token in its document, from 0."""
        return torch.cat(
            [
                torch.arange(d, d + n)
                for d, n in zip(
                    map(self.depth, range(len(self.lengths))), self.lengths, strict=True
                )
            ]
        )

    def span(self, segment: int) -> range:
        start = self.starts[segment]
        return range(start, start + self.lengths[segment])

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Segments of like shape, to be attended in one call each."""
        return tuple(_buckets(self))


@dataclass(frozen=True)
class Bucket:
    """Segments whose attention is one padded batch of B rows.

    `queries` and `keys` hold flat token indices; -1 is padding, at the end of a row.
    """

    queries: Int[Tensor, "B Q"]
    keys: Int[Tensor, "B K"]
    offset: int
    """Flat index of the first token if the rows are whole, equal and adjacent, else -1: then the
    bucket is a view of the flat tensors and plain causal attention is exact."""


WASTE = 1.25
"""A segment joins a bucket while the longest row is at most this times its own length."""


def _buckets(layout: Layout) -> Iterator[Bucket]:
    """Sort by (ancestors, length), cut where padding would waste too much."""
    order = sorted(
        range(len(layout.lengths)),
        key=lambda s: (layout.depth(s) > 0, layout.depth(s), -layout.lengths[s]),
    )
    row: list[int] = []
    for segment in order:
        if row:
            first = row[0]
            alike = layout.depth(first) == layout.depth(segment)
            if not alike or layout.lengths[first] > WASTE * layout.lengths[segment]:
                yield _bucket(layout, row)
                row = []
        row.append(segment)
    if row:
        yield _bucket(layout, row)


def _bucket(layout: Layout, segments: list[int]) -> Bucket:
    segments = sorted(segments)
    lengths = [layout.lengths[s] for s in segments]
    adjacent = all(b == a + 1 for a, b in pairwise(segments))
    whole = adjacent and len(set(lengths)) == 1 and layout.depth(segments[0]) == 0
    queries = [list(layout.span(s)) for s in segments]
    keys = [[t for a in layout.lineage(s) for t in layout.span(a)] for s in segments]
    return Bucket(
        queries=_padded(queries),
        keys=_padded(keys),
        offset=layout.starts[segments[0]] if whole else -1,
    )


def _padded(rows: list[list[int]]) -> Int[Tensor, "B L"]:
    longest = max(map(len, rows))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows])
