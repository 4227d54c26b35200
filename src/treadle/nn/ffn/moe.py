"""Mixture of experts: each token passes a few of many feed-forward networks.

    p = softmax(W_r x)      y = sum_{e in top-k} w_e f_e(x) + s(x)      w from p, s shared experts

Tokens are sorted by expert, so that an expert's tokens are one product and one without tokens
costs nothing. Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021 (top-1), arXiv:2101.03961.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import ConfigError
from treadle.kernels.gated import Activation, gated
from treadle.kernels.grouped import grouped_linear
from treadle.nn.ffn.ffn import FeedForward, GatedMLP

CARD = Card(
    id="arch.moe.experts",
    paper="Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024, Mixtral, arXiv:2401.04088",
    summary="Top-k gated experts by softmax or sigmoid, with shared experts; products by group.",
    recipe="treadle run quickstart-scratch steps.1.model.decoder.blocks.0.ffn="
    "'{kind: MoE, expert: {kind: GatedMLP, hidden: 352}, experts: 4, top_k: 2}'",
    oracle="tests/models/test_models_families.py::test_logits_and_gradients_match_transformers",
)


@dataclass(frozen=True)
class Routed:
    """For each token its experts and their weights."""

    experts: Int[Tensor, "N k"]
    weights: Float[Tensor, "N k"]


class Router(Config):
    """A shape: which experts a token takes, and how much of each. In fp32."""

    @abstractmethod
    def __call__(self, scores: Float[Tensor, "N E"], top_k: int) -> Routed:
        """`scores` are W_r x."""


class SoftmaxOfTop(Router):
    """w = softmax over the k largest: they sum to 1 (Mixtral)."""

    def __call__(self, scores: Float[Tensor, "N E"], top_k: int) -> Routed:
        top = scores.float().topk(top_k, dim=-1)
        return Routed(top.indices, top.values.softmax(-1))


class TopOfSoftmax(Router):
    """w = the k largest of a softmax over all experts, as they are (OLMoE; Switch with k = 1)."""

    def __call__(self, scores: Float[Tensor, "N E"], top_k: int) -> Routed:
        top = scores.float().softmax(-1).topk(top_k, dim=-1)
        return Routed(top.indices, top.values)


class SigmoidOfTop(Router):
    """w = scale sigmoid / their sum: experts do not compete before they are chosen (DeepSeek 3)."""

    scale: float = 1.0

    def __call__(self, scores: Float[Tensor, "N E"], top_k: int) -> Routed:
        top = scores.float().sigmoid().topk(top_k, dim=-1)
        return Routed(top.indices, self.scale * top.values / top.values.sum(-1, keepdim=True))


class MoE(FeedForward):
    """Routed experts, and shared ones that every token passes."""

    expert: GatedMLP
    experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    router: Router = SoftmaxOfTop()
    shared: FeedForward | None = None

    def build(self, dim: int) -> nn.Module:
        if self.top_k > self.experts:
            raise ConfigError(f"MoE: top_k={self.top_k} of {self.experts} experts; lower it")
        if self.expert.bias:
            raise ConfigError("MoE: experts have no biases; set expert.bias to false")
        return MoELayer(self, dim)


class SigmoidGated(FeedForward):
    """sigmoid(w x) f(x): Qwen's shared experts."""

    ffn: FeedForward

    def build(self, dim: int) -> nn.Module:
        return SigmoidGatedLayer(self, dim)


class SigmoidGatedLayer(nn.Module):
    def __init__(self, config: SigmoidGated, dim: int) -> None:
        super().__init__()
        self.switch = nn.Linear(dim, 1, bias=False)
        self.ffn = config.ffn.build(dim)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        y: Tensor = self.switch(x).sigmoid() * self.ffn(x)
        return y


class Experts(nn.Module):
    """Gated networks of one size, their weights stacked."""

    def __init__(self, config: GatedMLP, experts: int, dim: int) -> None:
        super().__init__()
        self.activation: Activation = config.activation
        self.gate = nn.Parameter(torch.empty(experts, config.hidden, dim))
        self.up = nn.Parameter(torch.empty(experts, config.hidden, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, config.hidden))

    def initialise(self, std: float, residual: float) -> None:
        """Fresh weights; `residual` is for those that write to the residual stream."""
        for weight, spread in ((self.gate, std), (self.up, std), (self.down, residual)):
            nn.init.normal_(weight, std=spread)

    def forward(self, x: Float[Tensor, "M D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "M D"]:
        """Rows sorted by expert, `counts[e]` of expert e."""
        gate = grouped_linear(x, self.gate, counts)
        up = grouped_linear(x, self.up, counts)
        return grouped_linear(gated(gate, up, self.activation), self.down, counts)


class MoELayer(nn.Module):
    def __init__(self, config: MoE, dim: int) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(dim, config.experts, bias=False)
        self.experts = Experts(config.expert, config.experts, dim)
        self.shared = config.shared.build(dim) if config.shared else None

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        k = self.config.top_k
        routed = self.config.router(self.router(x), k)
        chosen = routed.experts.flatten()
        order = chosen.argsort(stable=True)
        tokens = order // k
        counts = torch.bincount(chosen, minlength=self.config.experts)
        y: Tensor = self.experts(x[tokens], counts)
        y = y * routed.weights.flatten()[order, None].to(y.dtype)
        out = torch.zeros_like(x, dtype=y.dtype).index_add(0, tokens, y)
        return out if self.shared is None else out + self.shared(x)
