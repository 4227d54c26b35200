"""Normalisation layers, and where a block puts them.

LayerNorm  y = (x - mean) / sqrt(var + eps) * w + b          Ba et al. 2016
RMSNorm    y = x / sqrt(mean(x^2) + eps) * w                  Zhang and Sennrich 2019
           (Gemma stores w - 1 and multiplies by 1 + w)
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.kernels.rms_norm import rms_norm

CARD = Card(
    id="arch.norms",
    paper="Ba et al. 2016; Zhang and Sennrich 2019 (RMSNorm); Wang et al. 2022 (DeepNorm)",
    summary="LayerNorm, RMSNorm (plain and 1+w), QK-norm; before, after or around a sublayer.",
    recipe="treadle run quickstart-scratch",
    oracle="tests/nn/test_nn_norms.py::test_norms_match_torch_and_formula",
)


class Norm(Config):
    """A shape: normalises the last dimension."""

    @abstractmethod
    def build(self, dim: int) -> nn.Module:
        """A module `[... dim] -> [... dim]`."""


class RMSNorm(Norm):
    """Root-mean-square normalisation."""

    eps: float = 1e-5
    offset: float = 0.0
    """Added to the stored weight: 1.0 in the Gemma family, whose weights start at zero."""

    def build(self, dim: int) -> nn.Module:
        return RMSNormLayer(dim, self)


class LayerNorm(Norm):
    """Layer normalisation with bias."""

    eps: float = 1e-5
    bias: bool = True

    def build(self, dim: int) -> nn.Module:
        return LayerNormLayer(dim, self)


class NoNorm(Norm):
    """The identity: GPT-1 has no norm before its head, its blocks end in one."""

    def build(self, dim: int) -> nn.Module:
        return nn.Identity()


class RMSNormLayer(nn.Module):
    def __init__(self, dim: int, config: RMSNorm) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - config.offset))
        self.kernel = rms_norm

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        gain = self.weight + self.config.offset if self.config.offset else self.weight
        return self.kernel(x, gain, self.config.eps)


class LayerNormLayer(nn.Module):
    def __init__(self, dim: int, config: LayerNorm) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if config.bias else None

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        y = F.layer_norm(x.to(wide), x.shape[-1:], self.weight.to(wide), bias, self.config.eps)
        return y.to(x.dtype)


class Placement(Config):
    """A shape: where the norms of a residual branch stand. `f` is the mixer or feed-forward."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Which norms the branch owns, of `before` and `after`."""

    @abstractmethod
    def scale(self, layers: int) -> float:
        """Factor of the skip connection in a model of `layers` blocks."""


class PreNorm(Placement):
    """x + f(norm(x)): GPT-2, Llama."""

    def names(self) -> tuple[str, ...]:
        return ("before",)

    def scale(self, layers: int) -> float:
        return 1.0


class SandwichNorm(Placement):
    """x + norm'(f(norm(x))): Gemma 2 and 3."""

    def names(self) -> tuple[str, ...]:
        return ("before", "after")

    def scale(self, layers: int) -> float:
        return 1.0


class PostNorm(Placement):
    """norm(x + f(x)): the original transformer, BERT."""

    def names(self) -> tuple[str, ...]:
        return ("outer",)

    def scale(self, layers: int) -> float:
        return 1.0


class DeepNorm(Placement):
    """norm(alpha x + f(x)) with alpha = (2 L)^(1/4), for decoders of L layers."""

    def names(self) -> tuple[str, ...]:
        return ("outer",)

    def scale(self, layers: int) -> float:
        return float((2 * layers) ** 0.25)
