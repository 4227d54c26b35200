"""Rows times the weight of their group: the products of a mixture of experts.

y_m = W_g(m) x_m      rows sorted by group, counts_g of group g
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def grouped_linear_reference(
    x: Float[Tensor, "M in"], weights: Float[Tensor, "E out in"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "M out"]:
    """One product for each group that has rows: the definition, and the fast path of processors."""
    parts = x.split(counts.tolist())
    return torch.cat([F.linear(p, w) for p, w in zip(parts, weights, strict=True)])


def grouped_linear(
    x: Float[Tensor, "M in"], weights: Float[Tensor, "E out in"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "M out"]:
    """`grouped_linear_reference`; on an accelerator in one call that never waits for the counts."""
    if x.device.type == "cpu":
        return grouped_linear_reference(x, weights, counts)
    ends = counts.cumsum(0).to(torch.int32)
    y: Tensor = F.grouped_mm(x, weights.to(x.dtype).transpose(1, 2), offs=ends)
    return y
