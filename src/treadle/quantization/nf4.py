"""NormalFloat: 4 bits whose 16 levels are quantiles of a normal distribution; the base of QLoRA.

    w = c_k level[code],     c_k = largest |w| of block k of 64 weights, as they lie in memory
    c_k = mean + p_j dynamic[code'],  8 bits for each c_k, in blocks of 256 with a peak p_j

Dettmers et al. 2023, QLoRA, arXiv:2305.14314. 4.127 bits a weight. Weights of trained networks
are near normal, so each level is used about equally often. Storing the scales in 8 bits in turn
(double quantisation) saves 0.37 bits a weight.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.kernels.dynamic_codes import DynamicCodes, from_codes, into_codes
from treadle.quantization.packed import Dequantise, Kernel, PackedWeight
from treadle.quantization.quantize import Quantization

CARD = Card(
    id="ft.qlora",
    paper="Dettmers et al. 2023, QLoRA, arXiv:2305.14314",
    summary="A base in 4-bit NormalFloat with doubly quantised scales, for LoRA on top.",
    recipe="treadle run fine-tune steps.sft.transforms='[{kind: NF4}, {kind: LoRA}]' "
    "steps.sft.optimizer='{kind: AdamW8bit, lr: 2e-3}'",
    oracle="tests/quantization/test_quantization_nf4.py::test_codes_match_bitsandbytes",
)
BLOCK = 64
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of N(0, 1) scaled to [-1, 1], 8 below zero and 8 from it up (their appendix E)."""


class NF4(Quantization):
    """4-bit NormalFloat with double quantisation."""

    targets: tuple[str, ...] = ("blocks.*",)
    kernel: Kernel = Dequantise()

    def pack(self, weight: Float[Tensor, "out in"]) -> PackedWeight:
        if weight.numel() % BLOCK:
            raise ConfigError(f"{weight.numel()} weights do not divide into blocks of {BLOCK}")
        return NF4Weight(weight)


class NF4Weight(PackedWeight):
    """Two codes a byte, the first in the high half; scales in 8 bits."""

    codes: Tensor
    scale_codes: Tensor
    scale_peaks: Tensor
    scale_mean: Tensor

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        super().__init__(weight)
        blocks = weight.float().reshape(-1, BLOCK)
        scales = blocks.abs().amax(1)
        levels = torch.tensor(LEVELS, device=weight.device)
        exact = blocks * (1 / scales.clamp(min=1e-38))[:, None]
        codes = torch.bucketize(exact, (levels[1:] + levels[:-1]) / 2, out_int32=True)
        high, low = codes.to(torch.uint8).view(-1, 2).unbind(1)
        mean = scales.mean()
        stored = into_codes(scales - mean)
        self.register_buffer("codes", (high << 4) | low)
        self.register_buffer("scale_codes", stored.codes)
        self.register_buffer("scale_peaks", stored.peaks)
        self.register_buffer("scale_mean", mean)

    def scales(self) -> Float[Tensor, " blocks"]:
        """c_k in fp32."""
        return from_codes(DynamicCodes(self.scale_codes, self.scale_peaks)).add_(self.scale_mean)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        pairs = _pairs(self.codes.device).index_select(0, self.codes.int())
        levels = pairs.view(torch.float32).view(-1, BLOCK)
        weights = levels if dtype == levels.dtype else torch.empty_like(levels, dtype=dtype)
        torch.mul(levels, self.scales()[:, None], out=weights)  # rounded once, as it is written
        return weights.view(self.out_features, self.in_features)

    def rows(self, ids: Int[Tensor, " N"], dtype: torch.dtype) -> Float[Tensor, "N in"]:
        columns = torch.arange(self.in_features, device=ids.device)
        places = ids[:, None] * self.in_features + columns
        pairs = _pairs(self.codes.device)[self.codes[places // 2].int()][..., None]
        levels = pairs.view(torch.float32).gather(-1, (places % 2)[..., None])[..., 0]
        return (levels * self.scales()[places // BLOCK]).to(dtype)


@cache
def _pairs(device: torch.device) -> Int[Tensor, " 256"]:
    """The two levels that each byte holds, as one number: one look-up for two weights."""
    levels = torch.tensor(LEVELS)
    byte: UInt8[Tensor, " 256"] = torch.arange(256)
    both = torch.stack((levels[byte >> 4], levels[byte & 15]), 1)
    return both.view(torch.int64).flatten().to(device)
