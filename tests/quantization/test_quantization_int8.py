"""Eight-bit rounding against loops in float64 and torchao, and its three products."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import nn

from treadle.core.errors import ConfigError
from treadle.nn.linear import weight_of
from treadle.quantization.int8 import DynamicInt8, Int8, Int8Weight
from treadle.quantization.layers import QuantizedLinear
from treadle.quantization.packed import Dequantise, Kernel, WeightOnly
from treadle.quantization.quantize import Asymmetric, Rounding, Symmetric

torch.manual_seed(0)
WEIGHT = torch.randn(6, 64) * torch.logspace(-3, 1, 6)[:, None]


def bf16(x: float) -> float:
    """x rounded to bf16, half to even, on its bits."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def grid(group: list[float], bits: int, symmetric: bool) -> tuple[float, float]:
    """s and z by the formulas."""
    half = 2 ** (bits - 1)
    if symmetric:
        return bf16(max(group, key=abs) / -half), 0.0
    step = (max(group) - min(group)) / (2 * half - 1)
    return bf16(step), bf16(min(group) + half * step)


def codes_by_loops(weight: torch.Tensor, size: int, bits: int, symmetric: bool) -> torch.Tensor:
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    half = 2 ** (bits - 1)
    for row, values in enumerate(weight.double().tolist()):
        for start in range(0, len(values), size):
            group = values[start : start + size]
            s, z = grid(group, bits, symmetric)
            for column, w in enumerate(group, start):
                nearest = math.floor((w - z) / s + 0.5)
                codes[row, column] = min(max(nearest, -half), half - 1)
    return codes


def linear(weight: torch.Tensor, bias: bool = False) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    layer.weight.data.copy_(weight)
    return nn.Sequential(layer)


def packed(config: Int8, weight: torch.Tensor = WEIGHT) -> Int8Weight:
    made = config.pack(weight)
    assert isinstance(made, Int8Weight)
    return made


@pytest.mark.parametrize("rounding", [Symmetric(), Asymmetric()])
@pytest.mark.parametrize("group", [None, 16])
def test_codes_match_float64_loops(rounding: Rounding, group: int | None) -> None:
    ours = packed(Int8(group=group, rounding=rounding))
    theirs = codes_by_loops(WEIGHT, group or 64, 8, isinstance(rounding, Symmetric))
    assert torch.equal(ours.codes, theirs)
    error = (ours.dense(torch.float32) - WEIGHT).unflatten(1, (-1, group or 64)).abs()
    step = ours.scales.float().abs()
    # Half a step; at the ends of the grid a full one, and what bf16 took from the scale.
    assert (error.amax(-1) <= 1.26 * step).all()
    assert ((error <= 0.51 * step[..., None]).float().mean()) > 0.98


@pytest.mark.parametrize("rounding", [Symmetric(), Asymmetric()])
def test_codes_match_torchao(rounding: Rounding) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    ours = packed(Int8(group=16, rounding=rounding))
    scales = ours.scales.float()
    offsets = torch.zeros_like(scales) if ours.offsets is None else ours.offsets.float()
    shifted = (WEIGHT.unflatten(1, (-1, 16)) - offsets[..., None]).flatten(1)
    theirs = primitives.quantize_affine(
        shifted, (1, 16), scales, torch.zeros_like(scales), torch.int8, -128, 127
    )
    assert torch.equal(ours.codes, theirs)


@pytest.mark.parametrize("rounding", [Symmetric(), Asymmetric()])
@pytest.mark.parametrize("kernel", [Dequantise(), WeightOnly(), DynamicInt8()])
@pytest.mark.parametrize("tokens", [1, 100])
def test_layer_computes_with_its_dense_weight(
    rounding: Rounding, kernel: Kernel, tokens: int
) -> None:
    torch.manual_seed(0)
    model = Int8(rounding=rounding, kernel=kernel, targets=("0",))(
        linear(torch.randn(48, 64), bias=True)
    )
    layer = model[0]
    x = torch.randn(2, tokens, 64)
    exact = x @ weight_of(layer).T + layer.bias
    bound = {Dequantise: 1e-6, WeightOnly: 0.01, DynamicInt8: 0.02}[type(kernel)]
    assert (layer(x) - exact).norm() <= bound * exact.norm()
    assert layer(x).dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(x) - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("kernel", [Dequantise(), WeightOnly(), DynamicInt8()])
def test_gradients_pass_through_the_packed_weight(kernel: Kernel) -> None:
    torch.manual_seed(0)
    layer = Int8(kernel=kernel, targets=("0",))(linear(torch.randn(48, 64)))[0]
    x = torch.randn(50, 64, requires_grad=True)
    g = torch.randn(50, 48)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert not saved, "nothing needs to be kept but the packed weight"
    y.backward(g)
    exact = g @ weight_of(layer)
    bound = 0.01 if isinstance(kernel, WeightOnly) else 1e-6
    assert (x.grad - exact).norm() <= bound * exact.norm()


def test_constant_and_zero_rows_are_exact() -> None:
    weight = torch.stack((torch.zeros(64), torch.full((64,), 0.5)))
    for rounding in (Symmetric(), Asymmetric()):
        assert torch.equal(packed(Int8(rounding=rounding), weight).dense(torch.float32), weight)


def test_kernels_that_cannot_run_say_so() -> None:
    for kernel, message in ((WeightOnly(), "one scale a row"), (DynamicInt8(), "one scale a row")):
        with pytest.raises(ConfigError, match=f"Int8 of `0`.*{message}.*kernel=Dequantise"):
            Int8(group=16, kernel=kernel, targets=("0",))(linear(WEIGHT))
    with pytest.raises(ConfigError, match="rows of 64 weights do not divide into groups of 24"):
        Int8(group=24, targets=("0",))(linear(WEIGHT))


def test_a_failed_quantisation_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
    model[1].weight.data[0, 0] = math.nan
    with pytest.raises(ConfigError if False else ValueError, match="weight of `1` holds NaN"):
        Int8(targets=("0", "1"))(model)
    assert not any(isinstance(m, QuantizedLinear) for m in model)
