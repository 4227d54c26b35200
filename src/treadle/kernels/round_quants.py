"""The first formats of GGUF: 32 weights, one scale, plain rounding; bit-exact with ggml.

Q4_0, Q5_0   x = d (q - 2^(b-1))    q of b = 4 or 5 bits, d float16
Q4_1, Q5_1   x = d q + m            d and m float16
Q8_0         x = d q                q int8
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from treadle.kernels.scales import from_half_bytes, half_bytes, inverse, signed_peak


def quantise_symmetric(x: Float[Tensor, "N 32"], bits: int) -> UInt8[Tensor, "N B"]:
    """Q4_0 and Q5_0: the weight of largest magnitude becomes the lowest level exactly."""
    half = 1 << (bits - 1)
    d = signed_peak(x) / -half
    q = (x * inverse(d)).add_(half + 0.5).clamp_(0, 2 * half - 0.5)  # .5 and a cast: rounded
    return torch.cat([half_bytes(d), _pack(q.to(torch.uint8), bits)], 1)


def dequantise_symmetric(blocks: UInt8[Tensor, "N B"], bits: int) -> Float[Tensor, "N 32"]:
    return from_half_bytes(blocks[:, :2]) * (
        _unpack(blocks[:, 2:], bits).to(torch.int8) - (1 << bits - 1)
    )


def quantise_affine(x: Float[Tensor, "N 32"], bits: int) -> UInt8[Tensor, "N B"]:
    """Q4_1 and Q5_1: the levels span the range from the lowest to the highest weight."""
    levels = (1 << bits) - 1
    low = x.amin(-1, True)
    d = _divide(x.amax(-1, True) - low, levels)
    q = (x - low).mul_(inverse(d)).add_(0.5).clamp_(0, levels + 0.5)
    return torch.cat([half_bytes(d), half_bytes(low), _pack(q.to(torch.uint8), bits)], 1)


def dequantise_affine(blocks: UInt8[Tensor, "N B"], bits: int) -> Float[Tensor, "N 32"]:
    d, m = from_half_bytes(blocks[:, 0:2]), from_half_bytes(blocks[:, 2:4])
    return (d * _unpack(blocks[:, 4:], bits)).add_(m)


def quantise_q8(x: Float[Tensor, "N 32"]) -> UInt8[Tensor, "N 34"]:
    """Q8_0 rounds halves away from zero, as C's roundf does; torch.round goes to even."""
    magnitude = x.abs()
    d = _divide(magnitude.amax(-1, True), 127)
    magnitude *= inverse(d)
    whole = magnitude.floor()
    whole += (magnitude - whole) >= 0.5
    return torch.cat([half_bytes(d), whole.copysign_(x).to(torch.int8).view(torch.uint8)], 1)


def dequantise_q8(blocks: UInt8[Tensor, "N 34"]) -> Float[Tensor, "N 32"]:
    return from_half_bytes(blocks[:, :2]) * blocks[:, 2:].contiguous().view(torch.int8)


def grid(blocks: UInt8[Tensor, "N B"], bits: int) -> tuple[Tensor, Tensor]:
    """Step and lowest level of each block, [N 1]: x = step q + lowest for all but Q8_0."""
    step = from_half_bytes(blocks[:, :2])
    affine = blocks.shape[1] == 4 + 4 * (bits == 5) + 16
    return step, from_half_bytes(blocks[:, 2:4]) if affine else step * -(1 << bits - 1)


def recode(blocks: UInt8[Tensor, "N B"], q: UInt8[Tensor, "N 32"], bits: int) -> Tensor:
    """The blocks with other codes on the same grid."""
    codes = _pack(q, bits)
    return torch.cat([blocks[:, : -codes.shape[1]], codes], 1)


def _pack(q: UInt8[Tensor, "N 32"], bits: int) -> UInt8[Tensor, "N B"]:
    """Weights i and i + 16 share a byte; fifth bits come first, one bit a weight."""
    nibbles = (q[:, :16] & 15) | (q[:, 16:] << 4)
    if bits == 4:
        return nibbles
    fifth = (q >> 4).view(-1, 4, 8) << _bits(q)
    return torch.cat([fifth.sum(-1, dtype=torch.uint8), nibbles], 1)


def _unpack(packed: UInt8[Tensor, "N B"], bits: int) -> UInt8[Tensor, "N 32"]:
    nibbles = packed[:, -16:]
    q = torch.cat([nibbles & 15, nibbles >> 4], 1)
    if bits == 5:
        fifth = (packed[:, :4, None] >> _bits(packed)) & 1
        q |= fifth.view(-1, 32) << 4
    return q


def _bits(like: Tensor) -> UInt8[Tensor, "8"]:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def _divide(x: Tensor, by: int) -> Tensor:
    """x / by, correctly rounded: on a GPU torch multiplies by the inverse of a Python number."""
    return x / torch.full_like(x, by)
