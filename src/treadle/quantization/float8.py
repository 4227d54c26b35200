"""Eight-bit floating point: weights, and activations where the chip multiplies them.

    w = s c,   c in e4m3 (4 bits of exponent, 3 of mantissa, |c| <= 448),   s = max |w| / 448 a row

The relative error of a weight is at most 2^-4, unless it is below 2^-6 s, where steps are 2^-9 s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import ScalingType

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.quantization.packed import Dequantise, Kernel, PackedWeight
from treadle.quantization.quantize import Quantization

CARD = Card(
    id="q.fp8",
    paper="Micikevicius et al. 2022, FP8 formats for deep learning, arXiv:2209.05433",
    summary="Weights in e4m3 with a scale a row; activations so too where the chip multiplies fp8.",
    recipe="treadle generate smollm2-135m-instruct 'The loom was' --device cpu --quantize Float8",
    oracle="tests/quantization/test_quantization_float8.py::test_codes_are_the_nearest",
)
FORMAT = torch.float8_e4m3fn
MOST = 448.0
MULTIPLE = 16
"""Rows and columns of what a GPU multiplies."""
CAPABILITY = (8, 9)
"""Of the first NVIDIA chips that multiply fp8."""


@dataclass(frozen=True)
class Rounded:
    """Rows of codes, and what a code of one stands for in each."""

    codes: Float[Tensor, "N K"]
    scales: Float[Tensor, "N 1"]


def round_rows(x: Float[Tensor, "N K"]) -> Rounded:
    """The nearest codes; a row of zeros has the scale 1."""
    peaks = x.float().abs().amax(-1, keepdim=True)
    scales = torch.where(peaks > 0, peaks / MOST, 1.0)
    # A quotient may come out above 448 by its own rounding, which would be NaN.
    return Rounded((x.float() / scales).clamp(-MOST, MOST).to(FORMAT), scales)


class Float8(Quantization):
    """Weights in e4m3."""

    targets: tuple[str, ...] = ("blocks.*",)
    kernel: Kernel = Dequantise()

    def pack(self, weight: Float[Tensor, "out in"]) -> PackedWeight:
        return Float8Weight(weight)


class Float8Weight(PackedWeight):
    """8 bits a weight and an fp32 scale a row."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        super().__init__(weight)
        rounded = round_rows(weight)
        # As bytes: a model that is cast would cast fp8 numbers too.
        self.register_buffer("codes", rounded.codes.view(torch.uint8))
        self.register_buffer("scales", rounded.scales)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return (self.codes.view(FORMAT).float() * self.scales).to(dtype)

    def rows(self, ids: Int[Tensor, " N"], dtype: torch.dtype) -> Float[Tensor, "N in"]:
        return (self.codes[ids].view(FORMAT).float() * self.scales[ids]).to(dtype)


class DynamicFloat8(Kernel):
    """Rounds the activations of each token to e4m3 too, and multiplies fp8 with fp32 sums.

    On NVIDIA GPUs from Ada and Hopper on; on a processor torch has it as a slow definition.
    """

    def check(self, weight: PackedWeight) -> None:
        if not isinstance(weight, Float8Weight):
            raise ConfigError("DynamicFloat8 multiplies weights in e4m3; take Float8")
        device = weight.device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise ConfigError(f"{name} multiplies no fp8; take kernel=Dequantise()")
        if device.type not in ("cuda", "cpu", "meta"):
            raise ConfigError(f"torch multiplies no fp8 on {device}; take kernel=Dequantise()")
        if weight.in_features % MULTIPLE or weight.out_features % MULTIPLE:
            raise ConfigError(
                f"a GPU multiplies fp8 in multiples of {MULTIPLE}, and the weight is "
                f"{weight.out_features} x {weight.in_features}; take kernel=Dequantise()"
            )

    def forward(self, x: Float[Tensor, "N in"], weight: PackedWeight) -> Float[Tensor, "N out"]:
        assert isinstance(weight, Float8Weight)
        rows, row = round_rows(x), ScalingType.RowWise
        # By rows cuBLAS gives bf16 alone.
        y: Tensor = F.scaled_mm(
            *(rows.codes, weight.codes.view(FORMAT).T),
            *(rows.scales, row, weight.scales.float().T, row),
            output_dtype=torch.bfloat16,
        )
        return y.to(x.dtype)

    def backward(self, g: Float[Tensor, "N out"], weight: PackedWeight) -> Float[Tensor, "N in"]:
        return g @ weight.dense(g.dtype)
