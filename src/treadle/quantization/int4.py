"""Four-bit weights by rounding to nearest, in groups of columns.

    w = s (c - 8) + z,   c in 0 ... 15,   s and z of a group

4.5 bits a weight symmetric, 5 asymmetric at groups of 32, at a relative error of 8 to 9 %.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from treadle.core.cards import Card
from treadle.kernels.packed_linear import (
    dequantise_int4,
    pack_tiles,
    tile_width,
    unpack_tiles,
    weight_only_int4,
)
from treadle.quantization.packed import Dequantise, Kernel, PackedWeight, RunsPacked, WeightOnly
from treadle.quantization.quantize import Asymmetric, Quantization, Rounding, into_groups

CARD = Card(
    id="q.int4",
    paper="Dettmers and Zettlemoyer 2023, k-bit inference scaling laws, arXiv:2212.09720",
    summary="Weights in 4 bits with a scale for each group of columns, two to a byte.",
    recipe="treadle run quickstart steps.2.transforms='[{kind: Int4}]'",
    oracle="tests/quantization/test_quantization_int4.py::test_codes_match_float64_loops",
)


class Int4(Quantization):
    """Weight-only int4."""

    group: Literal[32, 64, 128, 256] = 32
    """Columns that share a scale."""
    rounding: Rounding = Asymmetric()
    targets: tuple[str, ...] = ("blocks.*",)
    kernel: Kernel = Dequantise()

    def pack(self, weight: Float[Tensor, "out in"]) -> PackedWeight:
        return Int4Weight(weight, self)


class Int4Weight(RunsPacked):
    """Tiles of codes, and bf16 scales [groups, rows, 1 or 2], the last holding s and z."""

    tiles: Tensor
    scales: Tensor

    def __init__(self, weight: Float[Tensor, "out in"], config: Int4) -> None:
        super().__init__(weight)
        groups = into_groups(weight, config.group)
        grid = config.rounding.grid(groups, 4)
        codes = (grid.codes(groups, 4).flatten(1) + 8).to(torch.uint8)
        parts = (grid.scale,) if grid.offset is None else (grid.scale, grid.offset)
        if grid.offset is None and isinstance(config.kernel, WeightOnly):
            parts = (grid.scale, torch.zeros_like(grid.scale))  # torch's kernel always reads z
        scales = torch.cat(parts, -1).transpose(0, 1)  # as the kernel reads them
        width = tile_width() or 32
        self.register_buffer("tiles", pack_tiles(codes, width))
        self.register_buffer("scales", _with_missing_rows(scales, width))

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return dequantise_int4(self.tiles, self.scales, dtype).narrow(0, 0, self.out_features)

    def rows(self, ids: Int[Tensor, " N"], dtype: torch.dtype) -> Float[Tensor, "N in"]:
        half = self.tiles.shape[2]
        tile, row = ids // (2 * half), ids % (2 * half)
        pairs = self.tiles[tile, :, row % half]
        codes = torch.where((row < half)[:, None], pairs & 15, pairs >> 4).to(dtype)
        s, *z = self.scales[:, ids].transpose(0, 1).to(dtype).unbind(-1)
        groups = (codes - 8).unflatten(1, (s.shape[1], -1)) * s[..., None]
        weights: Tensor = groups + z[0][..., None] if z else groups
        return weights.flatten(1)

    def refusal(self) -> str:
        return "" if tile_width() else "torch's kernel needs AVX2 or AVX-512; take Int8"

    def weight_only(self, x: BFloat16[Tensor, "N in"]) -> BFloat16[Tensor, "N out"]:
        y = weight_only_int4(x, self.tiles, self.scales)
        return y if y.shape[1] == self.out_features else y[:, : self.out_features].contiguous()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes tiles of the width of another processor, and symmetric scales without z."""
        tiles, scales = state.get(f"{prefix}tiles"), state.get(f"{prefix}scales")
        width = 2 * self.tiles.shape[2]
        if tiles is not None and scales is not None and tiles.ndim == scales.ndim == 3:
            if tiles.shape[2] != self.tiles.shape[2]:
                codes = unpack_tiles(tiles).transpose(1, 2).flatten(0, 1)[: self.out_features]
                state[f"{prefix}tiles"] = pack_tiles(codes, width)
                scales = _with_missing_rows(scales[:, : self.out_features], width)
            if scales.shape[2] == 1 < self.scales.shape[2]:
                scales = F.pad(scales, (0, 1))
            state[f"{prefix}scales"] = scales
        super()._load_from_state_dict(state, prefix, *rest)


def _with_missing_rows(scales: Float[Tensor, "n out parts"], width: int) -> Tensor:
    """Zeros for the rows that fill the last tile."""
    missing = -scales.shape[1] % width
    return F.pad(scales, (0, 0, 0, missing)).contiguous()
