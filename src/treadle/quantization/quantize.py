"""Quantisation as a transform, and the grids of integers that weights are rounded to."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from treadle.core.config import Config
from treadle.core.errors import ConfigError, TreadleError
from treadle.models.transform import M, Transform, match_modules, replace_module
from treadle.quantization.layers import QuantizedEmbedding, QuantizedLinear
from treadle.quantization.packed import Kernel, PackedWeight


class Quantization(Transform):
    """A shape: replaces the weights of the matched layers by packed ones."""

    targets: tuple[str, ...]
    kernel: Kernel

    def __call__(self, model: M) -> M:
        """The model with packed weights; a weight that two targets share is packed once.

        Raises:
            ConfigError: a target matches nothing, or a layer that this format cannot hold.
            TreadleError: a weight is NaN or infinite.
        """
        owner = type(self).__name__
        found = match_modules(model, self.targets, (nn.Linear, nn.Embedding), owner=owner)
        packed: dict[int, PackedWeight] = {}
        for name, layer in found.items():
            assert isinstance(layer, nn.Linear | nn.Embedding)
            if id(layer.weight) not in packed:
                packed[id(layer.weight)] = self._packed(name, layer.weight.detach())
        for name, layer in found.items():
            assert isinstance(layer, nn.Linear | nn.Embedding)
            weight = packed[id(layer.weight)]
            if isinstance(layer, nn.Embedding):
                replace_module(model, name, QuantizedEmbedding(weight))
            else:
                replace_module(model, name, QuantizedLinear(weight, layer.bias, self.kernel))
        return model

    @abstractmethod
    def pack(self, weight: Float[Tensor, "out in"]) -> PackedWeight:
        """The weight in this format.

        Raises:
            TreadleError: the format does not fit its shape.
        """

    @torch.no_grad()
    def _packed(self, name: str, weight: Tensor) -> PackedWeight:
        if not (weight.is_meta or bool(weight.isfinite().all())):
            raise TreadleError(
                f"{type(self).__name__}: the weight of `{name}` holds NaN or infinity; look for a "
                "diverged run"
            )
        try:
            packed = self.pack(weight)
            self.kernel.check(packed)
        except TreadleError as error:
            raise ConfigError(f"{type(self).__name__} of `{name}`: {error}") from None
        return packed


@torch.no_grad()
def unpack(model: M) -> M:
    """Dense weights again, in place: what was stored, in the dtype from before. For saving in the
    formats of others; weights that share their packed form share the dense one."""
    dense: dict[int, nn.Parameter] = {}
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, QuantizedLinear | QuantizedEmbedding):
            continue
        packed = layer.weight
        if id(packed) not in dense:
            values = packed.dense(packed.dtype).contiguous()
            dense[id(packed)] = nn.Parameter(values, requires_grad=False)
        plain: nn.Linear | nn.Embedding
        if isinstance(layer, QuantizedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            if layer.bias is not None:
                plain.bias = layer.bias
        else:
            plain = nn.Embedding(packed.out_features, packed.in_features, device="meta")
        plain.weight = dense[id(packed)]
        replace_module(model, name, plain.train(layer.training))
    return model


@dataclass(frozen=True)
class Grid:
    """w = s c + z for the codes c of a group."""

    scale: Float[Tensor, "... 1"]
    offset: Float[Tensor, "... 1"] | None

    def codes(self, groups: Float[Tensor, "... g"], bits: int) -> Int8[Tensor, "... g"]:
        """The nearest codes, from -2^(bits-1) to 2^(bits-1) - 1."""
        shifted = groups if self.offset is None else groups - self.offset.float()
        scale = self.scale.float()
        half = 2 ** (bits - 1)
        exact = shifted / scale.masked_fill(scale == 0, 1.0)
        return exact.round_().clamp_(-half, half - 1).to(torch.int8)


class Rounding(Config):
    """A shape: where the integers lie. Scales are rounded to bf16 before codes are chosen, so that
    codes make up for it."""

    @abstractmethod
    def grid(self, groups: Float[Tensor, "... g"], bits: int) -> Grid:
        """The grid of each group."""


class Symmetric(Rounding):
    """s = -peak / 2^(bits-1) for the weight of largest magnitude, signed, and z = 0.

    The peak takes the outermost code, which has no partner on the other side, so that all codes
    are in use: an error 11 % below that of |peak| / (2^(bits-1) - 1) for Gaussian weights at 4
    bits. A weight of the other sign and of almost the same size is off by up to one step.
    """

    def grid(self, groups: Float[Tensor, "... g"], bits: int) -> Grid:
        peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        return Grid((peak / -(2 ** (bits - 1))).to(torch.bfloat16), None)


class Asymmetric(Rounding):
    """From the least weight of a group to the largest: a smaller error, and z to be kept."""

    def grid(self, groups: Float[Tensor, "... g"], bits: int) -> Grid:
        low, high = groups.aminmax(dim=-1, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        offset = low + 2 ** (bits - 1) * scale
        return Grid(scale.to(torch.bfloat16), offset.to(torch.bfloat16))


def into_groups(weight: Float[Tensor, "out in"], group: int | None) -> Float[Tensor, "out n g"]:
    """Each row in fp32, cut into groups; None takes the whole row as one.

    Raises:
        ConfigError: the rows do not divide.
    """
    size = group or weight.shape[1]
    if weight.shape[1] % size:
        raise ConfigError(f"rows of {weight.shape[1]} weights do not divide into groups of {size}")
    groups: Tensor = weight.float().unflatten(1, (-1, size))
    return groups
