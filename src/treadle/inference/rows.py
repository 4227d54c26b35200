"""A contiguous view of the sequences that decode: no step gathers what an earlier one gathered.

Reading a sequence through its pages would copy all its keys at every token. Sequences that
advance token by token therefore have a row each in `[rows, G, capacity, D]`, brought up to date
from the pages once and then token by token. Position p is stored at p mod R, with R the window
of a sliding layer or the capacity; which position an entry holds follows from the row's length.

A row is a copy: what it holds is known by the pages it came from. When such a page is written
anew the row is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Rows:
    """Keys and values of the decoding sequences; grows as they do."""

    def __init__(self, page: int) -> None:
        self.page, self.capacity = page, 0
        self.lengths: list[int] = []
        self.tables: list[list[int]] = []
        """Pages from which each row was filled; their tokens are `lengths`."""
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for store in (self.keys, self.values) for t in store.values())

    def assign(self, tables: Sequence[list[int]], starts: Sequence[int]) -> list[int]:
        """Which sequence has row 0, 1, ...: each keeps the row that holds its tokens already."""
        while len(self.lengths) < len(tables):
            more = max(1, len(self.lengths))
            self.lengths += [0] * more
            self.tables += [[] for _ in range(more)]
        known = {
            (self.tables[row][-1], self.lengths[row]): row
            for row in range(len(tables))
            if self.lengths[row]
        }
        order = [-1] * len(tables)
        homeless = []
        for index, (table, start) in enumerate(zip(tables, starts, strict=True)):
            row = known.get((table[(start - 1) // self.page], start), -1)
            if row >= 0 and order[row] < 0 and table[: len(self.tables[row])] == self.tables[row]:
                order[row] = index
            else:
                homeless.append(index)
        free = (row for row, index in enumerate(order) if index < 0)
        for row, index in zip(free, homeless, strict=True):
            order[row] = index
            self.lengths[row] = 0
        return order

    def grow(self, row: int, table: list[int], length: int) -> int:
        """The row is to hold `length` tokens of these pages; returns how many it holds already."""
        held, self.lengths[row] = self.lengths[row], length
        need = -(-length // self.page)
        if len(self.tables[row]) != need or not held:
            self.tables[row] = table[:need]
        return held

    def forget(self, pages: set[int]) -> None:
        """These pages get new contents."""
        for row, table in enumerate(self.tables):
            if self.lengths[row] and not pages.isdisjoint(table):
                self.lengths[row] = 0

    def reserve(self, capacity: int) -> None:
        """Make room for sequences of up to `capacity` tokens, at the next write."""
        if capacity > self.capacity:
            self.capacity = max(capacity, min(2 * self.capacity, capacity + 1024))

    def ring(self, window: int | None) -> int:
        """How many positions a row of a layer with this window holds."""
        return min(self.capacity, window) if window else self.capacity

    def write(
        self,
        layer: int,
        k: Float[Tensor, "N G D"],
        v: Float[Tensor, "N G E"],
        rows: Int[Tensor, " N"],
        positions: Int[Tensor, " N"],
        window: int | None,
    ) -> None:
        """Store keys and values of tokens; no two may share a place."""
        ring = self.ring(window)
        places = positions % ring
        self._fit(self.keys, layer, k, ring)[rows, :, places] = k
        self._fit(self.values, layer, v, ring)[rows, :, places] = v

    def _fit(self, store: dict[int, Tensor], layer: int, like: Tensor, size: int) -> Tensor:
        """The layer's tensor with room for `size` positions, in the dtype that is written."""
        old, rows = store.get(layer), len(self.lengths)
        if old is not None and old.shape[::2] == (rows, size) and old.dtype == like.dtype:
            return old
        shape = (rows, like.shape[1], size, like.shape[2])
        store[layer] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if old is not None:
            # A ring grows only while it has not wrapped, so places stay valid.
            store[layer][: old.shape[0], :, : old.shape[2]] = old
        return store[layer]

    def held(self, lengths: Int[Tensor, " B"], width: int, window: int | None) -> Tensor:
        """Position `[B L]` that each of the first `width` places of a row holds, or -1."""
        ring = self.ring(window)
        place = torch.arange(min(width, ring), device=lengths.device)
        last = lengths[:, None] - 1
        return (last - (last - place) % ring).clamp(min=-1)
