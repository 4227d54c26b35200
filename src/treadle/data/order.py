"""Shuffling without a list: position to index by a keyed bijection.

A Feistel network permutes the numbers below 4^k; a number that lands at `size` or
above is permuted again until it lands below (cycle walking; Black and Rogaway 2002). Each epoch
has its own key. The place is two numbers, so an order of any length can be resumed at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

_ROUNDS = 8


@dataclass(frozen=True)
class Place:
    """Where a run is in its data: how much all ranks together have taken."""

    epoch: int = 0
    position: int = 0

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> Self:
        return cls(int(state["epoch"]), int(state["position"]))


@dataclass(frozen=True)
class Order:
    """An endless run over `size` items, each epoch in a new order that the seed fixes."""

    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.size > 0

    def index(self, place: Place) -> int:
        """Which item stands at a place."""
        return permute(place.position, size=self.size, key=f"{self.seed}/{place.epoch}")

    def after(self, place: Place, count: int = 1) -> Place:
        """The place `count` items later."""
        epochs, position = divmod(place.position + count, self.size)
        return Place(place.epoch + epochs, position)

    def take(self, place: Place, count: int, *, rank: int = 0, world: int = 1) -> list[int]:
        """This rank's share of the next `count` items: those at rank, rank + world, ..."""
        return [self.index(self.after(place, i)) for i in range(rank, count, world)]

    def epoch(self, number: int) -> Iterator[int]:
        """All items of one epoch in their order."""
        return (self.index(Place(number, position)) for position in range(self.size))


def permute(position: int, *, size: int, key: str) -> int:
    """The image of `position` under a bijection of range(size) that `key` chooses."""
    assert 0 <= position < size
    half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits; 4^half >= size
    mask = (1 << half) - 1
    keys = _round_keys(key)
    value = position
    while True:
        left, right = value >> half, value & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        value = (left << half) | right
        if value < size:
            return value


@lru_cache(maxsize=64)
def _round_keys(key: str) -> list[int]:
    digest = hashlib.sha512(key.encode()).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit of x moves every bit."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
