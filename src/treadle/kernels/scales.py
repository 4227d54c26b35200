"""What the block formats share: float16 scales as bytes, and arithmetic that keeps zeros zero."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def half_bytes(scale: Float[Tensor, "N 1"]) -> UInt8[Tensor, "N 2"]:
    return scale.half().view(torch.uint8)


def from_half_bytes(data: UInt8[Tensor, "N 2"]) -> Float[Tensor, "N 1"]:
    return data.contiguous().view(torch.float16).float()


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where that is not finite: a group of zeros keeps scale 0."""
    return x.reciprocal().nan_to_num_(0, 0, 0)


def signed_peak(x: Float[Tensor, "N n"]) -> Float[Tensor, "N 1"]:
    """The element of largest magnitude in each row, with its sign; of several, the first."""
    high, low = x.amax(-1, True), x.amin(-1, True)
    peak = torch.where(high > -low, high, low)
    tied = (high == -low).flatten()
    if tied.any():  # argmax is slow on a CPU, and ties are rare
        rows = x[tied]
        peak[tied] = rows.gather(1, rows.abs().argmax(-1, True))
    return peak
