"""Compacter: the matrices of a bottleneck adapter as sums of Kronecker products.

    W = sum_i A_i (x) S_i T_i,    A [n, n, n] of all layers,  S [n, in/n, r],  T [n, r, out/n]

Mahabadi, Henderson and Ruder 2021, arXiv:2106.04647: about 1 / n of the parameters of a matrix at
full rank r, far fewer at rank 1. W is never written out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.peft.bottleneck import Projection

CARD = Card(
    id="ft.adapter.compacter",
    paper="Mahabadi et al. 2021, Compacter, arXiv:2106.04647",
    summary="Bottleneck adapters whose matrices are sums of Kronecker products, partly shared.",
    recipe="treadle run fine-tune "
    "steps.sft.transforms='[{kind: Bottleneck, projection: {kind: Kronecker}}]'",
    oracle="tests/peft/test_peft_bottleneck.py::test_kronecker_matches_the_written_matrix",
)


class Kronecker(Projection):
    """Parametrised hypercomplex multiplication with factors of low rank."""

    parts: int = Field(default=4, ge=1)
    """n."""
    rank: int = Field(default=1, ge=1)

    def build(self, width_in: int, width_out: int, *, zero: bool) -> nn.Module:
        for width in (width_in, width_out):
            if width % self.parts:
                raise ConfigError(
                    f"Kronecker: parts={self.parts} must divide the widths of the adapter, of "
                    f"which one is {width}"
                )
        return KroneckerLayer(self, width_in, width_out, zero=zero)

    def share(self, layers: Sequence[nn.Module]) -> None:
        found = [m for m in layers if isinstance(m, KroneckerLayer)]
        for layer in found[1:]:
            layer.A = found[0].A


class KroneckerLayer(nn.Module):
    def __init__(self, config: Kronecker, width_in: int, width_out: int, *, zero: bool) -> None:
        super().__init__()
        n, r = config.parts, config.rank
        self.A = nn.Parameter(torch.randn(n, n, n) / n)
        self.S = nn.Parameter(torch.empty(n, width_in // n, r))
        self.T = nn.Parameter(torch.zeros(n, r, width_out // n))
        self.bias = nn.Parameter(torch.zeros(width_out))
        for factor in (self.S,) if zero else (self.S, self.T):
            for matrix in factor.detach():  # of all n together it would take n for a width
                nn.init.xavier_normal_(matrix)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        parts = x.unflatten(-1, (len(self.A), -1))
        h = torch.einsum("...pa,iar->...ipr", parts, self.S.to(x.dtype))
        h = torch.einsum("...ipr,ipq->...iqr", h, self.A.to(x.dtype))
        y = torch.einsum("...iqr,irb->...qb", h, self.T.to(x.dtype)).flatten(-2)
        return y + self.bias.to(x.dtype)
