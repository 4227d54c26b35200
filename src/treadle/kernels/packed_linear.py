"""Products with weights that stay in 8 or 4 bits.

    w = s c + z        c an integer code, s and z of its group (z = 0 where symmetric)

Each operation has its definition here, `dequantise_*`, which gives the dense weight, and a fast
path that reads the codes: `weight_only_*` with bf16 activations and fp32 sums (torch's own
kernels), `dynamic_int8` with activations rounded to 8 bits as well (VNNI where the chip has it).
The fast paths win where a product is bound by reading the weight: for up to `INT8_ROWS` or
`INT4_ROWS` tokens. Beyond, it is faster to unpack the weight and multiply densely.

Four-bit codes lie in tiles of 32 or 64 rows, the register widths of AVX2 and AVX-512: byte r of
column k of a tile holds row r in its low half and row r + width / 2 in its high half.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int8, UInt8
from torch import Tensor

INT8_ROWS, INT4_ROWS = 32, 96
"""Tokens up to which the packed product beats unpacking, at widths of 576 to 1536."""


def dequantise_int8(
    codes: Int8[Tensor, "out in"],
    scales: Float[Tensor, "out groups"],
    offsets: Float[Tensor, "out groups"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "out in"]:
    """The definition; each row falls into equal groups."""
    groups: Tensor = codes.to(dtype).unflatten(1, (scales.shape[1], -1))
    groups = groups.mul_(scales.to(dtype)[..., None])
    if offsets is not None:
        groups = groups.add_(offsets.to(dtype)[..., None])
    return groups.flatten(1)


def weight_only_int8(
    x: BFloat16[Tensor, "N in"],
    codes: Int8[Tensor, "out in"],
    scales: BFloat16[Tensor, "out 1"],
    offsets: BFloat16[Tensor, "out 1"] | None,
) -> BFloat16[Tensor, "N out"]:
    """x W^T for one scale a row."""
    if 0 < len(x) <= INT8_ROWS and x.device.type == "cpu":
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), codes, scales[:, 0])
    else:
        y = F.linear(x, codes.to(x.dtype)).mul_(scales[:, 0])
    return _with_offset(y, x, offsets)


def dynamic_int8(
    x: Float[Tensor, "N in"],
    codes: Int8[Tensor, "out in"],
    scales: Float[Tensor, "out 1"],
    offsets: Float[Tensor, "out 1"] | None,
) -> Float[Tensor, "N out"]:
    """x W^T with each token rounded to its own 255 steps, summed in int32."""
    peak = x.abs().amax(1, keepdim=True).float().clamp_(min=1e-30)
    rounded = (x * (127 / peak)).round_().to(torch.int8)
    sums = torch._int_mm(rounded, codes.T)
    y = sums.float().mul_(peak / 127).mul_(scales[:, 0].float())
    return _with_offset(y, x, offsets).to(x.dtype)


def _with_offset(y: Tensor, x: Tensor, offsets: Tensor | None) -> Tensor:
    """Adds z sum_i x_i, the part of an asymmetric weight that is the same for all columns."""
    if offsets is None:
        return y
    return y.addmm_(x.to(y.dtype).sum(1, keepdim=True), offsets.T.to(y.dtype))


def tile_width() -> int:
    """Rows of a tile that this processor's kernel reads; 0 where it has none of this layout."""
    return {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 0)


def pack_tiles(codes: UInt8[Tensor, "rows in"], width: int) -> UInt8[Tensor, " tiles in half"]:
    """Codes from 0 to 15; missing rows of the last tile are 8, the code of zero."""
    missing = -len(codes) % width
    padded = F.pad(codes, (0, 0, 0, missing), value=8)
    low, high = padded.unflatten(0, (-1, width)).transpose(1, 2).chunk(2, dim=2)
    tiles: Tensor = (low | high << 4).contiguous()
    return tiles


def unpack_tiles(tiles: UInt8[Tensor, " tiles in half"]) -> UInt8[Tensor, " tiles in width"]:
    """Codes from 0 to 15, rows last; missing rows included."""
    return torch.cat((tiles & 15, tiles >> 4), dim=2)


def dequantise_int4(
    tiles: UInt8[Tensor, " tiles in half"],
    scales: Float[Tensor, "groups padded parts"],
    dtype: torch.dtype,
) -> Float[Tensor, "padded in"]:
    """The definition, w = s (c - 8) + z, missing rows included.

    `scales` holds s, or s and z, for each group of columns and each row.
    """
    groups, padded, parts = scales.shape
    codes = unpack_tiles(tiles).sub_(8).view(torch.int8)
    dense = codes.to(dtype).unflatten(1, (groups, -1))  # tile, group, column, row
    by_tile = scales.to(dtype).view(groups, len(tiles), 1, -1, parts).permute(4, 1, 0, 2, 3)
    s, *z = by_tile.contiguous()  # rows last, as in the tiles: three times faster
    dense = dense.mul_(s).add_(z[0]) if z else dense.mul_(s)
    columns: Tensor = dense.flatten(1, 2).permute(1, 0, 2).reshape(-1, padded)
    return columns.T


def weight_only_int4(
    x: BFloat16[Tensor, "N in"],
    tiles: UInt8[Tensor, " tiles in half"],
    scales: BFloat16[Tensor, "groups padded 2"],
) -> BFloat16[Tensor, "N padded"]:
    """x W^T, missing rows included."""
    if not 0 < len(x) <= INT4_ROWS or x.device.type != "cpu":
        return F.linear(x, dequantise_int4(tiles, scales, x.dtype))
    groups, padded, _ = scales.shape
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), tiles.view(padded, -1), x.shape[1] // groups, scales
    )
    return y
