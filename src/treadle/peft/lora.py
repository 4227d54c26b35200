"""LoRA: a trained change of low rank beside a frozen weight.

    y = W x + s B A x,      A [r, in] random,  B [out, r] = 0,  so y = W x at the start
    s = alpha / r                                            Hu et al. 2021, arXiv:2106.09685
    s = alpha / sqrt(r)     does not fade at high rank       Kalajdzievski 2023, arXiv:2312.03732

The gradients of W are never computed and x is saved once, for A. The product with B is added
into the output of the base, so that no second output is written; a hand-written backward that
does the same for the gradient of x gained 1 % and is not worth its lines.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import ConfigError
from treadle.nn.linear import LinearLike, bias_of, compute_dtype, weight_of
from treadle.peft.adapter import Adapter, AdapterLayer, EmbeddingAdapter, LinearAdapter

CARD = Card(
    id="ft.lora",
    paper="Hu et al. 2021, LoRA, arXiv:2106.09685; Kalajdzievski 2023, rsLoRA, arXiv:2312.03732",
    summary="Trains a change of low rank beside frozen weights; merges back without a trace.",
    recipe="treadle run quickstart steps.1.transforms.0.rank=8",
    oracle="tests/peft/test_peft_lora.py::test_matches_peft",
)

UNKNOWN = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
"""Settings of PEFT that change what is computed or saved."""
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


class LoRA(Adapter):
    """Low-rank adaptation of linear layers and embeddings."""

    peft_type: ClassVar[str] = "LORA"

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

    def wrap(self, name: str, base: nn.Module) -> AdapterLayer:
        if isinstance(base, nn.Embedding):
            shape = tuple(base.weight.shape)
        else:
            assert isinstance(base, nn.Linear | LinearLike)
            shape = (base.out_features, base.in_features)
        if self.rank > min(shape):
            raise ConfigError(
                f"LoRA: rank {self.rank} is larger than `{name}`, which is {shape[0]} x "
                f"{shape[1]}; choose at most {min(shape)}, or other targets"
            )
        if isinstance(base, nn.Embedding):
            return LoRAEmbedding(base, self)
        return LoRALinear(base, self)

    def to_peft(self) -> dict[str, Any]:
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": isinstance(self.scaling, RankStabilised),
            "bias": "none",
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], targets: tuple[str, ...]) -> Self:
        for key in UNKNOWN:
            if fields.get(key):
                raise ConfigError(
                    f"{key}={fields[key]!r} in a LoRA adapter is not known to treadle"
                )
        for key, known in (("bias", (None, "none")), ("init_lora_weights", INITS)):
            if fields.get(key) not in known:
                raise ConfigError(
                    f"{key}={fields[key]!r} in a LoRA adapter changes the base; merge it with PEFT"
                )
        if not isinstance(fields.get("r"), int):
            raise ConfigError(f"r={fields.get('r')!r} in a LoRA adapter is not a rank")
        return cls(
            rank=fields["r"],
            alpha=float(fields.get("lora_alpha", fields["r"])),
            dropout=float(fields.get("lora_dropout", 0.0)),
            targets=targets,
            scaling=RankStabilised() if fields.get("use_rslora") else AlphaOverRank(),
        )


class LoRALinear(LinearAdapter):
    """A and B stay in fp32 beside a base of any dtype, and are rounded to it in each product."""

    def __init__(self, base: nn.Linear | LinearLike, config: LoRA) -> None:
        super().__init__(base, config)
        rank, device = config.rank, _device(base)
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.scale, self.dropout = config.scale, config.dropout
        config.init(self.A)

    def adapted(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        dtype = compute_dtype(x)
        rows = x.to(dtype).reshape(-1, self.in_features)
        h = F.linear(F.dropout(rows, self.dropout, self.training), self.A.to(dtype))
        y: Tensor = self.base(rows)
        y = y.addmm_(h, self.B.to(dtype).T, alpha=self.scale)
        return y.view(*x.shape[:-1], self.out_features)

    def adapted_weight(self) -> Float[Tensor, "out in"]:
        weight = weight_of(self.base)
        return torch.addmm(weight.float(), self.B, self.A, alpha=self.scale).to(weight.dtype)

    def adapted_bias(self) -> Float[Tensor, " out"] | None:
        return bias_of(self.base)

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}


class LoRAEmbedding(EmbeddingAdapter):
    """A holds a row of r numbers for each token and starts at zero; B is random."""

    def __init__(self, base: nn.Embedding, config: LoRA) -> None:
        super().__init__(base, config)
        (tokens, width), device = base.weight.shape, base.weight.device
        self.A = nn.Parameter(torch.zeros(tokens, config.rank, device=device))
        self.B = nn.Parameter(torch.empty(width, config.rank, device=device))
        self.scale = config.scale
        nn.init.normal_(self.B)

    def adapted(self, x: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        y: Tensor = self.base(x)
        h = F.embedding(x, self.A).to(y.dtype)
        return y + self.scale * F.linear(h, self.B.to(y.dtype))

    def adapted_table(self) -> Float[Tensor, "V D"]:
        table = self.base.weight
        return torch.addmm(table.float(), self.A, self.B.T, alpha=self.scale).to(table.dtype)

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.A.T, "lora_embedding_B": self.B}


def _device(module: nn.Module) -> torch.device:
    return next(iter((*module.parameters(), *module.buffers()))).device
