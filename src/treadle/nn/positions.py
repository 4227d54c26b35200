"""How attention learns the order of tokens: shapes; RoPE is in `rope.py`, ALiBi in `alibi.py`."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor

from treadle.core.config import Config
from treadle.nn.context import Context


class Positions(Config):
    """A shape: turns queries and keys, or biases their scores, by position."""

    @abstractmethod
    def rotate(
        self, q: Float[Tensor, "N H D"], k: Float[Tensor, "N G D"], context: Context
    ) -> tuple[Float[Tensor, "N H D"], Float[Tensor, "N G D"]]:
        """Queries and keys with their positions in them."""

    @abstractmethod
    def slopes(self, heads: int) -> tuple[float, ...] | None:
        """ALiBi slopes a head, or None."""


class NoPositions(Positions):
    """Nothing: the model relies on the causal mask, or on positions added to its embeddings."""

    def rotate(
        self, q: Float[Tensor, "N H D"], k: Float[Tensor, "N G D"], context: Context
    ) -> tuple[Float[Tensor, "N H D"], Float[Tensor, "N G D"]]:
        return q, k

    def slopes(self, heads: int) -> tuple[float, ...] | None:
        return None
