"""The K formats of GGUF: 256 weights share two-level scales, found by least squares.

    Q4_K, Q5_K   x = d sc_j q - dmin m_j    8 groups of 32; q of 4 or 5 bits, sc and m of 6 bits
    Q6_K         x = d sc_j q               16 groups of 16; q in [-32, 31], sc in [-128, 127]

d and dmin are float16. For each group the search tries several roundings of its weights to
levels q, solves for the scale (and offset) that fit those levels best in squared error, and
keeps the best. The scales are then rounded to d sc_j, and d, dmin fitted to what came out.

Everything works on rows of blocks, `x` [N 256] to bytes [N B] and back, on the CPU or a GPU.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from treadle.kernels.scales import from_half_bytes, half_bytes, inverse, signed_peak

SUPER = 256
"""Weights in one block."""

_STRETCH_AFFINE = tuple(-1.6 + 0.2 * i for i in range(13))
_STRETCH_SYMMETRIC = tuple(-8 + 2 / 3 * i for i in range(13))
"""Roundings tried: the range of a group is laid over `levels + stretch` steps. Chosen by error."""
_REFITS = 2


def quantise_affine(x: Float[Tensor, "N 256"], bits: int) -> UInt8[Tensor, "N B"]:
    """Q4_K (bits=4) or Q5_K (bits=5)."""
    levels = (1 << bits) - 1
    x = x.view(-1, 8, 32)
    scale, offset = (v.view(-1, 8, 1) for v in fit_affine(x.reshape(-1, 32), levels))
    d, dmin = _half(scale.amax(1, True) / 63), _half(offset.amax(1, True) / 63)
    sc = (scale * inverse(d)).round_().clamp_(0, 63)
    m = (offset * inverse(dmin)).round_().clamp_(0, 63)

    q = _levels(x + dmin * m, d * sc, 0, levels)
    for _ in range(_REFITS):
        d, dmin = fit_pair(sc * q, m.expand_as(q), x, d, dmin)
        q = _levels(x + dmin * m, d * sc, 0, levels)

    q = q.to(torch.uint8)
    low, high = q.view(-1, 4, 2, 32).unbind(2)
    parts = [half_bytes(d.view(-1, 1)), half_bytes(dmin.view(-1, 1)), _pack_scales(sc, m)]
    if bits == 5:
        parts.append(_join([(q[:, j] >> 4) << j for j in range(8)]))
    return torch.cat([*parts, ((low & 15) | (high << 4)).flatten(1)], 1)


def dequantise_affine(blocks: UInt8[Tensor, "N B"], bits: int) -> Float[Tensor, "N 256"]:
    """Q4_K (bits=4) or Q5_K (bits=5) as float32."""
    d, dmin = from_half_bytes(blocks[:, 0:2]), from_half_bytes(blocks[:, 2:4])
    sc, m = _unpack_scales(blocks[:, 4:16])
    packed = blocks[:, -128:].reshape(-1, 4, 1, 32)
    q = torch.cat([packed & 15, packed >> 4], 2).view(-1, 8, 32)
    if bits == 5:
        high = blocks[:, 16:48].reshape(-1, 1, 32)
        q |= ((high >> _steps(8, 1, blocks)) & 1) << 4
    return ((d * sc)[..., None] * q - (dmin * m)[..., None]).view(-1, SUPER)


def quantise_q6(x: Float[Tensor, "N 256"]) -> UInt8[Tensor, "N 210"]:
    x = x.view(-1, 16, 16)
    scale = fit_symmetric(x.reshape(-1, 16)).view(-1, 16, 1)
    d = _half(signed_peak(scale.view(-1, 16))[..., None] / -128)
    sc = (scale * inverse(d)).round_().clamp_(-128, 127)

    q = _levels(x, d * sc, -32, 31)
    for _ in range(_REFITS):
        fitted = (sc * q * x).sum((1, 2), True) * inverse((sc * q).square().sum((1, 2), True))
        d = torch.where(fitted == 0, d, _half(fitted))
        q = _levels(x, d * sc, -32, 31)

    q = (q + 32).to(torch.uint8).view(-1, 2, 4, 32)
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] << 4)
    high = _join([(q[:, :, j] >> 4) << 2 * j for j in range(4)])
    sc = sc.to(torch.int8).view(-1, 16).view(torch.uint8)
    return torch.cat([low.flatten(1), high.flatten(1), sc, half_bytes(d.view(-1, 1))], 1)


def dequantise_q6(blocks: UInt8[Tensor, "N 210"]) -> Float[Tensor, "N 256"]:
    low = blocks[:, :128].reshape(-1, 2, 1, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    sc, d = blocks[:, 192:208].contiguous().view(torch.int8), from_half_bytes(blocks[:, 208:210])
    q = torch.cat([low & 15, low >> 4], 2).view(-1, 2, 4, 32)
    q |= ((high >> _steps(4, 2, blocks)) & 3) << 4
    centred = q.to(torch.int8).view(-1, 16, 16) - 32
    return ((d * sc)[..., None] * centred).view(-1, SUPER)


def fit_affine(x: Float[Tensor, "S n"], levels: int) -> tuple[Tensor, Tensor]:
    """`scale`, `offset` >= 0, [S 1] each, with small |scale q - offset - x|^2 for q in 0..levels.

    For given q the optimum solves two normal equations; where its offset would be negative,
    which the format cannot hold, the offset is 0.
    """
    n = x.shape[-1]
    low = x.amin(-1, True).clamp_(max=0)
    step = inverse(x.amax(-1, True) - low)
    shifted = x - low
    sum_x, sum_xx = x.sum(-1, True), _dot(x, x)

    def solve(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sum_q, sum_qq, sum_qx = q.sum(-1, True), _dot(q, q), _dot(q, x)
        per_determinant = inverse(n * sum_qq - sum_q * sum_q)
        offset = (sum_q * sum_qx - sum_qq * sum_x) * per_determinant
        free = (offset >= 0) & (per_determinant > 0)
        scale = (n * sum_qx - sum_q * sum_x) * per_determinant
        scale = torch.where(free, scale, sum_qx * inverse(sum_qq)).clamp_(min=0)
        offset = torch.where(free, offset, torch.where(sum_qq == 0, -low, 0))
        return scale, offset, sum_xx - scale * sum_qx + offset * sum_x

    best: tuple[Tensor, ...] | None = None
    for stretch in _STRETCH_AFFINE:
        found = solve((shifted * (step * (levels + stretch))).round_().clamp_(0, levels))
        best = found if best is None else _better(found, best)
    assert best is not None
    for _ in range(_REFITS):
        best = _better(solve(_levels(x + best[1], best[0], 0, levels)), best)
    return best[0], best[1]


def fit_symmetric(x: Float[Tensor, "S n"]) -> Float[Tensor, "S 1"]:
    """The `scale` (of either sign) with small |scale q - x|^2 for q in -32..31."""
    step = -inverse(signed_peak(x))

    def solve(q: Tensor) -> tuple[Tensor, Tensor]:
        sum_qx = _dot(q, x)
        scale = sum_qx * inverse(_dot(q, q))
        return scale, -scale * sum_qx

    best: tuple[Tensor, ...] | None = None
    for stretch in _STRETCH_SYMMETRIC:
        found = solve((x * (step * (32 + stretch))).round_().clamp_(-32, 31))
        best = found if best is None else _better(found, best)
    assert best is not None
    for _ in range(_REFITS):
        best = _better(solve(_levels(x, best[0], -32, 31)), best)
    return best[0]


def _better(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Row by row the candidate with the smaller error, which comes last."""
    smaller = new[-1] < old[-1]
    return tuple(torch.where(smaller, a, b) for a, b in zip(new, old, strict=True))


def fit_pair(
    a: Float[Tensor, "N 8 32"],
    b: Float[Tensor, "N 8 32"],
    x: Float[Tensor, "N 8 32"],
    d: Float[Tensor, "N 1 1"],
    dmin: Float[Tensor, "N 1 1"],
) -> tuple[Tensor, Tensor]:
    """The float16 `d`, `dmin` that minimise |d a - dmin b - x|^2; those given where it is flat."""
    a, b, flat = a.flatten(1), b.flatten(1), x.flatten(1)
    aa, ab, bb, ax, bx = _dot(a, a), _dot(a, b), _dot(b, b), _dot(a, flat), _dot(b, flat)
    determinant = aa * bb - ab * ab
    per_determinant = inverse(determinant)
    new_d = _half((ax * bb - bx * ab) * per_determinant)[..., None]
    new_dmin = _half((ax * ab - bx * aa) * per_determinant)[..., None]
    sound = (determinant > 1e-4 * aa * bb)[..., None] & (new_d > 0) & (new_dmin >= 0)
    return torch.where(sound, new_d, d), torch.where(sound, new_dmin, dmin)


def _levels(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (x * inverse(scale)).round_().clamp_(low, high)


def _dot(a: Float[Tensor, "S n"], b: Float[Tensor, "S n"]) -> Float[Tensor, "S 1"]:
    product: Tensor = torch.linalg.vecdot(a, b)
    return product[:, None]


def _half(x: Tensor) -> Tensor:
    """Rounded to what the file can hold."""
    return x.clamp(-65504, 65504).half().float()


def _steps(count: int, by: int, like: Tensor) -> UInt8[Tensor, "n 1"]:
    return torch.arange(0, count * by, by, dtype=torch.uint8, device=like.device)[:, None]


def _join(parts: list[Tensor]) -> Tensor:
    """Bytes whose bits are those of all parts."""
    whole = parts[0]
    for part in parts[1:]:
        whole = whole | part
    return whole


def _pack_scales(sc: Float[Tensor, "N 8 1"], m: Float[Tensor, "N 8 1"]) -> UInt8[Tensor, "N 12"]:
    """Sixteen 6-bit numbers: four whole of each in 8 bytes, whose top bits complete the rest."""
    sc, m = sc.to(torch.uint8).flatten(1), m.to(torch.uint8).flatten(1)
    first = sc[:, :4] | ((sc[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    return torch.cat([first, second, (sc[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], 1)


def _unpack_scales(packed: UInt8[Tensor, "N 12"]) -> tuple[Tensor, Tensor]:
    first, second, rest = packed.split(4, 1)
    sc = torch.cat([first & 63, (rest & 15) | ((first >> 6) << 4)], 1)
    m = torch.cat([second & 63, (rest >> 4) | ((second >> 6) << 4)], 1)
    return sc, m
