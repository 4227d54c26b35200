"""Numbers in 8 bits with a dynamic exponent, in blocks that share a scale.

A code is a number in [-1, 1] (or [0, 1]); the smaller, the fewer of its 7 bits are a fraction:

    +- 10^(i - 6) times the midpoint of one of 2^i equal parts of [0.1, 1],   i = 0 ... 6

with 0 and 1 besides (unsigned: 2^(i+1) parts). So seven decades fit in a byte, at two digits near
the top: good for what is small by and large, with outliers. A block is divided by its largest
magnitude, the *peak*, and each number takes the nearest code.

Dettmers 2016, arXiv:1511.04561; Dettmers et al. 2022, arXiv:2110.02861.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
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
    exact = (blocks * (1 / peaks.clamp(min=1e-38))[:, None]).flatten()
    lowest, bounds = _search(signed, x.device)
    low = lowest.index_select(0, (exact.view(torch.int32) >> 16).bitwise_and_(0xFFFF))
    codes = low.add_(exact > bounds.index_select(0, low)).to(torch.uint8)
    return DynamicCodes(codes[: x.numel()].view(x.shape), peaks)


@cache
def _search(
    signed: bool, device: torch.device
) -> tuple[Int[Tensor, " 65536"], Float[Tensor, " 256"]]:
    """For the upper 16 bits of a number the lowest code it can have; each code's upper bound.

    Numbers that share these bits lie closer together than two bounds do, so each has its lowest
    code or the next: one comparison instead of eight.
    """
    table = dynamic_table(signed, device)
    bounds = (table[1:] + table[:-1]) / 2
    upper = torch.arange(1 << 16, device=device, dtype=torch.int32) << 16
    least = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    return torch.bucketize(least, bounds, out_int32=True), F.pad(bounds, (0, 1), value=math.inf)


def from_codes(stored: DynamicCodes, *, signed: bool = True) -> Float[Tensor, "..."]:
    """The numbers, in fp32."""
    table, codes = dynamic_table(signed, stored.codes.device), stored.codes.flatten()
    values = table.index_select(0, codes.int())
    if values.numel() % BLOCK:
        peaks = stored.peaks.repeat_interleave(BLOCK)[: values.numel()]
        return values.mul_(peaks).view(stored.codes.shape)
    scaled: Tensor = values.view(-1, BLOCK).mul_(stored.peaks[:, None])
    return scaled.view(stored.codes.shape)
