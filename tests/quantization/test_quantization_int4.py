"""Four-bit rounding against loops in float64 and torchao, its products, and its state dict."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from treadle.core.errors import ConfigError
from treadle.kernels.packed_linear import pack_tiles, tile_width, unpack_tiles
from treadle.nn.linear import weight_of
from treadle.quantization.int4 import Int4, Int4Weight
from treadle.quantization.packed import Dequantise, Kernel, WeightOnly
from treadle.quantization.quantize import Asymmetric, Rounding, Symmetric

torch.manual_seed(0)
WEIGHT = torch.randn(80, 64) * torch.logspace(-3, 1, 80)[:, None]


@pytest.fixture(params=[Dequantise(), WeightOnly()], ids=["Dequantise", "WeightOnly"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    if isinstance(request.param, WeightOnly) and not tile_width():
        pytest.skip("torch has no kernel of this layout on this processor")
    return request.param


def packed(config: Int4, weight: torch.Tensor = WEIGHT) -> Int4Weight:
    made = config.pack(weight)
    assert isinstance(made, Int4Weight)
    return made


def codes_of(weight: Int4Weight) -> torch.Tensor:
    """From -8 to 7, in the order of the matrix."""
    codes = unpack_tiles(weight.tiles).transpose(1, 2).flatten(0, 1)[: weight.out_features]
    return codes.to(torch.int8) - 8


def layer_of(config: Int4, weight: torch.Tensor = WEIGHT) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    return config.replace(targets=("0",))(nn.Sequential(layer))[0]


@pytest.mark.parametrize("rounding", [Symmetric(), Asymmetric()])
@pytest.mark.parametrize("group", [32, 64])
def test_codes_match_float64_loops(rounding: Rounding, group: int) -> None:
    ours = packed(Int4(group=group, rounding=rounding))
    codes = codes_of(ours)
    dense = ours.dense(torch.float64)
    for row, values in enumerate(WEIGHT.double().tolist()):
        for start in range(0, 64, group):
            part = values[start : start + group]
            if isinstance(rounding, Symmetric):
                exact_s, exact_z = max(part, key=abs) / -8, 0.0
            else:
                exact_s = (max(part) - min(part)) / 15
                exact_z = min(part) + 8 * exact_s
            s, *z = ours.scales[start // group, row].double().tolist()
            assert s == pytest.approx(exact_s, rel=2**-8)
            assert (z or [0.0])[0] == pytest.approx(exact_z, rel=2**-8)
            for column, w in enumerate(part, start):
                nearest = math.floor((w - sum(z)) / s + 0.5)
                code = min(max(nearest, -8), 7)
                assert codes[row, column] == code
                assert float(dense[row, column]) == s * code + sum(z)


@pytest.mark.parametrize("rounding", [Symmetric(), Asymmetric()])
def test_codes_match_torchao(rounding: Rounding) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    ours = packed(Int4(rounding=rounding))
    scales = ours.scales[:, :80, 0].T.float().contiguous()
    offsets = ours.scales[:, :80, 1].T.float() if ours.scales.shape[2] == 2 else 0 * scales
    shifted = (WEIGHT.unflatten(1, (-1, 32)) - offsets[..., None]).flatten(1)
    theirs = primitives.quantize_affine(
        shifted, (1, 32), scales, torch.zeros_like(scales), torch.int8, -8, 7
    )
    assert torch.equal(codes_of(ours), theirs)


def test_errors_are_those_of_four_bits() -> None:
    """Relative error of Gaussian weights in groups of 32: 8.6 % symmetric, 7.8 % asymmetric."""
    torch.manual_seed(1)
    weight = torch.randn(512, 512)
    for rounding, expected in ((Symmetric(), 0.086), (Asymmetric(), 0.078)):
        dense = packed(Int4(rounding=rounding), weight).dense(torch.float32)
        assert float((dense - weight).norm() / weight.norm()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("rounding", [Symmetric(), Asymmetric()])
@pytest.mark.parametrize("tokens", [1, 150])
def test_layer_computes_with_its_dense_weight(
    kernel: Kernel, rounding: Rounding, tokens: int
) -> None:
    layer = layer_of(Int4(rounding=rounding, kernel=kernel))
    x = torch.randn(2, tokens, 64)
    exact = x @ weight_of(layer).T + layer.bias
    bound = 1e-6 if isinstance(kernel, Dequantise) else 0.01
    assert (layer(x) - exact).norm() <= bound * exact.norm()
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_pass_through_the_packed_weight(kernel: Kernel) -> None:
    layer = layer_of(Int4(kernel=kernel))
    x = torch.randn(50, 64, requires_grad=True)
    g = torch.randn(50, 80)
    layer(x).backward(g)
    exact = g @ weight_of(layer)
    bound = 1e-6 if isinstance(kernel, Dequantise) else 0.01
    assert (x.grad - exact).norm() <= bound * exact.norm()
    torch.testing.assert_close(layer.bias.grad, g.sum(0))


@pytest.mark.parametrize("rounding", [Symmetric(), Asymmetric()])
def test_rows_are_those_of_the_dense_table(rounding: Rounding) -> None:
    table = packed(Int4(rounding=rounding))
    ids = torch.tensor([0, 79, 31, 32, 63, 64, 3, 3])
    assert torch.equal(table.rows(ids, torch.float32), table.dense(torch.float32)[ids])


def test_state_of_another_processor_loads(kernel: Kernel) -> None:
    """Tiles of either width, and symmetric scales with or without zeros, give the same weight."""
    source = packed(Int4(rounding=Symmetric()))
    target = packed(Int4(rounding=Symmetric(), kernel=kernel), torch.randn(80, 64))
    state = source.state_dict()
    codes = (codes_of(source) + 8).to(torch.uint8)
    for width in (32, 64):
        rows = -(-80 // width) * width
        scales = torch.zeros(2, rows, 1, dtype=torch.bfloat16)
        scales[:, :80] = state["scales"][:, :80]
        target.load_state_dict({"tiles": pack_tiles(codes, width), "scales": scales})
        assert torch.equal(target.dense(torch.float32), source.dense(torch.float32))
        assert target.tiles.shape == source.tiles.shape


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="Int4 of `0`: rows of 48 weights do not divide"):
        Int4(targets=("0",))(nn.Sequential(nn.Linear(48, 8)))
    with pytest.raises(ValueError, match="group"):
        Int4(group=48)
