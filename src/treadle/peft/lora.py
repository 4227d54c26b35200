"""LoRA: a trained change of low rank beside a frozen weight.

    y = W x + s B A x,      A [r, in] random,  B [out, r] = 0,  so y = W x at the start

Hu et al. 2021, arXiv:2106.09685; the scales s are in `low_rank.py`. On a table of embeddings A
holds a row of r numbers a token; on a convolution A is one with r channels, and B mixes those;
experts of a mixture are in `lora_experts.py`.

The gradients of W are never computed and x is saved once, for A. The product with B is added
into the output of the base, so that no second output is written; a hand-written backward that
does the same for the gradient of x gained 1 % and is not worth its lines.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.errors import ConfigError
from treadle.nn.ffn.moe import Experts
from treadle.nn.linear import LinearLike, compute_dtype, weight_of
from treadle.peft.adapter import AdapterLayer, EmbeddingAdapter, device_of
from treadle.peft.lora_experts import LoRAExperts
from treadle.peft.low_rank import LowRank, LowRankLinear, check_rank

CARD = Card(
    id="ft.lora",
    paper="Hu et al. 2021, LoRA, arXiv:2106.09685; Kalajdzievski 2023, rsLoRA, arXiv:2312.03732",
    summary="Trains a change of low rank beside frozen weights; merges back without a trace.",
    recipe="treadle run quickstart steps.1.transforms.0.rank=8",
    oracle="tests/peft/test_peft_lora.py::test_matches_peft",
)

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class LoRA(LowRank):
    """Low-rank adaptation of linear layers, embeddings, convolutions and experts of mixtures."""

    peft_type: ClassVar[str] = "LORA"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (
        *(nn.Linear, LinearLike, nn.Embedding),
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, Experts),
    )

    def wrap(self, name: str, base: nn.Module) -> AdapterLayer:
        if isinstance(base, nn.Embedding):
            check_rank("LoRA", self.rank, name, base.weight.shape)
            return LoRAEmbedding(base, self)
        if isinstance(base, Experts):
            return LoRAExperts(base, self, name)
        if isinstance(base, Conv):
            if base.groups > 1:
                raise ConfigError(
                    f"LoRA: `{name}` convolves in {base.groups} groups, where a low rank saves "
                    "nothing; take other targets"
                )
            check_rank("LoRA", self.rank, name, base.weight.flatten(1).shape)
            return LoRAConv(base, self)
        assert isinstance(base, nn.Linear | LinearLike)
        check_rank("LoRA", self.rank, name, (base.out_features, base.in_features))
        return LoRALinear(base, self)


class LoRALinear(LowRankLinear):
    def adapted(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        dtype = compute_dtype(x)
        rows = x.to(dtype).reshape(-1, self.in_features)
        h = self.narrow(rows)
        y: Tensor = self.base(rows)
        y = y.addmm_(h, self.B.to(dtype).T, alpha=self.scale)
        return y.view(*x.shape[:-1], self.out_features)

    def adapted_weight(self) -> Float[Tensor, "out in"]:
        return self.changed_weight().to(weight_of(self.base).dtype)

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


class LoRAConv(AdapterLayer):
    """A convolves as the base does, to r channels; B is a matrix at each place."""

    base: Conv

    def __init__(self, base: Conv, config: LoRA) -> None:
        super().__init__(base, config)
        device = device_of(base)
        self.A = nn.Parameter(torch.empty(config.rank, *base.weight.shape[1:], device=device))
        self.B = nn.Parameter(torch.zeros(base.out_channels, config.rank, device=device))
        self.scale, self.dropout = config.scale, config.dropout
        config.init(self.A.detach().flatten(1))

    def adapted(self, x: Float[Tensor, "N C *places"]) -> Float[Tensor, "N K *places"]:
        dtype = compute_dtype(x)
        y: Tensor = self.base(x)
        dropped = F.dropout(x.to(dtype), self.dropout, self.training)
        h = self.base._conv_forward(dropped, self.A.to(dtype), None)  # its stride, padding, ...
        return y + self.scale * torch.einsum("kr,nr...->nk...", self.B.to(dtype), h)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        plain = copy.copy(self.base)  # its settings; parameters are put in below
        plain._parameters = dict(self.base._parameters)
        weight = self.base.weight
        change = self.scale * torch.einsum("kr,r...->k...", self.B, self.A)
        plain.weight = nn.Parameter((weight.float() + change).to(weight.dtype), requires_grad=False)
        return plain.train(self.training)

    def peft_tensors(self) -> dict[str, Tensor]:
        ones = (1,) * (self.A.ndim - 2)
        return {"lora_A.weight": self.A, "lora_B.weight": self.B.view(*self.B.shape, *ones)}
