"""Packing: documents of many lengths into rows of one length, with little left empty.

Best-fit decreasing: the longest document first, each into the fullest row that still has room
(Johnson et al. 1974: at most 11/9 of the best number of rows). Documents in a row do not see each
other and each counts its positions from zero (`Layout`), so a packed row trains exactly as its
documents would alone.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError

CARD = Card(
    id="data.pack",
    paper="Krell et al. 2021, arXiv:2107.02027; Ding et al. 2024, arXiv:2404.10830 (best-fit)",
    summary="Best-fit packing of documents into rows; no document sees another.",
    recipe="treadle run quickstart-scratch steps.1.source.rows.kind=PackedDocuments",
    oracle="tests/data/test_data_pack.py::test_packed_loss_and_gradient_equal_unpacked",
)

Span = tuple[int, int]


class Overlong(Config):
    """A shape: what happens to a document that is longer than a row."""

    @abstractmethod
    def __call__(self, length: int, budget: int) -> tuple[Span, ...]:
        """The parts of a document that are kept, each at most `budget` long."""


class TruncateLong(Overlong):
    """Keep the beginning."""

    def __call__(self, length: int, budget: int) -> tuple[Span, ...]:
        return ((0, min(length, budget)),)


class SplitLong(Overlong):
    """Keep everything; parts share one token, so that each token but the first is predicted."""

    def __call__(self, length: int, budget: int) -> tuple[Span, ...]:
        if budget < 2:
            raise TreadleError(f"a budget of {budget} tokens cannot be split into; it needs two")
        starts = range(0, max(length - 1, 1), budget - 1)
        return tuple((start, min(start + budget, length)) for start in starts)


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of document indices, each with lengths that sum to at most `budget`.

    Every document is in exactly one row and none is cut. Ties go to the lower index and to the
    row that was opened first, so the result depends on nothing but the arguments.

    Raises:
        TreadleError: a document is longer than the budget, or empty.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and sizes.max() > budget:
        worst = int(sizes.argmax())
        raise TreadleError(
            f"document {worst} has {sizes[worst]} tokens, more than the budget of {budget}: raise "
            "the budget, or cut documents with TruncateLong() or SplitLong()"
        )
    if len(sizes) and sizes.min() < 1:
        raise TreadleError(f"document {int(sizes.argmin())} is empty; leave it out")
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> rows that have exactly that much, oldest last
    rooms: list[int] = []  # the keys of with_room, ascending
    for document in np.argsort(-sizes, kind="stable"):
        size = int(sizes[document])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            row, room = len(rows), budget
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(int(document))
        left = room - size
        if left:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            insort(with_room[left], row, key=lambda r: -r)
    return rows
