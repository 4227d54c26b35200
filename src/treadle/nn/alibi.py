"""Attention with linear biases (Press et al. 2022): score_ij - m_h (i - j).

m_h is the geometric sequence 2^(-8/H), 2^(-16/H), ... for H a power of two; otherwise the slopes
of the next lower power, followed by every other slope of the next higher one.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from treadle.core.cards import Card
from treadle.nn.context import Context
from treadle.nn.positions import Positions

CARD = Card(
    id="arch.alibi",
    paper="Press, Smith and Lewis 2022, Train Short, Test Long, arXiv:2108.12409",
    summary="Penalises attention linearly with distance instead of embedding positions.",
    recipe="treadle run quickstart-scratch "
    "steps.1.model.decoder.blocks.0.mixer.positions='{kind: ALiBi}'",
    oracle="tests/nn/test_nn_positions.py::test_alibi_matches_bloom",
)


class ALiBi(Positions):
    """Linear biases."""

    def rotate(
        self, q: Float[Tensor, "N H D"], k: Float[Tensor, "N G D"], context: Context
    ) -> tuple[Float[Tensor, "N H D"], Float[Tensor, "N G D"]]:
        return q, k

    def slopes(self, heads: int) -> tuple[float, ...] | None:
        lower = 2 ** math.floor(math.log2(heads))
        slopes = [2 ** (-8 * (h + 1) / lower) for h in range(lower)]
        slopes += [2 ** (-4 * (h + 1) / lower) for h in range(0, 2 * (heads - lower), 2)]
        return tuple(slopes)
