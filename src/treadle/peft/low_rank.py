"""What the adapters of low rank share: W + s B A, its scale s and its fresh values.

s = alpha / r                                            Hu et al. 2021, arXiv:2106.09685
s = alpha / sqrt(r)     does not fade at high rank       Kalajdzievski 2023, arXiv:2312.03732
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from treadle.core.config import Config
from treadle.core.errors import ConfigError
from treadle.nn.linear import LinearLike, bias_of, weight_of
from treadle.peft.adapter import Adapter, LinearAdapter, device_of

UNKNOWN = (
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
"""Settings of PEFT that change what is computed or saved."""
EXPERT_TENSORS = ("gate_up_proj", "down_proj")
"""What transformers calls the tensors of a mixture's experts."""
INITS = (None, True, False, "gaussian", "orthogonal")
"""Initialisations of PEFT that leave the base as it is."""


class LoRAScaling(Config):
    """A shape: the factor s on B A."""

    @abstractmethod
    def __call__(self, alpha: float, rank: int) -> float:
        """s for this alpha and rank."""


class AlphaOverRank(LoRAScaling):
    """s = alpha / r."""

    def __call__(self, alpha: float, rank: int) -> float:
        return alpha / rank


class RankStabilised(LoRAScaling):
    """s = alpha / sqrt(r): outputs and gradients keep their size at any rank."""

    def __call__(self, alpha: float, rank: int) -> float:
        return alpha / math.sqrt(rank)


class LoRAInit(Config):
    """A shape: fresh values of the factor that is not zero."""

    @abstractmethod
    def __call__(self, factor: Float[Tensor, "r n"]) -> None:
        """Fill `factor` from the current random state."""


class KaimingUniform(LoRAInit):
    """Uniform within 1 / sqrt(n): that of nn.Linear and of PEFT."""

    def __call__(self, factor: Float[Tensor, "r n"]) -> None:
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


class Gaussian(LoRAInit):
    """Normal with standard deviation 1 / r."""

    def __call__(self, factor: Float[Tensor, "r n"]) -> None:
        nn.init.normal_(factor, std=1 / factor.shape[0])


class LowRank(Adapter):
    """A shape: adapters that PEFT describes as a kind of LoRA."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    """s = 2 at the default rank. It does not follow the rank: with s = alpha / r the first steps,
    and so the best learning rate, are nearly the same at every rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the inputs of A that are zeroed in training."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    scaling: LoRAScaling = AlphaOverRank()
    init: LoRAInit = KaimingUniform()

    @property
    def scale(self) -> float:
        return self.scaling(self.alpha, self.rank)

    def to_peft(self) -> dict[str, Any]:
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": isinstance(self.scaling, RankStabilised),
            "bias": "none",
            "init_lora_weights": True,
            **dict.fromkeys(self.peft_flags, True),
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], targets: tuple[str, ...]) -> Self:
        refuse_unknown(fields)
        if not isinstance(fields.get("r"), int):
            raise ConfigError(f"r={fields.get('r')!r} in a LoRA adapter is not a rank")
        return cls(
            rank=fields["r"],
            alpha=float(fields.get("lora_alpha", fields["r"])),
            dropout=float(fields.get("lora_dropout", 0.0)),
            targets=targets,
            scaling=RankStabilised() if fields.get("use_rslora") else AlphaOverRank(),
        )


class LowRankLinear(LinearAdapter):
    """A and B stay in fp32 beside a base of any dtype, and are rounded to it in each product."""

    def __init__(self, base: nn.Linear | LinearLike, config: LowRank) -> None:
        super().__init__(base, config)
        rank, device = config.rank, device_of(base)
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.scale, self.dropout = config.scale, config.dropout
        config.init(self.A)

    def narrow(self, rows: Float[Tensor, "N in"]) -> Float[Tensor, "N r"]:
        """A x, in the dtype of x."""
        return F.linear(F.dropout(rows, self.dropout, self.training), self.A.to(rows.dtype))

    def changed_weight(self) -> Float[Tensor, "out in"]:
        """W + s B A in fp32."""
        return torch.addmm(
            weight_of(self.base).float(), self.B.float(), self.A.float(), alpha=self.scale
        )

    def adapted_bias(self) -> Float[Tensor, " out"] | None:
        return bias_of(self.base)


def refuse_unknown(fields: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings of PEFT that treadle does not have."""
    for key in UNKNOWN:
        if fields.get(key):
            raise ConfigError(f"{key}={fields[key]!r} in a LoRA adapter is not known to treadle")
    chosen = {name.rpartition(".")[2] for name in fields.get("target_parameters") or ()}
    if len(alone := chosen & set(EXPERT_TENSORS)) == 1:
        raise ConfigError(
            f"target_parameters in a LoRA adapter has the experts' {alone.pop()} alone; treadle "
            f"adapts {' and '.join(EXPERT_TENSORS)} together; merge it with PEFT"
        )
    for key, known in (("bias", (None, "none")), ("init_lora_weights", INITS)):
        if fields.get(key) not in known:
            raise ConfigError(
                f"{key}={fields[key]!r} in a LoRA adapter changes the base; merge it with PEFT"
            )


def check_rank(owner: str, rank: int, name: str, shape: Sequence[int]) -> None:
    """Raise ConfigError where a matrix of this shape has no change of this rank."""
    if rank > min(shape):
        raise ConfigError(
            f"{owner}: rank {rank} is larger than `{name}`, which is {shape[0]} x {shape[1]}; "
            f"choose at most {min(shape)}, or other targets"
        )
