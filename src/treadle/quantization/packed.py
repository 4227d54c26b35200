"""Weights in their packed form, and how a product is taken with them.

A `PackedWeight` is a way to store a matrix; a `Kernel` a way to multiply by it. Which kernel runs
is a choice in the configuration, for it decides the rounding of the activations:

    Dequantise   W is unpacked to the activations' dtype; exact, any format, any device
    WeightOnly   activations in bf16, sums in fp32; a quarter to a half of the bytes are read, so
                 a token at a time is several times faster than dense fp32
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int
from torch import Tensor, nn

from treadle.core.config import Config
from treadle.core.errors import ConfigError


class PackedWeight(nn.Module, ABC):
    """A matrix [out in] in few bits, held in buffers; the state dict holds it packed."""

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        """That of the weight before it was packed."""

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The matrix, unpacked: the definition of the format."""

    @abstractmethod
    def rows(self, ids: Int[Tensor, " N"], dtype: torch.dtype) -> Float[Tensor, "N in"]:
        """Some rows, unpacked: what an embedding looks up."""


class RunsPacked(PackedWeight):
    """A format with a product that reads the packed form."""

    @abstractmethod
    def refusal(self) -> str:
        """Why this weight cannot run packed, with a remedy; empty if it can."""

    @abstractmethod
    def weight_only(self, x: BFloat16[Tensor, "N in"]) -> BFloat16[Tensor, "N out"]:
        """x W^T with fp32 sums."""


class Kernel(Config):
    """A shape: how activations meet a packed weight."""

    @abstractmethod
    def check(self, weight: PackedWeight) -> None:
        """Raise ConfigError where this kernel cannot run this weight."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "N in"], weight: PackedWeight) -> Float[Tensor, "N out"]:
        """x W^T in the dtype of x, as a fresh tensor."""

    @abstractmethod
    def backward(self, g: Float[Tensor, "N out"], weight: PackedWeight) -> Float[Tensor, "N in"]:
        """g W in the dtype of g; rounding of activations passes gradients unchanged."""


class Dequantise(Kernel):
    """Unpacks W to the dtype of the activations for each product."""

    def check(self, weight: PackedWeight) -> None:
        pass

    def forward(self, x: Float[Tensor, "N in"], weight: PackedWeight) -> Float[Tensor, "N out"]:
        return F.linear(x, weight.dense(x.dtype))

    def backward(self, g: Float[Tensor, "N out"], weight: PackedWeight) -> Float[Tensor, "N in"]:
        return g @ weight.dense(g.dtype)


class WeightOnly(Kernel):
    """Rounds activations to bf16 and reads the packed weight where that is faster."""

    def check(self, weight: PackedWeight) -> None:
        refusal = weight.refusal() if isinstance(weight, RunsPacked) else "torch has no kernel"
        if refusal:
            raise ConfigError(
                f"WeightOnly cannot run {type(weight).__name__}: {refusal}; or take "
                "kernel=Dequantise()"
            )

    def forward(self, x: Float[Tensor, "N in"], weight: PackedWeight) -> Float[Tensor, "N out"]:
        assert isinstance(weight, RunsPacked)
        return weight.weight_only(x.to(torch.bfloat16)).to(x.dtype)

    def backward(self, g: Float[Tensor, "N out"], weight: PackedWeight) -> Float[Tensor, "N in"]:
        return (g.to(torch.bfloat16) @ weight.dense(torch.bfloat16)).to(g.dtype)
