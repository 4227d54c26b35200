"""Eight-bit weights by rounding to nearest.

    w = s c + z,   c = round((w - z) / s) in -128 ... 127,   s and z of a row or a group of columns

Half the bytes of bf16 at a relative error of about 0.5 %; perplexity hardly moves.
"""

from __future__ import annotations

import torch
from jaxtyping import BFloat16, Float, Int
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.kernels.packed_linear import dequantise_int8, dynamic_int8, weight_only_int8
from treadle.quantization.packed import Dequantise, Kernel, PackedWeight, RunsPacked
from treadle.quantization.quantize import Quantization, Rounding, Symmetric, into_groups

CARD = Card(
    id="q.int8",
    paper="Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339; Jacob et al. 2018, arXiv:1712.05877",
    summary="Weights in 8 bits a row or group; activations in float or, a token at a time, int8.",
    recipe="treadle run quickstart steps.2.transforms='[{kind: Int8}]'",
    oracle="tests/quantization/test_quantization_int8.py::test_codes_match_float64_loops",
)


class Int8(Quantization):
    """Weight-only int8."""

    group: int | None = Field(default=None, ge=1)
    """Columns that share a scale; None: one scale a row."""
    rounding: Rounding = Symmetric()
    targets: tuple[str, ...] = ("blocks.*",)
    kernel: Kernel = Dequantise()

    def pack(self, weight: Float[Tensor, "out in"]) -> PackedWeight:
        return Int8Weight(weight, self)


class Int8Weight(RunsPacked):
    """8 bits a weight; bf16 scales, and offsets where asymmetric."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    def __init__(self, weight: Float[Tensor, "out in"], config: Int8) -> None:
        super().__init__(weight)
        groups = into_groups(weight, config.group)
        grid = config.rounding.grid(groups, 8)
        self.register_buffer("codes", grid.codes(groups, 8).flatten(1))
        self.register_buffer("scales", grid.scale.squeeze(-1))
        self.register_buffer("offsets", None if grid.offset is None else grid.offset.squeeze(-1))

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return dequantise_int8(self.codes, self.scales, self.offsets, dtype)

    def rows(self, ids: Int[Tensor, " N"], dtype: torch.dtype) -> Float[Tensor, "N in"]:
        offsets = None if self.offsets is None else self.offsets[ids]
        return dequantise_int8(self.codes[ids], self.scales[ids], offsets, dtype)

    def refusal(self) -> str:
        return "" if self.scales.shape[1] == 1 else "torch's kernel has one scale a row; group=None"

    def weight_only(self, x: BFloat16[Tensor, "N in"]) -> BFloat16[Tensor, "N out"]:
        return weight_only_int8(x, self.codes, self.scales, self.offsets)


class DynamicInt8(Kernel):
    """Rounds the activations of each token to 8 bits too, and multiplies integers.

    The fastest where the chip multiplies int8 (VNNI, AMX) and has no bf16; adds an error of about
    0.5 % of each token's largest activation.
    """

    def check(self, weight: PackedWeight) -> None:
        if not isinstance(weight, Int8Weight) or weight.refusal():
            raise ConfigError(
                "DynamicInt8 multiplies 8-bit weights with one scale a row; take "
                "Int8(group=None), or kernel=Dequantise()"
            )

    def forward(self, x: Float[Tensor, "N in"], weight: PackedWeight) -> Float[Tensor, "N out"]:
        assert isinstance(weight, Int8Weight)
        return dynamic_int8(x, weight.codes, weight.scales, weight.offsets)

    def backward(self, g: Float[Tensor, "N out"], weight: PackedWeight) -> Float[Tensor, "N in"]:
        return g @ weight.dense(g.dtype)
