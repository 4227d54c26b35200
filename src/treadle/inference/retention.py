"""What a row keeps of a sequence: a shape, and the plainest of its values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from treadle.kernels.attention import AttentionRule


@dataclass
class Kept:
    """What one layer keeps, of some rows or of one prompt, in the order of the text."""

    keys: Float[Tensor, "*R G n D"]
    values: Float[Tensor, "*R G n E"]
    positions: Int[Tensor, "*R G n"]
    scores: Float[Tensor, "*R G n"]
    """Attention that each token got."""

    @property
    def planes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.positions, self.scores

    def choose(self, places: Int[Tensor, "*R G k"]) -> Kept:
        """Those at these places, for each head its own."""
        return Kept(*(_take(plane, places) for plane in self.planes))

    def behind(self, new: Kept) -> Kept:
        """These, and the new ones behind them."""
        axis = self.positions.ndim - 1
        return Kept(*(torch.cat(pair, axis) for pair in zip(self.planes, new.planes, strict=True)))


def _take(plane: Tensor, places: Int[Tensor, "*R G k"]) -> Tensor:
    if plane.ndim == places.ndim:
        return plane.gather(-1, places)
    return plane.gather(-2, places[..., None].expand(*places.shape, plane.shape[-1]))


class Retention(ABC):
    """A choice of tokens, made when a prompt is read and again as the row grows."""

    slack: int = 32
    """Tokens over the choice before it is made again."""
    later: bool = True
    """Whether it is made again behind the prompt."""
    early: bool = False
    """Whether it can be made before a prompt is read to its end."""
    watch: int = 0
    """How many of a prompt's last queries are watched; whom they attend to has the score."""
    follow: bool = False
    """Whether scores grow by the queries behind the prompt."""

    def rule(self, rule: AttentionRule) -> AttentionRule:
        """What queries may see, of what is there."""
        return rule

    @abstractmethod
    def size(self, length: int) -> int:
        """How many of so many tokens are kept."""

    @abstractmethod
    def keep(self, scores: Float[Tensor, "*R G n"]) -> Int[Tensor, "*R G k"]:
        """Places of the `size(n)` tokens that stay, ascending."""


class Everything(Retention):
    """All of it."""

    later = False

    def size(self, length: int) -> int:
        return length

    def keep(self, scores: Float[Tensor, "*R G n"]) -> Int[Tensor, "*R G n"]:
        return torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)


def best_and_last(
    scores: Float[Tensor, "*R G n"], *, size: int, last: int
) -> Int[Tensor, "*R G k"]:
    """Places of the `last` tokens and of those before them with the highest scores, ascending."""
    length = scores.shape[-1]
    if length <= size:
        return torch.arange(length, device=scores.device).expand_as(scores)
    best = scores[..., : length - last].topk(size - last, dim=-1).indices.sort(-1).values
    tail = torch.arange(length - last, length, device=scores.device)
    return torch.cat([best, tail.expand(*best.shape[:-1], last)], -1)
