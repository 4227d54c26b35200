"""Numbers in 8 bits with a dynamic exponent, in blocks that share a scale.

A code is a number in [-1, 1] (or [0, 1]); the smaller, the fewer of its 7 bits are a fraction:

    +- 10^(i - 6) times the midpoint of one of 2^i equal parts of [0.1, 1],   i = 0 ... 6

with 0 and 1 besides (unsigned: 2^(i+1) parts). So seven decades fit in a byte, at two digits near
the top: good for what is small by and large, with outliers. A block is divided by its largest
magnitude, the *peak*, and each number takes the nearest code.

Dettmers 2016, arXiv:1511.04561; Dettmers et al. 2022, arXiv:2110.02861.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

BLOCK = 256
DECADES = 7


@dataclass(frozen=True)
class DynamicCodes:
    """Codes of a tensor, in its shape, and a peak for each block of its flat numbers."""

    codes: UInt8[Tensor, "..."]
    peaks: Float[Tensor, " blocks"]


@cache
def dynamic_table(signed: bool, device: torch.device) -> Float[Tensor, " 256"]:
    """What the 256 codes stand for, ascending."""
    values = [torch.tensor([0.0, 1.0])]
    for i in range(DECADES):
        ends = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        decade = 10.0 ** (i - DECADES + 1) * ((ends[:-1] + ends[1:]) / 2)
        values += [decade, -decade] if signed else [decade]
    return torch.cat(values).sort().values.to(device)


def into_codes(x: Float[Tensor, "..."], *, signed: bool = True) -> DynamicCodes:
    """The nearest code of each number of `x`."""
    missing = -x.numel() % BLOCK
    blocks = F.pad(x.float().flatten(), (0, missing)).view(-1, BLOCK)
    peaks = blocks.abs().amax(1)
    table = dynamic_table(signed, x.device)
    exact = blocks * (1 / peaks.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(exact, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)
    return DynamicCodes(codes.flatten()[: x.numel()].view(x.shape), peaks)


def from_codes(stored: DynamicCodes, *, signed: bool = True) -> Float[Tensor, "..."]:
    """The numbers, in fp32."""
    table, codes = dynamic_table(signed, stored.codes.device), stored.codes.flatten()
    values = table[codes.int()]
    if values.numel() % BLOCK:
        peaks = stored.peaks.repeat_interleave(BLOCK)[: values.numel()]
        return values.mul_(peaks).view(stored.codes.shape)
    scaled: Tensor = values.view(-1, BLOCK).mul_(stored.peaks[:, None])
    return scaled.view(stored.codes.shape)
