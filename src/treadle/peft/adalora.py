"""AdaLoRA: a low-rank change in the form of an SVD, whose singular values can be switched off.

    y = W x + s P (e * Q x),     P [out, r], Q [r, in] random,  e [r] = 0,  s = alpha / r

Zhang et al. 2023, arXiv:2303.10512. `optim/allocate_ranks.py` spends the rank where it matters, by
setting the least important e to zero; `objectives/orthogonal.py` keeps P and Q near orthogonal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.nn.linear import LinearLike, bias_of, compute_dtype, weight_of
from treadle.peft.adapter import Adapter, AdapterLayer, LinearAdapter, device_of
from treadle.peft.low_rank import check_rank, refuse_unknown

CARD = Card(
    id="ft.lora.adaptive",
    paper="Zhang et al. 2023, AdaLoRA, arXiv:2303.10512",
    summary="Low-rank changes in SVD form; a budget of ranks goes to the layers that need them.",
    recipe="treadle run fine-tune steps.sft.transforms='[{kind: AdaLoRA}]' "
    "steps.sft.objective='{kind: Orthogonal, objective: {kind: CausalLM}}' "
    "steps.sft.optimizer='{kind: AllocateRanks, optimizer: {kind: AdamW, lr: 4e-3}, "
    "begin: 8, end: 48}'",
    oracle="tests/peft/test_peft_adalora.py::test_matches_peft",
)
STD = 0.02


class AdaLoRA(Adapter):
    """Adaptive low-rank adaptation of linear layers; starts above the rank it is to end with."""

    peft_type: ClassVar[str] = "ADALORA"

    rank: int = Field(default=12, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    def wrap(self, name: str, base: nn.Module) -> AdapterLayer:
        if not isinstance(base, nn.Linear | LinearLike):
            raise ConfigError(
                f"AdaLoRA: `{name}` is a {type(base).__name__}; it goes on linear layers"
            )
        check_rank("AdaLoRA", self.rank, name, (base.out_features, base.in_features))
        return AdaLoRALinear(base, self)

    def to_peft(self) -> dict[str, Any]:
        return {
            "init_r": self.rank,
            "target_r": self.rank,
            "total_step": 1,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "bias": "none",
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], targets: tuple[str, ...]) -> Self:
        refuse_unknown(fields)
        return cls(
            rank=int(fields["init_r"]),
            alpha=float(fields["lora_alpha"]),
            dropout=float(fields.get("lora_dropout", 0.0)),
            targets=targets,
        )


class AdaLoRALinear(LinearAdapter):
    """P, e and Q stay in fp32 beside a base of any dtype."""

    def __init__(self, base: nn.Linear | LinearLike, config: AdaLoRA) -> None:
        super().__init__(base, config)
        rank, device = config.rank, device_of(base)
        self.P = nn.Parameter(torch.empty(base.out_features, rank, device=device))
        self.e = nn.Parameter(torch.zeros(rank, device=device))
        self.Q = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.scale, self.dropout = config.alpha / rank, config.dropout
        nn.init.normal_(self.P, std=STD)
        nn.init.normal_(self.Q, std=STD)

    def adapted(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        dtype = compute_dtype(x)
        rows = x.to(dtype).reshape(-1, self.in_features)
        h = F.linear(F.dropout(rows, self.dropout, self.training), self.Q.to(dtype))
        y: Tensor = self.base(rows)
        y = y.addmm_(h * self.e.to(dtype), self.P.to(dtype).T, alpha=self.scale)
        return y.view(*x.shape[:-1], self.out_features)

    def adapted_weight(self) -> Float[Tensor, "out in"]:
        weight = weight_of(self.base)
        change = torch.addmm(weight.float(), self.P * self.e, self.Q, alpha=self.scale)
        return change.to(weight.dtype)

    def adapted_bias(self) -> Float[Tensor, " out"] | None:
        return bias_of(self.base)

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"lora_A": self.Q, "lora_E": self.e[:, None], "lora_B": self.P}
