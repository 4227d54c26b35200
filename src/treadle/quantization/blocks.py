"""Weights in the block formats of GGUF, run from the very bytes that the file will hold.

What is measured is then what is exported: `treadle.kernels.blocks` has the formats.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from treadle.kernels.blocks import BlockFormat, block_format, dequantise, quantise
from treadle.quantization.packed import Dequantise, Kernel, PackedWeight
from treadle.quantization.quantize import Quantization


class Blocks(Quantization):
    """Block formats of llama.cpp, from 4.5 to 8.5 bits a weight."""

    format: Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"] = "Q4_0"
    targets: tuple[str, ...] = ("blocks.*",)
    kernel: Kernel = Dequantise()

    def pack(self, weight: Float[Tensor, "out in"]) -> PackedWeight:
        return BlockWeight(weight, block_format(self.format))


class BlockWeight(PackedWeight):
    """The bytes of each row as they lie in a GGUF file."""

    blocks: Tensor

    def __init__(self, weight: Float[Tensor, "out in"], format: BlockFormat) -> None:
        super().__init__(weight)
        self.format = format
        self.register_buffer("blocks", quantise(weight, format))

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return dequantise(self.blocks, self.format, dtype)

    def rows(self, ids: Int[Tensor, " N"], dtype: torch.dtype) -> Float[Tensor, "N in"]:
        return dequantise(self.blocks[ids], self.format, dtype)
