"""Rotary position embeddings (Su et al. 2021) and their extensions to longer contexts.

The pair (x_i, x_{i+D/2}) is rotated by the angle p * w_i, with w_i = theta^(-2i/D), so that
q.k depends on the distance of the positions alone. A `Scaling` changes the frequencies w.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.kernels.rotary import rotary
from treadle.nn.context import Context
from treadle.nn.positions import Positions

CARD = Card(
    id="arch.rope",
    paper="Su et al. 2021, RoFormer, arXiv:2104.09864; Peng et al. 2023, YaRN, arXiv:2309.00071",
    summary="Rotary positions; linear, NTK, YaRN, LongRoPE and Llama 3 scaling.",
    recipe="treadle run quickstart-scratch",
    oracle="tests/nn/test_nn_positions.py::test_rope_scalings_match_transformers",
)


@dataclass(frozen=True)
class Frequencies:
    """Angular frequencies `[D/2]` and a factor on cos and sin."""

    inverse: Float[Tensor, " half"]
    attention: float = 1.0


class Scaling(Config):
    """A shape: the frequencies that a context of some length should use."""

    @abstractmethod
    def __call__(self, base: Float[Tensor, " half"], theta: float, length: int) -> Frequencies:
        """`base` is theta^(-2i/D); `length` is the longest position in use plus one."""


class NoScaling(Scaling):
    """The original frequencies."""

    def __call__(self, base: Float[Tensor, " half"], theta: float, length: int) -> Frequencies:
        return Frequencies(base)


class RoPE(Positions):
    """Rotary embedding of the first `fraction` of each head's dimensions."""

    theta: float = 10_000.0
    scaling: Scaling = NoScaling()
    fraction: float = 1.0

    def rotate(
        self, q: Float[Tensor, "N H D"], k: Float[Tensor, "N G D"], context: Context
    ) -> tuple[Float[Tensor, "N H D"], Float[Tensor, "N G D"]]:
        dim = int(q.shape[-1] * self.fraction)
        cos, sin = context.once((self, dim, q.dtype), lambda: self.table(dim, context, q.dtype))
        return rotary(q, cos, sin), rotary(k, cos, sin)

    def slopes(self, heads: int) -> tuple[float, ...] | None:
        return None

    def table(
        self, dim: int, context: Context, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "N 1 R"], Float[Tensor, "N 1 R"]]:
        """cos and sin of every token's angles, computed in fp32: R of them turn 2 R dimensions."""
        device = context.positions.device
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        frequencies = self.scaling(1.0 / self.theta**exponents, self.theta, context.length)
        angles = context.positions.float()[:, None, None] * frequencies.inverse
        cos, sin = angles.cos() * frequencies.attention, angles.sin() * frequencies.attention
        return cos.to(dtype), sin.to(dtype)
