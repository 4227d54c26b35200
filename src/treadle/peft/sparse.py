"""Sparse fine-tuning: a few numbers of each weight change, all others stay bit for bit.

    W' = W + scatter(places, d),     d = 0 at the start, trained; places fixed

    LargestWeights    where |W| is largest        SmallestWeights   where it is smallest
    RandomWeights     at random (Xu et al. 2021, Child-Tuning, arXiv:2109.05687)
    FisherMasked      where the task says most about the weight: FISH mask, Sung et al. 2021,
                      arXiv:2111.09839

What is trained, kept and saved is d: a thousandth of the weights, with their places. A step
computes W' once a layer; d gets the gradient of W at its places.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import ConfigError
from treadle.models.decoder import DecoderModel
from treadle.models.transform import replace_module
from treadle.nn.linear import LinearLike, bias_of, compute_dtype, weight_of
from treadle.peft.adapter import Adapter, AdapterLayer, LinearAdapter, freeze

CARD = Card(
    id="ft.sparse.mask",
    paper="Sung et al. 2021, FISH mask, arXiv:2111.09839; Guo et al. 2021, arXiv:2012.07463",
    summary="A small part of each weight is trained, chosen by magnitude, Fisher or chance.",
    recipe="treadle run fine-tune 'steps.sft.transforms=[{kind: SparseDelta, density: 0.005}]'",
    oracle="tests/peft/test_peft_sparse.py::test_all_else_is_bit_identical",
)
NOT_IN_PEFT = "PEFT has no such sparse changes; the run's folder keeps this one"


class Places(Config):
    """A shape: which numbers of a weight are trained."""

    @abstractmethod
    def __call__(self, weight: Float[Tensor, "out in"], count: int) -> Int[Tensor, " n"]:
        """Flat indices of `count` numbers."""


class LargestWeights(Places):
    """Those of largest magnitude."""

    def __call__(self, weight: Float[Tensor, "out in"], count: int) -> Int[Tensor, " n"]:
        return weight.abs().flatten().topk(count).indices


class SmallestWeights(Places):
    """Those of smallest magnitude: the weights that matter least are free."""

    def __call__(self, weight: Float[Tensor, "out in"], count: int) -> Int[Tensor, " n"]:
        return weight.abs().flatten().topk(count, largest=False).indices


class RandomWeights(Places):
    """At random."""

    def __call__(self, weight: Float[Tensor, "out in"], count: int) -> Int[Tensor, " n"]:
        return torch.randperm(weight.numel())[:count].to(weight.device)


class SparseDelta(Adapter):
    """A sparse change of linear layers."""

    peft_type: ClassVar[str] = ""

    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    density: float = Field(default=0.005, gt=0.0, le=1.0)
    """Of the numbers of each weight, those that train."""
    places: Places = LargestWeights()

    def wrap(self, name: str, base: nn.Module) -> AdapterLayer:
        if not isinstance(base, nn.Linear | LinearLike):
            raise ConfigError(
                f"SparseDelta: `{name}` is a {type(base).__name__}; it goes on linear layers"
            )
        weight = weight_of(base).detach()
        count = int(self.density * weight.numel())
        if not count:
            raise ConfigError(
                f"SparseDelta: density={self.density} of the {weight.numel()} numbers of `{name}` "
                f"is an empty mask; raise it to at least {1 / weight.numel():.1g}"
            )
        return SparseLinear(base, self, self.places(weight, count))

    def to_peft(self) -> NoReturn:
        raise ConfigError(NOT_IN_PEFT)

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], targets: tuple[str, ...]) -> Self:
        raise ConfigError(NOT_IN_PEFT)


class SparseLinear(LinearAdapter):
    """d stays in fp32 beside a base of any dtype; the places are sorted."""

    places: Int[Tensor, " n"]

    def __init__(
        self, base: nn.Linear | LinearLike, config: SparseDelta, places: Int[Tensor, " n"]
    ) -> None:
        super().__init__(base, config)
        self.register_buffer("places", places.sort().values)
        self.d = nn.Parameter(torch.zeros(len(places), device=places.device))

    def adapted(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        dtype, bias = compute_dtype(x), bias_of(self.base)
        weight = self.adapted_weight().to(dtype)
        return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))

    def adapted_weight(self) -> Float[Tensor, "out in"]:
        weight = weight_of(self.base)
        # Only the sum is rounded: added in the dtype of the base, small d would be lost.
        flat = weight.flatten()
        changed = (flat[self.places].float() + self.d).to(weight.dtype)
        return flat.index_copy(0, self.places, changed).view(weight.shape)

    def adapted_bias(self) -> Float[Tensor, " out"] | None:
        return bias_of(self.base)

    def peft_tensors(self) -> NoReturn:
        raise ConfigError(NOT_IN_PEFT)


def with_masks(
    model: DecoderModel, masks: Mapping[str, Int[Tensor, " n"]], owner: str
) -> DecoderModel:
    """Let the masked numbers of each layer train; in place.

    Args:
        masks: flat indices, by the name of the layer.

    Raises:
        ConfigError: no mask has a number in it.
    """
    chosen = {name: places for name, places in masks.items() if len(places)}
    if not chosen:
        raise ConfigError(
            f"{owner}: all masks are empty, so nothing would train; raise the density"
        )
    config = SparseDelta()
    for name, places in chosen.items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear | LinearLike)
        replace_module(model, name, SparseLinear(base, config, places))
    freeze(model)
    return model
