"""BitFit: only biases train; a layer without one gets one.

    y = W x + b + d,     d [out] = 0 at the start

Ben Zaken et al. 2022, arXiv:2106.10199. The gradient of d is that of b, so on a layer with a bias
this is the paper's method, and it goes on quantised layers and on models without biases too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.nn.linear import LinearLike, bias_of, weight_of
from treadle.peft.adapter import Adapter, AdapterLayer, LinearAdapter, device_of

CARD = Card(
    id="ft.sparse.bitfit",
    paper="Ben Zaken et al. 2022, BitFit, arXiv:2106.10199",
    summary="Trains the biases of linear layers alone, a thousandth of the parameters.",
    recipe="treadle run fine-tune steps.sft.optimizer.lr=0.01 "
    "'steps.sft.transforms=[{kind: BitFit}]'",
    oracle="tests/peft/test_peft_bitfit.py::test_gradients_are_those_of_transformers_biases",
)
NOT_IN_PEFT = "PEFT has no bias tuning by itself; merge it, or keep the run's folder"


class BitFit(Adapter):
    """Bias-only fine-tuning of linear layers."""

    peft_type: ClassVar[str] = ""

    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    def wrap(self, name: str, base: nn.Module) -> AdapterLayer:
        if not isinstance(base, nn.Linear | LinearLike):
            raise ConfigError(
                f"BitFit: `{name}` is a {type(base).__name__}; it trains biases of linear layers"
            )
        return BitFitLinear(base, self)

    def to_peft(self) -> NoReturn:
        raise ConfigError(NOT_IN_PEFT)

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], targets: tuple[str, ...]) -> Self:
        raise ConfigError(NOT_IN_PEFT)


class BitFitLinear(LinearAdapter):
    """d stays in fp32 beside a base of any dtype."""

    def __init__(self, base: nn.Linear | LinearLike, config: BitFit) -> None:
        super().__init__(base, config)
        self.d = nn.Parameter(torch.zeros(base.out_features, device=device_of(base)))

    def adapted(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        y: Tensor = self.base(x)
        return y + self.d.to(y.dtype)

    def adapted_weight(self) -> Float[Tensor, "out in"]:
        return weight_of(self.base).clone()

    def adapted_bias(self) -> Float[Tensor, " out"] | None:
        bias = bias_of(self.base)
        whole = self.d if bias is None else bias.float() + self.d
        return whole.to(weight_of(self.base).dtype)

    def peft_tensors(self) -> NoReturn:
        raise ConfigError(NOT_IN_PEFT)
