"""(IA)^3: a learned factor for every key, value and hidden unit of the feed-forward network.

    k <- l_k * W_k x,    v <- l_v * W_v x,    y = W_down (l_ff * h),     all l = 1 at the start

Liu et al. 2022, arXiv:2205.05638. It trains a few thousand numbers and merges into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.nn.linear import LinearLike, bias_of, weight_of
from treadle.peft.adapter import Adapter, AdapterLayer, LinearAdapter, device_of

CARD = Card(
    id="ft.adapter",
    paper="Liu et al. 2022, (IA)^3, arXiv:2205.05638",
    summary="(IA)^3: learned factors on keys, values and hidden units..",
    recipe="treadle run quickstart 'steps.1.transforms=[{kind: IA3}]' steps.1.optimizer.lr=0.02",
    oracle="tests/peft/test_peft_ia3.py::test_matches_peft",
)


class IA3(Adapter):
    """Infused adapter by inhibiting and amplifying inner activations."""

    peft_type: ClassVar[str] = "IA3"
    module_fields: ClassVar[tuple[str, ...]] = ("feedforward_modules",)

    targets: tuple[str, ...] = ("k", "v", "down")
    inputs: tuple[str, ...] = ("down",)
    """Those of the targets whose inputs are scaled; of the others it is the outputs."""

    def wrap(self, name: str, base: nn.Module) -> AdapterLayer:
        if not isinstance(base, nn.Linear | LinearLike):
            raise ConfigError(f"IA3: `{name}` is a {type(base).__name__}; it scales linear layers")
        scaled = any(fnmatchcase(f".{name}", f"*.{pattern}") for pattern in self.inputs)
        return IA3Linear(base, self, inputs=scaled)

    def to_peft(self) -> dict[str, Any]:
        return {"init_ia3_weights": True}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], targets: tuple[str, ...]) -> Self:
        return cls(targets=targets, inputs=tuple(fields["feedforward_modules"]))


class IA3Linear(LinearAdapter):
    """The factor stays in fp32 beside a base of any dtype."""

    def __init__(self, base: nn.Linear | LinearLike, config: IA3, *, inputs: bool) -> None:
        super().__init__(base, config)
        self.inputs = inputs
        self.peft_fields = ("feedforward_modules",) if inputs else ()
        width = base.in_features if inputs else base.out_features
        self.factor = nn.Parameter(torch.ones(width, device=device_of(base)))

    def adapted(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.inputs:
            y: Tensor = self.base(x * self.factor.to(x.dtype))
            return y
        y = self.base(x)
        return y * self.factor.to(y.dtype)

    def adapted_weight(self) -> Float[Tensor, "out in"]:
        weight = weight_of(self.base)
        factor = self.factor if self.inputs else self.factor[:, None]
        return (weight.float() * factor).to(weight.dtype)

    def adapted_bias(self) -> Float[Tensor, " out"] | None:
        bias = bias_of(self.base)
        if bias is None or self.inputs:
            return bias
        return (bias.float() * self.factor).to(bias.dtype)

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"ia3_l": self.factor[None] if self.inputs else self.factor[:, None]}
