"""Packed products against naive loops in float64, on every path and shape of codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from treadle.kernels.packed_linear import (
    INT4_ROWS,
    INT8_ROWS,
    dequantise_int4,
    dequantise_int8,
    dynamic_int8,
    pack_tiles,
    tile_width,
    unpack_tiles,
    weight_only_int4,
    weight_only_int8,
)


def _scales(*shape: int) -> Tensor:
    return (torch.rand(shape) + 0.5).mul(0.01).bfloat16()


def _int8(groups: int, asymmetric: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Codes, scales, offsets, and the dense weight by loops."""
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (48, 96), dtype=torch.int8)
    scales = _scales(48, groups)
    offsets = (_scales(48, groups) * 3 - 0.02).bfloat16() if asymmetric else None
    dense = torch.empty(48, 96, dtype=torch.float64)
    for row in range(48):
        for column in range(96):
            group = column * groups // 96
            offset = 0.0 if offsets is None else float(offsets[row, group])
            dense[row, column] = float(scales[row, group]) * int(codes[row, column]) + offset
    return codes, scales, offsets, dense


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_int8_definition_matches_loops(groups: int, asymmetric: bool) -> None:
    codes, scales, offsets, dense = _int8(groups, asymmetric)
    torch.testing.assert_close(
        dequantise_int8(codes, scales, offsets, torch.float64), dense, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("rows", [0, 1, 5, INT8_ROWS, INT8_ROWS + 1])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_weight_only_int8_matches_loops(rows: int, asymmetric: bool) -> None:
    codes, scales, offsets, dense = _int8(1, asymmetric)
    x = torch.randn(rows, 96).bfloat16()
    y = weight_only_int8(x, codes, scales, offsets)
    exact = x.double() @ dense.T
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_dynamic_int8_matches_its_formula(rows: int, asymmetric: bool) -> None:
    """Against the rounded activations to rounding of fp32, against the true ones to half a step."""
    codes, scales, offsets, dense = _int8(1, asymmetric)
    x = torch.randn(rows, 96)
    peak = x.abs().amax(1, keepdim=True).double() / 127
    rounded = (x.double() / peak).round()
    exact = (rounded * peak) @ (dense - (0 if offsets is None else offsets.double())).T
    if offsets is not None:
        exact = exact + x.double().sum(1, keepdim=True) * offsets.double().T
    y = dynamic_int8(x, codes, scales, offsets).double()
    # A value that lies halfway between two steps may round either way in fp32.
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=float(peak.max() * dense.abs().max()))
    assert ((y - x.double() @ dense.T).abs() <= peak / 2 * dense.abs().sum(1) + 1e-4).all()


def test_dynamic_int8_of_zeros_is_zero() -> None:
    codes, scales, _, _ = _int8(1, False)
    assert torch.equal(dynamic_int8(torch.zeros(2, 96), codes, scales, None), torch.zeros(2, 48))


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("rows", [48, 64, 130])
def test_tiles_hold_every_code(width: int, rows: int) -> None:
    codes = torch.randint(0, 16, (rows, 6), dtype=torch.uint8)
    tiles = pack_tiles(codes, width)
    assert tiles.shape == (-(-rows // width), 6, width // 2)
    whole = unpack_tiles(tiles).transpose(1, 2).flatten(0, 1)
    assert torch.equal(whole[:rows], codes)
    assert (whole[rows:] == 8).all()
    assert tiles[0, 3, 2] == codes[2, 3] + 16 * codes[2 + width // 2, 3]


def test_tiles_are_those_of_torch() -> None:
    if not tile_width():
        pytest.skip("torch has no kernel of this layout on this processor")
    codes = torch.randint(0, 16, (192, 64), dtype=torch.uint8)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(pack_tiles(codes, tile_width()).flatten(), theirs.flatten())


def _int4(parts: int, rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles, scales and the dense weight by loops."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (rows, 96), dtype=torch.uint8)
    tiles = pack_tiles(codes, width)
    scales = torch.zeros(3, tiles.shape[0] * width, parts, dtype=torch.bfloat16)
    scales[:, :rows, 0] = _scales(3, rows)
    if parts == 2:
        scales[:, :rows, 1] = _scales(3, rows) * 3 - 0.02
    dense = torch.zeros(rows, 96, dtype=torch.float64)
    for row in range(rows):
        for column in range(96):
            s, *z = scales[column // 32, row].double().tolist()
            dense[row, column] = s * (int(codes[row, column]) - 8) + sum(z)
    return tiles, scales, dense


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("rows", [64, 80])
def test_int4_definition_matches_loops(parts: int, width: int, rows: int) -> None:
    tiles, scales, dense = _int4(parts, rows, width)
    ours = dequantise_int4(tiles, scales, torch.float64)
    torch.testing.assert_close(ours[:rows], dense, rtol=1e-12, atol=1e-12)
    assert (ours[rows:] == 0).all()


@pytest.mark.parametrize("tokens", [0, 1, 5, INT4_ROWS, INT4_ROWS + 1])
@pytest.mark.parametrize("rows", [64, 80])
def test_weight_only_int4_matches_loops(tokens: int, rows: int) -> None:
    if not tile_width():
        pytest.skip("torch has no kernel of this layout on this processor")
    tiles, scales, dense = _int4(2, rows, tile_width())
    x = torch.randn(tokens, 96).bfloat16()
    y = weight_only_int4(x, tiles, scales)[:, :rows]
    torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=2**-6, atol=2**-6)
